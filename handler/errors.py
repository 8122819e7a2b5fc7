"""Why a job fails: the codes, the error that its sender gets to see, and the meaning of a library's own errors.

A JobError is no ModelStoreError: it ends one job with an answer, and neither a start nor a command.
"""

from __future__ import annotations

import reprlib
from enum import StrEnum

from modelstore.units import one_line

_MAX_ERROR_CHARACTERS = 2000
_GPU_LOST = ("CUDA error", "device-side assert", "launch failure", "cuBLAS", "CUBLAS_STATUS", "cuDNN error")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Code(StrEnum):
    """Why a job failed; the `code` of an error."""

    INVALID_INPUT = "INVALID_INPUT"
    RESULT_TOO_LARGE = "RESULT_TOO_LARGE"
    OOM = "OOM"
    TIMEOUT = "TIMEOUT"
    MODEL_NOT_ALLOWED = "MODEL_NOT_ALLOWED"
    MODEL_UNAVAILABLE = "MODEL_UNAVAILABLE"
    INTERNAL_ERROR = "INTERNAL_ERROR"


class JobError(Exception):
    """A job that ends in an error that its sender gets to see: one line, even if it quotes a long and strange value."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(one_line(message, _MAX_ERROR_CHARACTERS))
        self.code = code

    def payload(self) -> dict[str, str]:
        """The handler's return value. The SDK sends `error` as the job's error, and `code` as its output."""
        return {"error": f"{self.code}: {self}" if str(self) else self.code.value, "code": self.code.value}


def not_a_number() -> JobError:
    """The error of a model whose output is infinite or not a number."""
    return JobError(
        Code.INTERNAL_ERROR,
        "the model's output is not a number, as if it overflowed in 16 bits: serve it with MODEL_DTYPE=float32",
    )


class TemplateError(ValueError):
    """The template does not take these messages; the text is the template's own."""


class TemplateTimeout(TimeoutError):
    """The template did not end in time, or its process ended otherwise than it should."""


def invalid(message: str) -> JobError:
    """The error for input that its sender can mend."""
    return JobError(Code.INVALID_INPUT, message)


def not_served(asked: str, *models: str) -> JobError:
    """The error for a job that names another model than those that are served."""
    return JobError(
        Code.MODEL_NOT_ALLOWED, f"this worker serves {', '.join(dict.fromkeys(models))}, not {shown(asked)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a GPU, has run out."""
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in _OUT_OF_MEMORY)


def is_gpu_lost(error: BaseException) -> bool:
    """Whether an error says that the GPU answers nothing in this process any more."""
    return not is_out_of_memory(error) and any(phrase in str(error) for phrase in _GPU_LOST)


def gpu_loss(error: BaseException) -> str:
    """Why no job can be answered in this process any more, if an error says that; else empty."""
    return f"the GPU does not answer any more ({str(error)[:200]})" if is_gpu_lost(error) else ""


class _Short(reprlib.Repr):
    """Quotes a foreign value in a few characters, without making the whole of it first."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 80, 40, 80


def shown(value: object) -> str:
    """A value of a request as an error quotes it: escaped, and cut to about 80 characters."""
    if value is None:
        return "nothing"
    text = _Short().repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
