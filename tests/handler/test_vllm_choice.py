"""vLLM is taken by itself if it is there, there is a GPU, and it has the model's class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from handler.engine_start import engine_of
from handler.engines import vllm_choice
from handler.engines.vllm_start import _names
from modelstore.errors import NotServable
from modelstore.pending_start import PendingStart
from modelstore.reference import parse_reference
from modelstore.servable import check_nothing
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.timeline import Timeline
from modelstore.warmstart import find_or_make
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.vllm import PYTHON, needs_vllm

REGISTRY = """
from vllm import nothing_that_is_imported_here
_TEXT_GENERATION_MODELS = {
    # a comment
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    **OTHERS,
}
_EMBEDDING_MODELS = {"BertModel": ("bert", "BertModel")}
_MULTIMODAL_MODELS: dict[str, tuple[str, str]] = {"LlavaForConditionalGeneration": ("llava", "Llava")}
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_choice, "gpus", lambda _visible: ["NVIDIA H100, 9.0, driver 570"])


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has a vLLM with this table."""
    models = tmp_path / "site" / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("raise AssertionError('it is not imported')")
    (models / "registry.py").write_text(REGISTRY)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec python3 "$@"\n')
    program.chmod(0o755)
    return program


def settings(root: Path, python: Path | None) -> Settings:
    return Settings(root=root, model=parse_reference("org/name"), vllm_python=python)


@pytest.mark.parametrize(
    ("architectures", "served"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["Other", "LlavaForConditionalGeneration"], "LlavaForConditionalGeneration"),
        (["BertModel"], ""),
        (["Other"], ""),
        ([], ""),
        (None, ""),
        ("LlamaForCausalLM", ""),
        ([7, ["LlamaForCausalLM"]], ""),
    ],
)
def test_the_class_is_looked_for_in_its_tables(
    tmp_path: Path, python: Path, architectures: object, served: str
) -> None:
    config = {} if architectures is None else {"architectures": architectures}
    assert vllm_choice.architecture_served(settings(tmp_path, python), config) == served


def test_it_is_possible_with_a_gpu_and_a_vllm(tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not vllm_choice.is_possible(settings(tmp_path, python))
    monkeypatch.setattr(vllm_choice, "gpus", lambda _visible: ["NVIDIA H100, 9.0, driver 570"])
    assert vllm_choice.is_possible(settings(tmp_path, python))
    assert not vllm_choice.is_possible(settings(tmp_path, None)), "this environment has none"
    assert not vllm_choice.is_possible(settings(tmp_path, tmp_path / "missing"))


@pytest.mark.parametrize("registry", [None, "not Python (", "_TEXT_GENERATION_MODELS = dict()"])
def test_an_unknown_registry_serves_nothing(tmp_path: Path, python: Path, registry: str | None) -> None:
    path = tmp_path / "site" / "vllm" / "model_executor" / "models" / "registry.py"
    path.unlink()
    if registry is not None:
        path.write_text(registry)
    assert not vllm_choice.architecture_served(settings(tmp_path, python), {"architectures": ["LlamaForCausalLM"]})


@needs_vllm
def test_the_real_ones_table_is_understood(tmp_path: Path) -> None:
    names = vllm_choice._architectures(vllm_choice._package(PYTHON) or tmp_path)
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForConditionalGeneration"} <= names
    assert len(names) > 150


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("architecture", "engine"), [("llama", "vllm"), ("gpt_neox", "text")])
def test_a_model_is_put_on_the_volume_and_gets_its_engine(
    hub: Hub, store: ModelStore, python: Path, architecture: str, engine: str
) -> None:
    write_model(hub.folder / "org" / "name", seed=1, architecture=architecture)
    chosen = replace(store.settings, model=parse_reference("org/name"), vllm_python=python)
    timeline = Timeline()
    name, reason = engine_of(find_or_make(chosen, timeline, check_nothing), chosen)
    assert name == engine
    assert "LlamaForCausalLM" in reason if engine == "vllm" else reason == "by the model"
    assert {"download", "publish"} <= {span.name for span in timeline.spans}
    hub.served.reset()
    assert engine_of(find_or_make(chosen, Timeline(), check_nothing), chosen)[0] == engine
    assert hub.served.requests == []


def test_a_model_that_cannot_be_served_is_told_before_its_download(hub: Hub, store: ModelStore) -> None:
    write_model(hub.folder / "org" / "name", seed=1)

    def refuse(_config: object, _files: object, label: str) -> None:
        raise NotServable(f"{label} cannot be served")

    with pytest.raises(NotServable):
        find_or_make(replace(store.settings, model=parse_reference("org/name")), Timeline(), refuse)
    assert not any("safetensors" in str(request) for request in hub.served.requests)


@pytest.mark.parametrize(
    ("arguments", "is_set"),
    [((), True), (("--allowed-media-domains", "a.org"), False), (("--allowed_media_domains=a.org",), False)],
)
def test_vllm_opens_no_address_unless_the_operator_says_so(arguments: tuple[str, ...], is_set: bool) -> None:
    settings = Settings(root=Path("/"), model=parse_reference("org/name"), vllm_args=arguments)
    snapshot = SimpleNamespace(key=SimpleNamespace(repo_id="org/name"))
    options = _names(cast(PendingStart, SimpleNamespace(settings=settings, snapshot=snapshot)), [], lambda _adapter: "")
    assert ("--allowed-media-domains" in options) == is_set
