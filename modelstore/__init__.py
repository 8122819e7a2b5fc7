"""A shared model store on a network volume, and the worker that warm-starts from it.

>>> from modelstore import ModelStore, load_model
>>> store = ModelStore("/runpod-volume/modelstore")
>>> snapshot = store.ensure("org/name", revision="main", dtype="float16")
>>> model = load_model(snapshot, device="cuda")

The names below are loaded when first used: looking at a store imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelstore.errors import ModelStoreError
    from modelstore.load.model import load_model, load_tensors
    from modelstore.settings import Settings
    from modelstore.store import ModelStore
    from modelstore.volume.snapshots import Snapshot

__version__ = "0.1.0"
__all__ = ["ModelStore", "ModelStoreError", "Settings", "Snapshot", "__version__", "load_model", "load_tensors"]

_HOME = {
    "ModelStore": "store",
    "ModelStoreError": "errors",
    "Settings": "settings",
    "Snapshot": "volume.snapshots",
    "load_model": "load.model",
    "load_tensors": "load.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"modelstore.{_HOME[name]}"), name)
