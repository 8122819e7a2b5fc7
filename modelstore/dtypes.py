"""The storage dtypes: what a snapshot's weights are stored as. `keep` is whatever the source has."""

from __future__ import annotations

DTYPES = ("float16", "bfloat16", "float32", "keep")
