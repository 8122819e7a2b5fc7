"""The processors that this process may use. Standard library only, because the reader process loads this file by its
path."""

from __future__ import annotations

import os


def processors(quota: str = "/sys/fs/cgroup/cpu.max") -> int:
    """How many there are; a container has a share of its host's."""
    count = len(os.sched_getaffinity(0))
    try:
        with open(quota) as file:
            limit, period = file.read().split()
        return max(1, min(count, round(int(limit) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return count
