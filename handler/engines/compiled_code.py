"""The code that an engine compiles, between this worker and the volume (`modelstore/volume/engine_caches.py`).

    code = CompiledCode(settings)          before the engine starts, which gets `code.environment`
    code.restore(snapshot, facts)          before it compiles: what another worker left for the same facts
    code.is_right(answer)                  once it answers a fixed prompt; if it is not, it starts again without
    code.publish(answer)                   if there was nothing to restore

Nothing here ends a start: what cannot be read, restored or published is a line in the log. Code that was made for
another instruction set can load and answer nonsense without an error, so the facts name the machine, and restored code
has to give the answer that its maker had.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelstore.environment import compiling_into, of_compilers
from modelstore.errors import IntegrityError, ModelStoreError
from modelstore.load.memory import gpus, has_driver
from modelstore.runtime import OwnedFolder, runtime_folder
from modelstore.settings import Settings
from modelstore.units import size
from modelstore.volume import engine_caches
from modelstore.volume.archive import pack, unpack
from modelstore.volume.capabilities import may_change
from modelstore.volume.engine_caches import EngineCache
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.space import Space

logger = logging.getLogger(__name__)

_OF_THIS_HOST = re.compile(r"gpu_p2p_access_cache.*")  # what vLLM found out about the links between its GPUs
_INSTRUCTION_SET = re.compile(
    r"abm|adx|aes|amx|asimd|avx|bf16|bmi|crc32|f16c|fma|gfni|i8mm|movbe|neon|pclmul|popcnt|rd(rnd|seed)|sha|sse|ssse3|sve|v(aes|pclmul)"
)


class CompiledCode:
    """The compiled code of one start, in a folder that has the same path on every worker."""

    def __init__(self, settings: Settings) -> None:
        """Raises Refused if the folder would not be this user's alone."""
        self._settings = settings
        self._layout = Layout(settings.root)
        self._folder = OwnedFolder(runtime_folder() / "engine-cache")
        self._snapshot: SnapshotKey | None = None
        self._facts: Mapping[str, Any] = {}
        self._expected: str | None = None
        self._may_publish = settings.engine_cache == "write"

    @classmethod
    def of(cls, settings: Settings) -> CompiledCode | None:
        """That of a start with these settings; None if they do not want it, or this host has no room for it."""
        if settings.engine_cache == "off":
            return None
        try:
            return cls(settings)
        except (ModelStoreError, OSError) as error:
            logger.warning("compiled code is neither restored nor published: %s", error)
            return None

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the engine's process."""
        return compiling_into(self._folder.path)

    @property
    def is_restored(self) -> bool:
        """Whether the engine runs code that another worker compiled."""
        return self._expected is not None

    def restore(self, snapshot: SnapshotKey, facts: Mapping[str, Any]) -> None:
        """Put the code for these facts in place, if it is on the volume and right. `facts`: those of the engine."""
        self._snapshot = snapshot
        if has_driver() and not gpus(self._settings.visible_gpus):
            logger.info("no compiled code is restored or published: the driver does not say which GPU this is")
            self._may_publish = False
            return
        self._facts = {
            **facts,
            **_machine(self._settings),
            "folder": str(self._folder.path),
            "model": str(snapshot.plain),
        }
        key, began = engine_caches.key_of(self._facts), time.monotonic()
        try:
            cache = engine_caches.read(self._layout, snapshot, key, self._settings.engine_cache_key)
            if cache is None:
                logger.info("no compiled code for this engine is on the volume (%s)", key)
                return
            unpack(cache.archive, self._folder.path)
            if may_change(self._layout, self._settings):
                engine_caches.note_use(self._layout, snapshot, key)
        except (ModelStoreError, OSError, MemoryError) as error:
            logger.warning("compiled code on the volume is not used: %s", error)
            self._clear()
            if self._may_publish and isinstance(error, IntegrityError):  # else it would be in the way for ever
                self.quarantine()
            return
        self._expected, self._may_publish = cache.answer, False
        took_s = time.monotonic() - began
        logger.info("restored %s of compiled code (%s) in %.2f s", size(len(cache.archive)), key, took_s)

    def is_right(self, answer: str) -> bool:
        """Whether the engine answers as the one did that compiled its code; yes if it compiled that itself."""
        return self._expected is None or self._expected == answer

    def forget(self) -> None:
        """Begin again without the code that was restored; the engine must have ended."""
        self._expected = None
        self._may_publish = self._settings.engine_cache == "write"
        self._clear()

    def quarantine(self) -> None:
        """Move the code on the volume that was restored out of the way."""
        assert self._snapshot is not None
        if not may_change(self._layout, self._settings):
            return
        try:
            engine_caches.quarantine(self._layout, self._snapshot, engine_caches.key_of(self._facts))
        except (ModelStoreError, OSError) as error:
            logger.warning("compiled code stays on the volume, though it is wrong: %s", error)

    def publish(self, answer: str) -> None:
        """Leave the code for the next worker, unless it was restored or may not be written."""
        if not self._may_publish or self._snapshot is None:
            return
        if not may_change(self._layout, self._settings):
            logger.info("compiled code is not published: the volume is used read-only")
            return
        if not answer:
            logger.info("compiled code is not published: the engine answers no prompt that could be compared")
            return
        began = time.monotonic()
        try:
            archive = pack(self._folder.path, without=_OF_THIS_HOST)
            self._check_room(len(archive))
            cache = EngineCache(self._facts, answer, archive)
            is_first = engine_caches.publish(
                self._layout, self._snapshot, cache, self._settings.worker_id, self._settings.engine_cache_key
            )
        except (ModelStoreError, OSError, MemoryError) as error:
            logger.warning("compiled code is not published: %s", error)
            return
        took_s = time.monotonic() - began
        how = "published" if is_first else "another worker had published compiled code before"
        logger.info("%s: %s in %.2f s", how, size(len(archive)), took_s)

    def _clear(self) -> None:
        try:
            self._folder.clear()
        except OSError as error:
            logger.warning("the folder of compiled code cannot be emptied: %s", error)
            self._may_publish = False

    def close(self) -> None:
        """Remove the folder."""
        self._folder.close()

    def _check_room(self, size_bytes: int) -> None:
        Space(self._layout, self._settings).check_room(size_bytes)


def run_uncompiled(model: Any) -> None:
    """Take back torch's `compile()` of a module, and of all below it."""
    for module in model.modules():
        module._compiled_call_impl = None


def _machine(settings: Settings) -> dict[str, Any]:
    """The facts of this machine and of the environment that compiled code depends on."""
    present = gpus(settings.visible_gpus)
    facts: dict[str, Any] = {"gpus": present, "cpu": _instruction_set(), "environment": of_compilers()}
    return facts if present else facts | {"processors": len(os.sched_getaffinity(0))}


def _instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The extensions of this processor that compilers use."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return sorted({flag for flag in flags.partition(":")[2].split() if _INSTRUCTION_SET.match(flag)})
