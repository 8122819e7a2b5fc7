"""What people ask of a volume: records in, records out.

inventory    what lies there, who uses it, what it takes
seed_list    a list of models, as a TOML file
seed_plan    such a list against a volume: preview, run, upload
doctor       whether a fleet can rely on the volume
report       a page of starts and of the volume
metrics      the same for Prometheus
"""
