"""A loaded model with its tokenizer: how a prompt becomes tokens, and tokens a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from handler.engines.chat_template import Renderer
from handler.engines.detokenizer import Detokenizer
from handler.errors import Code, JobError, TemplateTimeout, invalid
from handler.jobs import Prompt, Sampling, TextRequest
from modelstore.errors import NotServable
from modelstore.load.model import load_model
from modelstore.load.torch_device import needs_several_gpus
from modelstore.servable import check_generates_text
from modelstore.units import one_line
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.pins import UsageMark
from modelstore.volume.snapshots import Snapshot, check_code
from modelstore.warmstart import PendingStart

_MESSAGE_CHARACTERS = 500  # of an error of a tokenizer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A causal language model with its tokenizer; `context`: the most tokens that it takes, if its config says so."""

    snapshot: Snapshot
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kinds: TokenKinds
    context: int | None
    in_use: UsageMark

    @classmethod
    def from_start(
        cls,
        pending: PendingStart,
        *,
        device: str | torch.device | None = None,
        while_reading: Callable[[], None] | None = None,
    ) -> Loaded:
        """The tokenizer, and the model while bytes are in flight; then `while_reading`, once; then the last bytes."""
        snapshot = pending.snapshot
        check_code(snapshot, trusted=pending.trusted)
        check_generates_text(snapshot.config(), snapshot.manifest.paths, str(snapshot.key))
        with pending.timeline.span("import"):
            tokenizer = _tokenizer_of(pending)
        model = load_model(
            pending.snapshot,
            device,
            device_map="auto" if device is None and needs_several_gpus(pending.snapshot) else None,
            reading=pending.reading,
            timeline=pending.timeline,
            trust_remote_code=pending.trusted,
            causal=True,
            weights=pending.prefetched,
            while_reading=while_reading,
        )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known = context if isinstance(context, int) and context > 0 else None
        return cls(pending.snapshot, model, tokenizer, TokenKinds(tokenizer), known, pending.in_use)

    @property
    def key(self) -> SnapshotKey:
        return self.snapshot.key


def _tokenizer_of(pending: PendingStart) -> PreTrainedTokenizerBase:
    """The snapshot's tokenizer. Raises NotServable if it cannot be made."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            pending.snapshot.path, trust_remote_code=pending.trusted
        )
    except Exception as error:  # the tokenizers of each library have their own
        raise NotServable(
            f"the tokenizer of {pending.snapshot.key} cannot be loaded: {one_line(str(error), _MESSAGE_CHARACTERS)}"
        ) from error
    return tokenizer


class TokenKinds:
    """Which ids of a tokenizer its `decode` treats in a way of their own. Made when it is first asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special(self) -> frozenset[int]:
        """The tokens that are left out of a text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset((*self.tokenizer.all_special_ids, *(number for number, token in added if token.special)))

    @cached_property
    def single_bytes(self) -> frozenset[int]:
        """The tokens that stand for one byte each, as sentencepiece has them for characters without a piece."""
        ids = self.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        return frozenset(number for number in ids if number is not None) - {self.tokenizer.unk_token_id}

    def __contains__(self, token: object) -> bool:
        """Whether `decode` leaves this id out: a special token, or one that has no token."""
        return token in self.special or self.tokenizer.convert_ids_to_tokens(token) is None

    def detokenizer(self, stops: Sequence[str], *, stream: bool) -> Detokenizer:
        """The detokenizer for this tokenizer's tokens, up to the first of `stops`; as they come if it is a `stream`.

        Without the clean-up of spaces that some configs ask for: it changes text that was handed out already.
        """
        decode = partial(self.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Detokenizer(decode, stops, at_the_end=not stream, skipped=self, single_bytes=self.single_bytes)


def encode(prompt: Prompt, loaded: Loaded, renderer: Renderer) -> list[int]:
    if prompt.text is not None:
        tokens: list[int] = loaded.tokenizer(prompt.text)["input_ids"]
        return tokens
    if not loaded.tokenizer.chat_template:
        raise invalid(f"{loaded.key.repo_id} has no chat template: send prompt instead of messages")
    return _encode_messages([dict(message) for message in prompt.messages], loaded, renderer)


def _encode_messages(messages: list[dict[str, Any]], loaded: Loaded, renderer: Renderer) -> list[int]:
    """A conversation's tokens, as `apply_chat_template` gives them; the template is rendered in a process that can be
    killed."""
    tokenizer = loaded.tokenizer
    made: dict[str, list[int]]
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        else:
            text = renderer.render(tokenizer.get_chat_template(), messages, tokenizer.special_tokens_map)
            made = tokenizer(text, add_special_tokens=False)
    except TemplateTimeout as error:
        raise JobError(Code.TIMEOUT, f"the chat template of {loaded.key.repo_id} was ended: {error}") from error
    except Exception as error:  # tokenizers with a way of their own raise errors of any class
        raise invalid(f"messages do not fit the chat template of {loaded.key.repo_id}: {error}") from error
    return made["input_ids"]


def fitted(prompt_tokens: int, request: TextRequest, loaded: Loaded) -> Sampling:
    """How to sample within the model's context. Raises JobError if prompt and answer do not go into it."""
    sampling, context = request.sampling, loaded.context
    if prompt_tokens == 0:
        raise invalid("prompt has no tokens")
    if context is None or prompt_tokens + sampling.max_tokens <= context:
        return sampling
    if request.fit and prompt_tokens < context:
        return replace(sampling, max_tokens=context - prompt_tokens)
    asked = "" if request.fit else f" and max_tokens {sampling.max_tokens}"
    raise invalid(
        f"the prompt's {prompt_tokens} tokens{asked} exceed the context of {context} tokens of {loaded.key.repo_id}"
    )


def pad_token_id(loaded: Loaded) -> int | None:
    pad: int | None = loaded.tokenizer.pad_token_id
    end: int | None = loaded.tokenizer.eos_token_id
    return end if pad is None else pad
