"""LoRA adapters of a model: snapshots of their own, stored as they come, compared before they are used.

style=org/style@revision      the name in jobs, and the reference; an alias may stand for it
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modelstore.errors import IntegrityError, NotServable
from modelstore.reference import Reference, is_repo_id
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume import durable
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.pins import UsageMark, wait_while_evicting
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot

if TYPE_CHECKING:
    from modelstore.store import ModelStore

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
MOST_RANK = 512  # vLLM's
_LOCAL = "local/"  # the repo ids of models that came from a folder


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on the volume. `name`: in jobs; `config`: its adapter_config.json; `rank`: of its largest matrices."""

    name: str
    snapshot: Snapshot
    config: Mapping[str, Any]
    rank: int
    in_use: UsageMark


def find_or_make(settings: Settings, name: str, base: SnapshotKey, timeline: Timeline) -> Adapter:
    """The adapter of this name in the settings, on the volume, with the bytes that were published.

    `base`: the model that it is for. Raises NotServable if it is made for another one or is no LoRA adapter, and the
    errors of `ModelStore.ensure`.
    """
    from modelstore.store import ModelStore  # its imports are for a start with adapters alone

    # The operator has named it; adapters are small, and their libraries open plain files.
    store = ModelStore.of(replace(settings, allowed_models=(), compress="never"))
    reference: Reference = settings.adapters[name]
    with timeline.span("adapter", name):
        snapshot = store.ensure(reference, dtype="keep")
        if snapshot.has_compressed_files:
            raise NotServable(
                f"the adapter {snapshot.key} is opened as plain files: run `modelstore expand {reference} --dtype keep`"
            )
        mark = UsageMark(store.layout, snapshot.key, settings.worker_id)
        try:
            gone = wait_while_evicting(store.layout, snapshot.key)
            if gone or not verify_snapshot(snapshot).intact:
                snapshot = _mended(store, reference, None if gone else snapshot)
            config = _config_of(snapshot)
            rank = _checked(config, str(snapshot.key), base)
        except BaseException:
            mark.end()
            raise
    return Adapter(name, snapshot, config, rank, mark)


def _mended(store: ModelStore, reference: Reference, damaged: Snapshot | None) -> Snapshot:
    """Raises NotServable if an adapter cannot be made again: the model's own bytes are not at fault."""
    try:
        return store.ensure(reference, dtype="keep", damaged=damaged)
    except IntegrityError as error:
        raise NotServable(f"the adapter {reference} is damaged, and cannot be made again: {error}") from error


def _config_of(snapshot: Snapshot) -> Mapping[str, Any]:
    try:
        config = json.loads(durable.read_file(snapshot.path / CONFIG))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise NotServable(f"{snapshot.key} is no adapter: MODEL_ADAPTERS names repos with {CONFIG}")
    return config


def _checked(config: Mapping[str, Any], label: str, base: SnapshotKey) -> int:
    """The rank of a LoRA adapter for this model. Raises NotServable."""
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != "LORA" or not isinstance(rank, int) or rank < 1:
        raise NotServable(f"{label} is an adapter of type {str(kind)[:40]!r}: only LoRA adapters are served")
    patterns = config.get("rank_pattern")
    ranks = [
        rank,
        *(each for each in (patterns.values() if isinstance(patterns, dict) else ()) if isinstance(each, int)),
    ]
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and is_repo_id(named):
        is_local = base.repo_id.startswith(_LOCAL)
        names = [(each.rpartition("/")[2] if is_local else each).lower() for each in (named, base.repo_id)]
        if names[0] != names[1]:
            raise NotServable(
                f"{label} is an adapter of {named}, and the model is {base.repo_id}: name another adapter"
            )
    else:
        logger.warning("%s does not say which model it is an adapter of: it is used with %s", label, base.repo_id)
    if max(ranks) > MOST_RANK:
        raise NotServable(f"{label} has rank {max(ranks)}: adapters are served up to {MOST_RANK}")
    return max(ranks)
