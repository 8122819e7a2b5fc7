"""Fixtures of the tests of fills."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import write_repo
from tests.support.compressed import born_in
from tests.support.hub import Hub


@pytest.fixture
def tensors(hub: Hub) -> dict[str, torch.Tensor]:
    """Those of org/name, in two shards, as its source has them."""
    tensors = born_in(torch.bfloat16)
    write_repo(hub.folder / "org" / "name", tensors, shards=2, save=save_file)
    return tensors
