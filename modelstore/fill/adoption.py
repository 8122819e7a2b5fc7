"""Models that already lie on the volume in another layout: found, and made snapshots without a download.

    models--org--name/{refs,snapshots,blobs}     an HF cache, or the folder that holds several of them
    config.json, model.safetensors, …            a folder that `save_pretrained` wrote, or a pipeline's
    name/config.json, org/name/config.json, …    a folder of such folders
    manifest.json, small.tar, big/               a mirror by the RunPod SDK's VolumeCache of either of them

A mirror keeps neither the links nor the refs of an HF cache: the names of its blobs are asked of the Hub, which tells
them by their digests.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from modelstore.errors import BadSafetensors, ModelStoreError, NotFound, Refused, UsageError
from modelstore.fill.folder import LocalFiles, files_below
from modelstore.fill.hf_cache import HfCacheSource
from modelstore.fill.source import ByteStream, Resolved, Source, SourceFile, stream_of
from modelstore.reference import Reference, is_commit, is_repo_id, local_repo_id
from modelstore.settings import Settings
from modelstore.volume import durable
from modelstore.volume.layout import check_file_name

logger = logging.getLogger(__name__)

_INDEXES = ("config.json", "model_index.json")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that lies somewhere, and how to read it."""

    label: str
    source: Source
    resolved: Resolved


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A model among others that cannot be taken."""

    label: str
    error: ModelStoreError


def find(path: Path, settings: Settings, *, repo_id: str | None = None) -> Iterator[LocalModel | Unreadable]:
    """The models at `path`. `repo_id`: the name for a folder without a name of its own.

    Raises NotFound if there is none, and UsageError if a name is missing or given to several.
    """
    if repo_id is not None and not is_repo_id(repo_id):
        raise UsageError(f"--as {repo_id!r} is not a repo id: write it like org/name")
    if not path.is_dir():
        raise NotFound(
            f"{path} is not a folder: give an HF cache, a model's folder, or a mirror by the SDK's VolumeCache"
        )
    if (path / "big").is_dir() and (path / "manifest.json").is_file():
        yield from _in_mirror(path, settings, repo_id)
        return
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        models = [model for model in _in_cache(path.parent.parent, settings) if model.resolved.commit == path.name]
        if models and repo_id is None:
            yield from models
            return
    if _is_model(path):
        yield _folder(str(path), path.name, files_below(path), repo_id, str(path))
        return
    caches = [path] if path.name.startswith("models--") else sorted(path.glob("models--*"))
    if not caches:
        models_below = [folder for folder in sorted([*path.glob("*"), *path.glob("*/*")]) if _is_model(folder)]
        models_below = [folder for folder in models_below if not _is_model(folder.parent)]  # a pipeline's parts
        if not models_below:
            raise NotFound(f"{path} holds no model: neither {' nor '.join(_INDEXES)} nor models--org--name")
        if repo_id is not None and len(models_below) > 1:
            raise UsageError(f"{path} holds {len(models_below)} models: --as can name only one")
        by_name: dict[str, Path] = {}
        for folder in models_below:
            name = local_repo_id(Reference("file", f"/{folder.name}", ""))
            if name in by_name:
                raise UsageError(f"{by_name[name]} and {folder} would both be {name}: adopt each of them, with --as")
            by_name[name] = folder
        for folder in models_below:
            try:
                yield _folder(str(folder), folder.name, files_below(folder), repo_id, str(folder))
            except ModelStoreError as error:
                yield Unreadable(str(folder), error)
        return
    if repo_id is not None:
        raise UsageError(f"{path} is an HF cache, whose models have names: leave out --as")
    models = [model for cache in caches for model in _in_cache(cache, settings)]
    if not models:
        raise NotFound(f"{path} holds no whole model: let the download that it belongs to end, or seed it from the Hub")
    yield from models


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _INDEXES)


def _in_cache(repo: Path, settings: Settings) -> Iterator[LocalModel]:
    """The revisions of one repo in an HF cache, those that are whole."""
    name = repo.name.removeprefix("models--").replace("--", "/", 1)
    if not is_repo_id(name):
        return
    refs = repo / "refs"
    names = [str(ref.relative_to(refs)) for ref in sorted(refs.rglob("*")) if ref.is_file()] if refs.is_dir() else []
    by_commit = {path.name: path.name for path in sorted((repo / "snapshots").glob("*")) if is_commit(path.name)}
    for ref in names:
        try:
            by_commit[durable.read_file(refs / ref).decode(errors="replace").strip()] = ref
        except OSError as error:
            logger.warning("%s is passed over: %s", refs / ref, error.strerror)
    for revision in by_commit.values():
        source = HfCacheSource(repo.parent, Reference("hub", name, revision), settings)
        try:
            resolved = source.whole()
        except (ModelStoreError, OSError) as error:
            logger.warning("%s is passed over: %s", repo, error)
            continue
        if resolved is not None:
            yield LocalModel(str(repo), source, resolved)


def _folder(label: str, name: str, paths: Mapping[str, Path], repo_id: str | None, revision: str) -> LocalModel:
    source = LocalFiles(
        repo_id or local_repo_id(Reference("file", f"/{name}", "")), "main" if repo_id else revision, name, paths
    )
    return LocalModel(label, source, source.resolve())


def _in_mirror(mirror: Path, settings: Settings, repo_id: str | None) -> Iterator[LocalModel]:
    """The mirror of the SDK's VolumeCache: files by their full names on the container, the small ones in a tar."""
    with TemporaryDirectory(prefix="modelstore-") as folder:
        paths = {f"/{name}": path for name, path in files_below(mirror / "big").items()}
        paths |= _unpacked(mirror / "small.tar", Path(folder))
        tops = sorted({name.rpartition("/")[0] for name in paths if name.rpartition("/")[2] in _INDEXES})
        tops = [top for top in tops if not any(top.startswith(f"{other}/") for other in tops)]
        if repo_id is not None and len(tops) > 1:
            raise UsageError(f"{mirror} holds {len(tops)} models: --as can name only one")
        for top in tops:
            inside = {name.removeprefix(f"{top}/"): path for name, path in paths.items() if name.startswith(f"{top}/")}
            yield _folder(f"{mirror}: {top}", top.rpartition("/")[2], inside, repo_id, top)
        repos: dict[str, dict[str, Path]] = {}
        for name, path in paths.items():
            before, blobs, digest = name.rpartition("/blobs/")
            repo = before.rpartition("/")[2]
            if blobs and repo.startswith("models--"):
                repos.setdefault(repo.removeprefix("models--").replace("--", "/", 1), {})[digest] = path
        for name, blobs_of_repo in sorted(repos.items()):
            source = _Blobs(Reference("hub", name, "main"), settings, blobs_of_repo)
            yield LocalModel(f"{mirror}: {name}", source, source.resolve())
        if not tops and not repos:
            raise NotFound(f"{mirror} is a mirror of something else than models")


def _unpacked(archive: Path, folder: Path) -> dict[str, Path]:
    if not archive.is_file():
        return {}
    try:
        with os.fdopen(durable.open_for_read(archive), "rb") as file, tarfile.open(fileobj=file) as tar:
            members = [member for member in tar.getmembers() if member.isfile()]
            for member in members:
                check_file_name(member.name)
            tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise BadSafetensors(f"{archive} cannot be unpacked ({error}): seed the model from the Hub") from error
    return {f"/{member.name}": folder / member.name for member in members}


class _Blobs(Source):
    """An HF cache that has lost its links: the Hub names the files, the blobs are here."""

    over_network = False

    def __init__(self, reference: Reference, settings: Settings, blobs: Mapping[str, Path]) -> None:
        from modelstore.fill.hub import HubSource

        if settings.offline:
            raise Refused(
                "a mirror has lost its files' names, the Hub tells them, and MODELSTORE_OFFLINE is set: unset it"
            )
        self._hub = HubSource(reference, settings)
        self._blobs = blobs

    def resolve(self) -> Resolved:
        resolved = self._hub.resolve()
        return replace(resolved, record=replace(resolved.record, kind="hf-cache", compared_with="hub"))

    def reach(self) -> str:
        return "lies in a mirror"

    def may_bring_code(self, resolved: Resolved, settings: Settings, *, named: Reference | None) -> bool:
        return False

    def list_files(self, resolved: Resolved) -> tuple[SourceFile, ...]:
        return self._hub.list_files(resolved)

    def open(
        self, resolved: Resolved, file: SourceFile, offset: int, length: int
    ) -> AbstractContextManager[ByteStream]:
        path = self.path_of(resolved, file)
        if path is None:
            raise NotFound(
                f"the mirror lacks {file.path} of {resolved.repo_id}@{resolved.commit[:12]}: seed it from the Hub"
            )
        return stream_of(path, offset, length)

    def path_of(self, resolved: Resolved, file: SourceFile) -> Path | None:
        return self._blobs.get(file.sha256 or file.git_oid or "")
