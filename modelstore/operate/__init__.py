"""The operations on a volume: records in, records out.

    inventory    the snapshots, their users, their sizes
    seed_list    a list of models, as a TOML file
    seed_plan    such a list against a volume: preview, run, upload
    doctor       whether a fleet can rely on the volume
    report       a page of starts and of the volume, with the drawings of drawings
    metrics      the same for Prometheus

Other packages may import all of these.
"""
