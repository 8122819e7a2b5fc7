"""Whether a model's starts would be shorter if it were compressed: an estimate from a sample of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from modelstore.units import size
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot

_WORTH_IT = 0.95
_IMPORTING_PROCESSORS = 1.5  # measured: with two processors in all, a start at 1 GB/s takes longer if it decodes
_LEAST_PROCESSORS = 0.5


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
            else "here decoding takes as long as the shorter read saves, so it would only save space"
        )
        return f"{figures}: {advice}"


def estimate(snapshot: Snapshot, bytes_per_s: float, *, processors: int) -> Estimate:
    """For a plain snapshot on a volume of this rate. Imports take one and a half processors meanwhile, and the others
    decode. Raises OSError."""
    from modelstore.fill.recode import sampled  # numpy and zstandard are for few commands

    sample, plain_bytes = sampled(snapshot), snapshot.plain_bytes
    reading_s = sample.stored_bytes / bytes_per_s
    decoding_s = sample.decoding_s / max(_LEAST_PROCESSORS, processors - _IMPORTING_PROCESSORS)
    seconds = max(reading_s, decoding_s)
    return Estimate(snapshot.key, plain_bytes, sample.stored_bytes, plain_bytes / bytes_per_s, seconds)
