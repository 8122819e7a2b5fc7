"""Weights that compress as trained ones do."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from modelstore.volume.snapshots import Snapshot

SHARD_ROWS = 2600  # of 2048 weights: a shard of more than a block


def born_in(dtype: torch.dtype, *, rows: int = SHARD_ROWS, count: int = 2) -> dict[str, torch.Tensor]:
    """Weights as trained ones are spread: normal, each row with a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(count):
        scales = 0.02 * torch.exp(torch.randn(rows, 1, generator=generator) / 2)
        tensors[f"layers.{number}.weight"] = (torch.randn(rows, 2048, generator=generator) * scales).to(dtype)
    return tensors


def are_those(loaded: dict[str, torch.Tensor], source: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    return all(torch.equal(loaded[name].cpu(), tensor.to(dtype)) for name, tensor in source.items())


def compressed_file(snapshot: Snapshot) -> Path:
    return next(snapshot.path.glob("*.compressed"))


def flip(path: Path, place: int, bit: int) -> None:
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, place)[0]
    os.pwrite(fd, bytes([byte ^ bit]), place)
    os.close(fd)
