"""One snapshot for many processes: one of them fills it, under a claim, and the others wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from modelstore.errors import BadManifest, ClaimLost, ModelStoreError, NoSpace, WaitTimeout
from modelstore.fill.request import FillRequest
from modelstore.settings import Settings
from modelstore.timeline import Span
from modelstore.volume import capabilities, durable, history, refs, tree
from modelstore.volume.claim import Claim, Contender, Holder
from modelstore.volume.content import check_decoder, has_decoder
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Catalog, Snapshot
from modelstore.volume.unfinished import is_running
from modelstore.volume.verify import is_as_published, save_result, verify_snapshot, wrong_bytes

logger = logging.getLogger(__name__)

_POLL_S = 0.25


class SingleFill:
    """The fills of one store by this process."""

    def __init__(
        self, layout: Layout, settings: Settings, catalog: Catalog, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._layout = layout
        self._settings = settings
        self._catalog = catalog
        self._sleep = sleep

    def obtain(self, request: FillRequest) -> Snapshot:
        """Claim and fill, or wait for the process that does; the volume is looked at again after every change."""
        if request.damaged is None:
            request = self._in_form_under_way(request)
        if request.compressed:
            check_decoder()
        key, timeline = request.key, request.timeline
        limit_s = self._settings.wait_s if request.wait_s is None else request.wait_s
        deadline = time.monotonic() + limit_s
        waited_from: float | None = None
        contender: Contender | None = None
        while True:
            snapshot = self._catalog.published(key)
            if snapshot is not None and not is_same(snapshot, request.damaged):
                if waited_from is None:
                    return snapshot
                timeline.add(Span("wait", waited_from, timeline.now()))
                return replace(snapshot, status="waited")
            if contender is None:
                capabilities.check_may_change(self._layout, self._settings)
            refs.prepare_store(self._layout)
            tree.check_no_links(self._layout.root, self._layout.claims(key))
            contender = contender or Contender(
                self._layout.claims(key), worker=self._settings.worker_id, lease_s=self._settings.lease_s
            )
            outcome = contender.try_claim()
            if isinstance(outcome, Claim):
                if waited_from is not None:
                    timeline.add(Span("wait", waited_from, timeline.now()))
                try:
                    return self._fill(request, outcome)
                except ClaimLost as error:
                    logger.warning("%s", error)
                    contender, waited_from = None, timeline.now()
                    continue
                except BaseException as error:
                    if isinstance(error, OSError | ModelStoreError) and self._is_published(key, request.damaged):
                        logger.warning("%s was published by another worker meanwhile (%s)", key, error)
                        contender, waited_from = None, timeline.now()
                        continue
                    request.observer.failed(key)
                    raise
            if waited_from is None:
                waited_from = timeline.now()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                request.observer.failed(key)
                raise _waited_too_long(key, outcome, limit_s)
            timeline.waited_for = outcome.record.worker if outcome.record else timeline.waited_for
            request.observer.waiting(key, outcome, left_s=left_s)
            self._sleep(min(_POLL_S, left_s))

    def _in_form_under_way(self, request: FillRequest) -> FillRequest:
        """The request, for the other form if another worker is making that: one of them is enough. Files that are to be
        linked stay plain."""
        twin = request.key.twin
        if request.link or not is_running(self._layout, twin) or self._catalog.published(request.key) is not None:
            return request
        if twin.compressed and not has_decoder():
            return request
        logger.info("%s is being made by another worker: it is used", twin)
        return replace(request, compressed=twin.compressed)

    def _is_published(self, key: SnapshotKey, damaged: Snapshot | None) -> bool:
        """Whether a snapshot is there that is not the damaged one; False if the volume does not say."""
        try:
            snapshot = self._catalog.published(key)
        except (ModelStoreError, OSError):
            return False
        return snapshot is not None and not is_same(snapshot, damaged)

    def _fill(self, request: FillRequest, claim: Claim) -> Snapshot:
        """Fill the snapshot under a claim, unless another process has published it since."""
        from modelstore.fill.fill import Fill  # numpy and HTTP are for a download alone

        key = request.key
        with claim:
            # Between our look and our claim another worker may have published and released.
            if (snapshot := self._catalog.published(key)) is not None:
                if not is_same(snapshot, request.damaged):
                    claim.finish("published")
                    return replace(snapshot, status="waited")
                with request.timeline.span("verify"):
                    verified = verify_snapshot(snapshot)
                if is_as_published(snapshot, verified):
                    save_result(self._layout, key, verified, whole=True)
                    logger.warning("%s reads back as it was published: the damage was on its way to this worker", key)
                    claim.finish("published")
                    return snapshot
            request = replace(
                request, damaged=self._quarantine_if_damaged(key, claim) or self._if_in_other_store(request.damaged)
            )
            while True:
                fill = Fill(self._layout, request, claim, self._settings, sleep=self._sleep)
                try:
                    filled = fill.run()
                    break
                except NoSpace as error:
                    if not fill.make_room(error):
                        raise
            claim.finish("published")
        snapshot = self._catalog.published(key)
        if snapshot is None:
            raise BadManifest(f"{key} was published and cannot be read back: check the volume, then seed again")
        return replace(snapshot, status="resumed" if filled.reused else "downloaded", downloaded_bytes=filled.network)

    def _if_in_other_store(self, damaged: Snapshot | None) -> Snapshot | None:
        """A damaged snapshot of another store, whose intact files are copied."""
        return damaged if damaged is not None and not damaged.path.is_relative_to(self._layout.root) else None

    def _quarantine_if_damaged(self, key: SnapshotKey, claim: Claim) -> Snapshot | None:
        """A damaged snapshot in the place of this one, if its manifest tells which of its files are intact.

        It is moved to the quarantine only if bytes of it were read and are wrong. Otherwise it stays, and is completed
        in its place: files that this host does not see may be there for others.
        """
        path = self._layout.snapshot(key)
        if not tree.exists(path):
            return None
        manifest = self._catalog.manifest(key)
        if not (problem := wrong_bytes(path, key)):
            return Snapshot(path, manifest) if manifest is not None else None
        aside = self._layout.aside(self._layout.quarantine, key)
        tree.check_no_links(self._layout.root, path.parent)
        tree.check_no_links(self._layout.root, aside)
        durable.make_folder(aside.parent)
        claim.check()
        durable.touch_folder(path)
        try:
            durable.rename(path, aside)
        except FileNotFoundError:  # evicted meanwhile
            return None
        history.record_event(self._layout, "quarantined", key)
        logger.warning("%s is damaged (%s): moved to %s, and made again", key, problem, aside)
        return Snapshot(aside, manifest) if manifest is not None else None


def is_same(snapshot: Snapshot, damaged: Snapshot | None) -> bool:
    """Whether the published snapshot is still the one that was damaged."""
    return damaged is not None and (snapshot.key, snapshot.inode) == (damaged.key, damaged.inode)


def _waited_too_long(key: SnapshotKey, holder: Holder, waited_s: float) -> WaitTimeout:
    return WaitTimeout(
        f"{key} is not there after waiting {waited_s:.0f} s for {holder.describe()}: "
        "raise MODELSTORE_WAIT_S, or seed the model before the launch"
    )
