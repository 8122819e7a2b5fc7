"""Settings that have no effect are named, and worker-vllm's names are understood if vLLM serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelstore.errors import InvalidSetting
from modelstore.settings import Settings, ineffective
from modelstore.worker_vllm import VARIABLES
from tests.conftest import Cli

ROOT = {"MODELSTORE_ROOT": "/vol/modelstore"}


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"MODELSTORE_QOUTA": "9GB"},
            "MODELSTORE_QOUTA is not known and has no effect: did you mean MODELSTORE_QUOTA?",
        ),
        ({"MODELSTORE_COLOUR": "red"}, "MODELSTORE_COLOUR is not known and has no effect: docs/configuration.md"),
        ({"MODEL_DTYP": "keep"}, "did you mean MODEL_DTYPE?"),
        (
            {"MAX_MODEL_LEN": "8192"},
            "MAX_MODEL_LEN has no effect here: use ENGINE=vllm with MODELSTORE_VLLM_ARGS='--max-model-len 8192'",
        ),
        ({"ENFORCE_EAGER": "true"}, "ENFORCE_EAGER has no effect here: use ENGINE=vllm with"),
        ({"DTYPE": "bfloat16"}, "DTYPE has no effect here: use MODEL_DTYPE=bfloat16"),
        ({"DTYPE": "auto"}, "DTYPE has no effect here: use MODEL_DTYPE=keep"),
        ({"BASE_PATH": "/x", "ENGINE": "vllm"}, "BASE_PATH has no effect here: the volume is found by its mount"),
        ({"DEFAULT_BATCH_SIZE": "50", "ENGINE": "vllm"}, "DEFAULT_BATCH_SIZE has no effect here: each piece"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_without_effect_has_one_line(env: dict[str, str], line: str) -> None:
    (told,) = ineffective(ROOT | env)
    assert line in told


@pytest.mark.parametrize(
    "env",
    [
        {"MODELSTORE_QUOTA": "9GB", "MODEL_ID": "org/name", "MODEL_NAME": "org/name", "HF_TOKEN": "x", "HOME": "/"},
        {"MODELSTORE_QOUTA": " "},
        {"ENFORCE_EAGER": "false", "ENABLE_LORA": "0"},
        {"SERVED_MODEL_NAME": "a", "MAX_CONCURRENCY": "4", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "b"},
        {"ENGINE": "vllm", "MAX_MODEL_LEN": "8192", "ENFORCE_EAGER": "1", "DTYPE": "auto", "MODEL_NAME": "org/name"},
    ],
    ids=lambda env: next(iter(env)),
)
def test_settings_that_work_have_none(env: dict[str, str]) -> None:
    assert ineffective(ROOT | env) == []


def test_each_command_tells_it_once(cli: Cli) -> None:
    cli.env = cli.env | {"MODELSTORE_QOUTA": "9GB", "MAX_MODEL_LEN": "1"}
    told = cli("alias", "ls", "--json").stderr.splitlines()
    assert [line.split()[1] for line in told] == ["MODELSTORE_QOUTA", "MAX_MODEL_LEN"]


def test_the_names_of_worker_vllm_are_understood_if_vllm_serves() -> None:
    env = {
        "ENGINE": "vllm",
        "MODEL_NAME": "org/name",
        "MODEL_REVISION": "v1",
        "MAX_MODEL_LEN": "8192",
        "MAX_NUM_BATCHED_TOKENS": "0",
        "TENSOR_PARALLEL_SIZE": "2",
        "ENFORCE_EAGER": "True",
        "ENABLE_PREFIX_CACHING": "false",
        "SPECULATIVE_CONFIG": '{"model": "org/draft", "num_speculative_tokens": 3}',
        "DTYPE": "half",
        "REQUEST_TIMEOUT": "3600",
        "VLLM_EXTRA_ARGS": "--seed 1",
        "MODELSTORE_VLLM_ARGS": "--max-model-len 512",
        "CUSTOM_CHAT_TEMPLATE": "{{ messages }} {%",
    }
    settings = Settings.from_env(env, root=Path("/x"))
    assert str(settings.model) == "org/name@v1"
    assert (settings.dtype, settings.max_job_s) == ("float16", 3600.0)
    args = list(settings.vllm_args)
    assert args[-4:] == ["--seed", "1", "--max-model-len", "512"]  # the last counts
    assert args[args.index("--max-model-len") + 1] == "8192"
    assert args[args.index("--chat-template") + 1] == "{{ messages }} {%"
    assert args[args.index("--speculative-config") + 1] == env["SPECULATIVE_CONFIG"]
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(args)
    assert "--max-num-batched-tokens" not in args


def test_our_own_settings_win() -> None:
    env = {"ENGINE": "vllm", "DTYPE": "half", "MODEL_DTYPE": "bfloat16", "MODEL_NAME": "org/a", "MODEL_ID": "org/b"}
    settings = Settings.from_env(env, root=Path("/x"))
    assert (settings.dtype, str(settings.model)) == ("bfloat16", "org/b")
    assert Settings.from_env({"ENGINE": "vllm", "DTYPE": "auto"}, root=Path("/x")).dtype == "keep"


def test_another_engine_takes_none_of_them() -> None:
    settings = Settings.from_env({"MAX_MODEL_LEN": "8192", "DTYPE": "bfloat16"}, root=Path("/x"))
    assert (settings.vllm_args, settings.dtype) == ((), None)


def test_a_switch_that_is_none_names_its_variable() -> None:
    with pytest.raises(InvalidSetting, match="ENFORCE_EAGER='maybe' is not a switch: use true or false"):
        Settings.from_env({"ENGINE": "vllm", "ENFORCE_EAGER": "maybe"}, root=Path("/x"))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"DTYPE": "float8"}, "DTYPE='float8'"),
        ({"TRUST_REMOTE_CODE": "maybe"}, "TRUST_REMOTE_CODE='maybe'"),
        ({"REQUEST_TIMEOUT": "soon"}, "REQUEST_TIMEOUT='soon'"),
    ],
)
def test_an_error_names_the_variable_that_was_set(env: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{words}"):
        Settings.from_env({"ENGINE": "vllm", **env}, root=Path("/x"))


def test_no_variable_is_without_a_meaning() -> None:
    for name, variable in VARIABLES.items():
        assert bool(variable.name) != bool(variable.reason), name
