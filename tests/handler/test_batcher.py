"""Many prompts through one real model at once: each gets the text that it gets alone, even if others join, fail or leave."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf

from handler.engines.active_sequence import ActiveSequence
from handler.engines.batcher import Batcher
from handler.engines.detokenizer import Detokenizer
from handler.engines.generation_defaults import generation_defaults
from handler.engines.token_choice import JOIN_EVERY
from handler.errors import Code, JobError
from handler.sampling import Sampling
from tests.support.batches import GREEDY, Receiver, decode, row, wait

VOCABULARY = 200
END = 199


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.5,
    )
    return tf.LlamaForCausalLM(config).eval()


@pytest.fixture
def batcher(model: tf.PreTrainedModel) -> Iterator[Batcher]:
    batcher = Batcher(model, limit=8, pad_token_id=None)
    yield batcher
    batcher.close()


def alone(model: tf.PreTrainedModel, prompt: list[int], count: int) -> str:
    """What transformers says by itself."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return decode([token for token in output[0][len(prompt) :].tolist() if token != END])


PROMPTS = [[5, 6, 7], [11] * 9, [20, 30, 40, 50, 60], [1], [9, 8, 7, 6]]


def test_each_of_a_batch_gets_the_text_that_it_gets_alone(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    made = [row(prompt) for prompt in PROMPTS]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    for prompt, (_, receiver) in zip(PROMPTS, made, strict=True):
        assert receiver.text == alone(model, prompt, 12)
        assert receiver.reason in ("length", "stop")
        assert receiver.tokens == 12 or receiver.reason == "stop"


def calls(model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of `generate` has from now on."""
    sizes: list[int] = []
    real = type(model).generate

    def generate(self: Any, tokens: torch.Tensor, **keywords: Any) -> Any:
        if not getattr(keywords.get("generation_config"), "return_dict_in_generate", False):  # the trial of the mask
            sizes.append(tokens.shape[0])
        return real(self, tokens, **keywords)

    monkeypatch.setattr(type(model), "generate", generate)
    return sizes


def test_a_later_request_joins_the_running_ones(
    model: tf.PreTrainedModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Sampling(max_tokens=200, temperature=0.0, repetition_penalty=1.3)
    sizes = calls(model, monkeypatch)
    first, first_got = row(PROMPTS[0], long, every_token=True)
    batcher.submit([first])
    while not first_got.pieces:
        pass
    second, second_got = row(PROMPTS[1])
    batcher.submit([second])
    wait(second_got)
    assert not first_got.ended.is_set(), "the later one did not wait for the end of the first"
    assert first_got.tokens <= JOIN_EVERY + 12 + 40
    first.cancel()
    assert second_got.text == alone(model, PROMPTS[1], 12)
    assert 2 in sizes


def test_a_join_changes_nothing_for_running_requests(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    seeded = Sampling(max_tokens=100, temperature=0.8, seed=5)
    lonely, expected = row(PROMPTS[2], seeded)
    batcher.submit([lonely])
    wait(expected)
    joined, got = row(PROMPTS[2], seeded, every_token=True)
    batcher.submit([joined])
    while got.tokens < 5:
        pass
    others = [row(prompt) for prompt in PROMPTS[:2]]
    batcher.submit([one for one, _ in others])
    wait(got, *(receiver for _, receiver in others))
    assert got.text == expected.text


def test_a_seed_gives_the_same_again_and_another_something_else(batcher: Batcher) -> None:
    texts = []
    for seed in (1, 1, 2):
        one, got = row(PROMPTS[0], Sampling(max_tokens=20, temperature=1.5, top_p=1.0, seed=seed))
        batcher.submit([one])
        wait(got)
        texts.append(got.text)
    assert texts[0] == texts[1] != texts[2]
    unseeded = []
    for _ in range(2):
        one, got = row(PROMPTS[0], Sampling(max_tokens=20, temperature=2.0, top_p=1.0))
        batcher.submit([one])
        wait(got)
        unseeded.append(got.text)
    assert unseeded[0] != unseeded[1]


def test_each_row_has_its_own_way_to_choose(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    ways = [
        GREEDY,
        Sampling(max_tokens=12, temperature=1.5, top_k=1, seed=1),
        Sampling(max_tokens=12, temperature=1.5, top_p=1e-9, seed=1),
        Sampling(max_tokens=12, temperature=0.0, repetition_penalty=1e-9 + 5.0),
    ]
    made = [row(PROMPTS[1], way) for way in ways]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    greedy, top_1, top_nothing, penalised = (receiver.text for _, receiver in made)
    assert greedy == top_1 == top_nothing == alone(model, PROMPTS[1], 12)
    output = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False, pad_token_id=0, repetition_penalty=5.0
    )
    assert penalised == decode([token for token in output[0][len(PROMPTS[1]) :].tolist() if token != END])
    assert penalised != greedy


def test_sampling_is_transformers_own_distribution(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    """One token, many times: as often as the warped probabilities say."""
    count = 400
    made = [
        row(PROMPTS[0], Sampling(max_tokens=1, temperature=3.0, top_k=4, top_p=1.0, seed=seed)) for seed in range(count)
    ]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    with torch.no_grad():
        odds = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 3.0).topk(4)
    expected = odds.values.softmax(-1)
    for token, share in zip(odds.indices.tolist(), expected.tolist(), strict=True):
        drawn = sum(receiver.text in (f"{token}.", "") and f"{token}." == receiver.text for _, receiver in made)
        assert abs(drawn / count - share) < 0.1


def test_a_stop_string_ends_a_row_before_it(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    whole = alone(model, PROMPTS[2], 12)
    fourth = ".".join(whole.split(".")[3:4]) + "."
    one, got = row(PROMPTS[2], Sampling(max_tokens=12, temperature=0.0, stop=(fourth,)))
    batcher.submit([one])
    wait(got)
    assert got.reason == "stop"
    assert got.text == whole[: whole.find(fourth)]


def test_a_row_that_is_cancelled_says_nothing_more(batcher: Batcher) -> None:
    one, got = row(PROMPTS[0], Sampling(max_tokens=400, temperature=0.0, repetition_penalty=1.3), every_token=True)
    other, other_got = row(PROMPTS[1])
    batcher.submit([one, other])
    while not got.pieces:
        pass
    one.cancel()
    wait(other_got)
    after, after_got = row(PROMPTS[0])
    batcher.submit([after])
    wait(after_got)
    assert not got.ended.is_set()
    assert got.tokens < 200
    never, never_got = row(PROMPTS[0])
    never.cancel()
    batcher.submit([never])
    batcher.close()
    assert not never_got.pieces


@pytest.fixture
def failing(
    model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[torch.Tensor], None]], None]:
    """`generate` raises what a function of its tokens raises."""
    real = type(model).generate

    def install(check: Callable[[torch.Tensor], None]) -> None:
        def generate(self: Any, tokens: torch.Tensor, **keywords: Any) -> Any:
            check(tokens)
            return real(self, tokens, **keywords)

        monkeypatch.setattr(type(model), "generate", generate)

    return install


def test_a_row_that_fails_alone_is_to_blame_and_the_others_are_answered(
    model: tf.PreTrainedModel, batcher: Batcher, failing: Callable[..., None]
) -> None:
    def poisoned(tokens: torch.Tensor) -> None:
        if (tokens == 77).any():
            raise ValueError("seventy-seven")

    failing(poisoned)
    good = [row(prompt) for prompt in PROMPTS]
    bad, bad_got = row([3, 77, 3])
    batcher.submit([one for one, _ in good[:2]] + [bad] + [one for one, _ in good[2:]])
    wait(bad_got, *(receiver for _, receiver in good))
    assert str(bad_got.error) == "seventy-seven"
    for prompt, (_, receiver) in zip(PROMPTS, good, strict=True):
        assert receiver.text == alone(model, prompt, 12)


def test_out_of_memory_makes_batches_smaller(
    model: tf.PreTrainedModel, batcher: Batcher, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tokens: torch.Tensor) -> None:
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failing(full)
    made = [row(prompt) for prompt in PROMPTS]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    for prompt, (_, receiver) in zip(PROMPTS, made, strict=True):
        assert receiver.text == alone(model, prompt, 12)


def test_there_is_room_again_once_the_row_that_does_not_fit_has_failed(
    model: tf.PreTrainedModel, batcher: Batcher, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while other rows wait: with a steady load no batch is ever empty."""

    def full(tokens: torch.Tensor) -> None:
        if (tokens == 77).any():
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failing(full)
    sizes = calls(model, monkeypatch)
    bad, bad_got = row([77] * 3)
    made = [row([number, 5, 9]) for number in range(1, 40)]
    batcher.submit([bad, *(one for one, _ in made)])
    wait(bad_got, *(receiver for _, receiver in made))
    assert isinstance(bad_got.error, torch.OutOfMemoryError)
    assert sizes.count(8) >= 3, f"of eight rows each, as before it: {sizes}"


def test_batches_become_larger_again_after_a_peak(
    model: tf.PreTrainedModel, batcher: Batcher, failing: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = [True]

    def full(tokens: torch.Tensor) -> None:
        if peak[0] and tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        peak[0] = False

    failing(full)
    sizes = calls(model, monkeypatch)
    made = [row([number, 5, 9]) for number in range(1, 60)]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 8, sizes


def test_a_row_that_does_not_fit_alone_fails_and_the_next_goes_on(
    batcher: Batcher, failing: Callable[..., None]
) -> None:
    def full(tokens: torch.Tensor) -> None:
        if tokens.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failing(full)
    large, large_got = row([7] * 150)
    small, small_got = row(PROMPTS[0])
    batcher.submit([large, small])
    wait(large_got, small_got)
    assert isinstance(large_got.error, torch.OutOfMemoryError)
    assert large_got.error.__traceback__ is None, "its frames would hold the batch's tensors"
    assert small_got.text


def test_a_lost_gpu_fails_everybody_and_is_said(batcher: Batcher, failing: Callable[..., None]) -> None:
    def lost(tokens: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    failing(lost)
    made = [row(prompt) for prompt in PROMPTS]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    assert all(receiver.error for _, receiver in made)
    assert "device-side assert" in batcher.broken


@pytest.mark.parametrize("words", ["an illegal memory access was encountered", "misaligned address"])
def test_any_error_of_the_gpu_ends_all_that_runs_and_waits(
    model: tf.PreTrainedModel, failing: Callable[..., None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after such an error: nothing that is asked of the GPU succeeds, giving memory back included."""

    def lost(*_: Any) -> None:
        raise RuntimeError(f"CUDA error: {words}")

    failing(lost)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    batcher = Batcher(model, limit=2, pad_token_id=None)
    made = [row(prompt) for prompt in PROMPTS]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    assert all(receiver.error for _, receiver in made)
    assert batcher.broken
    batcher.close()


def test_a_slot_is_free_when_its_row_has_ended(model: tf.PreTrainedModel) -> None:
    batcher = Batcher(model, limit=2, pad_token_id=None)
    long, long_got = row(
        PROMPTS[0], Sampling(max_tokens=400, temperature=0.0, repetition_penalty=1.3), every_token=True
    )
    short, short_got = row(PROMPTS[1], Sampling(max_tokens=1, temperature=0.0))
    batcher.submit([long, short])
    wait(short_got)
    later, later_got = row(PROMPTS[2], Sampling(max_tokens=2, temperature=0.0))
    batcher.submit([later])
    wait(later_got)
    assert not long_got.ended.is_set(), "it did not wait for the end of the long one"
    long.cancel()
    batcher.close()


def test_a_row_that_has_ended_is_not_carried_beyond_the_context() -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=49
    )
    model = tf.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    batcher = Batcher(model, limit=2, pad_token_id=0)
    near, near_got = row([5] * 35, Sampling(max_tokens=4, temperature=0.0))
    far, far_got = row([6, 7], Sampling(max_tokens=37, temperature=0.0))
    sizes: list[int] = []
    real = type(model).generate
    batcher._model = model
    model.generate = lambda tokens, **more: sizes.append(len(tokens)) or real(model, tokens, **more)  # type: ignore[method-assign]
    batcher.submit([near, far])
    wait(near_got, far_got)
    batcher.close()
    assert sizes[-2:] == [2, 1], "begun together, and gone on with alone; nothing failed"
    assert (near_got.tokens, far_got.tokens) == (4, 37)


def test_the_models_own_generation_config_is_applied_once(model: tf.PreTrainedModel) -> None:
    own = copy.deepcopy(model)
    own.generation_config.repetition_penalty = 1.4
    own.generation_config.num_beams = 3
    batcher = Batcher(own, limit=2, pad_token_id=None)
    by_default, got = row(PROMPTS[1])
    without, plain = row(PROMPTS[1], Sampling(max_tokens=12, temperature=0.0, repetition_penalty=1.0))
    batcher.submit([by_default, without])
    wait(got, plain)
    batcher.close()
    output = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False, pad_token_id=0, repetition_penalty=1.4
    )
    assert got.text == decode([token for token in output[0][len(PROMPTS[1]) :].tolist() if token != END])
    assert plain.text == alone(model, PROMPTS[1], 12)


def test_weights_that_overflow_are_an_error_and_no_crash(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: real(self, dim) * float("nan"))
    one, got = row(PROMPTS[0], Sampling(max_tokens=3, temperature=1.0, seed=1))
    batcher.submit([one])
    wait(got)
    assert "not a number" in str(got.error)


def test_a_model_with_an_encoder_is_not_interrupted_for_later_requests() -> None:
    torch.manual_seed(1)
    config = tf.T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, initializer_factor=20.0,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    batcher = Batcher(model, limit=4, pad_token_id=0)
    first, first_got = row([5, 6, 7, 8], Sampling(max_tokens=60, temperature=0.0), every_token=True)
    batcher.submit([first])
    while not first_got.pieces:
        pass
    second, second_got = row([9, 10], Sampling(max_tokens=5, temperature=0.0))
    batcher.submit([second])
    wait(first_got, second_got)
    batcher.close()
    for prompt, count, got in (([5, 6, 7, 8], 60, first_got), ([9, 10], 5, second_got)):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        assert got.text == decode(output[0][1:].tolist())


class Panic(BaseException):
    """No Exception, as a tokenizer in Rust raises it."""


def test_a_panic_fails_its_row_and_no_other(batcher: Batcher, model: tf.PreTrainedModel) -> None:
    def panics(_tokens: object) -> str:
        raise Panic("index out of bounds")

    got = Receiver()
    bad = ActiveSequence(
        PROMPTS[0], Sampling(max_tokens=4, temperature=0.0), Detokenizer(panics), got, every_token=True
    )
    good, good_got = row(PROMPTS[1])
    batcher.submit([bad, good])
    wait(got, good_got)
    assert isinstance(got.error, Panic)
    assert good_got.text == alone(model, PROMPTS[1], 12)


def test_no_row_waits_for_a_thread_that_has_ended(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object) -> None:
        raise Panic("a fault of ours")

    monkeypatch.setattr(batcher, "_after_failure", fails)
    monkeypatch.setattr(batcher, "_generate", fails)
    first, first_got = row(PROMPTS[0])
    batcher.submit([first])
    wait(first_got)
    batcher._thread.join(10)
    late, late_got = row(PROMPTS[1])
    batcher.submit([late])
    wait(late_got)
    assert first_got.error is not None
    assert late_got.error is not None
    assert "failed" in batcher.broken


def test_an_abandoned_step_says_that_the_worker_is_stuck(batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(batcher, "_generate", lambda _rows: release.wait(30))
    monkeypatch.setattr("handler.engines.batcher._STUCK_S", 0.2)
    hung, _got = row(PROMPTS[0])
    batcher.submit([hung])
    time.sleep(0.3)
    assert batcher.broken == "", "it is waited for"
    hung.cancel()
    time.sleep(0.3)
    assert "has not ended" in batcher.broken
    release.set()
    until = time.monotonic() + 60
    while batcher.broken and time.monotonic() < until:
        time.sleep(0.01)
    assert batcher.broken == ""


@pytest.mark.parametrize(
    ("name", "value", "applied"),
    [
        ("stop_strings", ["the"], False),
        ("constraints", [{"x": 1}], False),
        ("force_words_ids", [[1, 2]], False),
        ("num_beams", 4, False),
        ("guidance_scale", 3.0, False),
        ("repetition_penalty", 0.0, False),
        ("repetition_penalty", "much", False),
        ("top_k", -3, False),
        ("suppress_tokens", [10**9], False),
        ("suppress_tokens", [5, 6], True),
        ("suppress_tokens", list(range(VOCABULARY)), False),
        ("bad_words_ids", [[]], False),
        ("bad_words_ids", [[7]], True),
        ("eos_token_id", "x", False),
        ("no_repeat_ngram_size", -1, False),
        ("sequence_bias", {"a": 1}, False),
        ("max_time", 0.0001, False),
        ("watermarking_config", {"bias": 1}, False),
    ],
)
def test_a_generation_config_that_is_not_served_is_ignored_with_a_warning(
    model: tf.PreTrainedModel, name: str, value: object, applied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    own = copy.deepcopy(model)
    setattr(own.generation_config, name, value)
    batcher = Batcher(own, limit=2, pad_token_id=None)
    one, got = row(PROMPTS[0])
    batcher.submit([one])
    wait(got)
    batcher.close()
    assert got.error is None
    assert (f"{name}=" in caplog.text) == (not applied)
    if not applied and name != "eos_token_id":
        assert got.text == alone(model, PROMPTS[0], 12)


def test_of_a_list_of_ids_those_apply_that_the_model_has(
    model: tf.PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    own = copy.deepcopy(model)
    own.generation_config.eos_token_id = [END, VOCABULARY + 5]
    batcher = Batcher(own, limit=2, pad_token_id=None)
    batcher.close()
    assert batcher._defaults.ends == {END}
    assert "only ids that the model has apply" in caplog.text


def texts(batcher: Batcher, sampling: Sampling, prompt: list[int] = PROMPTS[0], **more: Any) -> Receiver:
    """What one row gets, beside others of another kind."""
    receiver = Receiver()
    mine = ActiveSequence(prompt, sampling, Detokenizer(decode), receiver, every_token=True, **more)
    other, other_got = row(PROMPTS[1])
    batcher.submit([other, mine])
    wait(receiver, other_got)
    assert receiver.error is None
    return receiver


def test_a_bias_makes_a_token_certain_or_impossible(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    plain = texts(batcher, GREEDY).text
    first = int(plain.split(".")[0])
    assert texts(batcher, replace(GREEDY, logit_bias=((77, 100.0),))).text == "77." * 12
    assert f"{first}." not in texts(batcher, replace(GREEDY, logit_bias=((first, -100.0),))).text
    own = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=12, do_sample=False, pad_token_id=0, sequence_bias=[[[77], 3.5]]
    )
    tokens = [token for token in own[0][len(PROMPTS[0]) :].tolist() if token != END]
    assert texts(batcher, replace(GREEDY, logit_bias=((77, 3.5),))).text == decode(tokens), "as transformers has it"


def test_penalties_count_what_was_generated(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    """Against the definition of OpenAI's documentation, step by step."""
    for presence, frequency in ((1.5, 0.0), (0.0, 2.0), (-2.0, -2.0), (0.7, 0.3)):
        expected: list[int] = []
        for _step in range(12):
            logits = model(torch.tensor([[*PROMPTS[0], *expected]])).logits[0, -1].detach().clone()
            for token in set(expected):
                logits[token] -= presence + frequency * expected.count(token)
            expected.append(int(logits.argmax()))
            if expected[-1] == END:
                break
        sampling = replace(GREEDY, presence_penalty=presence, frequency_penalty=frequency)
        assert texts(batcher, sampling).text == decode([token for token in expected if token != END])


def test_min_p_leaves_the_likely_tokens_alone(batcher: Batcher) -> None:
    wild = Sampling(max_tokens=12, temperature=2.0, top_p=1.0, top_k=0, seed=3)
    greedy = texts(batcher, replace(GREEDY, ignore_eos=True)).text
    assert texts(batcher, replace(wild, ignore_eos=True)).text != greedy
    assert texts(batcher, replace(wild, min_p=1.0, ignore_eos=True)).text == greedy


def test_end_tokens_are_the_models_the_tokenizers_and_the_jobs(model: tf.PreTrainedModel) -> None:
    certain = ((77, 50.0), (END, 100.0))
    for tokenizer_end, sampling, more, text in (
        (None, replace(GREEDY, logit_bias=certain), {}, ""),
        (None, replace(GREEDY, logit_bias=certain, skip_special_tokens=False), {}, f"{END}."),
        (None, replace(GREEDY, logit_bias=certain, ignore_eos=True), {}, f"{END}." * 12),
        (None, replace(GREEDY, logit_bias=certain, min_tokens=3), {}, "77." * 3),
        (77, replace(GREEDY, logit_bias=((77, 100.0),)), {}, ""),
        (None, replace(GREEDY, logit_bias=((77, 100.0),)), {"ends": frozenset({77})}, ""),
        (None, replace(GREEDY, logit_bias=((77, 100.0),), ignore_eos=True), {"ends": frozenset({77})}, ""),
        (None, replace(GREEDY, logit_bias=((77, 100.0),), skip_special_tokens=False), {"ends": frozenset({77})}, ""),
    ):
        batcher = Batcher(model, limit=8, pad_token_id=None, tokenizer_end=tokenizer_end)
        got = texts(batcher, sampling, **more)
        batcher.close()
        assert (got.text, got.reason) == (text, "length" if sampling.ignore_eos and not more else "stop")


def test_log_probabilities_are_the_models_own(model: tf.PreTrainedModel, batcher: Batcher) -> None:
    """Those of the prompt too, and also if a penalty or a bias chooses other tokens."""
    for sampling in (GREEDY, replace(GREEDY, temperature=1.0, seed=5), replace(GREEDY, logit_bias=((77, 100.0),))):
        prompt = PROMPTS[2]
        sampling = replace(sampling, logprobs=2, ignore_eos=True)
        got = texts(batcher, sampling, prompt, beginning="P", scores_prompt=True)
        assert got.text.startswith("P")
        tokens = [int(each.token) for each in got.logprobs]
        assert tokens[: len(prompt)] == prompt
        assert len(tokens) == len(prompt) + 12
        odds = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        assert got.logprobs[0].logprob is None
        for place, each in enumerate(got.logprobs[1:]):
            assert each.logprob == pytest.approx(odds[place, int(each.token)].item(), abs=1e-3)
            best = odds[place].topk(2)
            assert [int(token) for token, _ in each.top] == best.indices.tolist()
            assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert not texts(batcher, GREEDY).logprobs
    assert all(each.top == () for each in texts(batcher, replace(GREEDY, logprobs=0)).logprobs)


def test_a_prompt_is_scored_without_a_token_generated(batcher: Batcher) -> None:
    sampling = replace(GREEDY, max_tokens=0, logprobs=1)
    got = texts(batcher, sampling, PROMPTS[2], beginning="P", scores_prompt=True)
    assert (got.text, got.tokens, got.reason, len(got.logprobs)) == ("P", 0, "length", len(PROMPTS[2]))


def test_others_go_on_while_prompts_are_scored(
    model: tf.PreTrainedModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are scored one by one, and what was cancelled meanwhile is not."""
    scored: list[int] = []
    real = Batcher._score_prompt

    def score(self: Batcher, one: ActiveSequence) -> None:
        scored.append(len(other_got.text))
        real(self, one)

    monkeypatch.setattr(Batcher, "_score_prompt", score)
    sampling = replace(GREEDY, max_tokens=0, logprobs=1)
    other, other_got = row(PROMPTS[0], Sampling(max_tokens=300, temperature=0.0, ignore_eos=True), every_token=True)
    batcher.submit([other])
    while not other_got.pieces:
        assert not other_got.ended.wait(0.01)
    made = []
    for prompt in PROMPTS:
        receiver = Receiver()
        made.append(
            (
                ActiveSequence(prompt, sampling, Detokenizer(decode), receiver, every_token=False, scores_prompt=True),
                receiver,
            )
        )
    made[-1][0].cancel()
    batcher.submit([one for one, _ in made])
    wait(other_got, *(receiver for _, receiver in made[:-1]))
    assert scored == sorted(set(scored)), "between two prompts the other row got tokens"
    assert len(scored) == len(PROMPTS) - 1
    for prompt, (_, receiver) in zip(PROMPTS[:-1], made[:-1], strict=True):
        assert len(receiver.logprobs) == len(prompt)


def scored(prompt: list[int], tokens: int) -> tuple[ActiveSequence, Receiver]:
    receiver = Receiver()
    sampling = replace(GREEDY, max_tokens=tokens, logprobs=1, ignore_eos=True)
    detokenizer = Detokenizer(decode, (), at_the_end=True)
    return ActiveSequence(prompt, sampling, detokenizer, receiver, every_token=False, scores_prompt=True), receiver


def test_prompts_that_are_scored_are_generated_for_together(
    model: tf.PreTrainedModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = calls(model, monkeypatch)
    made = [scored(prompt, 4) for prompt in PROMPTS]
    batcher.submit([one for one, _ in made])
    wait(*(receiver for _, receiver in made))
    assert sizes == [len(PROMPTS)]
    assert [len(receiver.logprobs) for _, receiver in made] == [len(prompt) + 4 for prompt in PROMPTS]


def test_a_prompt_that_cannot_be_scored_fails_alone(
    model: tf.PreTrainedModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(model).forward

    def fails(self: Any, *tokens: torch.Tensor, **more: Any) -> Any:  # `generate` names its arguments
        if tokens and (tokens[0] == 77).any():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output = forward(self, *tokens, **more)
        if tokens and (tokens[0] == 78).any():
            output.logits[:] = float("nan")
        return output

    monkeypatch.setattr(type(model), "forward", fails)
    other, other_got = row(PROMPTS[0])
    bad, bad_got = scored([3, 77], 0)
    odd, odd_got = scored([3, 78], 0)
    good, good_got = scored([3, 7], 0)
    batcher.submit([bad, other, odd, good])
    wait(bad_got, other_got, odd_got, good_got)
    assert isinstance(bad_got.error, torch.OutOfMemoryError)
    assert "not a number" in str(odd_got.error)
    assert not odd_got.logprobs, "and no NaN goes out"
    assert other_got.text == alone(model, PROMPTS[0], 12)
    assert len(good_got.logprobs) == 2
    assert batcher._room.rows == 8, "nobody else had less room"


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_that_fails_in_the_middle_is_done_once_more_as_it_was(
    model: tf.PreTrainedModel, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Rows that have drawn their token keep it, and log probabilities are told once."""
    ways = [
        replace(GREEDY, temperature=1.0, seed=1, logprobs=1, ignore_eos=True),
        replace(GREEDY, temperature=0.7, seed=2, logprobs=1, ignore_eos=True),
    ]

    def run() -> list[Receiver]:
        made = [row(prompt, way) for prompt, way in zip(PROMPTS, ways, strict=False)]
        batcher.submit([one for one, _ in made])
        wait(*(receiver for _, receiver in made))
        return [receiver for _, receiver in made]

    expected = run()
    real, drawn = torch.multinomial, []

    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(1)
        if len(drawn) == 2 * step:  # the second row of a step, when the first one has drawn
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "multinomial", fails)
    got = run()
    assert len(drawn) == 2 * 12 + 1
    for one, other in zip(got, expected, strict=True):
        assert (one.text, one.tokens) == (other.text, other.tokens)
        assert [each.token for each in one.logprobs] == [each.token for each in other.logprobs]


def test_a_job_without_a_value_gets_the_models_own(model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"temperature": 0.3, "top_p": 0.7, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    open_ = Sampling(temperature=None, top_p=None, top_k_without_one=0)
    defaults = generation_defaults(tf.GenerationConfig(**own), vocabulary=VOCABULARY, pad_token_id=0)
    completed = defaults.completed(open_)
    assert {name: getattr(completed, name) for name in own} == own
    named = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert defaults.completed(named) == named
    none = generation_defaults(tf.GenerationConfig(), vocabulary=VOCABULARY, pad_token_id=0).completed(open_)
    assert (none.temperature, none.top_p, none.top_k, none.min_p) == (1.0, 1.0, 0, 0.0)
    assert generation_defaults(tf.GenerationConfig(), vocabulary=9, pad_token_id=0).completed(Sampling()).top_k == 50


def test_tokens_that_no_text_begins_with_may_come_when_another_row_joins(model: tf.PreTrainedModel) -> None:
    """`generate` starts anew for a row that joins: in the middle of a text nothing is suppressed."""
    own = copy.deepcopy(model)
    own.generation_config.begin_suppress_tokens = [77]
    batcher = Batcher(own, limit=8, pad_token_id=None)
    first, got = row(
        PROMPTS[0], replace(GREEDY, max_tokens=60, ignore_eos=True, logit_bias=((77, 100.0),)), every_token=True
    )
    batcher.submit([first])
    while not got.pieces:
        pass
    others = [row(prompt) for prompt in PROMPTS[1:]]
    for other, _receiver in others:
        batcher.submit([other])
    wait(got, *(receiver for _, receiver in others))
    batcher.close()
    assert got.text.count("77.") == 59, "all but the first"


def test_an_output_that_is_not_a_number_is_an_error_for_every_way_to_choose(model: tf.PreTrainedModel) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data.fill_(float("nan"))
    batcher = Batcher(broken, limit=8, pad_token_id=None)
    for sampling in (GREEDY, replace(GREEDY, temperature=1.0), replace(GREEDY, logprobs=1)):
        one, got = row(PROMPTS[0], sampling)
        batcher.submit([one])
        wait(got)
        assert "not a number" in str(got.error)
    batcher.close()


def test_a_request_that_leaves_no_token_is_the_senders_fault(batcher: Batcher) -> None:
    sampling = replace(GREEDY, min_tokens=2)
    receiver = Receiver()
    ends = frozenset(range(VOCABULARY))
    batcher.submit([ActiveSequence(PROMPTS[0], sampling, Detokenizer(decode), receiver, every_token=True, ends=ends)])
    wait(receiver)
    assert isinstance(receiver.error, JobError)
    assert receiver.error.code is Code.INVALID_INPUT


def test_the_log_probabilities_of_a_characters_tokens_join_to_the_text() -> None:
    def text_of(token: int, before: Sequence[int]) -> str:
        return bytes([*before, token]).decode(errors="replace")

    receiver = Receiver()
    one = ActiveSequence(
        [1], replace(GREEDY, logprobs=1), Detokenizer(lambda tokens: bytes(tokens).decode(errors="replace")), receiver,
        every_token=True, text_of=text_of,
    )  # fmt: skip
    for token in "a\u20ac\U0001f600b".encode():
        one.tell(token, -1.0, [(0xE2, -2.0)])
        one.push(token, frozenset())
    one.end("stop")
    assert "".join(each.token for each in receiver.logprobs) == receiver.text == "a\u20ac\U0001f600b"
