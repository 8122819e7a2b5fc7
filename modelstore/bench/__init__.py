"""Measurements on a volume, for `modelstore bench` and `scripts/bench`.

    checkpoints    checkpoints of a given size
    race           entrants in turn, and their results
    loaders        the loaders, each in a process of its own: ours, and those that people use instead

`scripts/bench` and the command import all of these.
"""
