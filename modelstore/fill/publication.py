"""A snapshot that is made from files that the caller has at hand: under a claim, in staging, published by one rename.

A download does the same with more states between (`fill.py`): here the manifest is known before or made at the end, and
what was cut short goes on with the files that are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from modelstore.errors import BadManifest, WaitTimeout
from modelstore.fill.observer import Observer
from modelstore.fill.staging import Staging
from modelstore.settings import Settings
from modelstore.volume import capabilities, durable, refs, tree
from modelstore.volume.claim import Claim, Contender
from modelstore.volume.layout import MANIFEST, Layout, SnapshotKey
from modelstore.volume.manifest import parse_manifest
from modelstore.volume.snapshots import Catalog
from modelstore.volume.space import Space

_POLL_S = 0.25

FillStaging = Callable[[Staging, Claim], bytes]
"""Puts all files of a snapshot into a staging, synced, and returns the bytes of its manifest."""


class Publication:
    """A snapshot that is to be on the volume. Use once."""

    def __init__(
        self,
        layout: Layout,
        settings: Settings,
        key: SnapshotKey,
        *,
        observer: Observer,
    ) -> None:
        self._layout = layout
        self._settings = settings
        self._key = key
        self._observer = observer

    def run(self, fill: FillStaging, *, needed_bytes: int) -> bool:
        """Have `fill` make the snapshot, which takes `needed_bytes`; False if it is there, or another process made it.

        Raises what `fill` raises, WaitTimeout, NoSpace, ReadOnlyVolume, ClaimLost, and BadManifest if it cannot be read
        back.
        """
        capabilities.check_may_change(self._layout, self._settings)
        tree.check_no_links(self._layout.root, self._layout.snapshot(self._key))
        claim = self._claimed()
        if claim is None:
            return False
        with claim:
            if self._is_published():
                claim.finish("published")
                return False
            staging = Staging(self._layout, self._key, claim)
            durable.make_folder(staging.paths.snapshot)
            Space(self._layout, self._settings).reserve(
                self._key, claim, needed_bytes, present_bytes=staging.present_bytes
            )
            self._publish(staging, fill(staging, claim))
            claim.finish("published")
        return True

    def _claimed(self) -> Claim | None:
        """The claim on the snapshot; None if another process has published it meanwhile."""
        refs.prepare_store(self._layout)
        folder = self._layout.claims(self._key)
        tree.check_no_links(self._layout.root, folder)
        contender = Contender(folder, worker=self._settings.worker_id, lease_s=self._settings.lease_s)
        deadline = time.monotonic() + self._settings.wait_s
        while not self._is_published():
            outcome = contender.try_claim()
            if isinstance(outcome, Claim):
                return outcome
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"{self._key} is being made by {outcome.describe()}: try again later")
            self._observer.waiting(self._key, outcome, left_s=left_s)
            time.sleep(min(_POLL_S, left_s))
        return None

    def _publish(self, staging: Staging, data: bytes) -> None:
        folder, place = staging.paths.snapshot, self._layout.snapshot(self._key)
        manifest = parse_manifest(data, where=str(folder))
        if not staging.publish(manifest, data, place) and not self._is_published():
            durable.remove_file(place / MANIFEST)  # so that no file is ever served by another one's manifest
            durable.complete_folder(folder, place, last=MANIFEST)
        if not self._is_published():
            raise BadManifest(f"{self._key} was made at {place} and is not whole there: remove it, and make it again")
        staging.remove()

    def _is_published(self) -> bool:
        return Catalog(self._layout).published(self._key) is not None
