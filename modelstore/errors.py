"""Every error the package raises on purpose, as one tree.

    ModelStoreError                     1  failed
    ├── UsageError (ValueError)         2  usage
    │   ├── InvalidReference
    │   └── InvalidSetting
    ├── NotFound (LookupError)          3  not found
    │   ├── RepoNotFound
    │   ├── RevisionNotFound
    │   ├── SnapshotNotFound
    │   └── NoWeights
    ├── AccessDenied                    4  access (gated, token)
    ├── IntegrityError                  5  integrity
    │   ├── DigestMismatch
    │   ├── BadSafetensors
    │   ├── BadConfig
    │   └── BadManifest
    ├── NoSpace                         6  no space or quota
    ├── DoesNotFit                      6  no room on the GPU
    ├── WaitTimeout (TimeoutError)      7  waited too long
    ├── Refused                         8  refused (policy)
    │   ├── UnsafeName
    │   ├── PickleRefused
    │   ├── CodeRefused
    │   ├── WeightOverflow
    │   ├── NotServable
    │   └── FormatTooNew
    ├── ClaimLost                       1
    ├── HubUnavailable                  1
    ├── RootUnusable                    1
    │   └── ReadOnlyVolume
    ├── VolumeUnavailable               1
    │   ├── ObjectMissing
    │   └── AlreadyThere
    ├── DeviceFailed                    1
    └── ProcessFailed                   1
        └── ServerFailed

The number is the exit code of the command line. A message is one line: the event, its object, and the remedy. Errors
of other libraries are mapped to these when they enter the package; an error that is not in this tree is a bug of ours.
"""

from __future__ import annotations

from typing import ClassVar

from modelstore.units import one_line

__all__ = [
    "AccessDenied",
    "AlreadyThere",
    "BadConfig",
    "BadManifest",
    "BadSafetensors",
    "ClaimLost",
    "CodeRefused",
    "DeviceFailed",
    "DigestMismatch",
    "DoesNotFit",
    "FormatTooNew",
    "HubUnavailable",
    "IntegrityError",
    "InvalidReference",
    "InvalidSetting",
    "ModelStoreError",
    "NoSpace",
    "NoWeights",
    "NotFound",
    "NotServable",
    "ObjectMissing",
    "PickleRefused",
    "ProcessFailed",
    "ReadOnlyVolume",
    "Refused",
    "RepoNotFound",
    "RevisionNotFound",
    "RootUnusable",
    "ServerFailed",
    "SnapshotNotFound",
    "UnsafeName",
    "UsageError",
    "VolumeUnavailable",
    "WaitTimeout",
    "WeightOverflow",
]


_MAX_CHARACTERS = 2000


class ModelStoreError(Exception):
    """The root of the tree; its text is one printable line that gives the event, its object, and the remedy."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, _MAX_CHARACTERS))


class UsageError(ModelStoreError, ValueError):
    """The caller's input cannot be used."""

    exit_code = 2


class InvalidReference(UsageError):
    """A model reference that does not parse."""


class InvalidSetting(UsageError):
    """A setting that does not parse; the message names the variable."""


def not_installed(error: ModuleNotFoundError, extra: str) -> NotFound:
    """The error for a library that an extra of this package brings. A library may name it only in the error's cause."""
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "name", None):
        cause = cause.__cause__ or cause.__context__
    name = getattr(cause, "name", None) or str(error)
    return NotFound(f"{name} is not installed: pip install 'runpod-modelstore[{extra}]'")


class NotFound(ModelStoreError, LookupError):
    """The requested thing does not exist."""

    exit_code = 3


class RepoNotFound(NotFound):
    """The Hub knows no such repo, or does not show it to this token."""


class RevisionNotFound(NotFound):
    """The repo has no such branch, tag or commit."""


class SnapshotNotFound(NotFound):
    """The store holds no such snapshot."""


class NoWeights(NotFound):
    """The source holds no weights that could be stored."""


class AccessDenied(ModelStoreError):
    """The Hub refuses this token: a gated or private repo, or a token that is missing or wrong."""

    exit_code = 4


class IntegrityError(ModelStoreError):
    """Bytes that are not as they should be."""

    exit_code = 5


class DigestMismatch(IntegrityError):
    """A file's bytes do not have the digest that was stated for them."""


class BadSafetensors(IntegrityError):
    """A safetensors file whose header is invalid or does not describe the bytes."""


class BadConfig(IntegrityError):
    """A config whose sizes are not those of its weights."""


class BadManifest(IntegrityError):
    """A manifest that cannot be read, or that its own digest contradicts."""


class NoSpace(ModelStoreError):
    """The volume, or its quota, is full; `free_bytes` was left, 0 if a write failed."""

    exit_code = 6

    def __init__(self, message: str, *, free_bytes: int = 0) -> None:
        super().__init__(message)
        self.free_bytes = free_bytes


class DoesNotFit(ModelStoreError):
    """The model is larger than the free memory of the GPU."""

    exit_code = 6


class WaitTimeout(ModelStoreError, TimeoutError):
    """Another worker's claim was waited for longer than allowed."""

    exit_code = 7


class Refused(ModelStoreError):
    """Possible, but against the policy in force."""

    exit_code = 8


class UnsafeName(Refused):
    """A name that could leave its folder or mislead its reader."""


class PickleRefused(Refused):
    """The weights are pickles, which can run code when they are opened."""


class CodeRefused(Refused):
    """The repo brings code of its own, and it was not allowed to run."""


class WeightOverflow(Refused):
    """Weights that do not fit the storage dtype. `problem` says which, without a remedy."""

    def __init__(self, problem: str, remedy: str, *, tensors: tuple[str, ...]) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem
        self.tensors = tensors


class NotServable(Refused):
    """A model of a kind that the engine does not serve, or that the libraries here cannot load."""


class FormatTooNew(Refused):
    """The store was written by a newer version of this package."""


class ClaimLost(ModelStoreError):
    """A higher generation exists: another process fills this snapshot now."""


class HubUnavailable(ModelStoreError):
    """The Hub could not be reached, or answered that it is busy; `retry_after_s` if it said for how long."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RootUnusable(ModelStoreError):
    """The store's root cannot be created, read or written."""


class ReadOnlyVolume(RootUnusable):
    """The volume is not changed, because it cannot do what that takes, or as it is set; models on it are served."""


class VolumeUnavailable(ModelStoreError):
    """A volume's S3 address does not answer, or not as the request expects."""


class ObjectMissing(VolumeUnavailable):
    """An object or an upload on the volume is gone: another process has completed or ended it."""


class AlreadyThere(VolumeUnavailable):
    """An object is on the volume that was to be written only if it was not."""


class DeviceFailed(ModelStoreError):
    """The GPU's driver is missing, or refuses a call; `code`: its number of the error, if it gave one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class ProcessFailed(ModelStoreError):
    """A process of ours has ended by itself: a conversion, a measurement."""


class ServerFailed(ProcessFailed):
    """The server of an engine has ended by itself."""
