"""A loaded model with its tokenizer: how a prompt becomes tokens, and tokens a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from handler.engines.chat_template import Renderer
from handler.engines.context import Context
from handler.engines.detokenizer import Detokenizer
from handler.errors import Code, JobError, TemplateTimeout, invalid
from handler.jobs import TextRequest
from handler.prompts import Prompt, parts_of_content, text_of_content
from handler.sampling import Sampling
from modelstore.adapters import Adapter, find_or_make
from modelstore.errors import NotServable
from modelstore.load.model import load_model
from modelstore.load.model_class import MESSAGE_CHARACTERS
from modelstore.load.torch_device import needs_several_gpus
from modelstore.pending_start import PendingStart
from modelstore.servable import check_generates_text
from modelstore.units import one_line
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.pins import UsageMark
from modelstore.volume.snapshots import Snapshot, check_code

if TYPE_CHECKING:
    from handler.engines.adapters import Adapters


@dataclass(frozen=True, slots=True)
class Loaded:
    """A language model with its tokenizer."""

    snapshot: Snapshot
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kinds: TokenKinds
    context: Context
    in_use: UsageMark
    adapters: Adapters | None = None

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
        with ExitStack() as stack:
            prepared = _adapters_of(pending, stack)
            model = load_model(
                pending.snapshot,
                device,
                device_map="auto"
                if device is None and pending.transfer is None and needs_several_gpus(pending.snapshot)
                else None,
                reading=pending.reading,
                timeline=pending.timeline,
                trust_remote_code=pending.trusted,
                causal=True,
                transfer=pending.transfer,
                while_reading=while_reading,
            )
            adapters = _beside(model, prepared)
            stack.pop_all()
        return cls(
            pending.snapshot, model, tokenizer, TokenKinds(tokenizer), Context.of(model), pending.in_use, adapters
        )

    def end_use(self) -> None:
        """The snapshots are no longer in use by this worker."""
        self.in_use.end()
        for adapter in self.adapters.current.values() if self.adapters is not None else ():
            adapter.in_use.end()

    @property
    def key(self) -> SnapshotKey:
        return self.snapshot.key


def _adapters_of(pending: PendingStart, stack: ExitStack) -> list[Adapter]:
    """The adapters of MODEL_ADAPTERS, in use until `stack` ends. Raises NotServable if one is for another model."""
    adapters = []
    for name in pending.settings.adapters:
        adapters.append(find_or_make(pending.settings, name, pending.snapshot.key, pending.timeline))
        stack.callback(adapters[-1].in_use.end)
    return adapters


def _beside(model: PreTrainedModel, adapters: Sequence[Adapter]) -> Adapters | None:
    """The adapters beside the model; None without any. Raises NotServable if one does not fit it."""
    if not adapters:
        return None
    from handler.engines.adapters import Adapters

    return Adapters(model, adapters)


def _tokenizer_of(pending: PendingStart) -> PreTrainedTokenizerBase:
    """The snapshot's tokenizer. Raises NotServable if it cannot be made."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            pending.snapshot.path, trust_remote_code=pending.trusted
        )
    except Exception as error:  # the tokenizers of each library have their own
        raise NotServable(
            f"the tokenizer of {pending.snapshot.key} cannot be loaded: {one_line(str(error), MESSAGE_CHARACTERS)}"
        ) from error
    return tokenizer


class TokenKinds:
    """Which ids of a tokenizer its `decode` treats in a way of their own. Made when it is first asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of a token each: log probabilities of a prompt ask for the same ones often

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

    @cached_property
    def special_by_text(self) -> Mapping[str, int]:
        """The special tokens by their text."""
        return dict(zip(self.tokenizer.convert_ids_to_tokens(sorted(self.special)), sorted(self.special), strict=True))

    def __contains__(self, token: object) -> bool:
        """Whether `decode` leaves this id out: a special token, or one that has no token."""
        return token in self.special or not self._has_token(token)

    def text_of(self, token: int, before: Sequence[int] = ()) -> str:
        """The text of one token, as it stands in a text, together with the first tokens of its character, `before`; a
        special token's too."""
        if before:
            return self._decoded(*before, token)
        if token not in self._texts:
            self._texts[token] = self._decoded(token)
        return self._texts[token]

    def _decoded(self, *tokens: int) -> str:
        """The text of tokens as it stands in a text."""
        decode = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        anchor: str = decode([*self._anchor])
        text: str = decode([*self._anchor, *tokens])
        return text[len(anchor) :] if text.startswith(anchor) else decode([*tokens])

    def detokenizer(
        self, sampling: Sampling, prompt: Sequence[int], *, is_new_message: bool, stream: bool
    ) -> Detokenizer:
        """The detokenizer for the tokens that follow a prompt, up to the first of the stop strings; as they come if it
        is a `stream`.

        A text goes on where its prompt ended. `is_new_message`: it is a message of its own, before which no word is
        joined to the template's by a space; a space that the first token has itself stays. Without the clean-up of
        spaces that some configs ask for: it changes text that was handed out already.
        """
        decode = partial(
            self.tokenizer.decode,
            skip_special_tokens=sampling.skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return Detokenizer(
            decode,
            sampling.stop,
            at_the_end=not stream,
            skipped=self if sampling.skip_special_tokens else _WithoutToken(self),
            single_bytes=self.single_bytes,
            prompt=prompt if self._has_decoder else (),
            goes_on=self._begins_with_space if is_new_message else lambda _first: True,
            stops_after=sampling.min_tokens,
        )

    @cached_property
    def _has_decoder(self) -> bool:
        """Whether it says how tokens become a text; else they are listed with spaces between them, which none wrote."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is None or backend.decoder is not None

    def _begins_with_space(self, token: int) -> bool:
        """Whether a token begins with a space of its own, as sentencepiece writes it."""
        return str(self.tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")

    def _has_token(self, token: object) -> bool:
        return self.tokenizer.convert_ids_to_tokens(token) is not None

    @cached_property
    def _anchor(self) -> tuple[int, ...]:
        """A token of a letter, whose text does not change with what follows."""
        tokens: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return tuple(tokens[-1:])


class _WithoutToken:
    """The ids that a tokenizer has no token for."""

    def __init__(self, kinds: TokenKinds) -> None:
        self._kinds = kinds

    def __contains__(self, token: object) -> bool:
        return not self._kinds._has_token(token)


def encode(prompt: Prompt, loaded: Loaded, renderer: Renderer, add_special_tokens: bool | None = None) -> list[int]:
    """A prompt's tokens. `add_special_tokens`: whether the tokenizer adds its own; by default it does so to a text, and
    a conversation's template has them. Raises JobError."""
    tokens: list[int]
    if prompt.tokens:
        tokens = list(prompt.tokens)
    elif prompt.text is not None:
        tokens = loaded.tokenizer(prompt.text, add_special_tokens=add_special_tokens is not False)["input_ids"]
    elif loaded.tokenizer.chat_template:
        tokens = _encode_messages(prompt, loaded, renderer, add_special_tokens=add_special_tokens is True)
    else:
        raise invalid(f"{loaded.key.repo_id} has no chat template: send prompt instead of messages")
    size = _prompt_vocabulary(loaded)
    if tokens and max(tokens) >= size:  # also of a text: a tokenizer may have tokens that were added after the training
        raise invalid(f"prompt holds the token id {max(tokens)}: {loaded.key.repo_id} has {size} tokens")
    return tokens


def _encode_messages(prompt: Prompt, loaded: Loaded, renderer: Renderer, *, add_special_tokens: bool) -> list[int]:
    """A conversation's tokens, as `apply_chat_template` gives them; the template is rendered in a process that can be
    killed."""
    tokenizer, template = loaded.tokenizer, prompt.template
    options: dict[str, Any] = {
        "add_generation_prompt": template.add_generation_prompt,
        "continue_final_message": template.continue_final_message,
    }
    options |= {"tools": [dict(tool) for tool in template.tools]} if template.tools else {}
    options |= {"documents": [dict(document) for document in template.documents]} if template.documents else {}
    made: dict[str, list[int]]
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            messages = [{**message, "content": text_of_content(message["content"])} for message in prompt.messages]
            made = tokenizer.apply_chat_template(messages, return_dict=True, **options, **template.variables)
        else:
            source = tokenizer.get_chat_template(tools=options.get("tools"))
            _check_used(source, options, loaded)
            as_read = (
                parts_of_content if renderer.reads_parts(source, tokenizer.special_tokens_map) else text_of_content
            )
            messages = [{**message, "content": as_read(message["content"])} for message in prompt.messages]
            variables = {**tokenizer.special_tokens_map, **template.variables}
            text = renderer.render(source, messages, variables, options)
            made = tokenizer(text, add_special_tokens=add_special_tokens)
    except TemplateTimeout as error:
        raise JobError(Code.TIMEOUT, f"the chat template of {loaded.key.repo_id} was ended: {error}") from error
    except JobError:
        raise
    except Exception as error:  # tokenizers with a way of their own raise errors of any class
        raise invalid(f"messages do not fit the chat template of {loaded.key.repo_id}: {error}") from error
    return made["input_ids"]


def _check_used(template: str, options: Mapping[str, Any], loaded: Loaded) -> None:
    """Raise JobError for tools or documents that a template does not take."""
    for name in ("tools", "documents"):
        if name in options and name not in template:
            raise invalid(f"{name} are not in the chat template of {loaded.key.repo_id}: leave them out")


def _prompt_vocabulary(loaded: Loaded) -> int:
    """The number of tokens that the model reads: an encoder may have a vocabulary of its own."""
    if not loaded.model.config.is_encoder_decoder:
        return vocabulary_size(loaded)
    return int(loaded.model.get_input_embeddings().weight.shape[0])


def vocabulary_size(loaded: Loaded) -> int:
    """The number of tokens that the model generates."""
    size = getattr(loaded.model.config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else len(loaded.tokenizer)


def check_token_ids(sampling: Sampling, loaded: Loaded) -> None:
    """Raise JobError if a request names tokens that the model does not have."""
    size = vocabulary_size(loaded)
    for name, ids in (
        ("logit_bias", [token for token, _bias in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if ids and max(ids) >= size:
            raise invalid(f"{name} names the token id {max(ids)}: {loaded.key.repo_id} has {size} tokens")


def ends_of(sampling: Sampling, loaded: Loaded) -> frozenset[int]:
    """The tokens that end a text at the request's wish: its ids, and stop strings that are one special token each,
    which no text shows."""
    special = loaded.kinds.special_by_text
    return frozenset((*sampling.stop_token_ids, *(special[stop] for stop in sampling.stop if stop in special)))


def fitted(prompt_tokens: int, request: TextRequest, loaded: Loaded) -> Sampling:
    """How to sample within the model's context. Raises JobError if prompt and answer do not go into it."""
    return loaded.context.fitted(prompt_tokens, request.sampling, shorten=request.fit, label=loaded.key.repo_id)


def pad_token_id(loaded: Loaded) -> int | None:
    """A token for the places of a batch that hold no text; None if the tokenizer names none that the model has."""
    ids = (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id)
    return next((number for number in ids if number is not None and number < vocabulary_size(loaded)), None)
