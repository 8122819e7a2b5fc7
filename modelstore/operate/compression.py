"""Whether a model's starts would be shorter if it were compressed: an estimate from a sample of its blocks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from modelstore.units import size
from modelstore.volume import durable
from modelstore.volume.block_table import block_lengths, stored_length
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot

_SAMPLES = 4
_WORTH_IT = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes and seconds of a cold read, plain and compressed."""

    key: SnapshotKey
    plain_bytes: int
    compressed_bytes: int
    plain_s: float
    compressed_s: float

    @property
    def is_worth_it(self) -> bool:
        return self.compressed_s < _WORTH_IT * self.plain_s

    @property
    def text(self) -> str:
        """Both estimates, and the advice."""
        figures = (
            f"a cold read of {self.key.repo_id} takes {self.plain_s:.1f} s for {size(self.plain_bytes)}, "
            f"and compressed {self.compressed_s:.1f} s for {size(self.compressed_bytes)}"
        )
        advice = (
            f"`modelstore compress {self.key.repo_id}` shortens starts that wait for the read"
            if self.is_worth_it
            else "decoding takes as long here, and it gains space alone"
        )
        return f"{figures}: {advice}"


def estimate(snapshot: Snapshot, bytes_per_s: float, *, processors: int) -> Estimate:
    """For a plain snapshot on a volume of this rate. One processor imports meanwhile, if there are several, and the
    others decode. Raises OSError."""
    from modelstore.volume import planes  # numpy and zstandard are for few commands

    block_bytes = snapshot.manifest.block_bytes
    places = [
        (file, index * block_bytes, length)
        for file in snapshot.weights
        for index, length in enumerate(block_lengths(file.size_bytes, block_bytes))
    ]
    sampled_bytes = stored_bytes = 0
    decoding_s = 0.0
    for file, offset, length in places[:: -(-len(places) // _SAMPLES)]:
        fd = durable.open_for_read(snapshot.path / file.path)
        try:
            block = os.pread(fd, length, offset)
        finally:
            os.close(fd)
        entry, parts = planes.encode(block)
        stored, target = memoryview(b"".join(parts)), memoryview(bytearray(len(block)))
        began = time.thread_time()
        planes.decode(entry, stored, target)
        decoding_s += time.thread_time() - began
        sampled_bytes += len(block)
        stored_bytes += stored_length(entry, len(block))
    plain_bytes = snapshot.weights_bytes
    compressed_bytes = round(plain_bytes * stored_bytes / sampled_bytes)
    reading_s = compressed_bytes / bytes_per_s
    decoding_s *= plain_bytes / sampled_bytes / max(1, processors - 1)
    return Estimate(snapshot.key, plain_bytes, compressed_bytes, plain_bytes / bytes_per_s, max(reading_s, decoding_s))
