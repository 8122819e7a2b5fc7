"""From a source to a published snapshot. No torch.

    request        the request for one snapshot, and the permissions of its fill
    fill           the steps, under a claim: select, download, convert, publish
    plan           the files to store, and their sizes; a dry run stops here
    footprint      sizes: over the network, stored, at the peak
    sources        which source answers a reference
    source         the interface of a source
    folder, hf_cache, hub      the sources
    http_range     byte ranges over HTTP
    selection      which files of a repo a snapshot needs, and which of them are its weights
    components     the folders of a repo that hold a part of the model
    repo_files     files by their names in a repo, and the names they are stored under
    repo_code      whether the configs of a repo make their reader run its code
    unservable     why a repo gives no weights
    indexes        the index of a sharded checkpoint
    download       several files and ranges at once, into staging
    staged_file    one file in staging: its bytes and its journal
    staging        the staging folder and its finished files
    weights        the weights: download, convert, link
    storage_policy which tensors are converted, and which are stored as they come
    convert        a safetensors file in the storage dtype
    stored_file    a file of weights as it is written, plain or compressed
    pickles        a pickle to safetensors, in a process of its own
    observer, progress         the calls that report a fill to its caller
    adoption       models that lie on the volume in another layout
    bucket, upload             a volume over S3, and a snapshot to it
    store_roots, verbatim      a store in a folder or in a bucket, and a published snapshot copied as it is
    recode                     a published snapshot made compressed, or plain again
    publication                a snapshot of files at hand: claimed, staged, published

Other packages start with `store.ModelStore`; `observer`, `adoption` and `upload` are for them, too.
"""
