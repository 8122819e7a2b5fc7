"""A copy of a published snapshot for this process alone: if bytes of it are wrong on a volume that is not changed.

It lies on this host's own disk until the process ends. Files that are intact come from the volume, the others from the
Hub; what others read stays as it is.
"""

from __future__ import annotations

import atexit
import logging
from dataclasses import replace

from modelstore.errors import DigestMismatch
from modelstore.fill.observer import Observer
from modelstore.reference import Reference
from modelstore.runtime import OwnedFolder, runtime_folder
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import is_as_published

logger = logging.getLogger(__name__)


def private_copy(settings: Settings, snapshot: Snapshot, *, observer: Observer, timeline: Timeline) -> Snapshot:
    """The snapshot with the same manifest, in a folder of this process.

    Raises DigestMismatch if the Hub's files do not make the bytes that were published, NoSpace if this host's disk has
    no room, and the errors of `ModelStore.ensure`.
    """
    with timeline.span("verify"):
        if is_as_published(snapshot):
            logger.warning("%s reads back as published: the damage was on its way to this worker", snapshot.key)
            return snapshot
    folder = OwnedFolder(runtime_folder() / "private")  # one that a killed process left is cleared
    own = replace(
        settings,
        root=folder.path / "modelstore",
        volume_mode="full",
        quota_bytes=None,
        allowed_models=(),
        evict=False,
        compress="always" if snapshot.key.compressed else "never",
    )
    reference = Reference("hub", snapshot.repo_id, snapshot.commit)
    try:
        made = ModelStore.of(own).ensure(
            reference, dtype=snapshot.dtype, damaged=snapshot, observer=observer, timeline=timeline
        )
        if not made.manifest.has_contents_of(snapshot.manifest):
            raise DigestMismatch(f"{snapshot.key} cannot be made as it was published: seed it again")
    except BaseException:
        folder.close()
        raise
    atexit.register(folder.close)
    logger.warning("%s is wrong on the volume, which is used read-only: this worker has a copy of its own", made.key)
    return replace(made, manifest=replace(snapshot.manifest, files=made.manifest.files))
