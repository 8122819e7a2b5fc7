"""The `modelstore` command.

    main       every command, registered in one page
    app        the parts of every command: options, context, errors, progress
    output     the text of results
    bars       progress bars
    fill       seed, adopt, export
    sync       sync: from one store to others
    recode     compress, expand
    start      warm, bench
    inspect    ls, show, path, du, claims, watch, doctor, verify
    history    history, report, metrics
    manage     rm, gc, pin, unpin
    alias      the commands of aliases

`__main__` calls `main.run`.
"""
