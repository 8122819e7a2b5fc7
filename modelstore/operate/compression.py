"""What compression would give a model, from a sample of its blocks: shorter starts, and a share of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from modelstore.errors import ModelStoreError
from modelstore.operate.fleet import Compressed, CompressedForm
from modelstore.units import size
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.preferred_form import compressed_read_s, is_worth_it
from modelstore.volume.snapshots import Catalog, Snapshot


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
        return is_worth_it(self.plain_s, self.compressed_s)

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
    """For a plain snapshot on a volume of this rate. Raises OSError."""
    from modelstore.fill.recode import sampled  # numpy and zstandard are for few commands

    sample, plain_bytes = sampled(snapshot), snapshot.plain_bytes
    seconds = compressed_read_s(sample.stored_bytes / bytes_per_s, sample.decoding_s, on=processors)
    return Estimate(snapshot.key, plain_bytes, sample.stored_bytes, plain_bytes / bytes_per_s, seconds)


def compressed_form(layout: Layout) -> CompressedForm:
    """A function of the commit and the dtype of a plain snapshot: its compressed form, from a sample of its blocks;
    None if it is not here, or the library for that is not."""

    def form(commit: str, dtype: str) -> Compressed | None:
        for snapshot in Catalog(layout).snapshots():
            if (snapshot.commit, snapshot.dtype) == (commit, dtype) and not snapshot.has_compressed_files:
                try:
                    from modelstore.fill.recode import sampled

                    sample = sampled(snapshot)
                except (ImportError, OSError, ModelStoreError):
                    return None
                return Compressed(sample.stored_bytes / snapshot.plain_bytes, sample.decoding_s)
        return None

    return form
