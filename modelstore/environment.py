"""The environments of child processes, and this one's own, as far as it is changed.

No child needs a token of the Hub; a process that runs foreign code gets next to nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from modelstore.settings import API_KEY, ENGINE_CACHE_KEY, FIELDS, SECRETS

WEIGHTS_SOURCE = "MODELSTORE_WEIGHTS"

_OF_COMPILERS = re.compile(
    r"(VLLM|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|INDUCTOR|ATEN|ONEDNN|DNNL|OMP|MKL|NCCL|CUDA|CUBLAS|CUDNN|FLASHINFER|DG)_"
    r"(?!.*(API_KEY|HOST_IP|PORT$|LOGGING|VISIBLE_DEVICES))"
)
_SECRET = re.compile(rf"TOKEN|SECRET|PASSWORD|^AWS_ACCESS_KEY|^RUNPOD_.*API_KEY$|^{ENGINE_CACHE_KEY}$|^{API_KEY}$")


def bare_environment() -> dict[str, str]:
    """For a process of our own: the variables of the dynamic loader and the clock, and no token."""
    return {name: value for name, value in os.environ.items() if name in ("LD_LIBRARY_PATH", "TZ")}


def without_secrets() -> dict[str, str]:
    """This process's environment for a child of it: without tokens and keys, of the Hub, RunPod and S3."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name)}


def server_environment() -> dict[str, str]:
    """For a server that loads a model by its path: all that is set but our settings and secrets, and
    not a word to the Hub."""
    own_names = {field.variable for field in FIELDS} - {"CUDA_VISIBLE_DEVICES"}
    kept = {name: value for name, value in without_secrets().items() if name not in own_names}
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def with_plugin(folder: str, name: str) -> dict[str, str]:
    """The variables with which vLLM finds a plug-in in `folder`, also if the plug-ins that it may load are listed."""
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))}
    listed = os.environ.get("VLLM_PLUGINS")
    return variables if listed is None else variables | {"VLLM_PLUGINS": f"{listed},{name}".lstrip(",")}


def weights_source(record: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """The process that serves a model's weights to this one, as this environment names it: its `socket`, and if it was
    asked for one by name, the `reference`, the `folder` and the `dtype`. Empty if there is none. `record`: a new one,
    for this process and its children."""
    if record is not None:
        os.environ[WEIGHTS_SOURCE] = json.dumps(record)
    return dict(json.loads(os.environ.get(WEIGHTS_SOURCE, "{}")))


def compiling_into(folder: Path) -> dict[str, str]:
    """The variables with which engines keep the code that they compile below `folder`, and vLLM what it found out about
    a GPU's memory."""
    places = {
        "VLLM_CACHE_ROOT": "vllm",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "DG_JIT_CACHE_DIR": "deep_gemm",
        "CUDA_CACHE_PATH": "cuda",
    }
    return {name: str(folder / place) for name, place in places.items()} | {"VLLM_ENABLE_STARTUP_PLAN": "1"}


def trust_authorities() -> None:
    """Let TLS of this process trust the certificates that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE name, as it does those
    of SSL_CERT_FILE and SSL_CERT_DIR, which come first."""
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return
    paths = [path for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if (path := os.environ.get(name))]
    for path in paths[:1]:
        os.environ["SSL_CERT_DIR" if os.path.isdir(path) else "SSL_CERT_FILE"] = path


def set_variables(variables: Mapping[str, str]) -> None:
    """Set these for this process and its children."""
    os.environ.update(variables)


def of_compilers() -> dict[str, str]:
    """The variables of this environment that compiled code may depend on."""
    return {name: value for name, value in server_environment().items() if _OF_COMPILERS.match(name)}


def prepare_for_cuda() -> None:
    """Set the variables that the driver reads once, when it is first called, unless they are set: load a kernel when it
    is first used (before 12.2, all kernels of each library at once), and count GPUs as NVML does, which says what is
    free."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def forget_secrets() -> None:
    """Take the secrets among the settings out of this process's environment, after the settings were
    read: no child needs them, nor a model's own code. A program that can read this process's memory finds them still.
    """
    values = [value for name in SECRETS if (value := os.environ.pop(name, ""))]
    if values:
        _overwrite_in_first_environment(values)


def _overwrite_in_first_environment(values: Iterable[str]) -> None:
    """Blank texts in the block that the kernel gave this process as its environment: `/proc/PID/environ` shows that, of
    a forked child too, even if it was taken out since. Best effort: on a system without /proc nothing happens."""
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
