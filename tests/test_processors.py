"""The processors that a process may use."""

from pathlib import Path

import pytest

from modelstore.processors import processors


def test_a_container_has_its_share_of_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(12)))
    quota = tmp_path / "cpu.max"
    for text, count in (("400000 100000\n", 4), ("max 100000\n", 12), ("50000 100000\n", 1), ("", 12)):
        quota.write_text(text)
        assert processors(str(quota)) == count
    assert processors(str(tmp_path / "none")) == 12
