"""How a request's tokens are chosen, and when its text ends. Pure functions.

`temperature: 0` means greedy. The names and their meaning are OpenAI's and vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.errors import invalid, shown
from handler.values import flag, integer, number, token_ids

MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1_000_000
MIN_REPETITION_PENALTY = 0.1
MAX_REPETITION_PENALTY = 10.0
TRANSFORMERS_TOP_K = 50  # the default of `generate`
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 200
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
_DEFAULT_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to end. None means the model's own default.

    `top_k_without_one`: the value if neither the job nor the model has one. `logit_bias`: pairs of a token's id and
    what is added to its logit. `logprobs`: the number of alternatives to each token whose log probabilities the answer
    tells, and the token's own; None if it tells none.
    """

    max_tokens: int = _DEFAULT_TOKENS
    temperature: float | None = 0.7
    top_p: float | None = 0.9
    top_k: int | None = None
    top_k_without_one: int = TRANSFORMERS_TOP_K
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters as an answer repeats them: those of the job, and the usual defaults."""
        usual = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}
        fields: dict[str, Any] = {name: value for name, value in usual.items() if value is not None}
        neutral = Sampling()
        optional = {
            name: getattr(self, name) for name in _REPEATED if getattr(self, name) not in (None, getattr(neutral, name))
        }
        lists = {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}
        bias = {str(token): value for token, value in self.logit_bias}
        optional |= {name: value for name, value in lists.items() if value} | ({"logit_bias": bias} if bias else {})
        return fields | optional


_REPEATED = (
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "min_tokens"),
    *("ignore_eos", "skip_special_tokens"),
)


def parse_sampling(
    data: Mapping[str, Any],
    max_tokens: int,
    *,
    usual: Sampling = Sampling(),
    at_least: int = 1,
) -> Sampling:
    """The fields that say how to choose tokens. `max_tokens`: the most that may be asked for; `usual`: the values of
    those that are not there. Raises JobError."""
    repetition_penalty = seed = min_p = None
    if data.get("min_p") is not None:
        min_p = number(data, "min_p", 0.0, at_least=0.0, at_most=1.0)
    if data.get("repetition_penalty") is not None:
        repetition_penalty = number(
            data, "repetition_penalty", 1.0, at_least=MIN_REPETITION_PENALTY, at_most=MAX_REPETITION_PENALTY
        )
    if data.get("seed") is not None:
        seed = integer(data, "seed", 0, at_least=-MAX_SEED, at_most=MAX_SEED)
    longest = integer(data, "max_tokens", min(usual.max_tokens, max_tokens), at_least=at_least, at_most=max_tokens)
    return Sampling(
        max_tokens=longest,
        temperature=usual.temperature if data.get("temperature") is None else _temperature(data),
        top_p=usual.top_p if data.get("top_p") is None else number(data, "top_p", 1.0, above=0.0, at_most=1.0),
        top_k=_top_k(data),
        top_k_without_one=usual.top_k_without_one,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=number(data, "presence_penalty", 0.0, at_least=-MAX_PENALTY, at_most=MAX_PENALTY),
        frequency_penalty=number(data, "frequency_penalty", 0.0, at_least=-MAX_PENALTY, at_most=MAX_PENALTY),
        logit_bias=_logit_bias(data.get("logit_bias")),
        seed=None if seed == -1 else seed,  # as vLLM has it
        stop=_stop(data.get("stop")),
        stop_token_ids=token_ids(data.get("stop_token_ids") or [], "stop_token_ids", at_most=MAX_STOP_TOKENS),
        min_tokens=integer(data, "min_tokens", 0, at_least=0, at_most=longest),
        ignore_eos=flag(data, "ignore_eos"),
        skip_special_tokens=flag(data, "skip_special_tokens", default=True),
        logprobs=_logprobs(data),
    )


def _temperature(data: Mapping[str, Any]) -> float:
    """0 for greedy, else large enough that dividing by it stays finite: on a GPU it would not be an exception. A lower
    one is raised, as vLLM does."""
    value = number(data, "temperature", 1.0, at_least=0.0, at_most=MAX_TEMPERATURE)
    return max(value, MIN_TEMPERATURE) if value else 0.0


def _top_k(data: Mapping[str, Any]) -> int | None:
    """None if the job names none; 0 for all tokens, which vLLM also writes as -1."""
    if data.get("top_k") is None:
        return None
    return max(0, integer(data, "top_k", 0, at_least=-1, at_most=MAX_TOP_K))


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    biases = {} if value is None else value
    if not isinstance(biases, dict) or len(biases) > MAX_BIASES:
        raise invalid(f"logit_bias must be an object of at most {MAX_BIASES} token ids, not {shown(value)}")
    pairs = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"logit_bias must have token ids as its names, not {shown(key)}")
        number({"logit_bias": bias}, "logit_bias", 0.0, at_least=-MAX_BIAS, at_most=MAX_BIAS)
        pairs.append((int(key), float(bias or 0.0)))
    return tuple(pairs)


def _logprobs(data: Mapping[str, Any]) -> int | None:
    """The number of alternatives: `logprobs` itself, as for a completion, or `top_logprobs` if that is true, as in a
    conversation."""
    value, top = data.get("logprobs"), data.get("top_logprobs")
    alternatives = integer(data, "top_logprobs", 0, at_least=0, at_most=MAX_LOGPROBS)
    if isinstance(value, bool) or value is None:
        if alternatives and not value:
            raise invalid("top_logprobs needs logprobs: true beside it")
        return alternatives if value else None
    if top is not None:
        raise invalid("logprobs must be true beside top_logprobs, or a number without it")
    return integer(data, "logprobs", 0, at_least=0, at_most=MAX_LOGPROBS)


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    usable = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not usable or any(not isinstance(s, str) or not 1 <= len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise invalid(
            f"stop must be a string or at most {MAX_STOPS} of them, each of 1 to {MAX_STOP_CHARACTERS} characters, "
            f"not {shown(value)}"
        )
    return tuple(stops)
