"""A model that cannot be served is refused in one line before its weights are downloaded, wherever it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from modelstore.errors import NotServable
from modelstore.servable import check_generates_text, check_loadable
from tests.conftest import Cli
from tests.support.checkpoints import write_repo
from tests.support.hub import Hub
from tests.support.models import SMALL, write_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "troubleshooting.md"
JOB = json.dumps({"input": {"prompt": "hello world", "max_tokens": 4, "temperature": 0}})
VERSION = tf.__version__


def adapter(folder: Path) -> None:
    write_model(folder, seed=1)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    record = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(record))


def unknown(folder: Path) -> None:
    write_model(folder, seed=1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "glm99", "architectures": ["Glm99ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def encoder(folder: Path) -> None:
    write_model(folder, seed=1)
    tf.BertModel(tf.BertConfig(**SMALL)).save_pretrained(folder)


def base_model(folder: Path) -> None:
    write_model(folder, seed=1)
    tf.LlamaModel(tf.LlamaConfig(**SMALL)).save_pretrained(folder)


def embedding(folder: Path) -> None:
    encoder(folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "modules.json").write_text(json.dumps(modules))


def gguf(folder: Path) -> None:
    write_model(folder, seed=1)
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def single_file(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(4)}, folder / "flux1-dev.safetensors")


# By kind: the repo, whether `seed` stores it, the exit code, and the line.
KINDS: dict[str, tuple[Callable[[Path], None], bool, int, str]] = {
    "a LoRA adapter": (
        adapter,
        False,
        3,
        "org/name is a LoRA adapter of org/base: it is no model by itself; name org/base, with this in MODEL_ADAPTERS, or "
        "a repo with the two merged",
    ),
    "GGUF": (
        gguf,
        False,
        3,
        "org/name has GGUF only (model-Q4_K_M.gguf), which llama.cpp serves: name the repo with safetensors that these "
        "files were made from",
    ),
    "a single file": (
        single_file,
        False,
        3,
        "org/name is a Diffusers single file, or another program's (flux1-dev.safetensors), without config.json: name "
        "the repo of the same model in folders, with model_index.json",
    ),
    "an unknown type": (
        unknown,
        True,
        8,
        f"org/name: model type 'glm99' is unknown to transformers {VERSION}: upgrade transformers",
    ),
    "an encoder": (
        encoder,
        True,
        8,
        "org/name is an encoder, or another model that continues no text (BertModel), and generates none: name a language "
        "model",
    ),
    "a base model": (
        base_model,
        True,
        8,
        "org/name is an encoder, or another model that continues no text (LlamaModel), and generates none: name a language "
        "model",
    ),
    "an embedding model": (
        embedding,
        True,
        8,
        "org/name is an embedding model and generates no text: name a language model, or serve it with ENGINE=embedding",
    ),
}


def weights_served(hub: Hub) -> int:
    return sum(size for name, size in hub.served.bytes.items() if name.endswith((".safetensors", ".gguf")))


def run_worker(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "handler", "--test_input", JOB],
        env=os.environ | env | {"MODEL_ID": "org/name", "ENGINE": "text"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_ends_in_one_line_before_the_download(hub: Hub, store_env: dict[str, str], kind: str) -> None:
    build, is_stored, code, line = KINDS[kind]
    build(hub.folder / "org" / "name")
    done = run_worker(store_env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].removeprefix("start failed: ").partition(": ")[2] == line
    assert weights_served(hub) == 0
    if is_stored:  # a start that finds it on the volume says the same
        subprocess.run(
            [sys.executable, "-m", "modelstore", "seed", "org/name", "-q"], env=os.environ | store_env, check=True
        )
        hit = run_worker(store_env)
        assert hit.returncode == code
        assert "Traceback" not in hit.stderr
        last = hit.stderr.splitlines()[-1]
        assert line.removeprefix("org/name") in last, last


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_stores_it_or_says_why_not(hub: Hub, cli: Cli, kind: str) -> None:
    build, is_stored, code, line = KINDS[kind]
    build(hub.folder / "org" / "name")
    done = cli("seed", "org/name", code=0 if is_stored else code)
    if is_stored:
        assert "error" not in done.stderr
        return
    assert done.stderr.splitlines()[-1] == f"error: {line}"
    assert weights_served(hub) == 0
    assert cli("seed", "org/name", "--dry-run", code=code).stderr.splitlines()[-1] == f"error: {line}"
    assert cli("warm", "org/name", code=code).stderr.splitlines()[-1] == f"error: {line}"


def test_warm_says_that_a_type_is_unknown_before_the_download(hub: Hub, cli: Cli) -> None:
    build, _is_stored, code, line = KINDS["an unknown type"]
    build(hub.folder / "org" / "name")
    assert cli("warm", "org/name", code=code).stderr.splitlines()[-1] == f"error: {line}"
    assert weights_served(hub) == 0
    encoder(hub.folder / "org" / "encoder")
    cli("warm", "org/encoder", "--device", "cpu")  # it loads, and generates nothing


def test_the_page_shows_these_lines() -> None:
    page = PAGE.read_text()
    for _build, _is_stored, _code, line in KINDS.values():
        shown = line.replace(VERSION, "…").replace("(LlamaModel)", "(BertModel)")
        assert f"`{shown.replace('`', '')}`" in page.replace("`modelstore path`", "modelstore path"), shown


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForCasualLM"]},
        {"model_type": "llama", "architectures": None},
        {"model_type": "llama"},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]},
        {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "m.Own"}},
        {"auto_map": {"AutoModel": "m.Own"}},
    ],
)
def test_a_model_that_may_generate_text_passes(config: dict[str, Any]) -> None:
    check_generates_text(config, {"config.json"}, "org/name")


@pytest.mark.parametrize("name", ["glm99", "llama5", "Llama"])
def test_an_unknown_type_is_named(name: str) -> None:
    with pytest.raises(NotServable, match=f"model type '{name}' is unknown"):
        check_loadable({"model_type": name}, {"config.json"}, "org/name")
    with pytest.raises(NotServable, match=f"model type '{name}' is unknown"):
        check_loadable({"model_type": "llava", "text_config": {"model_type": name}}, {"config.json"}, "org/name")


@pytest.mark.parametrize(
    ("config", "files", "match"),
    [
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, {"config.json"}, "no text"),
        ({"model_type": "blip", "architectures": ["BlipForConditionalGeneration"]}, {"config.json"}, "no text"),
        (
            {"model_type": "vision-encoder-decoder", "architectures": ["VisionEncoderDecoderModel"]},
            {"config.json"},
            "no text",
        ),
        ({"model_type": "musicgen", "architectures": ["MusicgenForConditionalGeneration"]}, {"config.json"}, "no text"),
        ({"model_type": "vit"}, {"config.json"}, "of type vit"),
        ({"_class_name": "AutoencoderKL"}, {"config.json"}, "is a AutoencoderKL, a part of a Diffusers pipeline"),
        ({}, {"model_index.json"}, "is a pipeline of Diffusers"),
        ({}, {"config.json"}, "names no model_type"),
        ({"model_type": None}, {"config.json"}, "names no model_type"),
        ({"model_type": ["llama"]}, {"config.json"}, "names no model_type"),
        ({}, {"model.safetensors"}, "has no config.json"),
    ],
)
def test_what_continues_no_text_is_told_by_its_config(config: dict[str, Any], files: set[str], match: str) -> None:
    with pytest.raises(NotServable, match=match):
        check_generates_text(config, files, "org/name")


def test_a_pickle_is_never_answered_with_the_step_that_was_just_taken(hub: Hub, cli: Cli) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    (repo / "model.safetensors").rename(repo / "consolidated.00.pth")
    for options in ((), ("--allow-pickle",)):
        error = cli("seed", "org/name", *options, code=8).stderr
        assert "--allow-pickle" not in error
        assert "consolidated.00.pth" in error
        assert "pytorch_model.bin" in error
