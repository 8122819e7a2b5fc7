"""The environment variables of worker-vllm, RunPod's own worker for vLLM, and what becomes of each here.

With `ENGINE=vllm` most of them are understood, as settings of ours (`names_of`) or as options of `vllm serve`
(`understood`). For those that have no effect, `ineffective` has a line with the name to use. The table in
docs/migrate.md is made from `VARIABLES`. Standard library only.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Literal, NamedTuple

from modelstore.errors import InvalidSetting
from modelstore.units import truth

_ZERO_IS_UNSET = ("MAX_MODEL_LEN", "MAX_NUM_BATCHED_TOKENS", "MAX_CPU_LORAS", "MAX_PARALLEL_LOADING_WORKERS")
_OPTIONS = "MODELSTORE_VLLM_ARGS"


class Variable(NamedTuple):
    """One variable of worker-vllm.

    `becomes`: an option of `vllm serve` with a value or as a switch, a setting of ours, or nothing; `name`: of the
    option or the setting; `reason`: why nothing becomes of it.
    """

    becomes: Literal["option", "switch", "setting", "nothing"]
    name: str = ""
    reason: str = ""


def _options(kind: Literal["option", "switch"], *names: str) -> dict[str, Variable]:
    return {name: Variable(kind, f"--{name.lower().replace('_', '-')}") for name in names}


_BY_SPECULATIVE_CONFIG = Variable("nothing", reason="vLLM has SPECULATIVE_CONFIG, a JSON object, instead")
_BATCHES_OF_OUTPUT = Variable("nothing", reason="each piece of a stream is sent as it comes")
_REMOVED = Variable("nothing", reason="today's vLLM has no such option")
VARIABLES: Mapping[str, Variable] = {
    "MODEL_NAME": Variable("setting", "MODEL_ID"),
    "MODEL_REVISION": Variable("setting", "MODEL_REVISION"),
    "REVISION": Variable("setting", "MODEL_REVISION"),
    "DTYPE": Variable("setting", "MODEL_DTYPE"),
    "TRUST_REMOTE_CODE": Variable("setting", "MODELSTORE_TRUST_REMOTE_CODE"),
    "HF_TOKEN": Variable("setting", "HF_TOKEN"),
    "MAX_CONCURRENCY": Variable("setting", "MAX_CONCURRENCY"),
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": Variable("setting", "SERVED_MODEL_NAME"),
    "SERVED_MODEL_NAME": Variable("setting", "SERVED_MODEL_NAME"),
    "REQUEST_TIMEOUT": Variable("setting", "MODELSTORE_MAX_JOB_S"),
    "VLLM_EXTRA_ARGS": Variable("setting", _OPTIONS),
    **_options(
        "option",
        "ALLOWED_LOCAL_MEDIA_PATH",
        "ATTENTION_BACKEND",
        "BLOCK_SIZE",
        "CHAT_TEMPLATE",
        "COMPILATION_CONFIG",
        "CONVERT",
        "CPU_OFFLOAD_GB",
        "DISTRIBUTED_EXECUTOR_BACKEND",
        "GPU_MEMORY_UTILIZATION",
        "HF_OVERRIDES",
        "KV_CACHE_DTYPE",
        "KV_TRANSFER_CONFIG",
        "LIMIT_MM_PER_PROMPT",
        "LORA_DTYPE",
        "LORA_MODULES",
        "MAX_CPU_LORAS",
        "MAX_LOGPROBS",
        "MAX_LORAS",
        "MAX_LORA_RANK",
        "MAX_MODEL_LEN",
        "MAX_NUM_BATCHED_TOKENS",
        "MAX_NUM_SEQS",
        "MAX_PARALLEL_LOADING_WORKERS",
        "MM_PROCESSOR_KWARGS",
        "NUM_GPU_BLOCKS_OVERRIDE",
        "PIPELINE_PARALLEL_SIZE",
        "POOLER_CONFIG",
        "QUANTIZATION",
        "REASONING_PARSER",
        "RUNNER",
        "SCHEDULING_POLICY",
        "SEED",
        "SPECULATIVE_CONFIG",
        "STRUCTURED_OUTPUTS_CONFIG",
        "TENSOR_PARALLEL_SIZE",
        "TOKENIZER",
        "TOKENIZER_MODE",
        "TOKENIZER_REVISION",
        "TOOL_CALL_PARSER",
    ),
    "CUSTOM_CHAT_TEMPLATE": Variable("option", "--chat-template"),
    "OPENAI_RESPONSE_ROLE": Variable("option", "--response-role"),
    "TOKENIZER_NAME": Variable("option", "--tokenizer"),
    **_options(
        "switch",
        "DISABLE_CUSTOM_ALL_REDUCE",
        "DISABLE_SLIDING_WINDOW",
        "ENABLE_AUTO_TOOL_CHOICE",
        "ENABLE_CHUNKED_PREFILL",
        "ENABLE_EXPERT_PARALLEL",
        "ENABLE_LOG_REQUESTS",
        "ENABLE_LORA",
        "ENABLE_PREFIX_CACHING",
        "ENFORCE_EAGER",
        "FULLY_SHARDED_LORAS",
        "RAY_WORKERS_USE_NSIGHT",
        "SKIP_TOKENIZER_INIT",
    ),
    "BASE_PATH": Variable("nothing", reason="the volume is found by its mount; MODELSTORE_ROOT names another folder"),
    "DOWNLOAD_DIR": Variable("nothing", reason="models lie in the store; MODELSTORE_ROOT names its folder"),
    "LOAD_FORMAT": Variable("nothing", reason="the weights come from the store"),
    "MODEL_LOADER_EXTRA_CONFIG": Variable("nothing", reason="the weights come from the store"),
    "DISABLE_LOG_STATS": Variable("nothing", reason=f"add --disable-log-stats to {_OPTIONS}"),
    "DEFAULT_BATCH_SIZE": _BATCHES_OF_OUTPUT,
    "DEFAULT_MIN_BATCH_SIZE": _BATCHES_OF_OUTPUT,
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": _BATCHES_OF_OUTPUT,
    "RAW_OPENAI_OUTPUT": Variable("nothing", reason="a stream of OpenAI's routes is always their events"),
    "VLLM_CONFIG_FILE": Variable("nothing", reason=f"write its options into {_OPTIONS}"),
    "SPECULATIVE_METHOD": _BY_SPECULATIVE_CONFIG,
    "SPECULATIVE_MODEL": _BY_SPECULATIVE_CONFIG,
    "NUM_SPECULATIVE_TOKENS": _BY_SPECULATIVE_CONFIG,
    "NGRAM_PROMPT_LOOKUP_MAX": _BY_SPECULATIVE_CONFIG,
    "NGRAM_PROMPT_LOOKUP_MIN": _BY_SPECULATIVE_CONFIG,
    "DEVICE": _REMOVED,
    "DISABLE_LOG_REQUESTS": _REMOVED,
    "GUIDED_DECODING_BACKEND": Variable("nothing", reason="vLLM has STRUCTURED_OUTPUTS_CONFIG instead"),
    "MAX_CONTEXT_LEN_TO_CAPTURE": _REMOVED,
    "MAX_SEQ_LEN_TO_CAPTURE": _REMOVED,
    "NUM_LOOKAHEAD_SLOTS": _REMOVED,
    "ROPE_SCALING": Variable("nothing", reason="give rope_scaling in HF_OVERRIDES"),
    "ROPE_THETA": Variable("nothing", reason="give rope_theta in HF_OVERRIDES"),
    "SCHEDULER_DELAY_FACTOR": _REMOVED,
    "SWAP_SPACE": _REMOVED,
    "USE_V2_BLOCK_MANAGER": _REMOVED,
}


def names_of(setting: str) -> tuple[str, ...]:
    """The variables of worker-vllm that mean a setting of ours, but for the one with its name."""
    return tuple(name for name, each in VARIABLES.items() if each.name == setting != name and each.becomes == "setting")


def understood(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with worker-vllm's variables as options in MODELSTORE_VLLM_ARGS; the options that stand there already come
    last, because vLLM takes the last. `names_of` has the variables that are settings.

    Raises InvalidSetting for a switch that is neither true nor false.
    """
    options: list[str] = []
    for name, variable in VARIABLES.items():
        text = env.get(name, "").strip()
        if not text:
            continue
        if variable.becomes == "option" and not (text == "0" and name in _ZERO_IS_UNSET):
            options += [variable.name, text]
        elif variable.becomes == "switch":
            options.append(_switch(name, variable.name, text))
    own = " ".join(filter(None, (env.get("VLLM_EXTRA_ARGS", ""), env.get(_OPTIONS, ""))))
    made = {_OPTIONS: f"{shlex.join(options)} {own}".strip()}
    if env.get("DTYPE", "").strip().lower() == "auto":
        made["DTYPE"] = "keep"
    return {**env, **made}


def ineffective(env: Mapping[str, str], *, is_vllm: bool) -> list[str]:
    """A line for each variable that is set and has no effect, with the name to use; `is_vllm`: `ENGINE=vllm` is set."""
    lines = []
    for name, variable in VARIABLES.items():
        text = env.get(name, "").strip()
        if not text or (is_vllm and variable.becomes != "nothing"):
            continue
        match variable.becomes:
            case "nothing":
                remedy = variable.reason
            case "option":
                remedy = f"use ENGINE=vllm with {_OPTIONS}={shlex.quote(shlex.join([variable.name, text]))}"
            case "switch" if truth(text) is False:
                continue  # as it is without it
            case "switch":
                remedy = f"use ENGINE=vllm with {_OPTIONS}={variable.name}"
            case "setting":
                value = "keep" if (name, text.lower()) == ("DTYPE", "auto") else text
                remedy = f"use {variable.name}={shlex.quote(value)}"
        lines.append(f"{name} has no effect here: {remedy}")
    return lines


def _switch(name: str, option: str, text: str) -> str:
    value = truth(text)
    if value is None:
        raise InvalidSetting(f"{name}={text!r} is not a switch: use true or false")
    return option if value else f"--no-{option.removeprefix('--')}"
