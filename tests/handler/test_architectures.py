"""Batches of models that are no plain decoders: with an encoder, or with a state that knows of no mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from handler.engines.batcher import Batcher
from handler.engines.context import Context
from handler.errors import JobError
from handler.sampling import Sampling
from tests.support.batches import decode, row, wait

PROMPTS = [[5, 6, 7], [11] * 20, [20, 30, 40, 50, 60], [8], [9, 8, 7, 6]]
SIZES: dict[str, Any] = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": None}


def bart() -> tf.PreTrainedModel:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            **SIZES, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, decoder_start_token_id=2,
            eos_token_id=2, forced_eos_token_id=None, init_std=0.5,
        )
    )  # fmt: skip


def t5() -> tf.PreTrainedModel:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            **SIZES, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=1,
            initializer_factor=20.0,
        )
    )  # fmt: skip


def marian() -> tf.PreTrainedModel:
    return tf.MarianMTModel(
        tf.MarianConfig(
            **SIZES, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=48, decoder_start_token_id=0,
            eos_token_id=1, forced_eos_token_id=None, decoder_vocab_size=100, init_std=0.5,
        )
    )  # fmt: skip


def rwkv() -> tf.PreTrainedModel:
    return tf.RwkvForCausalLM(
        tf.RwkvConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, context_length=128, bos_token_id=None)
    )


def mamba() -> tf.PreTrainedModel:
    return tf.MambaForCausalLM(
        tf.MambaConfig(
            **SIZES, hidden_size=32, num_hidden_layers=2, state_size=8, eos_token_id=1, use_mambapy=False
        )
    )  # fmt: skip


def gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    )


ENCODERS = [bart, t5, marian]


def made(build: Callable[[], tf.PreTrainedModel]) -> tf.PreTrainedModel:
    """A model whose texts differ from prompt to prompt and do not end by themselves."""
    torch.manual_seed(4)
    model = build().eval()
    if not model.config.is_encoder_decoder:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(3)
    model.generation_config.eos_token_id = None
    return model


def alone(model: tf.PreTrainedModel, prompt: list[int], sampling: Sampling) -> str:
    """What transformers says by itself."""
    penalty = sampling.repetition_penalty
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=sampling.max_tokens, do_sample=False, pad_token_id=0,
        repetition_penalty=penalty or 1.0,
    )[0]  # fmt: skip
    return decode(output[1 if model.config.is_encoder_decoder else len(prompt) :].tolist())


@pytest.mark.parametrize("build", [*ENCODERS, rwkv, mamba, gpt2], ids=lambda build: build.__name__)
def test_each_of_a_batch_gets_the_text_that_it_gets_alone(build: Callable[[], tf.PreTrainedModel]) -> None:
    model = made(build)
    sampling = Sampling(max_tokens=20, temperature=0.0)
    batcher = Batcher(model, limit=8, pad_token_id=0)
    rows = [row(prompt, sampling) for prompt in PROMPTS]
    batcher.submit([each for each, _ in rows])
    wait(*(receiver for _, receiver in rows))
    batcher.close()
    texts = [receiver.text for _, receiver in rows]
    assert texts == [alone(model, prompt, sampling) for prompt in PROMPTS]
    assert len(set(texts)) > 1


def sizes_of(model: tf.PreTrainedModel) -> list[int]:
    """The number of rows of each call of `generate` from now on, but of the trial of the mask."""
    sizes: list[int] = []
    generate = model.generate

    def count(tokens: torch.Tensor, **options: Any) -> Any:
        if not options["generation_config"].return_dict_in_generate:
            sizes.append(len(tokens))
        return generate(tokens, **options)

    model.generate = count
    return sizes


@pytest.mark.parametrize(("build", "expected"), [(gpt2, [5]), (mamba, [5]), (bart, [5]), (rwkv, [1] * 5)])
def test_only_models_that_ignore_the_mask_are_asked_by_length(
    build: Callable[[], tf.PreTrainedModel], expected: list[int]
) -> None:
    model = made(build)
    batcher = Batcher(model, limit=8, pad_token_id=0)
    sizes = sizes_of(model)
    rows = [row(prompt, Sampling(max_tokens=4, temperature=0.0)) for prompt in PROMPTS]
    batcher.submit([each for each, _ in rows])
    wait(*(receiver for _, receiver in rows))
    batcher.close()
    assert sizes == expected


@pytest.mark.parametrize("build", ENCODERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_a_decoder_behind_an_encoder_goes_on_after_a_failure(
    build: Callable[[], tf.PreTrainedModel], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is too small for all rows at their seventh token: they go on in smaller batches, each where it was."""
    model = made(build)
    sampling = Sampling(max_tokens=20, temperature=temperature, seed=3, repetition_penalty=1.2)
    batcher = Batcher(model, limit=8, pad_token_id=0)

    def texts() -> list[str]:
        rows = [row(prompt, sampling, every_token=True) for prompt in PROMPTS]
        batcher.submit([each for each, _ in rows])
        wait(*(receiver for _, receiver in rows))
        assert [receiver.error for _, receiver in rows] == [None] * len(rows)
        assert [receiver.tokens for _, receiver in rows] == [20] * len(rows)
        return [receiver.text for _, receiver in rows]

    expected = texts()
    if not temperature:
        assert expected == [alone(model, prompt, sampling) for prompt in PROMPTS]
    forward, steps = model.forward, [0]

    def fails(*args: Any, **options: Any) -> Any:
        steps[0] += 1
        if steps[0] == 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **options)

    model.forward = fails
    assert texts() == expected
    batcher.close()


def test_a_prompt_that_overflows_tells_nothing_of_the_mask() -> None:
    model = made(gpt2)
    batcher = Batcher(model, limit=8, pad_token_id=0)
    forward = model.forward

    @functools.wraps(forward)  # `generate` looks at the signature
    def overflows(input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(input_ids, **options)
        if (input_ids == 77).any():
            output.logits[:] = float("nan")
        return output

    model.forward = overflows
    bad, bad_got = row([77] * 30, Sampling(max_tokens=4, temperature=0.0))
    rows = [row(prompt, Sampling(max_tokens=4, temperature=0.0)) for prompt in PROMPTS]
    batcher.submit([bad, *(each for each, _ in rows)])
    wait(bad_got, *(receiver for _, receiver in rows))
    assert "not a number" in str(bad_got.error)
    assert [receiver.error for _, receiver in rows] == [None] * len(rows)
    sizes = sizes_of(model)
    later = [row(prompt, Sampling(max_tokens=4, temperature=0.0)) for prompt in PROMPTS]
    batcher.submit([each for each, _ in later])
    wait(*(receiver for _, receiver in later))
    batcher.close()
    assert sizes == [len(PROMPTS)], "the trial was made with a prompt that tells it"


def test_the_context_of_an_encoder_is_not_the_answers() -> None:
    context = Context.of(made(bart))
    assert context == Context(prompt=32, answer=31)
    assert context.fitted(30, Sampling(max_tokens=20), shorten=False, label="org/name").max_tokens == 20
    assert context.fitted(32, Sampling(max_tokens=99), shorten=True, label="org/name").max_tokens == 31
    with pytest.raises(JobError, match="33 tokens exceed the 32 tokens that org/name reads"):
        context.fitted(33, Sampling(max_tokens=1), shorten=True, label="org/name")
    with pytest.raises(JobError, match="max_tokens 32 exceeds the 31 tokens"):
        context.fitted(3, Sampling(max_tokens=32), shorten=False, label="org/name")
    assert Context.of(made(t5)) == Context()
    led = tf.LEDConfig(**SIZES, max_encoder_position_embeddings=64, max_decoder_position_embeddings=16)
    both = tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        tf.BertConfig(max_position_embeddings=40), tf.BertConfig(max_position_embeddings=20)
    )
    contexts = [Context.of(type("Model", (), {"config": config})()) for config in (led, both)]  # type: ignore[arg-type]
    assert contexts == [Context(prompt=64, answer=15), Context(prompt=40, answer=19)]


def test_the_context_of_a_decoder_holds_prompt_and_answer() -> None:
    context = Context.of(made(gpt2))
    assert (context, context.size) == (Context(together=64), 64)
    assert context.fitted(60, Sampling(max_tokens=99, min_tokens=9), shorten=True, label="m").min_tokens == 4
    for count, shorten, message in (
        (64, True, "leave no room for an answer"),
        (65, True, "65 tokens exceed the context of 64 tokens of m"),
        (60, False, "60 tokens and max_tokens 9 exceed the context"),
        (0, True, "prompt has no tokens"),
    ):
        with pytest.raises(JobError, match=message):
            context.fitted(count, Sampling(max_tokens=9), shorten=shorten, label="m")
