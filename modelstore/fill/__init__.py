"""From a source to a published snapshot. No torch.

    request        the request for one snapshot, and the permissions of its fill
    fill           the steps, under a claim: select, download, convert, publish
    plan           the files to store, and their sizes; a dry run stops here
    footprint      sizes: over the network, stored, at the peak
    sources        which source answers a reference
    source         the interface of a source
    folder, hf_cache, hub      the sources
    http_range     byte ranges over HTTP
    selection      which files of a repo a snapshot needs, and their stored names
    indexes        the index of a sharded checkpoint
    download       several files and ranges at once, into staging
    staged_file    one file in staging: its bytes and its journal
    staging        the staging folder and its finished files
    weights        the weights: download, convert, link
    convert        a safetensors file in the storage dtype, and the rules for storing it unchanged
    pickles        a pickle to safetensors, in a process of its own
    observer, progress         the calls that report a fill to its caller
    adoption       models that lie on the volume in another layout
    bucket, upload             a volume over S3, and a snapshot to it

Other packages start with `store.ModelStore`; `observer`, `adoption` and `upload` are for them, too.
"""
