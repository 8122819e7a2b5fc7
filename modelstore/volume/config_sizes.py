"""Whether the sizes in a model's config can be those of its weights, looked at before a model is built from it.

A config is a program of a kind: `"num_hidden_layers": 1000000000` makes its reader build layers until the memory is
full, and no error says why. So a number of layers is compared with the number of tensors, and a width with the longest
side of a tensor, generously: a refused number is orders of magnitude away, never a model with unusual parts.

Not compared: lengths of texts, bases of rotary embeddings, token ids, and all else that no weight bears out. Their
can make a reader compute is bounded while the model is built (`loader.bounded_build`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstore.errors import BadConfig
from modelstore.volume import durable

_NO_SIZES = re.compile(r"theta|eps|scal|std|base|factor|prob|drop|rate|_ids?$|index|label")
_SIZES = re.compile(r"size|dim|width|channel|rank|vocab|d_model|d_ff|n_embd|n_inner")
_LAYERS = re.compile(r"layer|block|depth|stage|repeat")
_COUNTS = re.compile(r"head|expert|group|kernel|query|queries")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that a checkpoint's weights bear out. Without arguments: bounds that no published checkpoint comes
    near."""

    tensors: int = 1 << 16
    longest_side: int = 1 << 28

    def check(self, config: Mapping[str, Any], path: str) -> None:
        """Raise BadConfig if a number in `config`, at any depth, is beyond what the weights can have; `path` is the
        config's name in messages."""
        for name, value in _numbers(config):
            kind, limit = self._limit(name)
            if limit is not None and value > limit:
                raise BadConfig(
                    f"{path} says {name}={value:g}, which its weights, with at most {limit} {kind}, do not bear out: "
                    "use another revision"
                )

    def _limit(self, name: str) -> tuple[str, int | None]:
        if _NO_SIZES.search(name):
            return "", None
        if _SIZES.search(name):
            return "elements on a side", max(1 << 27, 64 * self.longest_side)
        if _LAYERS.search(name):
            return "layers", max(1024, self.tensors)
        if _COUNTS.search(name):
            return "parts", max(4096, self.tensors, self.longest_side)
        return "", None


def check_configs(folder: Path, paths: Iterable[str], name: str) -> None:
    """`Sizes().check` for each `config.json` among the `paths` of a snapshot in `folder`, before a library parses it:
    one of an earlier version may hold a number that is refused today. One that cannot be read is for its reader to
    find."""
    for path in paths:
        if path.rpartition("/")[2] == "config.json":
            try:
                config = json.loads(durable.read_file(folder / path))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(config, dict):
                Sizes().check(config, f"{path} of {name}")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a config with the name of the entry that holds it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("label2id", "id2label"):  # their keys are words of a data set
                yield from _numbers(inner, str(key).lower())
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
