"""An engine's compiled code from worker to worker: only the same facts, and nothing about it ends a start."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.engines import compiled_code
from handler.engines.compiled_code import CompiledCode
from modelstore.settings import Settings
from modelstore.volume import engine_caches
from modelstore.volume.layout import Layout, SnapshotKey

KEY = SnapshotKey("org/name", "a" * 40, "float16")
FACTS: dict[str, Any] = {
    "engine": "vLLM",
    "versions": {"vllm": "0.32.0", "torch": "2.13.0", "triton": "3.9", "python": "3.12.1"},
    "arguments": ["--dtype", "float16", "--max-model-len", "512"],
}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for name in list(os.environ):
        if name.startswith(("VLLM_", "TORCH", "ATEN_")):
            monkeypatch.delenv(name)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "store").mkdir()
    return Settings(root=tmp_path / "store", engine_cache="write", worker_id="w1")


def start(settings: Settings, facts: dict[str, Any] = FACTS, *, key: SnapshotKey = KEY) -> CompiledCode:
    """A worker's start up to the moment at which its engine compiles."""
    code = CompiledCode(settings)
    code.restore(key, facts)
    return code


def compile_into(code: CompiledCode) -> Path:
    folder = Path(code.environment["TORCHINDUCTOR_CACHE_DIR"])
    folder.mkdir()
    (folder / "kernel.so").write_bytes(b"code")
    return folder / "kernel.so"


def publish(settings: Settings, facts: dict[str, Any] = FACTS) -> None:
    code = start(settings, facts)
    assert not code.is_restored
    compile_into(code)
    code.publish("Paris")
    code.close()


def test_the_second_worker_gets_what_the_first_compiled(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    publish(settings)
    code = start(settings)
    assert code.is_restored
    assert (Path(code.environment["TORCHINDUCTOR_CACHE_DIR"]) / "kernel.so").read_bytes() == b"code"
    assert code.is_right("Paris")
    assert not code.is_right("")
    code.publish("Paris")
    code.close()
    assert [record.message.split()[0] for record in caplog.records] == ["no", "published:", "restored"]


def _with(**changes: Any) -> dict[str, Any]:
    return {**FACTS, **changes}


@pytest.mark.parametrize(
    "other",
    [
        *(_with(versions=FACTS["versions"] | {name: "0"}) for name in FACTS["versions"]),
        _with(arguments=[*FACTS["arguments"][:-1], "1024"]),
        _with(engine="other"),
        "another commit",
        "another dtype",
        "another instruction set",
        "another GPU",
        "two GPUs",
        "another number of processors",
        *("VLLM_USE_AOT_COMPILE", "VLLM_ATTENTION_BACKEND", "TORCHINDUCTOR_MAX_AUTOTUNE", "ATEN_CPU_CAPABILITY"),
        *("OMP_NUM_THREADS", "TORCH_CUDA_ARCH_LIST", "CUDA_MODULE_LOADING", "ONEDNN_MAX_CPU_ISA"),
    ],
    ids=str,
)
def test_code_for_other_facts_is_never_used(settings: Settings, monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    monkeypatch.setattr(
        compiled_code, "gpus", lambda _visible: ["NVIDIA H100, 9.0, driver 570"] * (other == "two GPUs")
    )
    publish(settings)
    facts, key = (other, KEY) if isinstance(other, dict) else (FACTS, KEY)
    if other == "another commit":
        key = replace(KEY, commit="b" * 40)
    elif other == "another dtype":
        key = replace(KEY, dtype="bfloat16")
    elif other == "another instruction set":
        monkeypatch.setattr(compiled_code, "_instruction_set", lambda: ["avx2"])
    elif other == "another number of processors":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(97)))
    elif other in ("another GPU", "two GPUs"):
        monkeypatch.setattr(compiled_code, "gpus", lambda _visible: ["NVIDIA H200, 9.0, driver 570"] * 2)
    elif isinstance(other, str):
        monkeypatch.setenv(other, "1")
    code = start(settings, facts, key=key)
    assert not code.is_restored
    assert not list(Path(code.environment["TORCHINDUCTOR_CACHE_DIR"]).parent.iterdir())
    code.close()


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "VLLM_HOST_IP", "CUDA_VISIBLE_DEVICES", "HF_TOKEN", "HOME"])
def test_what_changes_from_host_to_host_is_no_fact(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish(settings)
    monkeypatch.setenv(name, "something secret")
    code = start(settings)
    assert code.is_restored
    assert "something secret" not in "".join(path.read_text() for path in settings.root.rglob("manifest.json"))
    code.close()


def test_names_of_the_model_in_jobs_and_limits_are_no_facts_of_ours() -> None:
    instruction_set = compiled_code._instruction_set()
    assert instruction_set == sorted(instruction_set)
    assert set(instruction_set) & {"avx2", "asimd"}
    assert not set(instruction_set) & {"pti", "ht", "nx"}


@pytest.mark.parametrize("damage", ["archive", "manifest", "hmac", "pipe", "unreadable"])
def test_damaged_code_is_not_used_and_the_start_goes_on(
    settings: Settings, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(settings)
    (folder,) = Layout(settings.root).engine_caches_of(KEY).iterdir()
    if damage == "archive":
        (folder / "archive.tar.zst").write_bytes(b"other")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "hmac":
        settings = replace(settings, engine_cache_key="a secret of this worker")
    elif damage == "pipe":
        (folder / "archive.tar.zst").unlink()
        os.mkfifo(folder / "archive.tar.zst")
    else:
        monkeypatch.setattr(engine_caches.durable, "read_file", _fails)
    code = start(settings)
    assert not code.is_restored
    assert "is not used" in caplog.text
    compile_into(code)
    code.publish("Paris")
    code.close()


def _fails(*_arguments: Any) -> bytes:
    raise PermissionError(13, "Permission denied")


def test_an_archive_that_cannot_be_unpacked_leaves_nothing(settings: Settings) -> None:
    publish(settings)
    (folder,) = Layout(settings.root).engine_caches_of(KEY).iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    cache = engine_caches.EngineCache(manifest["facts"], "Paris", b"no archive, with the right checksum")
    engine_caches.quarantine(Layout(settings.root), KEY, folder.name)
    assert engine_caches.publish(Layout(settings.root), KEY, cache, "w2", None)
    code = start(settings)
    assert not code.is_restored
    assert not list(Path(code.environment["VLLM_CACHE_ROOT"]).parent.iterdir())
    code.close()


def test_code_that_answers_wrongly_is_moved_away_and_made_again(settings: Settings) -> None:
    publish(settings)
    code = start(settings)
    assert not code.is_right("")
    kernel = Path(code.environment["TORCHINDUCTOR_CACHE_DIR"]) / "kernel.so"
    code.forget()
    assert not kernel.exists()
    code.quarantine()
    assert not list(Layout(settings.root).engine_caches_of(KEY).iterdir())
    compile_into(code)
    code.publish("Paris")
    code.close()
    again = start(settings)
    assert again.is_restored
    again.close()


def test_read_only_means_that_nothing_is_written(settings: Settings) -> None:
    reading = replace(settings, engine_cache="read")
    code = start(reading)
    compile_into(code)
    code.publish("Paris")
    code.close()
    assert not list(settings.root.iterdir())
    publish(settings)
    code = start(reading)
    assert code.is_restored
    code.forget()
    compile_into(code)
    code.publish("Paris")
    code.close()


@pytest.mark.parametrize("why", ["quota", "volume", "no answer", "too much"])
def test_what_cannot_be_published_is_a_line(
    settings: Settings, why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    if why == "quota":
        settings = replace(settings, quota_bytes=10)
    elif why == "volume":
        monkeypatch.setattr(engine_caches.durable, "publish_folder", _fails)
    elif why == "too much":
        monkeypatch.setattr("modelstore.volume.archive.UNPACKED_BYTES", 1)
    code = start(settings)
    compile_into(code)
    code.publish("" if why == "no answer" else "Paris")
    code.close()
    assert "not published" in caplog.text
    assert not list(settings.root.rglob("manifest.json"))


def test_two_workers_on_one_host_have_a_folder_each(settings: Settings) -> None:
    first, second = CompiledCode(settings), CompiledCode(settings)
    assert first.environment["VLLM_CACHE_ROOT"] != second.environment["VLLM_CACHE_ROOT"]
    for code in (first, second):
        code.close()
