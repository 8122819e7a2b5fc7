"""The cache of huggingface_hub on the volume: a source, as RunPod's cached models are, and a place to export to.

models--org--name/{refs,snapshots,blobs}
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from modelstore.errors import ModelStoreError, NotFound, Refused, RepoNotFound, UnsafeName
from modelstore.fill.components import components
from modelstore.fill.repo_code import code_of
from modelstore.fill.repo_files import folder_of, is_small
from modelstore.fill.source import ByteStream, Resolved, Source, SourceFile, stream_of
from modelstore.fill.stored_file import StoredFile
from modelstore.reference import Reference, is_commit
from modelstore.settings import Settings
from modelstore.volume import durable, tree
from modelstore.volume.checksums import content_blocks, git_oid_of
from modelstore.volume.manifest import FileRecord, SourceRecord
from modelstore.volume.snapshots import Snapshot

logger = logging.getLogger(__name__)


class HfCacheSource(Source):
    """A model in an HF cache on the volume: `models--org--name/{refs,snapshots,blobs}`.

    The cache names its blobs by their digests, with which all that is stored from here is compared; that they are those
    of the commit is for the Hub to confirm (`hub.confirmed`). A cache whose download was cut short, or whose files are
    no links to blobs, is not `whole`, and the Hub is asked.
    """

    over_network = False
    is_copy = True

    def __init__(
        self, cache: Path, reference: Reference, settings: Settings, *, named: Reference | None = None
    ) -> None:
        """`named`: the reference as the caller gave it, if `reference` was pinned to a commit since."""
        self._repo = cache / f"models--{reference.name.replace('/', '--')}"
        self._reference = reference
        self._settings = settings
        self._named = named or reference

    @property
    def label(self) -> str:
        return f"the HF cache at {self._repo}"

    def resolve(self) -> Resolved:
        revision = self._reference.revision
        commit = revision
        if not is_commit(revision):
            try:
                commit = durable.read_file(self._repo / "refs" / revision).decode(errors="replace").strip()
            except FileNotFoundError:
                commit = ""
        if not is_commit(commit) or not (self._repo / "snapshots" / commit).is_dir():
            raise RepoNotFound(f"{self._reference} is not in the HF cache at {self._repo.parent}: seed it from the Hub")
        record = SourceRecord(kind="hf-cache", location=self._repo.parent.name, revision=revision)
        return Resolved(self._reference.name, commit, revision, record)

    def whole(self) -> Resolved | None:
        """The commit of the revision, if the cache can miss no part of a model and all files can be verified."""
        try:
            resolved = self.resolve()
        except NotFound:
            return None
        files = {file.path: file for file in self.list_files(resolved)}
        if any((self._repo / "blobs").glob("*.incomplete")) or "config.json" not in files:
            return None
        if not all(file.sha256 or file.git_oid for file in files.values()):
            return None
        if "model.safetensors" in files:
            return resolved
        index = files.get("model.safetensors.index.json")
        if index is None:
            return None
        try:
            shards = set(json.loads(self.read(resolved, index))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return None
        return resolved if shards <= files.keys() else None

    def offer(self) -> Resolved | None:
        """The commit, unless a part of the model is missing, the Hub states other files, or the model brings code that
        may be stored, which only the Hub gives."""
        try:
            resolved = self.whole()
            if resolved is None:
                return None
            if self._settings.may_run_code_of(resolved.repo_id, resolved.commit, named=self._named) and self._has_code(
                resolved
            ):
                logger.info("%s brings code, which is never taken from an HF cache: asking the Hub", resolved.repo_id)
                return None
            return self.confirmed(resolved)
        except (ModelStoreError, OSError) as error:
            logger.warning("%s is passed over: %s", self.label, error)
            return None

    def reach(self) -> str:
        try:
            return "lies in an HF cache on the volume" if self.whole() is not None else ""
        except (ModelStoreError, OSError) as error:
            logger.warning("%s is passed over: %s", self.label, error)
            return ""

    def confirmed(self, resolved: Resolved) -> Resolved | None:
        """`resolved` once the Hub confirms that the cache holds the commit's own files: see `hub.confirmed`."""
        from modelstore.fill.hub import confirmed

        return confirmed(self, resolved, self._settings)

    def lacks(self, resolved: Resolved, stated: Mapping[str, SourceFile]) -> str:
        """The first small file of the commit, as the Hub states it, that a snapshot needs and the cache has not; empty
        if it has all of them. A cache holds only what its programs have opened."""
        cached = {file.path: file for file in self.list_files(resolved)}

        def read(file: SourceFile) -> bytes:
            return self.read(resolved, cached[file.path])

        try:
            folders = {part.folder for part in components(stated, read)}
        except KeyError as error:
            return str(error.args[0])
        return next((p for p, f in stated.items() if folder_of(p) in folders and is_small(f) and p not in cached), "")

    def may_bring_code(self, resolved: Resolved, settings: Settings, *, named: Reference | None) -> bool:
        return False  # every user of the volume may have made the cache

    def _has_code(self, resolved: Resolved) -> bool:
        """Whether a config in the cache names code of the repo."""
        files = {file.path: file for file in self.list_files(resolved)}
        return bool(code_of(files, lambda path: self.read(resolved, files[path]), files.keys()))

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        folder = self._repo / "snapshots" / resolved.commit
        files = []
        for parent, _folders, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                blob = self._inside(path)
                if blob.is_file():
                    sha256 = blob.name if len(blob.name) == 64 and blob.parent.name == "blobs" else None
                    git_oid = blob.name if len(blob.name) == 40 and blob.parent.name == "blobs" else None
                    files.append(SourceFile(str(path.relative_to(folder)), blob.stat().st_size, sha256, git_oid))
        return tuple(sorted(files, key=lambda file: file.path))

    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        return stream_of(self.path_of(resolved, file), offset, length)

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path:
        return self._inside(self._repo / "snapshots" / resolved.commit / file.path)

    def _inside(self, path: Path) -> Path:
        """`path` with its links followed, as long as they stay in this repo's folder."""
        real = Path(os.path.realpath(path))  # a loop of links is a path that does not exist
        if not real.is_relative_to(os.path.realpath(self._repo)):
            raise UnsafeName(f"{path} is a link that leaves its HF cache: it is refused")
        return real


def _expand(path: Path, content: FileRecord, block_bytes: int, blob: Path) -> None:
    """Write the plain form of a compressed file, which has its name only once it is whole. The name until then is of
    this process alone: `<blob>.incomplete` belongs to huggingface_hub."""
    temporary = blob.with_name(f".{blob.name}.{secrets.token_hex(4)}.tmp")
    try:
        with StoredFile(temporary) as target:
            for block in content_blocks(path, content, block_bytes):
                target.write(block)
            target.finish(blob.name, None)
        durable.rename(temporary, blob)
    except BaseException:
        durable.remove_file(temporary)
        raise


def export_to_hf_cache(snapshot: Snapshot, cache: Path, *, revision: str) -> Path:
    """Lay a snapshot out as huggingface_hub does, its files by second names, for programs that look there.

    Existing files are left as they are. Returns the revision's folder. Raises Refused for a snapshot whose files are
    not the repo's own, byte for byte, because the cache would name them by a commit that they are not.
    """
    changed = [file.path for file in snapshot.manifest.files if file.origin is not None]
    if changed or snapshot.manifest.source.kind == "file":
        why = f"{changed[0]} was converted" if changed else "it came from a folder"
        raise Refused(f"{snapshot.key} is not the repo's own bytes ({why}): seed it with --dtype keep, and export that")
    repo = cache / f"models--{snapshot.repo_id.replace('/', '--')}"
    folder, ref = repo / "snapshots" / snapshot.commit, repo / "refs" / revision
    for file in snapshot.manifest.contents:
        path = snapshot.path / file.on_volume.path
        is_large = file.path.endswith(".safetensors")
        blob = repo / "blobs" / (file.sha256 if is_large else git_oid_of(path))
        link = folder / file.path
        for parent in (blob.parent, link.parent):
            tree.check_no_links(cache, parent)
            durable.make_folder(parent)
        tree.check_no_links(cache, blob)
        if file.stored is None:
            durable.link_or_copy(path, blob)
        elif not tree.exists(blob):
            _expand(path, file, snapshot.manifest.block_bytes, blob)
        durable.symlink(os.path.relpath(blob, link.parent), link)
    tree.check_no_links(cache, ref)
    durable.write_atomic(ref, snapshot.commit.encode())
    return folder
