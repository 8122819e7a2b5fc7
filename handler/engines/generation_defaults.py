"""The values of a model's `generation_config.json` that the text engine applies to its jobs.

The file comes with the repository, so nothing in it is taken unseen: a value that `generate` would fail for, in each
job, is ignored with a warning when the model is loaded. So is a way to search or to stop that batches of independent
rows do not have (`stop_strings`, `constraints`, beams). How a token is chosen is the job's to say; of the model's own
values the engine takes those that the job leaves open, as vLLM does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from handler.errors import shown
from handler.sampling import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    Sampling,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`config`: for `generate`, greedy and neutral but for the values that shape a model's output, and without an end.
    `ends`: the tokens that end a text. `suppressed_first`: tokens that no text begins with. The others are for what a
    job leaves open; `top_k` is None if the model leaves it open too.
    """

    config: GenerationConfig
    ends: frozenset[int]
    suppressed_first: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def completed(self, sampling: Sampling) -> Sampling:
        """A job's way to choose tokens, completed by the model's own."""
        fallback_top_k = sampling.top_k_without_one if self.top_k is None else self.top_k
        return replace(
            sampling,
            temperature=self.temperature if sampling.temperature is None else sampling.temperature,
            top_p=self.top_p if sampling.top_p is None else sampling.top_p,
            top_k=fallback_top_k if sampling.top_k is None else sampling.top_k,
            min_p=self.min_p if sampling.min_p is None else sampling.min_p,
            repetition_penalty=sampling.repetition_penalty or self.repetition_penalty,
        )


def generation_defaults(
    config_values: GenerationConfig, *, vocabulary: int, pad_token_id: int | None, tokenizer_end: int | None = None
) -> GenerationDefaults:
    """The defaults that a model's own config leads to; `vocabulary` is the number of its tokens. `tokenizer_end`: the
    end token of its tokenizer, which a fine-tune may name there alone."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocabulary

    def is_ids(value: Any) -> bool:
        return is_id(value) or (isinstance(value, list) and value != [] and all(map(is_id, value)))

    def leaves_some(value: Any) -> bool:
        return is_ids(value) and (is_id(value) or len(set(value)) < vocabulary)

    def is_words(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(ids, list) and ids and is_ids(ids) for ids in value)

    def is_switch(value: Any) -> bool:
        return isinstance(value, bool)

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value <= vocabulary

    def is_penalty(value: Any) -> bool:
        return type(value) in (int, float) and MIN_REPETITION_PENALTY <= value <= MAX_REPETITION_PENALTY

    def is_temperature(value: Any) -> bool:
        return type(value) in (int, float) and (value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE)

    def is_share(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value <= 1

    def is_top_k(value: Any) -> bool:
        return type(value) is int and 0 <= value <= MAX_TOP_K

    applied: Mapping[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("bos_token_id", "decoder_start_token_id", "forced_bos_token_id"), is_id),
        **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), is_ids),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), leaves_some),
        "bad_words_ids": is_words,
        **dict.fromkeys(("use_cache", "renormalize_logits", "remove_invalid_values"), is_switch),
        **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), is_count),
        **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), is_penalty),
        "top_k": is_top_k,
        "temperature": is_temperature,
        **dict.fromkeys(("top_p", "min_p"), is_share),
    }
    values: dict[str, Any] = {}
    for name, value in vars(config_values).items():
        if value is None or value == [] or name in _REPLACED:
            continue
        if name in _LISTS_OF_IDS and isinstance(value, list) and not all(map(is_id, value)):
            # As a checkpoint has it that names added tokens which its embedding has no rows for
            logger.warning("generation_config.json: %s=%s: only ids that the model has apply", name, shown(value))
            value = list(filter(is_id, value))
        if name in applied and applied[name](value):
            values[name] = value
        elif value != _HARMLESS.get(name):
            logger.warning("generation_config.json: %s=%s is ignored: it is not served", name, shown(value))
    choices = {name: values.pop(name) for name in _OF_A_JOB if name in values}
    first = values.pop("begin_suppress_tokens", ())  # `generate` starts anew if a row joins, in the middle of a text
    # The batcher ends each row itself: a job may ask for a text beyond the end.
    named_ends = values.pop("eos_token_id", ())
    ends = {named_ends} if isinstance(named_ends, int) else set(named_ends)
    if is_id(tokenizer_end):
        ends.add(tokenizer_end)
    config = GenerationConfig(
        **values,
        # Neutral values, and not None: `generate` fills None from its own defaults.
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        min_length=0,
        temperature=1.0,
        top_p=1.0,
        typical_p=1.0,
        pad_token_id=pad_token_id or 0,
    )
    return GenerationDefaults(config, frozenset(ends), (first,) if isinstance(first, int) else tuple(first), **choices)


_OF_A_JOB = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_LISTS_OF_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
# The job, or the engine, says these in each case.
_REPLACED = frozenset(
    (
        *("do_sample", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"),
        *("max_length", "max_new_tokens", "min_length", "max_cache_len", "pad_token_id", "num_return_sequences"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("cache_implementation", "cache_config", "compile_config", "disable_compile", "continuous_batching_config"),
        *("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash"),
        *("length_penalty", "early_stopping", "low_memory"),  # they say something of beams alone
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        *("assistant_early_exit", "speculation_type", "use_mtp"),
    )
)
_HARMLESS: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "min_new_tokens": 0,
    "token_healing": False,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
}
