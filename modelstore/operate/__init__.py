"""The operations on a volume: records in, records out.

    inventory    the snapshots, their users, their sizes
    seed_list    a list of models, as a TOML file
    seed_plan    such a list against a volume: preview, run, upload
    sync_plan    what one store has and others lack
    compression  whether a model would start sooner if it were compressed
    doctor       whether a fleet can rely on the volume
    report       a page of starts and of the volume, with the drawings of drawings
    fleet        the seconds of all starts, and the change that would have saved most
    metrics      the same for Prometheus

Other packages may import all of these.
"""
