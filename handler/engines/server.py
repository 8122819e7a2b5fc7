"""A snapshot that a server beside this process opens by its path, with the weights already in this one's memory.

A server such as vLLM brings a loader of its own, which maps the files: over a network volume that is the slow way.
It is given a folder of links instead, whose weights lead to the memory that they were read into at the volume's rate,
and verified on the way. Once it has loaded, the links lead to the volume, and the memory is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from modelstore.load.reader import Reading
from modelstore.volume.snapshots import Snapshot


class SharedFolder:
    """A folder like the snapshot's, made of links, for processes of the same user on this host."""

    def __init__(self, snapshot: Snapshot, reading: Reading) -> None:
        """Returns once everything that was read has arrived.

        Raises DigestMismatch where a file is not what the manifest says, OSError where the volume fails.
        """
        reading.wait_all()
        self._snapshot = snapshot
        self._reading = reading
        self._folder = TemporaryDirectory(prefix="modelstore-")
        self.path = Path(self._folder.name)
        self._link(self._in_memory)

    def let_go(self) -> None:
        """Lead to the volume from now on, and free the memory as soon as nobody maps it."""
        self._link(self._on_volume)
        self._reading.close()

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def _on_volume(self, path: str) -> Path:
        return self._snapshot.path / path

    def _in_memory(self, path: str) -> Path:
        read = path.endswith(".safetensors") and self._reading.holds(path)
        fd = self._reading.descriptor(path) if read else -1
        return self._on_volume(path) if fd < 0 else Path(f"/proc/{os.getpid()}/fd/{fd}")

    def _link(self, target: Callable[[str], Path]) -> None:
        for file in self._snapshot.manifest.files:
            link = self.path / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(target(file.path))
