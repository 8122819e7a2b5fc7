"""The request for one snapshot: its source and commit, the form that is stored, and the permissions of the fill."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelstore.dtypes import Dtype
from modelstore.fill.observer import SILENT, Observer
from modelstore.fill.source import Resolved, Source
from modelstore.timeline import Timeline
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class FillRequest:
    """A snapshot that is to be on the volume.

    `compressed`: the weights are compressed. `code`: the repo's Python files may be stored. `link`: weights
    that the source has on this volume, and that need no conversion, get a second name instead of a copy. `damaged`: the
    snapshot that is to be replaced; its intact files are used again. `wait_s`: how long to wait for another process
    that fills it, MODELSTORE_WAIT_S by default.
    """

    source: Source
    resolved: Resolved
    dtype: Dtype
    compressed: bool = False
    code: bool = False
    link: bool = False
    damaged: Snapshot | None = None
    wait_s: float | None = None
    observer: Observer = SILENT
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def key(self) -> SnapshotKey:
        """The key of the snapshot."""
        return SnapshotKey(self.resolved.repo_id, self.resolved.commit, self.dtype, self.compressed)
