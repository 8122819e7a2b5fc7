"""What transformers accepts is accepted: tied weights in an index, `auto_map` of a known type, a config without its
class, an encoder without its pooler. What it cannot load ends in one line of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from modelstore.errors import (
    BadConfig,
    BadSafetensors,
    CodeRefused,
    IntegrityError,
    ModelStoreError,
    NotServable,
    WeightOverflow,
)
from modelstore.load.model import load_model
from modelstore.store import ModelStore
from tests.conftest import MakeStore
from tests.support.models import SMALL, assert_equal

LLAMA = {**SMALL, "num_key_value_heads": 2}


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """Change a JSON file; an ellipsis removes a key."""
    record = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is ...:
            record.pop(key, None)
        else:
            record[key] = value
    (folder / name).write_text(json.dumps(record))


def stored(store: ModelStore, folder: Path, **options: Any) -> Any:
    return load_model(store.ensure(f"file://{folder}"), "cpu", **options)


# An index that names a tied weight


TIED: dict[str, tuple[Callable[[], tf.PreTrainedModel], str]] = {
    "a head": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), "lm_head.weight"),
    "GPT-2's head": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)),
        "lm_head.weight",
    ),
    "T5's embeddings": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        ),
        "encoder.embed_tokens.weight",
    ),
    "BERT's decoder": (lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)), "cls.predictions.decoder.weight"),
}


def with_ghost(build: Callable[[], tf.PreTrainedModel], folder: Path, ghost: str, shard: int = -1) -> None:
    torch.manual_seed(0)
    build().save_pretrained(folder, max_shard_size="60KB")
    name = "model.safetensors.index.json"
    weight_map = json.loads((folder / name).read_text())["weight_map"]
    assert ghost not in weight_map
    edit(folder, name, weight_map=weight_map | {ghost: sorted(set(weight_map.values()))[shard]})


@pytest.mark.parametrize("kind", TIED)
def test_an_index_that_names_a_tied_weight_is_corrected(store: ModelStore, tmp_path: Path, kind: str) -> None:
    build, ghost = TIED[kind]
    with_ghost(build, tmp_path / "model", ghost)
    snapshot = store.ensure(f"file://{tmp_path}/model")
    cls = type(build())
    assert_equal(load_model(snapshot, "cpu"), cls.from_pretrained(tmp_path / "model", dtype=torch.float16))
    index = json.loads((snapshot.path / "model.safetensors.index.json").read_text())
    held = {name for path in snapshot.path.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"].keys() == held


@pytest.mark.parametrize(
    ("ghost", "tie"),
    [("lm_head.weight", False), ("model.layers.0.mlp.up_proj.weight_g", True), ("ghost", True)],
)
def test_another_weight_that_no_shard_holds_is_an_error(
    store: ModelStore, tmp_path: Path, ghost: str, tie: bool
) -> None:
    with_ghost(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), tmp_path / "model", ghost
    )
    edit(tmp_path / "model", tie_word_embeddings=tie)
    with pytest.raises(BadSafetensors, match=ghost):
        store.ensure(f"file://{tmp_path}/model")


# Code of a type that transformers has


RAISES = "raise RuntimeError('this code must not run')\n"
KNOWN = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA, pad_token_id=0)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
}


def with_code(folder: Path, build: Callable[[], tf.PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder)
    name = type(model).__name__
    edit(folder, auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": f"modeling_own.{name}"})
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_own.T", None]}})
    )
    for part in ("configuration", "modeling", "tokenization"):
        (folder / f"{part}_own.py").write_text(RAISES)


@pytest.mark.parametrize("model_type", KNOWN)
def test_code_of_a_known_type_is_left_out_and_not_needed(store: ModelStore, tmp_path: Path, model_type: str) -> None:
    with_code(tmp_path / "model", KNOWN[model_type])
    snapshot = store.ensure(f"file://{tmp_path}/model")
    assert not [path for path in snapshot.manifest.paths if path.endswith(".py")]
    assert not snapshot.manifest.remote_code
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    ours = load_model(snapshot, "cpu")
    assert type(ours) is type(theirs)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("model_type", [..., None, "", "own", "glm99"])
def test_code_of_a_type_that_transformers_lacks_is_refused(
    store: ModelStore, tmp_path: Path, model_type: object
) -> None:
    with_code(tmp_path / "model", KNOWN["llama"])
    edit(tmp_path / "model", model_type=model_type)
    with pytest.raises(CodeRefused, match="auto_map"):
        store.ensure(f"file://{tmp_path}/model")


def test_a_name_of_the_repos_own_class_leads_to_the_auto_class_that_it_is_given_for(
    store: ModelStore, tmp_path: Path
) -> None:
    with_code(tmp_path / "model", KNOWN["llama"])
    edit(
        tmp_path / "model", architectures=["ZForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_z.ZForCausalLM"}
    )
    assert type(stored(store, tmp_path / "model")) is tf.LlamaForCausalLM


def test_code_of_a_tokenizer_is_stored_and_flagged_with_permission(make_store: MakeStore, tmp_path: Path) -> None:
    with_code(tmp_path / "model", KNOWN["llama"])
    snapshot = make_store(trust_remote_code=True).ensure(f"file://{tmp_path}/model")
    assert snapshot.manifest.remote_code
    assert "tokenization_own.py" in snapshot.manifest.paths


def test_a_model_that_was_stored_without_its_code_says_so(
    store: ModelStore, make_store: MakeStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_code(tmp_path / "model", KNOWN["llama"])
    assert type(stored(store, tmp_path / "model", trust_remote_code=True)) is tf.LlamaForCausalLM
    assert "is stored without its code: the class of transformers is used" in caplog.text
    make_store(trust_remote_code=True).ensure(f"file://{tmp_path}/model", refresh=True)
    assert "was stored without its code: to have it, run `modelstore rm local/model@" in caplog.text


# A config that does not name its class

NAMED: dict[str, Any] = {"missing": ..., "null": None, "empty": [], "misspelt": ["LlamaForCasualLM"], "text": "Llama"}


@pytest.mark.parametrize("kind", NAMED)
def test_without_a_class_the_text_engine_takes_the_causal_one(store: ModelStore, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", architectures=NAMED[kind])
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    ours = stored(store, tmp_path / "model", causal=True)
    assert type(ours) is tf.LlamaForCausalLM
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert type(stored(store, tmp_path / "model")) is tf.LlamaModel, "the plain model, as AutoModel takes it"


def test_a_type_without_a_causal_class_names_the_key(store: ModelStore, tmp_path: Path) -> None:
    tf.CLIPTextModel(
        tf.CLIPTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4
        )
    ).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", architectures=["ClipForCausalLM"])
    with pytest.raises(NotServable, match=r"architectures \['ClipForCausalLM'\] .* no causal language model of type"):
        stored(store, tmp_path / "model", causal=True)


# An encoder without its pooler

ENCODERS = {
    "bert": (tf.BertModel, tf.BertConfig(**SMALL)),
    "roberta": (tf.RobertaModel, tf.RobertaConfig(**SMALL, pad_token_id=1)),
    "xlm-roberta": (tf.XLMRobertaModel, tf.XLMRobertaConfig(**SMALL, pad_token_id=1)),
    "vit": (
        tf.ViTModel,
        tf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=28, patch_size=14),
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_without_its_pooler_loads(
    store: ModelStore, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls, config = ENCODERS[kind]
    torch.manual_seed(0)
    cls(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    theirs = cls.from_pretrained(tmp_path / "model", dtype=torch.float16).state_dict()
    ours = stored(store, tmp_path / "model").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "pooler" not in name)
    assert "lacks pooler.dense.bias, pooler.dense.weight" in caplog.text


OF_TRAINING = {
    "wav2vec2": (
        tf.Wav2Vec2ForCTC,
        tf.Wav2Vec2Config(
            vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2, mask_time_prob=0.05,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ),
        "wav2vec2.masked_spec_embed",
    ),
    "dinov2": (
        tf.Dinov2Model,
        tf.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        "embeddings.mask_token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_TRAINING)
def test_a_model_without_what_only_a_training_uses_loads(store: ModelStore, tmp_path: Path, kind: str) -> None:
    cls, config, name = OF_TRAINING[kind]
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "model")
    without(tmp_path / "model", name)
    theirs = cls.from_pretrained(tmp_path / "model", dtype=torch.float16).state_dict()
    ours = stored(store, tmp_path / "model").state_dict()
    assert ours.keys() == theirs.keys()
    assert name in ours
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != name)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_generation_config_that_is_none_is_left_out(store: ModelStore, tmp_path: Path, content: str) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, eos_token_id=77)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(content)
    assert stored(store, tmp_path / "model").generation_config.eos_token_id == 77


def test_a_weight_that_only_a_load_would_make_infinite_is_an_error(store: ModelStore, tmp_path: Path) -> None:
    """One that was stored as it came, in 64 bits."""
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    tensors = {name: tensor.double().contiguous() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert stored(store, tmp_path / "model").dtype is torch.float16
    tensors["model.norm.weight"][3] = 1e5
    model.save_pretrained(tmp_path / "large")
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WeightOverflow, match=r"model\.norm\.weight of .* goes beyond it: serve it with MODEL_DTYPE=bfloat16"
    ):
        stored(store, tmp_path / "large")


def without(folder: Path, name: str) -> None:
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if name not in key}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)), "pooler"),
        (lambda: tf.BertModel(tf.BertConfig(**SMALL)), "layer.1.attention.self.query.weight"),
        (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)), "classifier.weight"),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), "lm_head.weight"),
    ],
)
def test_other_missing_weights_are_an_error(
    store: ModelStore, tmp_path: Path, build: Callable[[], tf.PreTrainedModel], name: str
) -> None:
    build().save_pretrained(tmp_path / "model")
    without(tmp_path / "model", name)
    with pytest.raises(IntegrityError, match=f"lacks weights .*{name}"):
        stored(store, tmp_path / "model")


# What cannot be loaded


def bad_config(folder: Path, kind: str) -> None:
    match kind:
        case "an unknown type":
            edit(folder, model_type="glm99", architectures=["Glm99ForCausalLM"])
        case "no type":
            edit(folder, model_type=...)
        case "a value that does not fit":
            edit(folder, rope_parameters="none")
        case "sizes of another model":
            edit(folder, intermediate_size=96)
        case "no config":
            (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        ("an unknown type", NotServable, f"model type 'glm99' is unknown to transformers {tf.__version__}: upgrade"),
        ("no type", NotServable, "its config.json names no model_type"),
        ("a value that does not fit", BadConfig, "cannot read the config of"),
        ("sizes of another model", IntegrityError, "cannot be made a LlamaForCausalLM"),
        ("no config", NotServable, "has no config.json"),
    ],
)
def test_a_model_that_transformers_cannot_load_is_an_error_of_ours(
    store: ModelStore, tmp_path: Path, kind: str, error: type[ModelStoreError], match: str
) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    bad_config(tmp_path / "model", kind)
    with pytest.raises(error, match=match) as caught:
        stored(store, tmp_path / "model")
    assert "\n" not in str(caught.value)
