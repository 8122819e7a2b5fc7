"""The table of engines is whole, and the first engine that can serve a snapshot is taken."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest

import handler.engines
from handler.engines import ENGINES, engine_for
from modelstore.errors import NotServable
from modelstore.settings import EngineName

FOLDER = Path(handler.engines.__file__).parent


def test_every_engine_that_can_be_set_is_in_the_table() -> None:
    assert set(ENGINES) == set(get_args(EngineName))


@pytest.mark.parametrize("name", ENGINES)
def test_the_module_of_an_engine_has_a_loader_of_the_interface(name: EngineName) -> None:
    tree = ast.parse((FOLDER / f"{ENGINES[name].module}.py").read_text())  # its libraries need not be installed
    (loader,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Loader"]
    methods = {node.name: len(node.args.args) for node in loader.body if isinstance(node, ast.FunctionDef)}
    assert {"__init__": 2, "load": 3, "cancel": 1}.items() <= methods.items()


def test_the_extra_of_each_engine_is_one_of_the_distribution() -> None:
    import tomllib

    extras = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {entry.extra for entry in ENGINES.values()} <= extras.keys()


BERT = {"model_type": "bert", "architectures": ["BertModel"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        (LLAMA, FILES, "text"),
        ({}, ["model_index.json", "unet/config.json"], "diffusion"),
        (LLAMA, ["unet/model_index.json", "config.json"], "text"),
        (BERT, FILES, "embedding"),
        (BERT, FILES[:2], "text"),
        (BERT | {"architectures": ["XLMRobertaForSequenceClassification"]}, FILES, "embedding"),
        (BERT | {"architectures": ["RobertaModel"]}, ["config.json", "vocab.json", "merges.txt"], "embedding"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, FILES, "text"),
        (LLAMA | {"architectures": ["LlamaModel"]}, FILES, "text"),
        (LLAMA | {"architectures": ["LlamaModel"]}, [*FILES, "modules.json"], "embedding"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, FILES, "text"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, FILES, "text"),
        ({"architectures": None}, FILES, "text"),
        ({"architectures": [7]}, FILES, "text"),
        ({}, [], "text"),
    ],
)
def test_the_engine_is_chosen_by_the_model(config: dict[str, Any], files: list[str], expected: str) -> None:
    assert engine_for(config, files) == expected


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        LLAMA | {"architectures": ["LlamaModel"]},
        {"model_type": "t5", "architectures": ["T5EncoderModel"]},
        {"model_type": "new", "architectures": ["NewModel"], "auto_map": {"AutoModel": "m.NewModel"}},
    ],
)
def test_an_engine_that_is_set_is_taken_at_its_word(config: dict[str, Any]) -> None:
    ENGINES["embedding"].check_config(config, FILES, "org/name")
    with pytest.raises(NotServable, match="is a pipeline of Diffusers"):
        ENGINES["embedding"].check_config(config, [*FILES, "model_index.json"], "org/name")
