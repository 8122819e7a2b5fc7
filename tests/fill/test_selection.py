"""Which files of a repo are its weights, decided as transformers, diffusers and sentence-transformers decide it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from modelstore.errors import BadSafetensors, ModelStoreError, NoWeights, PickleRefused, UnsafeName
from modelstore.fill.repo_files import TOKENIZER_FILES, is_small, stored_path
from modelstore.fill.selection import Selection, select_files
from modelstore.fill.source import SourceFile

CONFIG = {"model_type": "llama"}
WEIGHTS = "model.safetensors"


def select(files: Mapping[str, Any], **options: Any) -> Selection:
    """The selection from a repo with these files: JSON by its value, weights by None."""
    data = {path: b"" if value is None else json.dumps(value).encode() for path, value in files.items()}
    listed = tuple(SourceFile(path, len(content)) for path, content in data.items())
    return select_files(listed, lambda file: data[file.path], repo_id="org/name", **options)


def weights(files: Mapping[str, Any], **options: Any) -> list[str]:
    return sorted(file.path for file in select(files, **options).weights)


def index(*shards: str) -> dict[str, Any]:
    return {"weight_map": {f"layers.{number}.weight": shard for number, shard in enumerate(shards)}}


# The file that a config names

EXPLICIT = {
    "a file": ("for_transformers.safetensors", None, ["for_transformers.safetensors"]),
    "an index": (
        "other.safetensors.index.json",
        index("other-1.safetensors", "other-2.safetensors"),
        ["other-1.safetensors", "other-2.safetensors"],
    ),
    "the plain name": (WEIGHTS, None, [WEIGHTS]),
}


@pytest.mark.parametrize("kind", EXPLICIT)
@pytest.mark.parametrize("folder", ["", "text_encoder/"])
def test_the_file_that_a_config_names_is_the_model(kind: str, folder: str) -> None:
    name, content, expected = EXPLICIT[kind]
    files = {
        WEIGHTS: None,
        "model-1-of-1.safetensors": None,
        "other-1.safetensors": None,
        "other-2.safetensors": None,
        "config.json": CONFIG | {"transformers_weights": name},
        name: content,
    }
    repo = {f"{folder}{path}": value for path, value in files.items()}
    if folder:
        repo["model_index.json"] = {"_class_name": "P", "text_encoder": ["transformers", "CLIPTextModel"]}
    chosen = select(repo)
    assert sorted(file.path for file in chosen.weights) == [f"{folder}{path}" for path in expected]
    assert (f"{folder}{name}" in {file.path for file in chosen.small}) is name.endswith(".json")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("../secret.safetensors", UnsafeName),
        ("/etc/x.safetensors", UnsafeName),
        ("a/../../b.safetensors", UnsafeName),
        ("gone.safetensors", BadSafetensors),
        ("pytorch_model.bin", BadSafetensors),
        ("adapter_model.bin", BadSafetensors),
        (7, BadSafetensors),
        (["a.safetensors"], BadSafetensors),
    ],
)
def test_a_name_in_a_config_that_leads_nowhere_is_an_error(name: object, error: type[ModelStoreError]) -> None:
    with pytest.raises(error):
        select({WEIGHTS: None, "pytorch_model.bin": None, "config.json": CONFIG | {"transformers_weights": name}})


# Pickles, and safetensors of somebody else

FOREIGN = [
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "some-other-model.safetensors",
    "consolidated.safetensors",
]
PICKLED: dict[str, dict[str, Any]] = {
    "one file": {"pytorch_model.bin": None},
    "shards": {
        "pytorch_model.bin.index.json": index("pytorch_model-1-of-1.bin"),
        "pytorch_model-1-of-1.bin": None,
    },
}


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("pickled", PICKLED)
def test_pickles_are_the_weights_if_there_is_no_model_safetensors(pickled: str, foreign: str) -> None:
    repo = {"config.json": CONFIG, foreign: None, **PICKLED[pickled]}
    with pytest.raises(PickleRefused, match=r"pytorch_model.*\.bin.*--allow-pickle"):
        select(repo)
    chosen = weights(repo, pickles=True)
    assert chosen == [path for path in PICKLED[pickled] if path.endswith(".bin")]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_file_beside_the_model_is_left_out(foreign: str) -> None:
    assert weights({"config.json": CONFIG, WEIGHTS: None, foreign: None}) == [WEIGHTS]
    sharded = {"config.json": CONFIG, "model.safetensors.index.json": index("model-1-of-1.safetensors")}
    assert weights({**sharded, "model-1-of-1.safetensors": None, foreign: None}) == ["model-1-of-1.safetensors"]


def test_weights_by_a_name_of_their_own_are_taken_if_a_config_describes_them() -> None:
    files = {"gptq_model-4bit-128g.safetensors": None, "quantize_config.json": {"bits": 4}}
    assert weights({"config.json": CONFIG, **files}) == ["gptq_model-4bit-128g.safetensors"]
    shards = {f"model-0000{number}-of-00002.safetensors": None for number in (1, 2)}
    assert weights({"config.json": CONFIG, **shards}) == sorted(shards)
    assert weights({"params.json": {"dim": 8}, "consolidated.safetensors": None}) == ["consolidated.safetensors"]


# Every folder that an index names

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.35",
    "requires_safety_checker": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
}


def pipeline(**changes: Any) -> dict[str, Any]:
    """A pipeline's repo; a change of None removes a file, any other adds one."""
    files: dict[str, Any] = {
        "model_index.json": PIPELINE,
        "scheduler/scheduler_config.json": {},
        "tokenizer/vocab.json": {},
        "feature_extractor/preprocessor_config.json": {},
        "unet/config.json": {},
        "unet/diffusion_pytorch_model.safetensors": None,
        "safety_checker/config.json": CONFIG,
        "safety_checker/model.safetensors": None,
    }
    for path, value in changes.items():
        if value == "gone":
            files.pop(path)
        else:
            files[path] = value
    return files


ROOT_FILES = ["v1-5-pruned.safetensors", "sd_xl_offset_example-lora_1.0.safetensors", WEIGHTS, "v1-5.ckpt"]


@pytest.mark.parametrize("name", ROOT_FILES)
def test_a_pipelines_root_holds_no_weights(name: str) -> None:
    expected = ["safety_checker/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    plain = select(pipeline())
    with_root = select(pipeline(**{name: None}))
    assert sorted(file.path for file in with_root.weights) == expected
    assert with_root.size_bytes == plain.size_bytes


@pytest.mark.parametrize(
    ("missing", "instead", "error", "match"),
    [
        ("safety_checker/model.safetensors", "safety_checker/pytorch_model.bin", PickleRefused, "--allow-pickle"),
        ("safety_checker/model.safetensors", "safety_checker/model.onnx", NoWeights, "model.onnx"),
        ("safety_checker/model.safetensors", "unet/notes.txt", NoWeights, "has no safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", PickleRefused, "--allow-pick"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/other.safetensors", NoWeights, "other.safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", "unet/flax_model.msgpack", NoWeights, "msgpack"),
    ],
)
def test_a_part_without_its_weights_refuses_the_seed_and_is_named(
    missing: str, instead: str, error: type[ModelStoreError], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        select(pipeline(**{missing: "gone", instead: None}))
    assert f"the folder {missing.partition('/')[0]} of org/name, which model_index.json names" in str(caught.value)


def test_a_part_that_is_a_pickle_is_converted_with_permission() -> None:
    files = pipeline(**{"safety_checker/model.safetensors": "gone", "safety_checker/pytorch_model.bin": None})
    assert weights(files, pickles=True)[0] == "safety_checker/pytorch_model.bin"


def test_a_folder_that_is_not_there_is_an_error() -> None:
    files = pipeline(**{"scheduler/scheduler_config.json": "gone"})
    with pytest.raises(BadSafetensors, match="names 'scheduler', a folder that the repo does not have"):
        select(files)


def module(path: str, kind: str) -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}


SENTENCE = {
    "modules.json": [module("", "Transformer"), module("1_Pooling", "Pooling"), module("2_Dense", "Dense")],
    "config.json": CONFIG,
    "1_Pooling/config.json": {},
    "2_Dense/config.json": {},
}
ROUTER = {
    "modules.json": [module("", "Router"), module("1_Normalize", "Normalize")],
    "router_config.json": {
        "types": {
            "query_0_StaticEmbedding": "sentence_transformers.models.StaticEmbedding",
            "document_0_Router": "sentence_transformers.models.Router",
        }
    },
    "query_0_StaticEmbedding/model.safetensors": None,
    "document_0_Router/router_config.json": {
        "types": {
            "a_0_Transformer": "sentence_transformers.models.Transformer",
            "a_1_Pooling": "sentence_transformers.models.Pooling",
        }
    },
    "document_0_Router/a_0_Transformer/config.json": CONFIG,
    "document_0_Router/a_1_Pooling/config.json": {},
}


@pytest.mark.parametrize("path", ["2_Dense/", "./2_Dense", "./2_Dense/"])
def test_the_path_of_a_module_is_read_as_a_folder(path: str) -> None:
    modules = [module(".", "Transformer"), module(path, "Dense")]
    repo = {"modules.json": modules, "config.json": CONFIG, WEIGHTS: None, "2_Dense/model.safetensors": None}
    assert weights(repo) == ["2_Dense/model.safetensors", WEIGHTS]


def test_modules_of_the_library_that_save_no_weights_need_none() -> None:
    """Those of the installed version: a new one fails this test."""
    import inspect
    from importlib import import_module

    from sentence_transformers.base.modules import InputModule, Module

    from modelstore.fill.components import _WEIGHTLESS_MODULES

    packages = ("base", "sentence_transformer", "sparse_encoder", "cross_encoder", "multi_vector_encoder")
    listed = [vars(import_module(f"sentence_transformers.{each}.modules")).values() for each in packages]
    classes = {each for names in listed for each in names if inspect.isclass(each) and issubclass(each, Module)}
    words = ("weights", "save_pretrained", "safetensors")
    light = {each.__name__ for each in classes if not any(word in inspect.getsource(each.save) for word in words)}
    assert {name for name in light if not name.startswith("Base")} - {InputModule.__name__} <= _WEIGHTLESS_MODULES
    modules = [module("", "Transformer"), module("1_LogitScore", "LogitScore")]
    repo = {"modules.json": modules, "config.json": CONFIG, WEIGHTS: None, "1_LogitScore/config.json": {}}
    assert weights(repo) == [WEIGHTS]


@pytest.mark.parametrize("kind", ["Router", "Asym"])
def test_a_router_may_be_described_by_its_config(kind: str) -> None:
    types = {"query_0_Dense": "sentence_transformers.models.Dense"}
    repo = {
        "modules.json": [module("", "Transformer"), module("1_Router", kind)],
        "config.json": CONFIG,
        WEIGHTS: None,
        "1_Router/config.json": {"types": types},
    }
    with pytest.raises(NoWeights, match=r"folder 1_Router/query_0_Dense of org/name, which 1_Router/config\.json"):
        select(repo)
    deep = "1_Router/query_0_Dense/model.safetensors"
    assert weights({**repo, deep: None}) == [deep, WEIGHTS]


def test_every_module_of_a_sentence_transformer_has_its_weights() -> None:
    assert weights({**SENTENCE, WEIGHTS: None, "2_Dense/model.safetensors": None}) == [
        "2_Dense/model.safetensors",
        WEIGHTS,
    ]
    deep = "document_0_Router/a_0_Transformer"
    assert weights({**ROUTER, f"{deep}/{WEIGHTS}": None}) == [
        f"{deep}/{WEIGHTS}",
        "query_0_StaticEmbedding/model.safetensors",
    ]
    small = {file.path for file in select({**ROUTER, f"{deep}/{WEIGHTS}": None}).small}
    assert {"router_config.json", "document_0_Router/router_config.json", f"{deep}/config.json"} <= small


@pytest.mark.parametrize(
    ("repo", "folder", "named_by"),
    [
        ({**SENTENCE, WEIGHTS: None, "2_Dense/pytorch_model.bin": None}, "2_Dense", "modules.json"),
        ({**SENTENCE, WEIGHTS: None}, "2_Dense", "modules.json"),
        (
            {**ROUTER, "document_0_Router/a_0_Transformer/pytorch_model.bin": None},
            "document_0_Router/a_0_Transformer",
            "document_0_Router/router_config.json",
        ),
    ],
)
def test_a_module_without_its_weights_is_named(repo: dict[str, Any], folder: str, named_by: str) -> None:
    with pytest.raises((NoWeights, PickleRefused), match=f"the folder {folder} of org/name, which {named_by} names"):
        select(repo)


def test_a_router_that_leads_to_itself_ends() -> None:
    types = {f"part{number}": "sentence_transformers.models.Router" for number in range(2)}
    files: dict[str, Any] = {"modules.json": [module("", "Router")], "router_config.json": {"types": types}}
    folder = ""
    for _ in range(1100):
        folder += "part0/"
        files[f"{folder}router_config.json"] = {"types": types}
    with pytest.raises((BadSafetensors, NoWeights)):
        select(files)


# Variants

VARIANTS: dict[str, dict[str, Any]] = {
    "one file": {"model.fp16.safetensors": None},
    "shards of transformers": {
        "model.safetensors.index.fp16.json": index("model.fp16-00001-of-00001.safetensors"),
        "model.fp16-00001-of-00001.safetensors": None,
    },
    "shards of diffusers": {
        "model.safetensors.index.fp16.json": index("model-00001-of-00001.fp16.safetensors"),
        "model-00001-of-00001.fp16.safetensors": None,
    },
    "another variant": {"model.bf16.safetensors": None},
    "a variant with a dash": {"model.ema-pruned.safetensors": None},
    "shards by an index of older diffusers": {
        "model.safetensors.fp16.index.json": index("model-00001-of-00001.fp16.safetensors"),
        "model-00001-of-00001.fp16.safetensors": None,
    },
}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("folder", ["", "unet/"])
def test_weights_that_are_there_as_a_variant_alone_get_the_plain_names(kind: str, folder: str) -> None:
    repo = {f"{folder}{path}": value for path, value in VARIANTS[kind].items()} | {f"{folder}config.json": CONFIG}
    if folder:
        repo["model_index.json"] = {"unet": ["diffusers", "UNet2DConditionModel"]}
    chosen = select(repo)
    names = {name.removeprefix(folder) for name in chosen.paths} - {"config.json", "model_index.json"}
    if "shards" in kind:
        assert names == {"model.safetensors.index.json", "model-00001-of-00001.safetensors"}
        assert len(chosen.indexes) == 1
    else:
        assert names == {WEIGHTS}


def test_the_plain_weights_go_before_a_variant_but_in_a_pipeline() -> None:
    assert weights({"config.json": CONFIG, WEIGHTS: None, "model.fp16.safetensors": None}, variant="fp16") == [WEIGHTS]
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    part = {"model_index.json": {"unet": ["diffusers", "UNet"]}, "unet/config.json": {}}
    part |= {f"unet/{name}": None for name in names}
    assert weights(part) == [f"unet/{names[0]}"]
    assert weights(part, variant="fp16") == [f"unet/{names[1]}"]


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("model.safetensors", "model.safetensors"),
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.safetensors"),
        ("unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("pytorch_model.bin.index.fp16.json", "model.safetensors.index.json"),
        ("gptq_model-4bit.safetensors", "gptq_model-4bit.safetensors"),
        ("model.safetensors.index.json", "model.safetensors.index.json"),
        ("tokenizer.model", "tokenizer.model"),
    ],
)
def test_the_name_that_a_file_is_stored_under(path: str, stored: str) -> None:
    assert stored_path(path) == stored


# Small files


def default_names() -> Iterator[str]:
    """The default file names of all tokenizers and processors in the source of transformers."""
    root = Path(transformers.__file__).parent
    for path in root.rglob("*.py"):
        if not re.search(r"tokenization|processing|feature_extraction|utils/__init__", str(path)):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and any(_is_constant(target) for target in node.targets):
                for value in ast.walk(node.value):
                    if isinstance(value, ast.Constant) and re.fullmatch(r"[\w.-]+\.[a-z]+", str(value.value)):
                        yield str(value.value)


def _is_constant(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and re.search(r"FILE|_NAMES?$", target.id) is not None


def test_every_default_name_of_a_tokenizer_is_in_the_table() -> None:
    other = {"config.json", "generation_config.json", "modelcard.json"}
    names = {
        name for name in default_names() if not re.search(r"pytorch|safetensors|^transformers\.|peft", name)
    } - other
    assert len(names) > 25
    assert names <= TOKENIZER_FILES
    assert all(is_small(SourceFile(name, 1)) for name in TOKENIZER_FILES)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model.v1", "tokenizer.model.v3", "tokenizer.model.v7m1", "tokenizer.mm.model.v7m1", "tekken.json"],
)
def test_the_tokenizers_of_mistral_have_versions_in_their_names(name: str) -> None:
    assert is_small(SourceFile(name, 1))
    assert not is_small(SourceFile("consolidated.model.v3", 1))


@pytest.mark.parametrize(
    "names",
    [
        ("LICENSE", "license"),
        ("LICENSE.txt", "License.txt"),
        ("NOTICE", "Notice"),
        ("Licence.md", "LICENCE.md", "licence.md"),
    ],
)
def test_licences_that_differ_in_case_alone_do_not_refuse_a_model(names: tuple[str, ...]) -> None:
    chosen = select({"config.json": CONFIG, WEIGHTS: None, **dict.fromkeys(names)})
    assert len(chosen.small) == 2
    with pytest.raises(UnsafeName):
        select({"config.json": CONFIG, "Config.json": CONFIG, WEIGHTS: None})


ADAPTER = {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": None}


def test_an_adapter_is_stored_if_it_is_asked_for_as_one() -> None:
    chosen = select({**ADAPTER, "tokenizer.json": None, "optimizer.bin": None, "README.md": None}, adapter=True)
    assert chosen.paths == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    both = select({**ADAPTER, "config.json": CONFIG, WEIGHTS: None}, adapter=True)
    assert [file.path for file in both.weights] == [WEIGHTS]
    with pytest.raises(NoWeights):
        select({"adapter_config.json": {}, "adapter_model.bin": None}, adapter=True)


# What cannot be stored

NO_MODEL: dict[str, tuple[dict[str, Any], type[ModelStoreError], str]] = {
    "a LoRA adapter": (
        {
            "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
            "adapter_model.safetensors": None,
        },
        NoWeights,
        r"is a LoRA adapter of org/base: .* name org/base, with this in MODEL_ADAPTERS",
    ),
    "a pickled adapter": (
        {"adapter_config.json": {"peft_type": "IA3"}, "adapter_model.bin": None},
        NoWeights,
        r"is a IA3 adapter of another model: .* merged",
    ),
    "a LoRA of a pipeline": ({"pytorch_lora_weights.safetensors": None}, NoWeights, "is a LoRA adapter"),
    "GGUF": (
        {"model-Q4_K_M.gguf": None, "model-Q8_0.gguf": None, "config.json": CONFIG},
        NoWeights,
        r"has GGUF only \(model-Q4_K_M.gguf, model-Q8_0.gguf\)",
    ),
    "GGUF in folders": ({"Q4_K_M/m-00001-of-00002.gguf": None, "config.json": CONFIG}, NoWeights, "has GGUF only"),
    "ONNX in a folder": ({"onnx/model.onnx": None, "config.json": CONFIG}, NoWeights, "only as onnx/model.onnx"),
    "a single file beside a config": (
        {"flux1-dev.safetensors": None, "config.json": {}},
        NoWeights,
        r"by names that its loader does not take for the model's \(flux1-dev.safetensors\)",
    ),
    "two foreign files": ({"a.safetensors": None, "b.safetensors": None, "config.json": CONFIG}, NoWeights, "by names"),
    "one shard of two": ({"model-00001-of-00002.safetensors": None, "config.json": CONFIG}, NoWeights, "all shards"),
    "a pickled shard without its index": (
        {"pytorch_model-00001-of-00002.bin": None, "config.json": CONFIG},
        PickleRefused,
        "does not open by these names",
    ),
    "a single file": ({"flux1-dev.safetensors": None}, NoWeights, r"is a Diffusers single file, .*flux1-dev"),
    "ONNX": ({"model.onnx": None, "config.json": CONFIG}, NoWeights, r"only as model.onnx"),
    "other pickles": (
        {"consolidated.00.pth": None, "consolidated.01.pth": None, "params.json": {}},
        PickleRefused,
        r"as consolidated.00.pth, consolidated.01.pth, pickles that transformers does not open",
    ),
    "nothing": ({"README.md": None}, NoWeights, "has no safetensors weights"),
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_what_holds_no_model_is_refused_with_the_reason(kind: str) -> None:
    files, error, match = NO_MODEL[kind]
    with pytest.raises(error, match=match) as caught:
        select(files)
    assert "--allow-pickle" not in str(caught.value)
    with pytest.raises(error, match=match):
        select(files, pickles=True)
