"""Small models of random weights, as the Hub would hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

TEMPLATE = "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}"


WORDS = ["<unk>", "<end>", "<user>", "hello", "world", "what", "is", "the", "capital", "of", "france", "paris"]


def write_model(
    folder: Path, *, seed: int, template: bool = True, context: int = 64, ends: bool = True, architecture: str = "llama"
) -> None:
    """A tiny causal model whose tokenizer knows a few words; one that does not end goes on until its limit."""
    torch.manual_seed(seed)
    config = tf.AutoConfig.for_model(
        architecture,
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=1 if ends else None,
        bos_token_id=None,
    )
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>" if ends else None
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2, tied": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)),
    "t5, kept in fp32": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "mixture of experts": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    ),
    "experts with a bias kept in fp32": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **SMALL,
            moe_intermediate_size=32,
            num_key_value_heads=4,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            qk_nope_head_dim=8,
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL)),
}


def save(model: PreTrainedModel, folder: Path, *, shards: bool) -> None:
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards


def assert_equal(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The same class, config, weights, buffers, ties and generation config; every bit and every dtype."""
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):
        mine, other = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor.cpu(), other[name].cpu()), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    configs = [model.config.to_dict() | {"_name_or_path": ""} for model in (ours, theirs)]
    assert configs[0] == configs[1]
    assert not ours.training
    if ours.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
