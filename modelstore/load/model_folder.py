"""A snapshot as a folder for a server on this host, at a path that is the same on every worker.

    <temporary folder>/modelstore-<user id>/<org>--<name>/<commit>.<dtype>

Servers keep compiled code by the path of the model, so a path that changed would lose it at each start. A lock says
which process a folder belongs to: one that finds it locked takes the next (`<commit>.<dtype>.2`), the lock of a process
that was killed is free again, and only the owner clears its folder up. The folder holds the small files, with the
bytes that were read and compared, and links to the weights on the volume, or in the memory of the process that read
them; of a compressed snapshot also the weights of its modules, which no reading has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from modelstore.errors import Refused
from modelstore.load.reader import Reading
from modelstore.runtime import OwnedFolder, runtime_folder
from modelstore.volume.checksums import content_blocks
from modelstore.volume.manifest import FileRecord
from modelstore.volume.snapshots import Snapshot


class ModelFolder:
    """A snapshot's folder for a server. `path` is there, with the small files, when this returns."""

    def __init__(self, snapshot: Snapshot, reading: Reading) -> None:
        """`reading`: of the snapshot, in flight. Raises DigestMismatch if a small file does not match the manifest,
        OSError if the volume fails, Refused if the folder would not be this user's alone."""
        self._snapshot = snapshot
        self._owned = OwnedFolder(runtime_folder().joinpath(*snapshot.key.plain.parts))
        self.path = self._owned.path
        try:
            for file in snapshot.manifest.contents:
                path = self.path / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                if not file.path.endswith(".safetensors"):
                    with path.open("wb") as copied:
                        copied.write(reading.wait(file.path))
            for file in snapshot.weights_beside:
                if file.table:
                    self._decode(file)
            self._link_weights(self._on_volume)
        except BaseException:
            self._owned.close()
            raise

    def write(self, name: str, data: bytes) -> None:
        """Give a small file other contents than the snapshot's."""
        with (self.path / name).open("wb") as file:
            file.write(data)

    def link_to_memory(self, reading: Reading) -> None:
        """Let the weights' links lead to the memory that they are read into, once all have arrived: for a server whose
        loader maps files. Raises as the reading does."""
        reading.wait_all()

        def in_memory(path: str) -> Path:
            fd = reading.descriptor(path) if reading.holds(path) else -1
            if fd >= 0:
                return Path(f"/proc/{os.getpid()}/fd/{fd}")
            self.check_plain()
            return self._on_volume(path)

        self._link_weights(in_memory)

    def check_plain(self) -> None:
        """Raise Refused if the server cannot read the weights from the volume by itself."""
        if self._snapshot.has_compressed_files:
            raise Refused(
                f"{self._snapshot.key} has no plain files, and its weights do not go through this host's memory: run "
                f"`modelstore expand {self._snapshot.repo_id}@{self._snapshot.commit[:12]}`"
            )

    def link_to_volume(self) -> None:
        """Let the weights' links lead to the volume."""
        self._link_weights(self._on_volume)

    def close(self) -> None:
        """Remove the folder."""
        self._owned.close()

    def _on_volume(self, path: str) -> Path:
        return self._snapshot.path / path

    def _decode(self, file: FileRecord) -> None:
        """Write the plain form of a file. Raises DigestMismatch."""
        with (self.path / file.path).open("wb") as plain:
            stored = self._snapshot.path / file.on_volume.path
            plain.writelines(content_blocks(stored, file, self._snapshot.manifest.block_bytes))

    def _link_weights(self, target: Callable[[str], Path]) -> None:
        plain = [file for file in self._snapshot.weights_beside if not file.table]  # the others were decoded
        for file in (*self._snapshot.weights, *plain):
            link = self.path / file.path
            link.unlink(missing_ok=True)
            if not file.table or target != self._on_volume:
                link.symlink_to(target(file.path))
