"""The bench is honest: every entrant really loads, in turn, cold or warm, and a failure costs one row."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from modelstore.bench import race as race_module
from modelstore.bench.checkpoints import make_checkpoint, seeded
from modelstore.bench.race import (
    Entrant,
    Measured,
    Sample,
    drop_page_cache,
    fill_page_cache,
    load_contenders,
    race,
    run_contender,
    run_worker,
    start_contenders,
    table,
)
from modelstore.cli import main
from modelstore.errors import InvalidSetting, ModelStoreError
from modelstore.load.blocks import CachedPages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("volume") / "float16", 4_000_000, "float16")


@pytest.fixture(scope="module")
def snapshot(checkpoint: Path) -> Path:
    return seeded(checkpoint.parent / "modelstore", checkpoint)


def test_a_checkpoint_is_a_model_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        folder = make_checkpoint(tmp_path / dtype, 5_000_000, dtype, shard_bytes=4_000_000)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert str(model.dtype) == f"torch.{dtype}"
        assert 4_000_000 < sum(p.numel() for p in model.parameters()) * 2 < 6_000_000
        assert len(list(folder.glob("*.safetensors"))) > 1
        tokens = AutoTokenizer.from_pretrained(folder)("a", return_tensors="pt")
        assert model.generate(**tokens, max_new_tokens=1, do_sample=False).shape == (1, 2)
    with pytest.raises(InvalidSetting, match="at least 1MB"):
        make_checkpoint(tmp_path / "tiny", 1000, "float16")


def test_every_contender_loads(checkpoint: Path, snapshot: Path) -> None:
    run_contender("prepare_volume_cache", checkpoint, "cpu")
    results = race(load_contenders(snapshot, checkpoint, device="cpu", cold=True), 0, lambda _line: None)
    missing = {result.label: result.missing for result in results if result.missing}
    assert missing == dict.fromkeys(("InstantTensor", "safetensors `prefetch`"), "for CUDA alone")


def test_on_a_gpu_the_pinned_rate_is_a_floor_and_a_row_that_cannot_be_says_why(
    checkpoint: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entrants = {each.label: each for each in load_contenders(snapshot, checkpoint, device="cuda", cold=False)}
    assert [label.partition(":")[0] for label in entrants][:2] == ["floor", "floor"]
    assert "safetensors `load_file`, and a copy to hold" not in entrants
    if not hasattr(safe_open, "prefetch"):
        assert re.fullmatch(r"safetensors \S+ has none", entrants["safetensors `prefetch`"].missing)
    assert entrants["InstantTensor"].missing in ("", "instanttensor is not installed")
    with pytest.raises(ModelStoreError, match=r"^load_safetensors failed: [^\n]*(CUDA|cuda)"):
        run_contender("load_safetensors", checkpoint, "cuda" if not torch.cuda.is_available() else "cuda:99")


def test_a_worker_starts_and_answers(checkpoint: Path, snapshot: Path) -> None:
    ready, answered = run_worker(checkpoint.parent / "modelstore", f"file://{checkpoint}")
    assert 0 < ready.seconds < answered.seconds
    names = [span["name"] for span in ready.spans]
    assert {"lookup", "read", "import", "build", "ready"} <= set(names)
    labels = [
        c.label for c in start_contenders(checkpoint.parent / "modelstore", {"float16": checkpoint}, device="cpu")
    ]
    assert [label.partition(":")[0] for label in labels[:2]] == ["floor", "floor"]
    seeds = run_contender("start_plain", checkpoint, "cpu")
    assert [span["name"] for span in seeds.spans] == ["import", "build", "read", "ready"]


def test_they_run_in_turn_after_a_round_that_does_not_count() -> None:
    seen: list[str] = []

    def contender(name: str) -> Entrant:
        def run() -> Sample:
            seen.append(name)
            return Sample(float(len(seen)), peak_bytes=len(seen))

        return Entrant(name, run)

    first, second = race([contender("a"), contender("b")], 2, lambda _line: None)
    assert seen == ["a", "b"] * 3
    assert (first.seconds, second.seconds) == ([3.0, 5.0], [4.0, 6.0])
    assert (first.median, first.peak_bytes, first.spread) == (4.0, 5, "3.00 to 5.00")


def test_one_that_fails_costs_its_own_row_and_a_floor_everything(tmp_path: Path) -> None:
    def fails() -> Sample:
        raise ModelStoreError("it has no such option")

    lines: list[str] = []
    results = race([Entrant("floor", lambda: Sample(1.0)), Entrant("theirs", fails)], 1, lines.append)
    assert results[1].missing == "it has no such option"
    assert "| theirs | not measured: it has no such option |" in "\n".join(table(results, 10**9))
    with pytest.raises(ModelStoreError):
        race([Entrant("floor", fails)], 1, lines.append)
    with pytest.raises(ModelStoreError, match="failed"):
        run_contender("load_safetensors", tmp_path / "nothing", "cpu")


def test_cold_is_cold_and_warm_is_warm(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"

    def cached() -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return CachedPages(fd, path.stat().st_size).contain(0, path.stat().st_size)
        finally:
            os.close(fd)

    fill_page_cache(checkpoint)
    assert cached()
    drop_page_cache(checkpoint)
    assert not cached()


def test_ratios_are_to_the_larger_floor() -> None:
    results = [Measured(label, [seconds]) for label, seconds in (("one", 1.0), ("two", 2.0), ("ours", 3.0))]
    assert "| ours | 3.00 | 3.00 to 3.00 | 0.33 | 1.50 |  |" in table(results, 10**9, floors=2)


def test_the_command_measures_in_a_folder_of_its_own_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def race_once(contenders: list[Entrant], runs: int, report: object) -> list[Measured]:
        seen.append([contender.label for contender in contenders])
        return [Measured(contender.label, [1.0] * runs) for contender in contenders]

    monkeypatch.setattr(race_module, "race", race_once)
    arguments = ["bench", "--root", str(tmp_path / "modelstore"), "--size", "2MB", "--runs", "2", "--device", "cpu"]
    done = CliRunner().invoke(main.app, [*arguments, "--json", "--quiet"])
    record = json.loads(done.stdout)
    assert list(record["results"]) == ["loading, cold", "loading, from the page cache", "start, cold"]
    assert record["results"]["start, cold"][0]["seconds"] == [1.0, 1.0]
    assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []
    bad = CliRunner().invoke(main.app, ["bench", "--root", str(tmp_path / "modelstore"), "--size", "12"])
    assert bad.exit_code == 2
    assert "at least 1MB" in bad.output
    assert list(tmp_path.iterdir()) == []
