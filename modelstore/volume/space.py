"""How much the store may take: its own accounting against MODELSTORE_QUOTA, and room for new snapshots.

statfs shows the whole cluster on RunPod, not the volume's quota, so the sizes of the store's files are added up here,
file by file. A holder writes into its claim the bytes that its snapshot will take before it downloads, and every
process counts that: if two downloads fit only one after the other, one of them goes on, and not both fail. One
process at a time counts and evicts, under a claim of its own (`claims/space`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modelstore.errors import NoSpace
from modelstore.settings import Settings
from modelstore.units import size
from modelstore.volume import durable, engine_caches, tree
from modelstore.volume.claim import DEAD_AFTER_S, Claim, Contender, reserved_bytes
from modelstore.volume.evict import evict, first_that_free, survey
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import keyed_folders, moved_aside
from modelstore.volume.unfinished import unfinished

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_ROUNDS = 3


class Space:
    """The space of one store, seen by one process."""

    def __init__(self, layout: Layout, settings: Settings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._layout = layout
        self._settings = settings
        self._sleep = sleep

    def reserve(
        self,
        key: SnapshotKey,
        claim: Claim,
        needed_bytes: int,
        *,
        present_bytes: int,
        damaged: Path | None = None,
        shared_bytes: int = 0,
    ) -> None:
        """Make sure that `key` may take `needed_bytes` with its staging, of which `present_bytes` are there already.

        `damaged`: a quarantined snapshot whose files are used again, and are counted in `needed_bytes`. `shared_bytes`:
        of files that lie in the snapshot's place and stay there. Raises NoSpace.
        """
        claim.reserve(needed_bytes)
        quota = self._settings.quota_bytes
        if quota is None:
            self._ask_the_file_system(key, needed_bytes - present_bytes)
            return
        if needed_bytes > quota:
            raise NoSpace(
                f"{key} takes up to {size(needed_bytes)} while it is made and MODELSTORE_QUOTA is {size(quota)}: "
                "raise it, or choose a smaller model",
                free_bytes=quota,
            )

        def missing_bytes() -> int:
            return needed_bytes - shared_bytes - (quota - self.taken(apart_from=key, damaged=damaged))

        with self._claimed(claim):
            missing = self._free_space(key, missing_bytes, damaged=damaged)
        if missing > 0:
            free = max(needed_bytes - missing, 0)
            raise NoSpace(
                f"{key} takes up to {size(needed_bytes)} while it is made and {size(free)} of "
                f"MODELSTORE_QUOTA={size(quota)} are free: {self._remedies(key)}, or raise the quota",
                free_bytes=free,
            )

    def _remedies(self, key: SnapshotKey) -> str:
        """What would free some space now."""
        dropped = [each for each in unfinished(self._layout) if each.key != key and not each.is_running]
        remedies = ["remove a model"]
        if dropped:
            total = size(sum(each.size_bytes for each in dropped))
            remedies.append(f"drop the unfinished downloads (`modelstore rm --unfinished`, {total})")
        if not self._settings.evict:
            remedies.append("set MODELSTORE_EVICT=1")
        return ", ".join(remedies)

    def check_room(self, size_bytes: int) -> None:
        """Raise NoSpace if a file of this size would go beyond the quota; nothing makes room for it."""
        quota = self._settings.quota_bytes
        if quota is not None and (free := quota - self.taken()) < size_bytes:
            raise NoSpace(
                f"it takes {size(size_bytes)} and {size(max(free, 0))} of MODELSTORE_QUOTA={size(quota)} are free: "
                "remove a model, or raise the quota",
                free_bytes=max(free, 0),
            )

    def make_room(self, key: SnapshotKey, size_bytes: int) -> bool:
        """Find `size_bytes` for `key` after the volume itself said that it is full. Returns whether space was freed.

        Not alone: a claim could not be written now. Two at once may evict more than they need.
        """
        before = tree.tree_bytes(self._layout.root)

        def missing_bytes() -> int:
            return size_bytes - (before - tree.tree_bytes(self._layout.root))

        return self._free_space(key, missing_bytes, damaged=None) < size_bytes

    def _free_space(self, key: SnapshotKey, missing_bytes: Callable[[], int], *, damaged: Path | None) -> int:
        """Remove the files that are worth least until nothing is missing; returns the bytes that are missing still.

        First the trash. Then, if MODELSTORE_EVICT allows it, quarantined snapshots, abandoned downloads, and the least
        recently used snapshots, those only if they are enough.
        """
        missing = missing_bytes()
        steps: list[Callable[[int], None]] = [lambda _missing: self._remove_all(self._layout.trash, None)]
        if self._settings.evict:
            steps.append(lambda _missing: self._remove_all(self._layout.quarantine, damaged))
            steps.append(lambda _missing: self._remove_abandoned(key))
            steps.append(lambda _missing: self._remove_caches())
            steps += [lambda missing: self._evict(key, missing)] * _ROUNDS
        for step in steps:
            if missing <= 0:
                break
            step(missing)
            missing = missing_bytes()
        return missing

    def _remove_all(self, folder: Path, but: Path | None) -> None:
        for path in moved_aside(folder):
            if path != but and not path.name.startswith("doctor-"):  # a trial of what the volume can do
                tree.check_no_links(self._layout.root, path)
                durable.remove_tree(path)

    def _remove_caches(self) -> None:
        """Remove what engines have compiled: the next worker compiles it again."""
        for key in {key for key, _folder in engine_caches.folders(self._layout)}:
            engine_caches.remove(self._layout, key)
            logger.warning("removed the compiled code for %s to make room", key)

    def _remove_abandoned(self, key: SnapshotKey) -> None:
        """Remove the staging of downloads whose worker is gone. The first look recognises a claim that was released,
        the second one that of a dead worker."""
        contenders = {}
        for other, variant in keyed_folders(self._layout.root / "staging"):
            if other != key and tree.entries(variant):
                contenders[other] = Contender(
                    self._layout.claims(other), worker=self._settings.worker_id, lease_s=self._settings.lease_s
                )
        for _look in range(2):
            for other, contender in list(contenders.items()):
                claim = contender.try_claim()
                if isinstance(claim, Claim):
                    with claim:
                        durable.remove_tree(self._layout.staging(other))
                    logger.warning("removed the unfinished download of %s to make room for %s", other, key)
                    del contenders[other]
            if not contenders:
                return
            self._sleep(DEAD_AFTER_S + _POLL_S)

    def _evict(self, key: SnapshotKey, size_bytes: int) -> None:
        """Evict the least recently used that may go and together free `size_bytes`; nothing if they do not."""
        others = tuple(candidate for candidate in survey(self._layout) if candidate.key != key)
        chosen = first_that_free(others, size_bytes)
        if sum(candidate.size_bytes for candidate in chosen) < size_bytes:
            return
        for candidate in chosen:
            if evict(self._layout, candidate.key):
                logger.warning("evicted %s (%s) to make room for %s", candidate.key, size(candidate.size_bytes), key)

    def taken(self, *, apart_from: SnapshotKey | None = None, damaged: Path | None = None) -> int:
        """Bytes that the store takes or has promised to downloads that run, without the staging of `apart_from` and the
        quarantined folder `damaged`."""
        counted: set[tuple[int, int]] = set()
        kept = (
            self._layout.models,
            self._layout.engine_caches,
            self._layout.trash,
            *tree.entries(self._layout.quarantine),
        )
        total = sum(tree.tree_bytes(folder, counted) for folder in kept if folder != damaged)
        promised: dict[SnapshotKey, tuple[int, int]] = {}
        for key, variant in keyed_folders(self._layout.root / "staging"):
            if key == apart_from:
                continue
            present = tree.tree_bytes(variant, counted)
            reserved, beat = reserved_bytes(self._layout.claims(key))
            total += present
            if reserved > present:
                promised[key] = (reserved - present, beat)
        return total + self._bytes_promised(promised)

    def could_fit(self, needed_bytes: int, error: NoSpace) -> bool:
        """Whether a snapshot would fit if everything else in the store made room.

        Without a quota of ours the store is as large as it was when it ran full.
        """
        if self._settings.quota_bytes is not None:
            return needed_bytes <= self._settings.quota_bytes
        return needed_bytes <= tree.tree_bytes(self._layout.root) + error.free_bytes

    def _bytes_promised(self, promised: dict[SnapshotKey, tuple[int, int]]) -> int:
        """The bytes that live claims have reserved."""
        if promised:
            self._sleep(DEAD_AFTER_S)
        alive = {key for key, (_size, beat) in promised.items() if reserved_bytes(self._layout.claims(key))[1] != beat}
        return sum(size for key, (size, _beat) in promised.items() if key in alive)

    def _ask_the_file_system(self, key: SnapshotKey, needed_bytes: int) -> None:
        """Fail if even the file system says that it cannot fit (on RunPod it says too much)."""
        state = os.statvfs(self._layout.root)
        free = state.f_bavail * state.f_frsize
        if needed_bytes > free:
            raise NoSpace(
                f"{key} needs {size(needed_bytes)} more and {self._layout.root} has {size(free)} free: "
                "free some, or remove a model",
                free_bytes=free,
            )

    @contextmanager
    def _claimed(self, claim: Claim) -> Iterator[None]:
        tree.check_no_links(self._layout.root, self._layout.space_claim)
        contender = Contender(self._layout.space_claim, worker=self._settings.worker_id, lease_s=self._settings.lease_s)
        while not isinstance(counting := contender.try_claim(), Claim):
            claim.check()
            self._sleep(_POLL_S)
        with counting:
            yield
