"""Measurements on a volume, for `modelstore bench` and `scripts/bench`.

race       checkpoints, entrants in turn, results
loaders    the loaders, each in a process of its own: ours, and those that people use instead
"""
