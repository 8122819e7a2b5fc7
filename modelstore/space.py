"""How much the store may take: its own accounting against MODELSTORE_QUOTA, and room for what is to come.

statfs shows the whole cluster on RunPod, not the volume's quota, so what the store takes is added up here, file by
file. A holder writes into its claim what its snapshot will take before it downloads, and everybody who counts counts
that, so that two downloads which fit only one after the other do not run into the wall together. One process at a time
counts and evicts, under a claim of its own (`claims/space`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from modelstore import durable
from modelstore.claim import DEAD_AFTER_S, Claim, Contender, reserved_bytes
from modelstore.errors import NoSpace
from modelstore.evict import evict, least_recently_used, survey
from modelstore.layout import Layout, SnapshotKey, key_from_parts
from modelstore.settings import Settings

logger = logging.getLogger(__name__)

_POLL_S = 0.05


class Space:
    """The space of one store, seen by one process."""

    def __init__(self, layout: Layout, settings: Settings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._layout = layout
        self._settings = settings
        self._sleep = sleep

    def reserve(self, key: SnapshotKey, claim: Claim, needed_bytes: int, *, present_bytes: int) -> None:
        """Make sure that `key` may take `needed_bytes` with its staging, of which `present_bytes` are there already.

        Where MODELSTORE_EVICT allows it, the least recently used snapshots make room. Raises NoSpace.
        """
        claim.reserve(needed_bytes)
        quota = self._settings.quota_bytes
        if quota is None:
            self._ask_the_file_system(key, needed_bytes - present_bytes)
            return
        if needed_bytes > quota:
            raise NoSpace(
                f"{key} takes up to {_text(needed_bytes)} while it is made and MODELSTORE_QUOTA is {_text(quota)}: "
                "raise it, or choose a smaller model",
                free_bytes=quota,
            )
        with self._alone(claim):
            free = quota - self.taken(apart_from=key)
            if needed_bytes > free and self._settings.evict:
                free += self._evict(key, needed_bytes - free)
            if needed_bytes > free:
                hint = "remove a model" if self._settings.evict else "remove a model, or set MODELSTORE_EVICT=1"
                raise NoSpace(
                    f"{key} takes up to {_text(needed_bytes)} while it is made and {_text(max(free, 0))} of "
                    f"MODELSTORE_QUOTA={_text(quota)} are free: {hint}, or raise the quota",
                    free_bytes=max(free, 0),
                )

    def taken(self, *, apart_from: SnapshotKey | None = None) -> int:
        """Bytes that the store takes or has promised to downloads that run, without what belongs to `apart_from`."""
        seen: set[tuple[int, int]] = set()
        kept = (self._layout.models, self._layout.quarantine, self._layout.trash)
        total = sum(durable.tree_bytes(folder, seen) for folder in kept)
        promised: dict[SnapshotKey, tuple[int, int]] = {}
        for repo in durable.entries(self._layout.root / "staging"):
            for variant in durable.entries(repo):
                key = key_from_parts(repo.name, variant.name)
                if key is None or key == apart_from:
                    continue
                present = durable.tree_bytes(variant, seen)
                reserved, beat = reserved_bytes(self._layout.claims(key))
                total += present
                if reserved > present:
                    promised[key] = (reserved - present, beat)
        return total + self._of_the_living(promised)

    def could_fit(self, needed_bytes: int, error: NoSpace) -> bool:
        """Whether a snapshot would fit if everything else in the store made room.

        Without a quota of ours the store is as large as it was when it ran full.
        """
        if self._settings.quota_bytes is not None:
            return needed_bytes <= self._settings.quota_bytes
        return needed_bytes <= durable.tree_bytes(self._layout.root) + error.free_bytes

    def make_room(self, key: SnapshotKey, size_bytes: int) -> bool:
        """Evict for `key` after the volume itself said that it is full; whether anything went.

        Not alone: a claim could not be written now. Two at once may evict more than they need.
        """
        return self._evict(key, size_bytes) > 0

    def _of_the_living(self, promised: dict[SnapshotKey, tuple[int, int]]) -> int:
        """The promises of claims whose heart beats; a dead worker needs no room."""
        if promised:
            self._sleep(DEAD_AFTER_S)
        alive = {key for key, (_size, beat) in promised.items() if reserved_bytes(self._layout.claims(key))[1] != beat}
        return sum(size for key, (size, _beat) in promised.items() if key in alive)

    def _evict(self, key: SnapshotKey, size_bytes: int) -> int:
        """Evict until `size_bytes` are free, or nothing more may go; what was freed."""
        others = tuple(candidate for candidate in survey(self._layout) if candidate.key != key)
        freed = 0
        while freed < size_bytes and others:
            chosen = least_recently_used(others, size_bytes - freed)
            if not chosen:
                break
            for candidate in chosen:
                if evict(self._layout, candidate.key):
                    logger.warning(
                        "evicted %s (%s) to make room for %s", candidate.key, _text(candidate.size_bytes), key
                    )
                    freed += candidate.size_bytes
            others = tuple(candidate for candidate in others if candidate not in chosen)
        return freed

    def _ask_the_file_system(self, key: SnapshotKey, needed_bytes: int) -> None:
        """Fail where even the file system says that it cannot fit (on RunPod it says too much)."""
        state = os.statvfs(self._layout.root)
        free = state.f_bavail * state.f_frsize
        if needed_bytes > free:
            raise NoSpace(
                f"{key} needs {_text(needed_bytes)} more and {self._layout.root} has {_text(free)} free: "
                "free some, or remove a model",
                free_bytes=free,
            )

    @contextmanager
    def _alone(self, claim: Claim) -> Iterator[None]:
        durable.check_no_links(self._layout.root, self._layout.space_claim)
        contender = Contender(self._layout.space_claim, worker=self._settings.worker_id, lease_s=self._settings.lease_s)
        while not isinstance(held := contender.try_claim(), Claim):
            claim.check()
            self._sleep(_POLL_S)
        with held:
            yield


def _text(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
