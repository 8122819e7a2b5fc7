"""The fields that clients send with a request, and what this worker does with each. Data, and two checks.

No field is ignored without a word: it is served, or it is known to change no answer, or it is refused by its name. The
table holds the fields of OpenAI's two completion routes, of vLLM's, and of worker-vllm's input; docs/client.md shows
it. A server that has OpenAI's routes itself says by its own schema which fields it takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from handler.errors import JobError, invalid

Route = Literal["native", "chat/completions", "completions"]
Treatment = Literal["served", "harmless", "refused"]

_NATIVE: tuple[Route, ...] = ("native",)
_CHAT: tuple[Route, ...] = ("native", "chat/completions")
_TEXT: tuple[Route, ...] = ("native", "completions")
_OPENAI: tuple[Route, ...] = ("chat/completions", "completions")
_ALL: tuple[Route, ...] = ("native", "chat/completions", "completions")


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `text`: the text engine's treatment. `note`: its meaning. `neutral`: values that ask for nothing,
    accepted though the field is refused. `instead`: what to do without it. `by_worker`: the worker itself reads it,
    also before a server with OpenAI's routes. `replaced`: vLLM does not serve it, or not any more."""

    routes: tuple[Route, ...]
    text: Treatment
    note: str
    neutral: tuple[object, ...] = ()
    instead: str = ""
    by_worker: bool = False
    replaced: bool = False


def _served(routes: tuple[Route, ...], note: str, *, by_worker: bool = False) -> Field:
    return Field(routes, "served", note, by_worker=by_worker)


def _harmless(routes: tuple[Route, ...], note: str) -> Field:
    return Field(routes, "harmless", note)


def _refused(
    routes: tuple[Route, ...], note: str, *neutral: object, instead: str = "", replaced: bool = False
) -> Field:
    return Field(routes, "refused", note, neutral, instead, replaced=replaced)


FIELDS: Mapping[str, Field] = {
    # What to continue
    "prompt": _served(_TEXT, "a text, a list of token ids, or a list of either"),
    "prompts": _served(_NATIVE, "several of them", by_worker=True),
    "messages": _served(_CHAT, "a conversation for the model's chat template"),
    "model": _served(_ALL, "a model that this worker serves", by_worker=True),
    "sampling_params": _served(_NATIVE, "worker-vllm's: an object of the fields below", by_worker=True),
    # How the conversation becomes a prompt
    "add_generation_prompt": _served(_CHAT, "`false`: without the opening of an answer"),
    "continue_final_message": _served(_CHAT, "`true`: the answer goes on with the last message"),
    "chat_template_kwargs": _served(_CHAT, "variables of the template, such as `enable_thinking`"),
    "reasoning_effort": _served(_CHAT, "a variable of the template"),
    "tools": _served(_CHAT, "given to the template; a call comes back as text"),
    "tool_choice": _served(_CHAT, "`auto` and `none`; another choice is refused"),
    "documents": _served(_CHAT, "given to the template"),
    "add_special_tokens": _served(_ALL, "`false`: the tokenizer adds none to the prompt"),
    "chat_template": _refused(
        _CHAT,
        "a template of the sender's",
        instead="the model's own template is used; chat_template_kwargs sets its variables",
    ),
    "truncate_prompt_tokens": _refused(_ALL, "cuts the prompt"),
    "truncation_side": _refused(_ALL, "where the prompt is cut", "left", "right"),
    "prompt_embeds": _refused(("completions",), "a prompt as vectors"),
    "media_io_kwargs": _refused(_CHAT, "of pictures and sounds in a prompt", {}),
    "mm_processor_kwargs": _refused(_CHAT, "of pictures and sounds in a prompt", {}),
    "suffix": _refused(_TEXT, "the text after a gap that is filled", ""),
    # How the next token is chosen
    "temperature": _served(_ALL, "0 to 2; 0 is greedy; the model's own by default, 0.7 on the native route"),
    "top_p": _served(_ALL, "above 0, at most 1; the model's own by default, 0.9 on the native route"),
    "top_k": _served(_ALL, "0 and -1: all tokens; the model's own by default, else all, and 50 on the native route"),
    "min_p": _served(_ALL, "0 to 1, relative to the most likely token"),
    "repetition_penalty": _served(_ALL, "0.1 to 10; counts the prompt too"),
    "presence_penalty": _served(_ALL, "-2 to 2"),
    "frequency_penalty": _served(_ALL, "-2 to 2"),
    "logit_bias": _served(_ALL, "token ids, each with -100 to 100"),
    "seed": _served(_ALL, "the same answer again, in any batch but for the rounding of 16 bits; -1: none"),
    "allowed_token_ids": _refused(_ALL, "no other tokens", []),
    "bad_words": _refused(_ALL, "words that never come", []),
    "response_format": _refused(_ALL, "JSON, also by a schema", {"type": "text"}),
    "structured_outputs": _refused(_ALL, "an answer by a grammar"),
    "guided_json": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "guided_regex": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "guided_choice": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "guided_grammar": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "guided_decoding_backend": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "guided_whitespace_pattern": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "structural_tag": _refused(
        _ALL, "an answer by a grammar", instead="vLLM takes structured_outputs instead", replaced=True
    ),
    "use_beam_search": _refused(_ALL, "a search with beams", False),
    "length_penalty": _refused(_ALL, "of beams", 1.0),
    "early_stopping": _refused(_ALL, "of beams", False, replaced=True),
    "thinking_token_budget": _refused(_ALL, "the most tokens of reasoning"),
    "watermarking": _refused(_ALL, "marks the text as generated", False),
    "vllm_xargs": _refused(_ALL, "for extensions of vLLM", {}),
    # When the text ends
    "max_tokens": _served(_ALL, "at most `MODELSTORE_MAX_TOKENS`, 2048 unless that is set"),
    "max_completion_tokens": _served(_OPENAI, "the same, if max_tokens is not there"),
    "max_new_tokens": _served(_NATIVE, "the same, if max_tokens is not there", by_worker=True),
    "min_tokens": _served(_ALL, "before them no end token and no stop string counts"),
    "stop": _served(_ALL, "up to 16 strings, also special tokens; left out of the text"),
    "stop_token_ids": _served(_ALL, "up to 128 ids; left out of the text"),
    "ignore_eos": _served(_ALL, "`true`: the model's end tokens do not end the text"),
    "include_stop_str_in_output": _refused(_ALL, "keeps the stop string", False),
    "repetition_detection": _refused(_ALL, "ends a text that repeats itself"),
    # What the answer holds
    "stream": _served(_ALL, "`true`: chunks as they come", by_worker=True),
    "stream_options": _served(_OPENAI, "`include_usage`"),
    "n": _served(_ALL, "so many answers to each prompt"),
    "echo": _served(_ALL, "`true`: the prompt, or the message that is continued, before the text"),
    "logprobs": _served(_ALL, "of each token: 0 to 20 alternatives, or `true` for a conversation"),
    "top_logprobs": _served(_CHAT, "0 to 20 alternatives"),
    "skip_special_tokens": _served(_ALL, "`false`: special tokens stay in the text, also the one that ends it"),
    "spaces_between_special_tokens": _refused(_ALL, "how special tokens are written", True),
    "best_of": _refused(_ALL, "the best of several answers", 1, replaced=True),
    "prompt_logprobs": _refused(
        _ALL, "log probabilities of the prompt", instead="echo with logprobs gives those of a prompt"
    ),
    "logprob_token_ids": _refused(_ALL, "log probabilities of certain tokens", []),
    "return_tokens_as_token_ids": _refused(_ALL, "ids in the place of texts in `logprobs`", False),
    "return_token_ids": _refused(_ALL, "the tokens besides the text", False),
    "return_token_offsets": _refused(_ALL, "of vLLM's rendering routes", False),
    "return_prompt_text": _refused(_CHAT, "the rendered prompt", False),
    "include_reasoning": _refused(
        _CHAT, "whether reasoning is told apart", True, instead="reasoning stays in the text"
    ),
    "detokenize": _refused(_NATIVE, "no text at all", True, replaced=True),
    # Of OpenAI's own service
    "parallel_tool_calls": _harmless(_CHAT, "how many tools are called at once; nothing is parsed here"),
    "functions": _refused(_CHAT, "OpenAI's earlier tools", [], instead="send tools", replaced=True),
    "function_call": _refused(
        _CHAT, "OpenAI's earlier choice of a tool", "none", instead="send tool_choice", replaced=True
    ),
    "modalities": _refused(_CHAT, "text or sound", ["text"], instead="this worker answers with text", replaced=True),
    "audio": _refused(_CHAT, "a voice", instead="this worker answers with text", replaced=True),
    "verbosity": _refused(
        _CHAT, "short or long answers", "medium", instead="ask for a short or a long answer in a message", replaced=True
    ),
    "web_search_options": _refused(_CHAT, "a search on the web", instead="this worker searches nothing", replaced=True),
    "moderation": _refused(_CHAT, "a judgement of the text", instead="this worker moderates nothing", replaced=True),
    "user": _harmless(_ALL, "names the sender"),
    "metadata": _harmless(_ALL, "of OpenAI's dashboard"),
    "store": _harmless(_ALL, "nothing is stored"),
    "service_tier": _harmless(_ALL, "there is one"),
    "safety_identifier": _harmless(_ALL, "names the sender"),
    "prediction": _harmless(_CHAT, "a hint for speed"),
    "prompt_cache_key": _harmless(_ALL, "a hint for speed"),
    "prompt_cache_retention": _harmless(_ALL, "a hint for speed"),
    "prompt_cache_options": _harmless(_ALL, "a hint for speed"),
    # Of vLLM's and worker-vllm's machinery
    "priority": _refused(_ALL, "the order of jobs", 0, instead="jobs are answered as they come"),
    "request_id": _harmless(_ALL, "the answer's id is the job's"),
    "session_id": _harmless(_ALL, "a hint for speed"),
    "cache_salt": _harmless(_ALL, "no request shares another one's cache"),
    "stream_interval": _harmless(_ALL, "chunks go out as fast as RunPod takes them"),
    "mm_payload": _refused(_OPENAI, "of vLLM's rendering routes", "tensors"),
    "return_mm_kwargs": _refused(_OPENAI, "of vLLM's rendering routes"),
    "routed_experts_prompt_start": _refused(_OPENAI, "of the routing of experts", 0),
    "kv_transfer_params": _refused(_ALL, "of prefill on another host", {}),
    "ec_transfer_params": _refused(_ALL, "of encoders on another host", {}),
    "max_batch_size": _harmless(_NATIVE, "chunks go out as fast as RunPod takes them"),
    "min_batch_size": _harmless(_NATIVE, "chunks go out as fast as RunPod takes them"),
    "batch_size_growth_factor": _harmless(_NATIVE, "chunks go out as fast as RunPod takes them"),
    "apply_chat_template": _refused(_NATIVE, "a prompt as a message", False, instead="send messages", replaced=True),
    "use_openai_format": _refused(
        _NATIVE, "an answer in OpenAI's form", False, instead="use OpenAI's routes", replaced=True
    ),
}

TEMPLATE_FIELDS = (
    *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort"),
    *("tools", "tool_choice", "documents"),
)
"""The fields that say something of a conversation alone."""


def check_fields(data: Mapping[str, Any], route: Route) -> None:
    """Raise JobError for a field that the text engine does not serve on this route."""
    for name, value in data.items():
        field = FIELDS.get(name)
        if value is None:
            continue
        if field is None:
            served = [each for each, other in FIELDS.items() if route in other.routes and other.text == "served"]
            raise unknown_field(name, served)
        if route not in field.routes:
            instead = _ELSEWHERE.get(name, "leave it out")
            raise invalid(f"{name} is not served on this route: {instead}")
        if field.text != "refused" or any(_is_same(value, neutral) for neutral in field.neutral):
            continue
        if field.replaced:
            raise invalid(f"{name} is not served by the text engine{f': {field.instead}' if field.instead else ''}")
        here = f". Here, {field.instead}" if field.instead else ""
        raise invalid(f"{name} is not served by the text engine; ENGINE=vllm serves it{here}")


# What to send instead of a field of another route
_ELSEWHERE = {
    "prompt": "send messages, or use /v1/completions",
    "prompts": "send messages, or a list as prompt to /v1/completions",
    "messages": "send a prompt, or use /v1/chat/completions",
    "max_completion_tokens": "send max_tokens",
    "max_new_tokens": "send max_tokens",
    "sampling_params": "send its fields by themselves",
    "top_logprobs": "send the number as logprobs",
}


def check_server_fields(data: Mapping[str, Any], known: Collection[str], server: str, *, native: bool) -> None:
    """Raise JobError for a field that a server does not know; `known`: the names in its schema for a route. The worker
    itself reads some fields of a `native` request."""
    for name, value in data.items():
        field = FIELDS.get(name)
        if native and name in NOT_STREAMED and value not in (None, False):
            raise invalid(f"{name} is served by this {server} on OpenAI's routes alone, without stream: send it there")
        if value is None or name in known:
            continue
        if field is not None and (field.text == "harmless" or (native and field.by_worker)):
            continue
        if field is not None and any(_is_same(value, neutral) for neutral in field.neutral):
            continue
        if field is not None and field.instead:
            raise invalid(f"{name} is not served by this {server}: {field.instead}")
        raise unknown_field(name, known)


NOT_STREAMED = ("use_beam_search", "prompt_logprobs")  # and vLLM's answer to a native job is always a stream
_LISTED = 8  # so many names go into an error


def unknown_field(name: str, names: Collection[str]) -> JobError:
    """The error for a field that is none; `names`: those that are."""
    close = difflib.get_close_matches(name[:100], names, 1)
    if len(names) <= _LISTED:
        return invalid(f"{name[:100]} is not served here; the fields that are: {', '.join(names)}")
    hint = f"the nearest field that is: {close[0]}" if close else "docs/client.md lists the fields that are"
    return invalid(f"{name[:100]} is not served; {hint}")


def _is_same(value: object, neutral: object) -> bool:
    """Whether they are equal, and true is not 1."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
