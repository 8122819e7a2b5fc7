"""Fixtures of tests that render chat templates."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from handler.engines.chat_template import Renderer


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """One process for the tests of a file."""
    made = Renderer()
    made.start()
    yield made
    made.close()
