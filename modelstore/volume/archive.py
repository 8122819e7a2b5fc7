"""A folder of small files as one archive in memory, and back: tar, compressed with zstd.

Only regular files go in and come out, under plain relative names, with their times, because a build tool compares
those. Both sides have limits: an archive from a shared volume may have been made to fill a worker's disk.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from modelstore.errors import IntegrityError, NoSpace, UnsafeName
from modelstore.units import size
from modelstore.volume.layout import check_file_name

ARCHIVE_BYTES = 1 << 30
UNPACKED_BYTES = 4 << 30
FILES = 100_000
_LEVEL = 3
_FILE_MODE = 0o600


def pack(folder: Path, without: re.Pattern[str] | None = None) -> bytes:
    """The regular files of a folder as an archive, but for those whose name `without` matches. Raises NoSpace if they
    are more than an archive may hold."""
    import zstandard

    packed = io.BytesIO()
    total = 0
    with (
        zstandard.ZstdCompressor(_LEVEL, threads=-1).stream_writer(packed, closefd=False) as compressed,
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        files = (path for path in _regular_files(folder) if without is None or not without.fullmatch(path.name))
        for count, path in enumerate(files):
            state = path.lstat()
            total += state.st_size
            if count >= FILES or total > UNPACKED_BYTES:
                raise NoSpace(f"{folder} holds more than {FILES} files or {size(UNPACKED_BYTES)}: it is not stored")
            info = tarfile.TarInfo(check_file_name(path.relative_to(folder).as_posix()))
            info.size, info.mtime = state.st_size, state.st_mtime
            with path.open("rb") as file:
                tar.addfile(info, file)
            if packed.tell() > ARCHIVE_BYTES:
                break
    if packed.tell() > ARCHIVE_BYTES:
        raise NoSpace(f"{folder} takes {size(packed.tell())} as an archive: it is not stored")
    return packed.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """Write the files of an archive below an empty folder of this user's. Raises IntegrityError, or OSError if this
    host's disk is full; part of the files may have been written then."""
    import zstandard

    total = 0
    try:
        with (
            zstandard.ZstdDecompressor().stream_reader(archive) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            for count, info in enumerate(tar):
                total += info.size
                if not info.isreg() or count >= FILES or total > UNPACKED_BYTES:
                    raise IntegrityError(f"an archive is refused: {info.name[:120]!r} is no file, or it holds too much")
                _write(tar, info, folder / check_file_name(info.name))
    except (tarfile.TarError, zstandard.ZstdError, UnsafeName, EOFError, ValueError, OverflowError) as error:
        raise IntegrityError(f"an archive cannot be unpacked: {error}") from error


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(info)
    assert source is not None
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _FILE_MODE)
    with os.fdopen(fd, "wb") as file:
        written = 0
        while part := source.read(1 << 20):
            written += file.write(part)
        if written != info.size:
            raise tarfile.ReadError(f"{info.name} ends early")
    os.utime(path, (info.mtime, info.mtime))


def _regular_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path
