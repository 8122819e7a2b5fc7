"""Every setting, from one environment: the only reader of it in the package.

A value that cannot be used raises InvalidSetting, which names the variable, what was given and what would do. `FIELDS`
describes each variable once; the README's table is checked against it.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args
from urllib.parse import urlsplit

from modelstore.dtypes import DEFAULT_DTYPE, DTYPES, Dtype, parse_dtype
from modelstore.errors import InvalidReference, InvalidSetting, Refused
from modelstore.mount import default_root, read_mounts
from modelstore.reference import Reference, parse_reference, pins

EngineName = Literal["text", "diffusion", "vllm"]

HUB = "https://huggingface.co"

# The Hub's library reads the second, too.
_HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|^AWS_ACCESS_KEY|^RUNPOD_.*API_KEY$")

_DTYPE_NAMES = "{}` or `{}".format("`, `".join([*DTYPES][:-1]), [*DTYPES][-1])

logger = logging.getLogger(__name__)


class Field(NamedTuple):
    """One environment variable, as the documentation shows it."""

    variable: str
    default: str
    meaning: str


FIELDS = (
    Field("MODEL_ID", "", "the model to serve: `org/name`, `org/name@revision`, `file:///folder` (or `MODEL_NAME`)"),
    Field("MODEL_REVISION", "main", "branch, tag or commit, where the reference names none"),
    Field("MODEL_DTYPE", DEFAULT_DTYPE, f"storage dtype: `{_DTYPE_NAMES}`"),
    Field("MODELSTORE_ROOT", "<volume>/modelstore", "the store's folder on the network volume"),
    Field("MODELSTORE_QUOTA", "", "what the store may take on the volume, such as `200GB`; no limit without it"),
    Field("MODELSTORE_EVICT", "0", "`1`: a download may remove the least recently used models to find room"),
    Field("MODELSTORE_LEASE_S", "30", "seconds without a heartbeat after which a claim is taken over"),
    Field("MODELSTORE_WAIT_S", "1800", "seconds to wait for another worker's download before giving up"),
    Field("MODELSTORE_OFFLINE", "0", "`1`: never ask the Hub, serve only what the volume holds"),
    Field(
        "MODELSTORE_ALLOWED_MODELS",
        "",
        "comma-separated references, each with the one revision that it names; any other model or revision is refused",
    ),
    Field("MODELSTORE_ALLOW_PICKLE", "0", "`1`: convert repos that have their weights only as pickles"),
    Field(
        "MODELSTORE_TRUST_REMOTE_CODE",
        "0",
        "`1`: store and run a repo's own code, if `MODEL_ID` or `MODELSTORE_ALLOWED_MODELS` names its commit in full",
    ),
    Field("MODELSTORE_KEEP_PREVIOUS", "0", "`1`: a worker that swaps models keeps the one before in host memory"),
    Field(
        "ENGINE", "", "what serves: `text`, `diffusion` or `vllm`; the first two by what the snapshot holds without it"
    ),
    Field(
        "MODELSTORE_VLLM_PYTHON", "", "the interpreter of the environment that has vLLM; the worker's own without it"
    ),
    Field("MODELSTORE_VLLM_ARGS", "", "options for `vllm serve`, such as `--max-model-len 8192 --enforce-eager`"),
    Field("MAX_CONCURRENCY", "16", "jobs that a worker takes at once; they share the GPU in one batch"),
    Field("MODELSTORE_MAX_TOKENS", "2048", "the most tokens that a job may ask for"),
    Field("MODELSTORE_MAX_PROMPT_CHARACTERS", "1000000", "the longest prompt"),
    Field("MODELSTORE_MAX_PROMPTS", "32", "the most prompts in one job"),
    Field("MODELSTORE_MAX_STEPS", "150", "the most steps of an image job"),
    Field("MODELSTORE_MAX_PIXELS", "4194304", "the most pixels of an image"),
    Field("MODELSTORE_MAX_IMAGES", "4", "the most images in one job"),
    Field("MODELSTORE_MAX_JOB_S", "600", "seconds after which a job ends with an error; `0`: never"),
    Field(
        "HF_TOKEN",
        "",
        "access token for gated and private repos; never written to the volume or a log, and taken out of the worker's "
        "environment at its start (or `HUGGING_FACE_HUB_TOKEN`)",
    ),
    Field("HF_ENDPOINT", HUB, "the Hub's address"),
    Field("MODELSTORE_S3_ENDPOINT", "", "another S3 address for `seed --to` than RunPod's for the datacenter"),
    Field("CUDA_VISIBLE_DEVICES", "", "CUDA's own: the numbers of the GPUs that this worker may use"),
)


def bare_environment() -> dict[str, str]:
    """For a process of our own: what the dynamic loader and the clock need, and no token."""
    return {name: value for name, value in os.environ.items() if name in ("LD_LIBRARY_PATH", "TZ")}


def without_secrets() -> dict[str, str]:
    """This process's environment for a child of it: without tokens and keys, of the Hub, RunPod and S3."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name)}


def server_environment() -> dict[str, str]:
    """For a server of somebody else's that loads a model by its path: all that is set but our settings and secrets, and
    not a word to the Hub."""
    ours = {field.variable for field in FIELDS} - {"CUDA_VISIBLE_DEVICES"}
    kept = {name: value for name, value in without_secrets().items() if name not in ours}
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def forget_hub_tokens() -> None:
    """Take the Hub's tokens out of this process's environment, after the settings were read: no child needs them, nor
    a model's own code. What can read this process's memory finds them still."""
    values = [value for name in _HUB_TOKENS if (value := os.environ.pop(name, ""))]
    if values:
        _overwrite_in_first_environment(values)


def _overwrite_in_first_environment(values: Iterable[str]) -> None:
    """Blank texts in the block that the kernel gave this process as its environment: `/proc/PID/environ` shows that, of
    a forked child too, whatever was taken out since. Best effort: on a system without /proc nothing happens."""
    import ctypes

    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[47]), int(fields[48])  # env_start and env_end, see proc(5)
    except (OSError, ValueError, IndexError):
        return
    block = ctypes.string_at(begin, end - begin)
    for value in map(os.fsencode, values):
        place = block.find(needle := b"=" + value + b"\0")
        while place >= 0:
            ctypes.memset(begin + place + 1, ord("x"), len(value))
            place = block.find(needle, place + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one process; build it with `from_env`, or by hand in tests and programs."""

    root: Path
    model: Reference | None = None
    dtype: Dtype = DEFAULT_DTYPE
    quota_bytes: int | None = None
    evict: bool = False
    lease_s: float = 30.0
    wait_s: float = 1800.0
    offline: bool = False
    allowed_models: tuple[Reference, ...] = ()
    allow_pickle: bool = False
    trust_remote_code: bool = False
    keep_previous: bool = False
    max_concurrency: int = 16
    max_tokens: int = 2048
    max_prompt_characters: int = 1_000_000
    max_prompts: int = 32
    max_steps: int = 150
    max_pixels: int = 2048 * 2048
    max_images: int = 4
    engine: EngineName | None = None
    vllm_python: Path | None = None
    vllm_args: tuple[str, ...] = ()
    max_job_s: float = 600.0
    hf_token: str | None = field(default=None, repr=False)
    hf_endpoint: str = HUB
    s3_endpoint: str | None = None
    visible_gpus: str | None = None
    worker_id: str = field(default_factory=socket.gethostname)

    @classmethod
    def from_env(
        cls, env: Mapping[str, str] | None = None, *, root: Path | None = None, mounts: str | None = None
    ) -> Settings:
        """Read every variable from `env`, by default the process's; `root` overrides MODELSTORE_ROOT.

        `mounts` is the text of the mount table, /proc/mounts by default.

        Raises InvalidSetting with the name of the first variable that cannot be used.
        """
        env = os.environ if env is None else env
        model_variable = "MODEL_ID" if env.get("MODEL_ID") else "MODEL_NAME"
        name = env.get(model_variable, "")
        model = _reference(model_variable, name, env.get("MODEL_REVISION") or None) if name else None
        quota = env.get("MODELSTORE_QUOTA", "")
        allowed = [text.strip() for text in env.get("MODELSTORE_ALLOWED_MODELS", "").split(",")]
        return cls(
            root=_root(env, mounts) if root is None else root.absolute(),
            model=model,
            dtype=parse_dtype("MODEL_DTYPE", env.get("MODEL_DTYPE") or DEFAULT_DTYPE),
            quota_bytes=parse_size("MODELSTORE_QUOTA", quota) if quota else None,
            evict=_switch(env, "MODELSTORE_EVICT"),
            lease_s=_number(env, "MODELSTORE_LEASE_S", 30.0, at_least=2.0),
            wait_s=_number(env, "MODELSTORE_WAIT_S", 1800.0, at_least=0.0),
            offline=_switch(env, "MODELSTORE_OFFLINE"),
            allowed_models=tuple(_allowed(text, model) for text in allowed if text),
            allow_pickle=_switch(env, "MODELSTORE_ALLOW_PICKLE"),
            trust_remote_code=_switch(env, "MODELSTORE_TRUST_REMOTE_CODE"),
            keep_previous=_switch(env, "MODELSTORE_KEEP_PREVIOUS"),
            max_concurrency=_count(env, "MAX_CONCURRENCY", 16),
            max_tokens=_count(env, "MODELSTORE_MAX_TOKENS", 2048),
            max_prompt_characters=_count(env, "MODELSTORE_MAX_PROMPT_CHARACTERS", 1_000_000),
            max_prompts=_count(env, "MODELSTORE_MAX_PROMPTS", 32),
            max_steps=_count(env, "MODELSTORE_MAX_STEPS", 150),
            max_pixels=_count(env, "MODELSTORE_MAX_PIXELS", 2048 * 2048),
            max_images=_count(env, "MODELSTORE_MAX_IMAGES", 4),
            engine=_engine(env),
            vllm_python=Path(env["MODELSTORE_VLLM_PYTHON"]) if env.get("MODELSTORE_VLLM_PYTHON") else None,
            vllm_args=_arguments(env, "MODELSTORE_VLLM_ARGS"),
            max_job_s=_number(env, "MODELSTORE_MAX_JOB_S", 600.0, at_least=0.0),
            hf_token=_token(env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN") or ""),
            hf_endpoint=_endpoint("HF_ENDPOINT", env.get("HF_ENDPOINT") or HUB),
            s3_endpoint=_endpoint("MODELSTORE_S3_ENDPOINT", env.get("MODELSTORE_S3_ENDPOINT", "")) or None,
            visible_gpus=env.get("CUDA_VISIBLE_DEVICES"),
            worker_id=env.get("RUNPOD_POD_ID") or socket.gethostname(),
        )

    @property
    def hf_caches(self) -> tuple[Path, ...]:
        """Where RunPod's cached models and other tools' HF caches may lie on the same volume."""
        return (self.root.parent / "huggingface-cache" / "hub",)

    def check_allowed(self, reference: Reference) -> None:
        """Raise Refused if MODELSTORE_ALLOWED_MODELS is set and does not list `reference` with this revision."""
        if self.allowed_models and reference not in self.allowed_models:
            raise Refused(f"{reference} is not among MODELSTORE_ALLOWED_MODELS: add it there, or ask for one of those")

    def may_run_code_of(self, repo_id: str, commit: str, *, named: Reference | None = None) -> bool:
        """Whether code that this commit brings may be stored and run: MODELSTORE_TRUST_REMOTE_CODE is set, and MODEL_ID
        or MODELSTORE_ALLOWED_MODELS pins the commit, or the reference `named` by the person who calls.

        An alias and a branch pin nothing: both are read from the volume or the Hub, where others may change them.
        """
        operator = (self.model, *self.allowed_models, named)
        return self.trust_remote_code and any(each is not None and pins(each, repo_id, commit) for each in operator)


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)


def parse_size(variable: str, text: str) -> int:
    """`text` such as `200GB` or `1.5 GiB` in bytes; decimal units, binary ones with an `i`."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise InvalidSetting(f"{variable}={text!r} is not a size: write it like 200GB or 1.5TiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _reference(variable: str, text: str, revision: str | None) -> Reference:
    try:
        return parse_reference(text, revision=revision)
    except InvalidReference as error:
        raise InvalidSetting(f"{variable}: {error}") from error


def _allowed(text: str, model: Reference | None) -> Reference:
    """An entry of MODELSTORE_ALLOWED_MODELS. Without a revision it means MODEL_ID's own if it names that repo."""
    reference = _reference("MODELSTORE_ALLOWED_MODELS", text, None)
    has_revision = "@" in text
    return model if model is not None and model.name == reference.name and not has_revision else reference


def _number(env: Mapping[str, str], variable: str, default: float, *, at_least: float) -> float:
    text = env.get(variable, "")
    if not text:
        return default
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not at_least <= number < float("inf"):
        raise InvalidSetting(f"{variable}={text!r} is not usable: give a number of seconds, at least {at_least:g}")
    return number


def _count(env: Mapping[str, str], variable: str, default: int) -> int:
    text = env.get(variable, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= 10**9):
        raise InvalidSetting(f"{variable}={text[:40]!r} is not usable: give a whole number, at least 1")
    return int(text)


def _engine(env: Mapping[str, str]) -> EngineName | None:
    text = env.get("ENGINE", "").strip().lower()
    if text not in ("", *get_args(EngineName)):
        raise InvalidSetting(f"ENGINE={text!r} is not known: use one of {', '.join(get_args(EngineName))}")
    return cast(EngineName, text) if text else None


def _arguments(env: Mapping[str, str], variable: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(env.get(variable, "")))
    except ValueError as error:
        raise InvalidSetting(f"{variable} cannot be split into words ({error}): close its quotes") from error


def _switch(env: Mapping[str, str], variable: str) -> bool:
    text = env.get(variable, "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise InvalidSetting(f"{variable}={text!r} is not a switch: use 1 or 0")


def _token(text: str) -> str | None:
    token = text.strip()
    if any(not 33 <= ord(c) < 127 for c in token):
        raise InvalidSetting("HF_TOKEN holds characters that no token has: copy it again (it is not shown here)")
    return token or None


def _endpoint(variable: str, text: str) -> str:
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and not parts.query
        usable = usable and parts.port != 0  # a port that is no number raises
    except ValueError:
        usable = False
    if not usable:
        raise InvalidSetting(f"{variable} is not an address: write it like {HUB}")
    return text.rstrip("/")


def _root(env: Mapping[str, str], mounts: str | None) -> Path:
    text = env.get("MODELSTORE_ROOT", "")
    if text:
        if not text.startswith("/"):
            raise InvalidSetting(f"MODELSTORE_ROOT={text!r} is not absolute: give the full path of a folder")
        return Path(text)
    return default_root(read_mounts() if mounts is None else mounts, env.get, Path.is_dir)
