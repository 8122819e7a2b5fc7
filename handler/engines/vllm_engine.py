"""vLLM, by its own command and its own routes.

`vllm serve` runs in a process of its own (vllm_start.py). Jobs go to it over a socket file, each prompt as a request
that it batches with all others; OpenAI's routes are passed on as they are.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from handler import openai_routes
from handler.answers import Answer, TextAnswer, TextDelta, TokenLogprob
from handler.engines import LARGE, MANY
from handler.engines.adapter_gate import AdapterGate, exchange_begun, exchange_ended, most_rank, shown
from handler.engines.server import Server, error_message
from handler.errors import Code, JobError, invalid, not_served
from handler.jobs import JobContext, TextRequest, parse_text
from handler.prompts import Prompt
from modelstore.adapters import Adapter, find_or_make
from modelstore.errors import IntegrityError, NotServable, Refused
from modelstore.pending_start import PendingStart
from modelstore.settings import Settings
from modelstore.timeline import Timeline
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.snapshots import Catalog, Snapshot

logger = logging.getLogger(__name__)


_EXCHANGE_S = 300.0  # for vLLM to load an adapter
# What a conversation's tokens depend on besides its messages
_OF_TOKENIZE = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "tools",
    "add_special_tokens",
)


class VllmEngine:
    """Answers by a vLLM server; texts, and OpenAI's routes."""

    jobs_at_once = MANY
    beside_the_prompt = LARGE  # a conversation may hold pictures

    def __init__(
        self,
        server: Server,
        pending: PendingStart,
        adapters: dict[str, Adapter],
        *,
        path_of: Callable[[Adapter], str],
        close: Callable[[], None],
    ) -> None:
        """`adapters`: those that the server has, by their names; `path_of`: the place that it reads one from; `close`:
        ends the server, and removes its files."""
        self._adapters = adapters
        self._path_of = path_of
        self._most_rank = most_rank(adapters.values())
        self._gate = AdapterGate()
        self._server = server
        self._close = close
        self._snapshot: Snapshot = pending.snapshot
        self._settings: Settings = pending.settings
        self._in_use = pending.in_use

    @property
    def model(self) -> str:
        return self._snapshot.key.repo_id

    def serves(self, name: str) -> bool:
        """Whether a job may call the model so."""
        return name in (self.model, str(self._settings.model)) or name in self._adapters

    @property
    def broken(self) -> str:
        return self._server.ended

    def check(self) -> None:
        Catalog(Layout(self._settings.root)).check_unchanged(self._snapshot)
        if self.broken:
            raise IntegrityError(self.broken)

    def status(self) -> dict[str, Any]:
        key = self._snapshot.key
        status = {"engine": "vllm", "model": key.repo_id, "commit": key.commit, "dtype": key.dtype}
        return status | shown(self._adapters)

    def swap(self, reference: str) -> Timeline:
        raise Refused(f"vLLM serves one model in its life: {reference} takes a new worker")

    def adapter(self, name: str) -> SnapshotKey:
        return self._adapters[name].snapshot.key

    def swap_adapter(self, name: str) -> Timeline:
        timeline, before = exchange_begun(self._settings, name), self._adapters[name]
        adapter = find_or_make(self._settings, name, self._snapshot.key, timeline)
        try:
            if adapter.rank > self._most_rank:
                raise Refused(f"{adapter.snapshot.key} has rank {adapter.rank}: vLLM takes it with a new worker alone")
            with timeline.span("pause"), self._gate.exchanging(name):
                try:
                    asyncio.run(self._load_adapter(adapter))
                except BaseException:
                    asyncio.run(self._load_adapter(before))
                    raise
        except BaseException:
            adapter.in_use.end()
            raise
        before.in_use.end()
        self._adapters[name] = adapter
        return exchange_ended(timeline, adapter)

    async def _load_adapter(self, adapter: Adapter) -> None:
        """Have the server load an adapter in the place of the one with its name. Not by its option `load_inplace`: with
        that, vLLM 0.32 reads the adapter again at each step."""
        paths = {"unload": {}, "load": {"lora_path": self._path_of(adapter)}}
        async with asyncio.timeout(_EXCHANGE_S):
            for action, fields in paths.items():
                body = {"lora_name": adapter.name, **fields}
                try:
                    async with self._server.request("POST", f"/v1/{action}_lora_adapter", body) as response:
                        await response.read()
                except JobError as error:
                    if action == "load":
                        raise NotServable(f"vLLM does not take the adapter {adapter.snapshot.key}: {error}") from error

    def close(self) -> None:
        self._close()
        self._in_use.end()

    async def answer(self, data: Mapping[str, Any], job: JobContext) -> Answer:
        """See Engine. OpenAI's routes are vLLM's own, and so are most fields of a native job."""
        fields = await self._server.fields()
        if openai_routes.is_request(data):
            path, body = openai_routes.parse_request(*openai_routes.route_and_body(data), job.limits)
            fields.check(body or {}, path.removeprefix("/v1/"))
            return self._passed_on(path, body), openai_routes.PassedAnswer()
        request = parse_text(data, job.limits, fields)
        if request.passed.get("tools"):  # vLLM tells a call apart from the text, and a native output has a text alone
            raise invalid("tools are served on OpenAI's routes by this vLLM: send them to /v1/chat/completions")
        return self.generate(replace(request, model=job.model_of(data))), TextAnswer(request)

    async def _passed_on(self, path: str, body: Mapping[str, Any] | None) -> AsyncIterator[str | dict[str, Any]]:
        async with self._with_adapter((body or {}).get("model")), aclosing(self._server.answer(path, body)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def _with_adapter(self, name: object) -> AbstractAsyncContextManager[None]:
        return self._gate.answering(name) if isinstance(name, str) and name in self._adapters else nullcontext()

    async def generate(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        """The pieces of all the request's prompts, as they come."""
        if request.model is not None and not self.serves(request.model):
            raise not_served(request.model, self.model, *self._settings.served_names, *self._adapters)
        name = request.model if request.model in self._adapters else self.model
        async with self._with_adapter(name), aclosing(self._generated(replace(request, model=name))) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def _generated(self, request: TextRequest) -> AsyncIterator[TextDelta]:
        pieces: asyncio.Queue[TextDelta | BaseException] = asyncio.Queue()

        async def run(index: int, prompt: Prompt) -> None:
            try:
                async with aclosing(self._continued(index, prompt, request)) as source:  # type: ignore[type-var]
                    reason = None
                    async for piece in source:
                        reason = piece.finish_reason
                        pieces.put_nowait(piece)
                if reason is None:
                    raise JobError(Code.INTERNAL_ERROR, "vLLM ended the answer early: send the job again")
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # else the request would wait for pieces for ever
                pieces.put_nowait(error)

        tasks = [asyncio.create_task(run(index, prompt)) for index, prompt in enumerate(request.prompts)]
        try:
            remaining = len(tasks)
            while remaining:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                remaining -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _continued(self, index: int, prompt: Prompt, request: TextRequest) -> AsyncIterator[TextDelta]:
        """The pieces of one prompt."""
        body_fields = await self._fitted(index, prompt, request)
        model = request.model or self.model
        route = "chat/completions" if prompt.messages else "completions"
        counted = {"include_usage": True, "continuous_usage_stats": True}
        tokens_so_far = 0
        async with self._server.request(
            "POST", f"/v1/{route}", body_fields | {"stream": True, "stream_options": counted}
        ) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise JobError(Code.INTERNAL_ERROR, error_message(event))
                for choice in event["choices"]:
                    text = choice["delta"].get("content") if prompt.messages else choice["text"]
                    reason, usage = choice.get("finish_reason"), event["usage"]
                    logprobs = _logprobs(choice.get("logprobs"))
                    if text or reason or logprobs:
                        new, tokens_so_far = usage["completion_tokens"] - tokens_so_far, usage["completion_tokens"]
                        prompt_tokens = usage["prompt_tokens"] if reason else 0
                        yield TextDelta(index, text or "", new, reason, prompt_tokens, model, logprobs)

    async def _fitted(self, index: int, prompt: Prompt, request: TextRequest) -> dict[str, Any]:
        """The body of a prompt's request; if the job names no max_tokens, with the room that the context leaves."""
        sampling = request.sampling
        if prompt.messages:
            source: dict[str, Any] = {"messages": list(prompt.messages)}
        else:
            source = {"prompt": list(prompt.tokens) if prompt.tokens else prompt.text}
        body = {"model": request.model, **source, **sampling.parameters, **request.passed}
        if sampling.seed is not None:
            body["seed"] = sampling.seed + index % request.choices
        if not prompt.messages and sampling.logprobs is not None:
            body["logprobs"] = sampling.logprobs
        if prompt.messages and sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
        if not request.fit:
            return body
        options = {name: value for name, value in request.passed.items() if name in _OF_TOKENIZE and prompt.messages}
        counted = {"prompt": "a"} if prompt.tokens else source | options
        async with self._server.request("POST", "/tokenize", {"model": self.model, **counted}) as response:
            count = await response.json()
        count |= {"count": len(prompt.tokens)} if prompt.tokens else {}
        room = count["max_model_len"] - count["count"]
        if room < 1:
            raise invalid(f"the prompt's {count['count']} tokens leave no room in {count['max_model_len']} tokens")
        return body | {"max_tokens": min(sampling.max_tokens, room)}


def _logprobs(logprobs: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    """The log probabilities of an event's choice, in either form of OpenAI's routes."""
    if not logprobs:
        return ()
    if "content" in logprobs:
        return tuple(
            TokenLogprob(
                each["token"],
                each["logprob"],
                tuple((other["token"], other["logprob"]) for other in each["top_logprobs"]),
            )
            for each in logprobs["content"] or ()
        )
    alternatives = logprobs.get("top_logprobs") or [None for _token in logprobs["tokens"]]
    return tuple(
        TokenLogprob(token, logprob, tuple((top or {}).items()))
        for token, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], alternatives, strict=True)
    )
