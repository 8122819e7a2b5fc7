"""Jobs for an encoder: vectors of texts, and the order of documents. Pure functions, no torch, no network.

    in      {"texts": str | [str], "dimensions": int, "normalize": bool, "prompt_name": str, "model"}
    out     {"embeddings": [[float]], "dimensions": int, "tokens": int, "model": str}
    in      {"query": str, "documents": [str | {"text": str}], "top_n": int, "return_documents": true, "model"}
    out     {"results": [{"index", "relevance_score", "document": {"text"}}], "tokens": int, "model": str}

and OpenAI's /v1/embeddings, and /v1/rerank as Jina, Cohere and vLLM have it. An output has "truncated", the places of
the texts of which the model reads less than they have, if there are any.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from handler import openai_routes
from handler.errors import invalid, shown
from handler.fields import unknown_field
from handler.jobs import JobContext
from handler.values import flag, integer

MAX_TEXTS = 2048
MAX_DIMENSIONS = 1 << 16
EncoderRoute = Literal["embeddings", "rerank", "models"]
ROUTES: tuple[EncoderRoute, ...] = ("embeddings", "rerank", "models")
_OTHER_PATHS = {"/v2/rerank": "/v1/rerank", "/rerank": "/v1/rerank"}  # Cohere's, and vLLM's shorter one

_HARMLESS = ("user", "metadata")
_EMBED = {
    "native": ("texts", "dimensions", "normalize", "prompt_name", "model"),
    "embeddings": ("input", "dimensions", "encoding_format", "model"),
}
_RERANK = ("query", "documents", "top_n", "return_documents", "model")


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Texts for their vectors. `form`: the answer's; `is_base64`: OpenAI's form with each vector as float32 bytes."""

    texts: tuple[str, ...]
    model: str | None
    dimensions: int | None = None
    normalize: bool = False
    prompt_name: str | None = None
    form: Literal["native", "openai"] = "native"
    is_base64: bool = False


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to be ordered by a query."""

    query: str
    documents: tuple[str, ...]
    model: str | None
    top_n: int
    return_documents: bool = True
    form: Literal["native", "openai"] = "native"


EncoderRequest = EmbedRequest | RerankRequest


def parse_encoder_job(data: Mapping[str, Any], job: JobContext) -> EncoderRequest | None:
    """The request of a job; None if it asks for the list of models. Raises JobError."""
    if not openai_routes.is_request(data):
        return _rerank(data, job, "native") if "query" in data else _embed(data, job, "native")
    requested, content = openai_routes.route_and_body(data)
    path = requested.rstrip("/") if isinstance(requested, str) else requested
    route = openai_routes.parse_route(_OTHER_PATHS.get(path, path) if isinstance(path, str) else path, ROUTES)
    if route == "models":
        openai_routes.check_no_body(content)
        return None
    body = openai_routes.checked_body(content)
    return _rerank(body, job, "openai") if route == "rerank" else _embed(body, job, "openai")


def embeddings_output(
    request: EmbedRequest, vectors: Sequence[Sequence[float]], *, tokens: int, truncated: Sequence[int], model: str
) -> dict[str, Any]:
    """The output for vectors in the order of their texts."""
    cut = {"truncated": list(truncated)} if truncated else {}
    if request.form == "native":
        sizes = {"dimensions": len(vectors[0]), "tokens": tokens}
        return {"embeddings": [list(vector) for vector in vectors], **sizes, **cut, "model": model}
    data = [
        {"object": "embedding", "index": place, "embedding": _base64(vector) if request.is_base64 else list(vector)}
        for place, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage, **cut}


def rerank_output(
    request: RerankRequest, scores: Sequence[float], *, tokens: int, truncated: Sequence[int], model: str, job_id: str
) -> dict[str, Any]:
    """The output for one score a document: the most relevant first."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])[: request.top_n]
    results = [
        {"index": place, "relevance_score": scores[place]}
        | ({"document": {"text": request.documents[place]}} if request.return_documents else {})
        for place in order
    ]
    cut = {"truncated": list(truncated)} if truncated else {}
    if request.form == "native":
        return {"results": results, "tokens": tokens, **cut, "model": model}
    return {"id": f"rerank-{job_id}", "model": model, "usage": {"total_tokens": tokens}, "results": results, **cut}


def _embed(data: Mapping[str, Any], job: JobContext, form: Literal["native", "openai"]) -> EmbedRequest:
    names = _EMBED["native" if form == "native" else "embeddings"]
    _check_names(data, names)
    source = names[0]
    prompt_name = data.get("prompt_name")
    if prompt_name is not None and not isinstance(prompt_name, str):
        raise invalid(f"prompt_name must be a string, not {shown(prompt_name)}")
    encoding = data.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise invalid(f"encoding_format must be float or base64, not {shown(encoding)}")
    dimensions = None
    if data.get("dimensions") is not None:
        dimensions = integer(data, "dimensions", 1, at_least=1, at_most=MAX_DIMENSIONS)
    return EmbedRequest(
        _texts(data.get(source), source, job),
        job.model_of(data),
        dimensions,
        flag(data, "normalize", default=form == "openai" and dimensions is not None),  # as OpenAI does after a cut
        prompt_name,
        form,
        encoding == "base64",
    )


def _rerank(data: Mapping[str, Any], job: JobContext, form: Literal["native", "openai"]) -> RerankRequest:
    _check_names(data, _RERANK)
    (query,) = _texts(data.get("query"), "query", job, single=True)
    value = data.get("documents")
    listed = (
        [each.get("text") if isinstance(each, dict) else each for each in value] if isinstance(value, list) else value
    )
    documents = _texts(listed, "documents", job, may_be_empty=True)
    return RerankRequest(
        query,
        documents,
        job.model_of(data),
        integer(data, "top_n", len(documents), at_least=1, at_most=MAX_TEXTS),
        flag(data, "return_documents", default=True),
        form,
    )


def _check_names(data: Mapping[str, Any], names: Sequence[str]) -> None:
    for name, value in data.items():
        if value is None or name in names or name in _HARMLESS:
            continue
        if name in ("prompt", "prompts", "messages"):
            fields = ", ".join(names)
            raise invalid(f"{name} is not served here; the fields that are: {fields}: this model generates no text")
        raise unknown_field(name, names)


def _texts(
    value: object, name: str, job: JobContext, *, single: bool = False, may_be_empty: bool = False
) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 1 <= len(texts) <= (1 if single else MAX_TEXTS):
        raise invalid(
            f"{name} must be a text{'' if single else f', or a list of 1 to {MAX_TEXTS} of them'}, not {shown(value)}"
        )
    for text in texts:
        if isinstance(text, int | list):
            raise invalid(f"{name} must hold texts, and no token ids (LangChain: check_embedding_ctx_length=False)")
        if not isinstance(text, str) or not (text or may_be_empty):
            raise invalid(f"{name} must hold texts that are not empty, not {shown(text)}")
        if len(text) > job.limits.prompt_characters:
            raise invalid(f"{name} must have at most {job.limits.prompt_characters} characters each, not {len(text)}")
    return tuple(texts)


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
