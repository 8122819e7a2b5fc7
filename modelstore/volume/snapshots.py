"""The published snapshots: finding one by its manifest. Reads the volume, writes nothing, needs no network.

A revision that was resolved once is answered from its record under `refs/`, so a fleet serves one commit until the next
seed, and a Hub that is down changes nothing. Standard library only: this is the first thing a worker does.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from modelstore.dtypes import DEFAULT_DTYPE
from modelstore.errors import BadManifest, CodeRefused, IntegrityError
from modelstore.reference import Reference
from modelstore.settings import Settings
from modelstore.units import counted, size
from modelstore.volume import aliases, durable, refs, tree
from modelstore.volume.layout import (
    MANIFEST,
    Layout,
    SnapshotKey,
    is_aside,
    key_from_parts,
    repo_folder,
)
from modelstore.volume.manifest import FileRecord, Manifest, parse_manifest
from modelstore.volume.preferred_form import prefers_compressed

logger = logging.getLogger(__name__)

Status = Literal["downloaded", "resumed", "present", "waited"]


@dataclass(frozen=True, slots=True, repr=False)
class Snapshot:
    """A published snapshot: an immutable folder that `from_pretrained`, vLLM or diffusers can open by `path`.

    `status` and `downloaded_bytes` tell how this process came to it; `inode` is the manifest file's, which tells it
    from one that was published in its place.
    """

    path: Path
    manifest: Manifest
    inode: int = 0
    status: Status = "present"
    downloaded_bytes: int = 0

    def __repr__(self) -> str:
        files = counted(len(self.manifest.files), "file")
        return f"<Snapshot {self.key}, {files}, {size(self.size_bytes)}, {self.status}, {str(self.path)!r}>"

    @property
    def key(self) -> SnapshotKey:
        return self.manifest.key

    @property
    def repo_id(self) -> str:
        return self.key.repo_id

    @property
    def commit(self) -> str:
        return self.key.commit

    @property
    def dtype(self) -> str:
        """The storage dtype that was asked for when it was made."""
        return self.key.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of all files on the volume."""
        return self.manifest.size_bytes

    @property
    def has_compressed_files(self) -> bool:
        """Whether programs that open its files by their names would miss some."""
        return any(file.plain is not None for file in self.manifest.files)

    @property
    def plain_bytes(self) -> int:
        """Bytes of all files as the model has them."""
        return self.manifest.plain_bytes

    @property
    def weights(self) -> tuple[FileRecord, ...]:
        """The weights at the top of the snapshot, as the model has them; for a pipeline, which has none there, those of
        its parts."""
        files = tuple(f for f in self.manifest.contents if f.path.endswith(".safetensors"))
        return tuple(f for f in files if "/" not in f.path) or files

    @property
    def weights_beside(self) -> tuple[FileRecord, ...]:
        """The weights in folders beside those at the top, as of the modules of a sentence-transformer."""
        known = {file.path for file in self.weights}
        return tuple(f for f in self.manifest.contents if f.path.endswith(".safetensors") and f.path not in known)

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """A config at the top; empty if there is none, or if it is no JSON object."""
        if name not in self.manifest.paths:
            return {}
        try:
            config = json.loads(durable.read_file(self.path / name, durable.MANIFEST_BYTES))
        except (ValueError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    @property
    def has_code(self) -> bool:
        """Whether the snapshot was stored with Python files of the repo, or names code of it that was allowed."""
        return self.manifest.remote_code or any(path.endswith(".py") for path in self.manifest.paths)

    @property
    def lacks_code(self) -> bool:
        """Whether its config names code of the repo, and the snapshot was stored without it."""
        return not self.has_code and bool(self.config().get("auto_map"))

    @property
    def weights_bytes(self) -> int:
        return sum(file.size_bytes for file in self.weights)

    def as_json(self) -> dict[str, Any]:
        """The record that `seed --json` and `show --json` print."""
        return {
            **self.key.as_json(),
            "path": str(self.path),
            "files": len(self.manifest.files),
            "bytes": self.size_bytes,
            **({"plain_bytes": self.plain_bytes} if self.key.compressed else {}),
            "downloaded_bytes": self.downloaded_bytes,
            "status": self.status,
        }


def check_code(snapshot: Snapshot, *, trusted: bool) -> None:
    """Raise CodeRefused if the snapshot was stored with code of its own and that is not `trusted`."""
    if snapshot.manifest.remote_code and not trusted:
        raise CodeRefused(
            f"{snapshot.key} was stored with code of its own: to run it here, set MODELSTORE_TRUST_REMOTE_CODE=1 and "
            f"name the commit in full, {snapshot.repo_id}@{snapshot.commit}, in MODEL_ID or MODELSTORE_ALLOWED_MODELS"
        )


class Catalog:
    """The published snapshots of one store."""

    def __init__(self, layout: Layout, *, compressed: bool = False) -> None:
        """`compressed`: of a snapshot that is there both plain and compressed, the compressed one is found."""
        self._layout = layout
        self._compressed = compressed

    @classmethod
    def of(cls, settings: Settings) -> Catalog:
        """The catalog of the store that these settings name, which prefers the form that they ask for."""
        layout = Layout(settings.root)
        return cls(layout, compressed=prefers_compressed(layout, settings.compress))

    def find(self, reference: Reference, dtype: str | None, *, worker: str | None = None) -> Snapshot | None:
        """The snapshot that the volume's records lead to, or None; an alias has its own dtype, and may lead this worker
        to another snapshot than the rest of the fleet.

        Without `dtype`: in the variant of the last seed, or the default; if that is not there, in the only one that is.

        Raises FormatTooNew, RootUnusable, and SnapshotNotFound for an alias that does not exist.
        """
        refs.check_format(self._layout)
        if reference.kind == "alias":
            return self.published_twin(aliases.target(self._layout, reference.name, worker=worker))
        key = self._recorded_key(reference, dtype)
        if key is None or (snapshot := self.published_twin(key)) is not None or dtype is not None:
            return snapshot if key is not None else None
        variant = self._variant_in_place(key)
        return self.published_twin(variant) if variant is not None and variant.plain != key.plain else None

    def published_twin(self, key: SnapshotKey) -> Snapshot | None:
        """The snapshot with these weights, plain or compressed, that is preferred of those that are published."""
        return next(filter(None, map(self.published, self._twins(key))), None)

    def _twins(self, key: SnapshotKey) -> tuple[SnapshotKey, SnapshotKey]:
        """The keys with these weights, the preferred one first."""
        preferred = replace(key, compressed=self._compressed)
        return preferred, preferred.twin

    def dtype_of(self, reference: Reference) -> str:
        """The variant to make if none is asked for: that of the last seed, or the only one on the volume, but for a
        `keep` that was not seeded; else the default."""
        key = self._recorded_key(reference, None)
        if key is None:
            return DEFAULT_DTYPE
        present = self._variant_in_place(key) or key
        return key.dtype if present.dtype == "keep" else present.dtype

    def _recorded_key(self, reference: Reference, dtype: str | None) -> SnapshotKey | None:
        """The key that the record of a reference, no alias, names; None if there is no record."""
        recorded = refs.recorded(self._layout, reference)
        if not recorded.commit:
            return None
        variant = dtype or refs.seeded_dtype(self._layout, recorded.repo_id, recorded.commit) or DEFAULT_DTYPE
        return SnapshotKey(recorded.repo_id, recorded.commit, variant)

    def _variant_in_place(self, key: SnapshotKey) -> SnapshotKey | None:
        """`key` or its twin, if there is a folder in its place, damaged or not; else the only variant of the commit
        that has one."""
        if (twin := self._twin_in_place(key)) is not None:
            return twin
        dtypes = {other.dtype for other in self.keys(key.repo_id) if other.commit == key.commit}
        return self._twin_in_place(replace(key, dtype=dtypes.pop())) if len(dtypes) == 1 else None

    def _twin_in_place(self, key: SnapshotKey) -> SnapshotKey | None:
        return next((twin for twin in self._twins(key) if self._layout.snapshot(twin).is_dir()), None)

    def keys(self, repo_id: str | None = None) -> Iterator[SnapshotKey]:
        """The key of each folder in a snapshot's place, damaged or not, of all repos or of one. Raises UnsafeName if
        `models` is a link."""
        refs.check_format(self._layout)
        models = self._layout.models
        tree.check_no_links(self._layout.root, models)
        repos = tree.folder_names(models) if repo_id is None else [repo_folder(repo_id)]
        variants = tree.map_concurrently(lambda repo: tree.folder_names(f"{models}/{repo}"), repos)
        for repo, names in zip(repos, variants, strict=True):
            for name in names:
                if (key := key_from_parts(repo, name)) is not None:
                    yield key

    def similar(self, repo_id: str) -> str:
        """The repo on the volume whose id is nearly this one; empty if there is none."""
        from difflib import get_close_matches  # only after an error

        others = {key.repo_id for key in list(self.keys())} - {repo_id}
        return next(iter(get_close_matches(repo_id, others, 1, 0.75)), "")

    def snapshots(self) -> Iterator[Snapshot]:
        """Every published snapshot, by repo and commit; damaged ones are left out, with a warning."""
        for key in self.keys():
            if (snapshot := self.published(key)) is not None:
                yield snapshot

    def find_key(self, reference: Reference, dtype: str | None, *, exact: bool = False) -> SnapshotKey | None:
        """The key that `find` would look at, if a folder is in its place, damaged or not; if `exact`, only the recorded
        variant."""
        refs.check_format(self._layout)
        is_alias = reference.kind == "alias"
        key = aliases.target(self._layout, reference.name) if is_alias else self._recorded_key(reference, dtype)
        if key is None or is_alias or exact or dtype is not None:
            return self._twin_in_place(key) if key is not None else None
        return self._variant_in_place(key)

    def published(self, key: SnapshotKey) -> Snapshot | None:
        """The snapshot, if its manifest is there and every file that it names is there with its size."""
        path = self._layout.snapshot(key)
        read = self._read_plain(key)
        manifest = self.parse(key, read)
        if read is None or manifest is None:
            return None
        for folder in {os.path.dirname(file.path) for file in manifest.files} - {""}:
            if not tree.is_free_of_links(path, path / folder):
                logger.warning("%s is passed over: %s is a link", path, folder)
                return None
        for file in manifest.files:
            try:
                state = tree.once_more(partial(os.lstat, path / file.path))
            except (FileNotFoundError, NotADirectoryError):
                state = None
            except OSError as error:
                raise tree.unreadable(error, path / file.path) from error
            if state is None or not stat.S_ISREG(state.st_mode) or state.st_size != file.size_bytes:
                logger.warning("%s is passed over: %s is missing or has another size", path, file.path)
                return None
        return Snapshot(path, manifest, read.state.st_ino)

    def check_unchanged(self, snapshot: Snapshot) -> None:
        """Raise IntegrityError if the published snapshot is no longer the one that this manifest describes."""
        current = self.published(snapshot.key)
        if current is None or not current.manifest.is_of(snapshot.manifest):
            raise IntegrityError(f"{snapshot.key} is not on the volume as it was loaded: restart the worker")

    def manifest(self, key: SnapshotKey) -> Manifest | None:
        """The manifest of the folder in the snapshot's place; None if that has none that can be trusted."""
        return self.parse(key, self._read_plain(key))

    def _read_plain(self, key: SnapshotKey) -> durable.Contents | None:
        path = self._layout.snapshot(key)
        if not tree.is_free_of_links(self._layout.root, path):
            logger.warning("%s is passed over: a folder on its way is a link", path)
            return None
        return self.read(key)

    def read(self, key: SnapshotKey) -> durable.Contents | None:
        """The manifest's bytes and state for one of `keys`, which pass no link; None if there is no such file."""
        path = self._layout.snapshot(key) / MANIFEST
        try:
            return durable.read_with_state(path, durable.MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EINVAL):
                raise tree.unreadable(error, path) from error
            logger.warning("%s is passed over: its manifest is no file of ours", path.parent)
            return None

    def parse(self, key: SnapshotKey, read: durable.Contents | None) -> Manifest | None:
        """The manifest; None if it cannot be trusted."""
        path = self._layout.snapshot(key)
        try:
            manifest = parse_manifest(read.data, where=str(path / MANIFEST)) if read is not None else None
        except BadManifest as error:
            logger.warning("%s", error)
            return None
        if manifest is not None and manifest.key != key:
            logger.warning("%s holds the manifest of %s: it is passed over", path, manifest.key)
            return None
        return manifest


def keyed_folders(folder: Path) -> Iterator[tuple[SnapshotKey, Path]]:
    """The folders of snapshots below `staging/`, `claims/` or `used/`, with their keys."""
    for repo in tree.entries(folder):
        for variant in tree.entries(repo):
            if (key := key_from_parts(repo.name, variant.name)) is not None:
                yield key, variant


def moved_aside(folder: Path) -> list[Path]:
    """The folders that the store has put in its trash or its quarantine; others there belong to persons."""
    return [path for path in tree.entries(folder) if is_aside(path.name) and path.is_dir()]
