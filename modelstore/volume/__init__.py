"""The files on the volume, and the right to change them. No network, no torch.

    layout         every path, and the names that may become one; SnapshotKey
    durable        every write: synced, atomic, mapped to our errors
    tree           the entries, sizes and times of folders, and the links in them
    manifest       the record of a snapshot's files
    header         the header of a safetensors file
    checksums      digests of files and of their blocks
    snapshots      the published snapshots: find one, list them
    refs           the store's format, and the commit of each revision
    aliases        names that point to snapshots
    claim          the exclusive right to fill a snapshot
    pins           pins of persons, usage marks of workers, the notice of an eviction
    space          the space that the store takes, against the quota
    evict          the removal of a snapshot to make room
    garbage        the collection of leftovers
    verify         the comparison of snapshots with their manifests
    history        records of starts and of events
    config_sizes   sizes in a config that would fill the memory of a start
    capabilities, trials           what a volume can do, and the trials that show it
    unfinished     the downloads that are not published
    engine_caches, archive         compiled code of engines; a folder as one archive
    planes, block_table, content   compressed weights: a block, the table of a file's blocks, and its plain bytes
    preferred_form                 plain or compressed, if both are possible

Other packages may import all of these.
"""
