"""Plain or compressed: the form in which new weights are stored, and which is read if both are there.

Compressed weights are fewer bytes, and processors have to decode them. MODELSTORE_COMPRESS=auto weighs the one against
the other by the volume's read rate, which `modelstore doctor` measures and keeps on the volume for all workers:

    read-rate.json                         {"bytes_per_s": 312000000}
"""

from __future__ import annotations

import json
import logging
import math

from modelstore.processors import processors
from modelstore.settings import CompressMode
from modelstore.volume import durable, tree
from modelstore.volume.content import has_decoder
from modelstore.volume.layout import Layout

_SHARE = 0.7  # of the plain bytes, for weights of 16 bits that were bfloat16: docs/benchmarks.md
_DECODED_BYTES_PER_S = 1.2e9  # by one processor, of the plain bytes: docs/benchmarks.md
_WORTH_IT = 0.95
_IMPORTING_PROCESSORS = 1.5  # measured: with two processors in all, a start at 1 GB/s takes longer if it decodes
_LEAST_PROCESSORS = 0.5
_MAX_BYTES = 4096

logger = logging.getLogger(__name__)


def compressed_read_s(reading_s: float, decoding_s: float, *, on: int) -> float:
    """Seconds until compressed weights are in memory, beside the imports of a start. `reading_s`: of the stored bytes;
    `decoding_s`: of one processor; `on`: so many processors."""
    return max(reading_s, decoding_s / max(_LEAST_PROCESSORS, on - _IMPORTING_PROCESSORS))


def is_worth_it(plain_s: float, compressed_s: float) -> bool:
    """Whether the compressed form is read sooner by enough to be worth its decoding."""
    return compressed_s < _WORTH_IT * plain_s


def prefers_compressed(layout: Layout, mode: CompressMode) -> bool:
    """Whether this process stores new weights compressed, and reads that form if both are there. With `auto` False as
    long as nobody has measured the volume, or if the library for compressed weights is missing."""
    if mode != "auto":
        return mode == "always"
    if not has_decoder():
        return False
    bytes_per_s = recorded_rate(layout)
    if bytes_per_s is None:
        return False
    seconds = compressed_read_s(_SHARE / bytes_per_s, 1 / _DECODED_BYTES_PER_S, on=processors())
    return is_worth_it(1 / bytes_per_s, seconds)


def record_rate(layout: Layout, bytes_per_s: float) -> None:
    """Keep a measured read rate for `auto`. Raises OSError."""
    tree.check_no_links(layout.root, layout.read_rate)
    durable.write_atomic(layout.read_rate, json.dumps({"bytes_per_s": round(bytes_per_s)}).encode() + b"\n")


def recorded_rate(layout: Layout) -> float | None:
    """The volume's read rate as it was measured last, in bytes a second; None if it was not, or cannot be read."""
    try:
        record = json.loads(durable.read_file(layout.read_rate, _MAX_BYTES))
        bytes_per_s = float(record["bytes_per_s"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        logger.warning("%s cannot be read (%s): run `modelstore doctor`, which writes it anew", layout.read_rate, error)
        return None
    return bytes_per_s if math.isfinite(bytes_per_s) and bytes_per_s > 0 else None
