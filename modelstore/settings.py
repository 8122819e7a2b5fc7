"""Every setting, from one environment, which only this file and `environment.py` read.

A value that cannot be used raises InvalidSetting, which names the variable, the value and what to do. `FIELDS`, at the
end, is the table of all variables: a new setting is an attribute of `Settings` with its default, and a line there.
docs/configuration.md is made from it.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args
from urllib.parse import urlsplit

from modelstore import worker_vllm
from modelstore.dtypes import DEFAULT_DTYPE, DTYPES, Dtype, parse_dtype
from modelstore.errors import InvalidReference, InvalidSetting, Refused
from modelstore.mount import default_root, read_mounts
from modelstore.reference import DEFAULT_REVISION, Reference, parse_reference, pins
from modelstore.units import truth

EngineName = Literal["text", "diffusion", "embedding", "vllm"]
EngineCacheMode = Literal["off", "read", "write"]
CompressMode = Literal["never", "always", "auto"]
VolumeMode = Literal["full", "read-only"]

HUB = "https://huggingface.co"

HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the Hub's library reads the second, too
ENGINE_CACHE_KEY = "MODELSTORE_ENGINE_CACHE_KEY"
API_KEY = "MODELSTORE_API_KEY"
SECRETS = (*HUB_TOKENS, ENGINE_CACHE_KEY, API_KEY)
_DTYPE_NAMES = "{}` or `{}".format("`, `".join([*DTYPES][:-1]), [*DTYPES][-1])

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one process; build it with `from_env`, or by hand in tests and programs."""

    root: Path
    model: Reference | None = None
    dtype: Dtype | None = None
    volume_mode: VolumeMode | None = None
    compress: CompressMode = "never"
    quota_bytes: int | None = None
    evict: bool = False
    lease_s: float = 30.0
    wait_s: float = 1800.0
    offline: bool = False
    allowed_models: tuple[Reference, ...] = ()
    allow_pickle: bool = False
    trust_remote_code: bool = False
    keep_previous: bool = False
    warm_up: bool | None = None
    compile: bool = False
    max_concurrency: int = 16
    max_tokens: int = 2048
    max_prompt_characters: int = 1_000_000
    max_prompts: int = 32
    max_steps: int = 150
    max_pixels: int = 2048 * 2048
    max_images: int = 4
    max_result_bytes: int = 20_000_000
    bucket_endpoint: str | None = None
    served_names: tuple[str, ...] = ()
    adapters: Mapping[str, Reference] = field(default_factory=dict)
    engine: EngineName | None = None
    vllm_python: Path | None = None
    vllm_args: tuple[str, ...] = ()
    engine_cache: EngineCacheMode = "off"
    engine_cache_key: str | None = field(default=None, repr=False)
    max_job_s: float = 600.0
    http_port: str | None = None
    health_port: str | None = None
    health_path: str = "/ping"
    api_key: str | None = field(default=None, repr=False)
    hf_token: str | None = field(default=None, repr=False)
    hf_endpoint: str = HUB
    s3_endpoint: str | None = None
    visible_gpus: str | None = None
    worker_id: str = field(default_factory=socket.gethostname)
    on_runpod: bool = False

    @classmethod
    def from_env(
        cls,
        env: Mapping[str, str] | None = None,
        *,
        root: Path | None = None,
        mounts: str | None = None,
        engine: EngineName | None = None,
    ) -> Settings:
        """Read every variable from `env`, by default the process's; `root` overrides MODELSTORE_ROOT, `engine` ENGINE.

        `mounts` is the text of the mount table, /proc/mounts by default.

        Raises InvalidSetting with the name of the first variable that cannot be used.
        """
        env = os.environ if env is None else env
        env = {**env, "ENGINE": engine} if engine is not None else env
        is_vllm = _is_vllm(env)
        env = worker_vllm.understood(env) if is_vllm else env
        values: dict[str, Any] = {"root": _root(env, mounts) if root is None else root.absolute()}
        for setting in FIELDS:
            others = worker_vllm.names_of(setting.variable) if is_vllm else ()
            names = (setting.variable, *setting.other_names, *others)
            variable = next((name for name in names if env.get(name, "").strip()), setting.variable)
            text = env.get(variable)
            if text is None or (not text.strip() and not setting.may_be_empty):
                continue
            text = text.strip()  # a secret or a file often ends with a line break
            if setting.attribute == "model":
                values["model"] = _reference(variable, text)
                revisions = ("MODEL_REVISION", "REVISION") if is_vllm else ("MODEL_REVISION",)
                if revision := next((name for name in revisions if env.get(name, "").strip()), None):
                    values["model"] = _reference(revision, text, env[revision].strip())
            elif setting.attribute == "allowed_models":
                values["allowed_models"] = _allowed_models(variable, text, values.get("model"))
            elif setting.parse is not None:
                values[setting.attribute] = setting.parse(variable, text)
        _check_adapter_names(values)
        values["worker_id"] = env.get("RUNPOD_POD_ID") or socket.gethostname()
        values["on_runpod"] = bool(env.get("RUNPOD_POD_ID"))
        return cls(**values)

    @property
    def hf_caches(self) -> tuple[Path, ...]:
        """The places of RunPod's cached models and other tools' HF caches on the same volume."""
        return (self.root.parent / "huggingface-cache" / "hub",)

    def check_allowed(self, reference: Reference) -> None:
        """Raise Refused if MODELSTORE_ALLOWED_MODELS is set and does not list `reference` with this revision."""
        if self.allowed_models and reference not in self.allowed_models:
            raise Refused(f"{reference} is not among MODELSTORE_ALLOWED_MODELS: add it there, or ask for one of those")

    def may_run_code_of(self, repo_id: str, commit: str, *, named: Reference | None = None) -> bool:
        """Whether code that this commit brings may be stored and run: MODELSTORE_TRUST_REMOTE_CODE is set, and MODEL_ID
        or MODELSTORE_ALLOWED_MODELS pins the commit, or the reference `named` by the caller.

        An alias and a branch pin nothing: both are read from the volume or the Hub, and others may change them.
        """
        operator = (self.model, *self.allowed_models, named)
        return self.trust_remote_code and any(each is not None and pins(each, repo_id, commit) for each in operator)


def ineffective(env: Mapping[str, str] | None = None) -> list[str]:
    """A line for each variable that looks like a setting and has no effect, with the name to use."""
    env = os.environ if env is None else env
    known = [name for field in FIELDS for name in (field.variable, *field.other_names)]
    lines = []
    for name in sorted(env):
        if name in (*known, *_OF_SCRIPTS) or not name.upper().startswith("MODEL") or not env[name].strip():
            continue
        from difflib import get_close_matches  # most processes never need it

        similar = get_close_matches(name.upper(), known, 1, 0.9)
        if similar:
            lines.append(f"{name} is not known and has no effect: did you mean {similar[0]}?")
        elif name.startswith("MODELSTORE_"):
            lines.append(f"{name} is not known and has no effect: docs/configuration.md has the names")
    unknown = {name: text for name, text in env.items() if name not in known}
    return lines + worker_vllm.ineffective(unknown, is_vllm=_is_vllm(env))


def _is_vllm(env: Mapping[str, str]) -> bool:
    return env.get("ENGINE", "").strip().lower() == "vllm"


_OF_SCRIPTS = ("MODELSTORE_VENV",)  # scripts/environment.sh
_ADAPTER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,95}")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)


def parse_size(variable: str, text: str) -> int:
    """`text` such as `200GB` or `1.5 GiB` in bytes; decimal units, binary ones with an `i`."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidSetting(f"{variable}={text!r} is not a size: write it like 200GB or 1.5TiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _reference(variable: str, text: str, revision: str | None = None) -> Reference:
    try:
        return parse_reference(text, revision=revision)
    except InvalidReference as error:
        raise InvalidSetting(f"{variable}: {error}") from error


def _allowed_models(variable: str, text: str, model: Reference | None) -> tuple[Reference, ...]:
    """The entries of MODELSTORE_ALLOWED_MODELS. One without a revision means MODEL_ID's own if it names that repo."""
    references = []
    for entry in filter(None, map(str.strip, text.split(","))):
        reference = _reference(variable, entry)
        is_own = model is not None and model.name == reference.name and "@" not in entry
        references.append(model if is_own and model is not None else reference)
    return tuple(references)


def _seconds(at_least: float) -> Callable[[str, str], float]:
    def parse(variable: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not at_least <= number < float("inf"):
            raise InvalidSetting(f"{variable}={text!r} is not usable: give a number of seconds, at least {at_least:g}")
        return number

    return parse


def _count(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= 10**9):
        raise InvalidSetting(f"{variable}={text[:40]!r} is not usable: give a whole number, at least 1")
    return int(text)


def _engine(variable: str, text: str) -> EngineName:
    name = text.lower()
    if name not in get_args(EngineName):
        raise InvalidSetting(f"{variable}={name!r} is not known: use one of {', '.join(get_args(EngineName))}")
    return cast(EngineName, name)


def _words(variable: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidSetting(f"{variable} cannot be split into words ({error}): close its quotes") from error


def _names(variable: str, text: str) -> tuple[str, ...]:
    names = tuple(filter(None, map(str.strip, text.split(","))))
    if not names or any(len(name) > 200 or not name.isprintable() for name in names):
        raise InvalidSetting(f"{variable} must be names of at most 200 characters: write them like gpt-4,chat")
    return names


def _adapters(variable: str, text: str) -> dict[str, Reference]:
    """The references of adapters, by their names in jobs."""
    adapters: dict[str, Reference] = {}
    for entry in filter(None, map(str.strip, text.split(","))):
        name, is_named, reference = (part.strip() for part in entry.partition("="))
        if not is_named or not _ADAPTER.fullmatch(name):
            raise InvalidSetting(
                f"{variable}: {entry[:80]!r} is not NAME=org/adapter: write it like style=org/style@main"
            )
        if name in adapters:
            raise InvalidSetting(f"{variable} gives two adapters the name {name}: rename one")
        adapters[name] = _reference(variable, reference)
    return adapters


def _check_adapter_names(values: Mapping[str, Any]) -> None:
    """Raise InvalidSetting if an adapter has a name that means something else in a job."""
    model = values.get("model")
    models = [each for each in (model, *values.get("allowed_models", ())) if each is not None]
    others = {*values.get("served_names", ()), *(each.name for each in models), *map(str, models)}
    for name in values.get("adapters", {}):
        if name in others:
            raise InvalidSetting(f"MODEL_ADAPTERS gives an adapter the name {name}, which a model has: choose another")


def _switch(variable: str, text: str) -> bool:
    value = truth(text)
    if value is None:
        raise InvalidSetting(f"{variable}={text.lower()!r} is not a switch: use 1 or 0")
    return value


def _engine_cache(variable: str, text: str) -> EngineCacheMode:
    value = _switch_or(variable, text, "read")
    return "read" if value is None else "write" if value else "off"


def _compress(variable: str, text: str) -> CompressMode:
    value = _switch_or(variable, text, "auto")
    return "auto" if value is None else "always" if value else "never"


def _switch_or(variable: str, text: str, word: str) -> bool | None:
    """A switch that has a third position, `word`: None."""
    if text.lower() == word:
        return None
    value = truth(text)
    if value is None:
        raise InvalidSetting(f"{variable}={text[:40]!r} is not usable: use 1, {word} or 0")
    return value


def _volume_mode(variable: str, text: str) -> VolumeMode:
    name = text.lower().replace("_", "-")
    if name not in get_args(VolumeMode):
        raise InvalidSetting(f"{variable}={text[:40]!r} is not known: use full or read-only, or leave it out")
    return cast(VolumeMode, name)


def _secret(variable: str, text: str) -> str:
    if len(text) < 16:
        raise InvalidSetting(f"{variable} is too short: give at least 16 random characters (it is not shown here)")
    return text


def _token(variable: str, text: str) -> str:
    if any(not 33 <= ord(c) < 127 for c in text):
        raise InvalidSetting(f"{variable} holds characters that no token has: copy it again (it is not shown here)")
    return text


def _endpoint(variable: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and not parts.query
        usable = usable and parts.port != 0  # a port that is no number raises
    except ValueError:
        usable = False
    if not usable:
        raise InvalidSetting(f"{variable} is not an address: write it like {HUB}")
    return text.rstrip("/")


def _path(_variable: str, text: str) -> Path:
    return Path(text)


def _api_key(variable: str, text: str) -> str:
    return _token(variable, _secret(variable, text))


def _as_it_is(_variable: str, text: str) -> str:
    return text


def _root(env: Mapping[str, str], mounts: str | None) -> Path:
    text = env.get("MODELSTORE_ROOT", "").strip()
    if text:
        if not text.startswith("/"):
            raise InvalidSetting(f"MODELSTORE_ROOT={text!r} is not absolute: give the full path of a folder")
        return Path(text)
    return default_root(read_mounts() if mounts is None else mounts, env.get)


class Field(NamedTuple):
    """One environment variable. `attribute`: of Settings, whose default is the variable's; `parse` takes the variable
    and its text, and is None if `from_env` itself reads it; `shown_default`: the default in words, if it has a form of
    its own; `other_names`: variables that mean the same, read if this one is empty."""

    variable: str
    attribute: str
    parse: Callable[[str, str], Any] | None
    meaning: str
    shown_default: str | None = None
    other_names: tuple[str, ...] = ()
    may_be_empty: bool = False

    @property
    def default(self) -> str:
        """The default as a person writes it; empty if there is none."""
        if self.shown_default is not None:
            return self.shown_default
        value = _DEFAULTS.get(self.attribute)
        if isinstance(value, bool):
            return str(int(value))
        return f"{value:g}" if isinstance(value, float) else "" if value in (None, (), {}) else str(value)


_DEFAULTS = {each.name: each.default for each in fields(Settings) if each.default is not MISSING}

FIELDS = (
    Field(
        "MODEL_ID",
        "model",
        None,
        "the model to serve: `org/name`, `org/name@revision`, `file:///folder` (or `MODEL_NAME`)",
        other_names=("MODEL_NAME",),
    ),
    Field("MODEL_REVISION", "", None, "branch, tag or commit, if the reference names none", DEFAULT_REVISION),
    Field(
        "MODEL_DTYPE",
        "dtype",
        parse_dtype,
        f"storage dtype: `{_DTYPE_NAMES}` (or `fp16`, `bf16`, `fp32`); if it is not set, a model on the volume is "
        "served in the variant that was seeded last, or in the only one",
        DEFAULT_DTYPE,
    ),
    Field("MODELSTORE_ROOT", "root", None, "the store's folder on the network volume", "<volume>/modelstore"),
    Field(
        "MODELSTORE_VOLUME",
        "volume_mode",
        _volume_mode,
        "`full`: store models on the volume though it cannot be shown to be safe, after `modelstore doctor --peer`; "
        "`read-only`: change nothing there; without it by what the volume can do (docs/operations.md)",
    ),
    Field(
        "MODELSTORE_COMPRESS",
        "compress",
        _compress,
        "`1`: compress the weights of new models, without loss, and serve the compressed form if both are there; "
        "`auto`: if that shortens a start at the read rate that `modelstore doctor` has measured, on this host",
    ),
    Field(
        "MODELSTORE_QUOTA",
        "quota_bytes",
        parse_size,
        "the space that the store may take on the volume, such as `200GB`; no limit without it",
    ),
    Field(
        "MODELSTORE_EVICT", "evict", _switch, "`1`: a download may remove the least recently used models to find room"
    ),
    Field(
        "MODELSTORE_LEASE_S", "lease_s", _seconds(2), "seconds without a heartbeat after which a claim is taken over"
    ),
    Field("MODELSTORE_WAIT_S", "wait_s", _seconds(0), "seconds to wait for another worker's download before giving up"),
    Field(
        "MODELSTORE_OFFLINE",
        "offline",
        _switch,
        "`1`: never ask the Hub, serve only models on the volume (or `HF_HUB_OFFLINE`)",
        other_names=("HF_HUB_OFFLINE",),
    ),
    Field(
        "MODELSTORE_ALLOWED_MODELS",
        "allowed_models",
        None,
        "comma-separated references, each with the one revision that it names; any other model or revision is refused",
    ),
    Field(
        "MODELSTORE_ALLOW_PICKLE",
        "allow_pickle",
        _switch,
        "`1`: convert repos that have their weights only as pickles",
    ),
    Field(
        "MODELSTORE_TRUST_REMOTE_CODE",
        "trust_remote_code",
        _switch,
        "`1`: store and run a repo's own code, if `MODEL_ID` or `MODELSTORE_ALLOWED_MODELS` names its commit in full",
    ),
    Field(
        "SERVED_MODEL_NAME",
        "served_names",
        _names,
        "comma-separated further names of the worker's own model in jobs (or `OPENAI_SERVED_MODEL_NAME_OVERRIDE`)",
        other_names=("OPENAI_SERVED_MODEL_NAME_OVERRIDE",),
    ),
    Field(
        "MODEL_ADAPTERS",
        "adapters",
        _adapters,
        "comma-separated LoRA adapters of the model, `style=org/style@revision,other=@alias`: a job names one as its "
        "`model`; for the `vllm` engine, and for `text` with the extra `adapters`",
    ),
    Field(
        "MODELSTORE_KEEP_PREVIOUS",
        "keep_previous",
        _switch,
        "`1`: a worker that swaps models keeps the one before in host memory",
    ),
    Field(
        "MODELSTORE_WARM_UP",
        "warm_up",
        _switch,
        "`1` or `0`: whether a worker answers one small job of its own before it takes others; by default on a GPU",
    ),
    Field(
        "MODELSTORE_COMPILE",
        "compile",
        _switch,
        "`1`: the engines `text` and `diffusion` run their model by torch.compile, which makes each start longer; see "
        "`MODELSTORE_ENGINE_CACHE`, and measure whether your model gains (docs/benchmarks.md)",
    ),
    Field(
        "ENGINE",
        "engine",
        _engine,
        "the engine: `text`, `diffusion`, `embedding` or `vllm`; without it by the model, vLLM if it is installed, has "
        "the model's class, and there is a GPU",
    ),
    Field(
        "MODELSTORE_VLLM_PYTHON",
        "vllm_python",
        _path,
        "the interpreter of the environment that has vLLM; the worker's own without it",
    ),
    Field(
        "MODELSTORE_VLLM_ARGS",
        "vllm_args",
        _words,
        "options for `vllm serve`, such as `--max-model-len 8192 --enforce-eager`",
    ),
    Field(
        "MODELSTORE_ENGINE_CACHE",
        "engine_cache",
        _engine_cache,
        "`1`: keep the code that an engine compiles (vLLM; others by `MODELSTORE_COMPILE`) on the volume for the next "
        "worker, and use what is there; `read`: only use "
        "it; it is code that runs in the worker, from a volume that others may write (docs/security.md)",
        "0",
    ),
    Field(
        ENGINE_CACHE_KEY,
        "engine_cache_key",
        _secret,
        "a secret of at least 16 characters: only compiled code that was signed with it is used",
    ),
    Field(
        "MAX_CONCURRENCY",
        "max_concurrency",
        _count,
        "jobs that a worker takes at once; they share the GPU in one batch",
    ),
    Field("MODELSTORE_MAX_TOKENS", "max_tokens", _count, "the most tokens that a job may ask for"),
    Field("MODELSTORE_MAX_PROMPT_CHARACTERS", "max_prompt_characters", _count, "the longest prompt"),
    Field("MODELSTORE_MAX_PROMPTS", "max_prompts", _count, "the most prompts in one job"),
    Field("MODELSTORE_MAX_STEPS", "max_steps", _count, "the most steps of an image job"),
    Field("MODELSTORE_MAX_PIXELS", "max_pixels", _count, "the most pixels of an image"),
    Field("MODELSTORE_MAX_IMAGES", "max_images", _count, "the most images in one job"),
    Field(
        "MODELSTORE_MAX_RESULT",
        "max_result_bytes",
        parse_size,
        "the largest result, or chunk of a stream, that RunPod takes; a larger one is an error",
        "20MB",
    ),
    Field(
        "BUCKET_ENDPOINT_URL",
        "bucket_endpoint",
        _endpoint,
        "RunPod's own: an S3 bucket that pictures are uploaded to, with `BUCKET_ACCESS_KEY_ID` and "
        "`BUCKET_SECRET_ACCESS_KEY`; jobs get addresses",
    ),
    Field("MODELSTORE_MAX_JOB_S", "max_job_s", _seconds(0), "seconds after which a job ends with an error; `0`: never"),
    Field(
        "PORT",
        "http_port",
        _as_it_is,
        "RunPod's own, for `python -m handler --http`: the port of requests",
        "80 on RunPod, 8000 elsewhere",
    ),
    Field("PORT_HEALTH", "health_port", _as_it_is, "RunPod's own: the port of questions for the health", "`PORT`"),
    Field("HEALTH_CHECK_PATH", "health_path", _as_it_is, "RunPod's own: the path of questions for the health"),
    Field(
        API_KEY,
        "api_key",
        _api_key,
        "a secret of at least 16 characters that each request over HTTP has to carry, as `Authorization: Bearer` or "
        "`X-API-Key`; without it anyone who reaches the port is served",
    ),
    Field(
        HUB_TOKENS[0],
        "hf_token",
        _token,
        "access token for gated and private repos; never written to the volume or a log, and taken out of the worker's "
        f"environment at its start (or `{HUB_TOKENS[1]}`)",
        other_names=HUB_TOKENS[1:],
    ),
    Field("HF_ENDPOINT", "hf_endpoint", _endpoint, "the Hub's address"),
    Field(
        "MODELSTORE_S3_ENDPOINT",
        "s3_endpoint",
        _endpoint,
        "another S3 address for `seed --to` than RunPod's for the datacenter",
    ),
    Field(
        "CUDA_VISIBLE_DEVICES",
        "visible_gpus",
        _as_it_is,
        "CUDA's own: the numbers of the GPUs that this worker may use",
        may_be_empty=True,
    ),
)
