"""Model references: the texts by which a user names a model.

    org/name[@revision]     hf://org/name[@revision]     file:///absolute/folder     @alias

Parsing is strict and does no I/O: the result is safe to use in a path on the volume. `fill/sources.py`
decides which source answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from modelstore.errors import InvalidReference

DEFAULT_REVISION = "main"
_LOCAL = "local/"

# The Hub's own rules for names (huggingface_hub's validate_repo_id): 96 characters, no "--", no "..". The first of
# them lets `org--name` be one folder on the volume.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/+-]{0,254})")
_ALIAS = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CUT_COMMIT = re.compile(r"[0-9a-f]{4,39}")

_FORMS = "write org/name, org/name@revision, hf://org/name or file:///folder"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed model reference.

    `name` is a repo id (`hub`), an absolute folder (`file`) or an alias (`alias`); `revision` is empty unless `hub`.
    """

    kind: Literal["hub", "file", "alias"]
    name: str
    revision: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "hub":
                return self.name if self.revision == DEFAULT_REVISION else f"{self.name}@{self.revision}"
            case "file":
                return f"file://{self.name}"
            case "alias":
                return f"@{self.name}"


def is_commit(text: str) -> bool:
    """Whether `text` is a full 40-hex commit id."""
    return _COMMIT.fullmatch(text) is not None


def is_cut_commit(text: str) -> bool:
    """Whether `text` may be the beginning of a commit id."""
    return _CUT_COMMIT.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Whether `text` is the name of an alias, without its @."""
    return _ALIAS.fullmatch(text) is not None


def is_repo_id(text: str) -> bool:
    """Whether `text` is `org/name` by the Hub's rules."""
    parts = text.split("/")
    return (
        len(parts) == 2
        and len(text) <= 96
        and all(_NAME.fullmatch(part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def parse_reference(text: str, *, revision: str | None = None) -> Reference:
    """Parse a model reference; `revision` fills in if the text names none.

    Raises InvalidReference, also if the text names a revision and `revision` names another.
    """
    if not text or text != text.strip() or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise InvalidReference(f"{text!r} is not a model reference: {_FORMS}")
    if text.startswith("@"):
        if not is_alias(text[1:]):
            raise InvalidReference(f"{text!r} is not an alias: use lower-case letters, digits, '.', '_' and '-'")
        _no_revision(text, revision)
        return Reference("alias", text[1:])
    if text.startswith("file:"):
        _no_revision(text, revision)
        return _parse_file(text)
    body = text.removeprefix("hf://")
    if "://" in body:
        raise InvalidReference(f"{text!r} has a scheme that is not known: {_FORMS}")
    repo_id, at, named = body.partition("@")
    if not is_repo_id(repo_id):
        hint = ""
        if text.startswith("/"):
            hint = f"; did you mean file://{text}?"
        elif text.startswith("."):
            hint = "; did you mean a folder, as in file:///path/to/it?"
        elif is_repo_id(f"org/{repo_id}"):
            hint = f"; did you mean an organisation's repo, as in org/{repo_id}?"
        raise InvalidReference(f"{text!r} is not a model reference: {_FORMS}{hint}")
    if at and revision and named != revision:
        raise InvalidReference(f"{text!r} names a revision and so does the setting ({revision!r}): keep one of them")
    chosen = named if at else (revision or DEFAULT_REVISION)
    if not _REVISION.fullmatch(chosen) or ".." in chosen or "//" in chosen or chosen.endswith("/"):
        raise InvalidReference(f"{chosen!r} is not a revision of {repo_id}: give a branch, a tag or a 40-digit commit")
    return Reference("hub", repo_id, chosen)


def local_repo_id(reference: Reference) -> str:
    """The repo id under which a folder's snapshots are kept: `local/` and the folder's name."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in reference.name.rpartition("/")[2])
    while "--" in name or ".." in name:
        name = name.replace("--", "-").replace("..", ".")
    repo_id = f"{_LOCAL}{name.strip('-.')[:80]}"
    return repo_id if is_repo_id(repo_id) else f"{_LOCAL}folder"


def revision_of(reference: Reference) -> str:
    """The revision that a reference's commit is recorded under: the path of a folder; empty for an alias."""
    return reference.name if reference.kind == "file" else reference.revision


def repo_id_of(reference: Reference) -> str:
    """The repo id that a reference's snapshots are kept under."""
    return local_repo_id(reference) if reference.kind == "file" else reference.name


def pins(reference: Reference, repo_id: str, commit: str) -> bool:
    """Whether `reference` can mean nothing but this commit: it names the commit in full, or the folder that the
    snapshots of `repo_id` are made of."""
    if reference.kind == "hub":
        return (reference.name, reference.revision) == (repo_id, commit)
    return reference.kind == "file" and local_repo_id(reference) == repo_id


def is_local(repo_id: str) -> bool:
    """Whether `local_repo_id` made it. No Hub is asked for such a name: its owner there would be trusted."""
    return repo_id.startswith(_LOCAL)


def _no_revision(text: str, revision: str | None) -> None:
    if revision not in (None, "", DEFAULT_REVISION):
        raise InvalidReference(f"{text!r} takes no revision, but {revision!r} was given: leave it out")


def _parse_file(text: str) -> Reference:
    try:
        parts = urlsplit(text)
    except ValueError:
        raise InvalidReference(f"{text!r} is not a local folder: write file:///absolute/folder") from None
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or parts.query or parts.fragment:
        raise InvalidReference(f"{text!r} is not a local folder: write file:///absolute/folder")
    if ".." in path.split("/") or not path.isprintable() or path.rstrip("/") == "":
        raise InvalidReference(f"{text!r} is not a plain absolute folder: write it without '..' and control characters")
    return Reference("file", path.rstrip("/"))
