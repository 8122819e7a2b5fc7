"""The answer of one job, made piece by piece from the engine's output.

Each kind of job has a responder of its own: `TextAnswer` here, `ImageAnswer` in `images.py`,
`OpenAIImagesAnswer` in `openai_images.py`, `OpenAIAnswer` and `PassedAnswer` in `openai_routes.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from handler.errors import JobError
from handler.jobs import TextRequest

P = TypeVar("P", contravariant=True)


class Responder(Protocol[P]):
    """Puts the pieces of one answer in the form that the job's sender expects."""

    streams: bool
    """Whether the sender gets chunks as they come, and all of them as the output."""

    def chunks(self, piece: P) -> list[Any]:
        """Take the next piece; returns its chunks of a stream, none if nothing is to be streamed."""

    def merge(self, chunks: list[Any]) -> list[Any]:
        """The same chunks in fewer: they waited while others were sent."""

    def progress(self) -> Mapping[str, Any] | None:
        """The state of a job that is not streamed, for its sender; None if its output is next."""

    def last_chunks(self) -> list[Any]:
        """The end of a stream."""

    def failed_chunks(self, error: JobError) -> list[Any]:
        """The end of a stream that fails midway."""

    def output(self) -> Any:
        """The output of a finished job that is not streamed."""


Answer = tuple[AsyncIterator[Any], Responder[Any]]
"""The pieces of an answer as an engine makes them, and what puts them in its sender's form."""


class WholeAnswer:
    """An output that comes as one piece: a Responder."""

    streams: bool = False

    def __init__(self) -> None:
        self._output: Any = None

    def chunks(self, piece: Any) -> list[Any]:
        """Take the output."""
        self._output = piece
        return []

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Nothing is streamed."""
        return chunks

    def progress(self) -> Mapping[str, Any] | None:
        """None: the output is next."""
        return None

    def last_chunks(self) -> list[Any]:
        """Nothing is streamed."""
        return []

    def failed_chunks(self, error: JobError) -> list[Any]:
        """Nothing is streamed."""
        return []

    def output(self) -> Any:
        """The output."""
        return self._output


def whole(output: Any) -> Answer:
    """The answer of an output that is there already."""

    async def pieces() -> AsyncIterator[Any]:
        yield output

    return pieces(), WholeAnswer()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token as a text, with its natural log probability, None if nothing is before it; `top`: the most likely
    tokens at its place, each with its own."""

    token: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """It in the form of a conversation's `logprobs` on OpenAI's routes."""
        top = [_logprob_as_json(token, logprob) for token, logprob in self.top]
        return _logprob_as_json(self.token, self.logprob) | {"top_logprobs": top}


def _as_json(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    return [token.as_json() for token in tokens]


def _logprob_as_json(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Some more text of prompt number `index`, made of so many tokens by `model`; the last one says why it ended, and
    how many tokens the prompt had. `logprobs`: of these tokens, if they were asked for."""

    index: int
    text: str
    tokens: int
    finish_reason: str | None = None
    prompt_tokens: int = 0
    model: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class TextAnswer:
    """Collects the pieces of one text request, and puts them in RunPod's form: a Responder."""

    def __init__(self, request: TextRequest) -> None:
        self._request = request
        self.streams = request.stream
        self.model = ""
        self.texts = ["" for _prompt in request.prompts]
        self.tokens = [0 for _prompt in request.prompts]
        self.reasons = ["" for _prompt in request.prompts]
        self.logprobs: list[list[TokenLogprob]] = [[] for _prompt in request.prompts]
        self.prompt_tokens = 0

    def add(self, piece: TextDelta) -> None:
        """Take the next piece."""
        self.model = piece.model
        self.prompt_tokens += piece.prompt_tokens
        self.texts[piece.index] += piece.text
        self.tokens[piece.index] += piece.tokens
        self.reasons[piece.index] = piece.finish_reason or ""
        self.logprobs[piece.index] += piece.logprobs

    def chunks(self, piece: TextDelta) -> list[Any]:
        """Take the next piece; returns its chunks of a stream."""
        self.add(piece)
        if not self.streams:
            return []
        index = {"index": piece.index} if self._request.listed else {}
        chunks: list[Any] = []
        if piece.text or piece.logprobs:
            entry = {"logprobs": _as_json(piece.logprobs)} if self._tells_logprobs else {}
            chunks.append({"token": piece.text, "finished": False} | index | entry)
        if piece.finish_reason:
            chunks.append({"token": "", "finished": True} | index | self._output(piece.index))
        return chunks

    def merge(self, chunks: list[Any]) -> list[Any]:
        """Chunks with those of one prompt that follow each other made one, as long as it goes on."""
        merged: list[Any] = []
        for chunk in chunks:
            last = merged[-1] if merged else None
            if last and not last["finished"] and not chunk["finished"] and last.get("index") == chunk.get("index"):
                merged[-1] = last | {name: last[name] + chunk[name] for name in ("token", "logprobs") if name in chunk}
            else:
                merged.append(chunk)
        return merged

    def progress(self) -> Mapping[str, Any] | None:
        """The tokens so far; None once the output is next."""
        return None if all(self.reasons) else {"tokens_generated": sum(self.tokens)}

    def last_chunks(self) -> list[Any]:
        """Nothing: the last chunk of each prompt says that it is finished."""
        return []

    def failed_chunks(self, error: JobError) -> list[Any]:
        """One chunk with the error."""
        return [{"token": "", "finished": True} | error.payload()]

    def output(self) -> dict[str, Any]:
        """The output of a finished job."""
        return self._output(None if self._request.listed else 0)

    @property
    def _tells_logprobs(self) -> bool:
        return self._request.sampling.logprobs is not None

    def _output(self, index: int | None) -> dict[str, Any]:
        """The output of one prompt, or of all of them."""
        of_each: dict[str, list[Any]] = {
            "generated_text": self.texts,
            "tokens_generated": self.tokens,
            "finish_reason": self.reasons,
        }
        output = {name: list(values) if index is None else values[index] for name, values in of_each.items()}
        if self._tells_logprobs:
            output["logprobs"] = list(map(_as_json, self.logprobs)) if index is None else _as_json(self.logprobs[index])
        return {
            **output,
            "model": self.model,
            "parameters": self._request.sampling.parameters,
        }
