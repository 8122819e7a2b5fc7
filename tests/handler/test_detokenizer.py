"""Text out of tokens as they come: never half a character, never a part of a stop string, and all of it at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from handler.engines.detokenizer import Detokenizer
from handler.engines.loaded import TokenKinds
from handler.sampling import Sampling


def decode(tokens: Sequence[int]) -> str:
    """Bytes as tokens, as byte-level tokenizers fall back to."""
    return bytes(tokens).decode(errors="replace")


def words(tokens: Sequence[int]) -> str:
    """Words as tokens; the first has no space before it, as with sentencepiece."""
    return " ".join(f"w{token}" for token in tokens)


@given(st.text(min_size=1, max_size=60))
def test_the_pieces_are_the_text_and_none_has_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(byte) for byte in text.encode()] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_spaces_between_words_are_kept() -> None:
    detokenizer = Detokenizer(words)
    assert [detokenizer.push(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string_and_says_nothing_of_it(text: str, stops: list[str]) -> None:
    detokenizer = Detokenizer(decode, stops)
    said = ""
    for byte in text.encode():
        said += detokenizer.push(byte)
        if detokenizer.stopped:
            break
    said += detokenizer.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert detokenizer.stopped == bool(ends)
    if ends:
        seen = text[: min(ends)]
        assert said == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    else:
        assert said == text


def test_at_once_says_all_at_the_end() -> None:
    detokenizer = Detokenizer(words, at_the_end=True)
    assert [detokenizer.push(token) for token in (1, 2, 3)] == ["", "", ""]
    assert detokenizer.finish() == "w1 w2 w3"
    stopping = Detokenizer(words, ["w2"], at_the_end=True)
    assert [stopping.push(token) for token in (1, 2)] == ["w1", " "]
    assert stopping.stopped


def test_a_broken_character_at_the_end_is_said_after_all() -> None:
    detokenizer = Detokenizer(decode)
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"


def byte_level() -> PreTrainedTokenizerBase:
    """As GPT-2, Llama 3 and Qwen have it: every token is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<pad>"],
    )
    tokenizer.train_from_iterator(["the capital of paris, the end \u20ac \U0001f600 caf\u00e9 \ufffd"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2, Mistral and Gemma have it: spaces in the pieces, single bytes for what no piece covers."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdehlortw.,\ufffd\u2581"]
    pieces += ["\u2581the", "\u2581world", "lo", "he"]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"
    )
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerBase:
    pieces = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "##ly", "##s", ",", ".", "a", "n", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


TOKENIZERS = {each.__name__: each() for each in (byte_level, sentencepiece, word_pieces)}


def streamed(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stops: Sequence[str] = ()) -> str:
    return pushed(detokenizer_of(tokenizer, stop=tuple(stops)), tokens)


def detokenizer_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int] = (),
    *,
    is_new_message: bool = False,
    stream: bool = True,
    **sampling: Any,
) -> Detokenizer:
    kinds = TokenKinds(tokenizer)
    return kinds.detokenizer(Sampling(**sampling), prompt, is_new_message=is_new_message, stream=stream)


def pushed(detokenizer: Detokenizer, tokens: Sequence[int]) -> str:
    return "".join([*map(detokenizer.push, tokens), detokenizer.finish()])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_stream_equals_the_decoding_of_all_tokens_at_once(name: str, data: Any) -> None:
    """Any tokens, special ones and ids without a token among them, and runs of a few."""
    tokenizer = TOKENIZERS[name]
    ids = st.one_of(st.integers(0, len(tokenizer) + 2), st.sampled_from(tokenizer.all_special_ids))
    few = st.lists(ids, min_size=1, max_size=4)
    runs = few.flatmap(lambda some: st.lists(st.sampled_from(some), max_size=60))
    tokens = data.draw(st.lists(ids, max_size=60) | runs)
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert streamed(tokenizer, tokens) == whole
    assert pushed(detokenizer_of(tokenizer, stream=False), tokens) == whole
    stops = data.draw(st.lists(st.sampled_from([" ", "he", "e ", "\n", "lo wo", "the world"]), min_size=1, max_size=2))
    before = streamed(tokenizer, tokens, stops)
    assert whole.startswith(before) or not before
    assert not any(stop in before for stop in stops)


def test_a_special_token_between_words_costs_neither_a_space_nor_a_stop() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    the, world, end = tokenizer.convert_tokens_to_ids(["\u2581the", "\u2581world", "</s>"])
    assert streamed(tokenizer, [the, end, world, end, end, the]) == "the world the"
    assert streamed(tokenizer, [the, end, world, end, end, the], [" world"]) == "the"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_token_that_repeats_makes_decoding_slow(name: str) -> None:
    """8,000 of them took 6.5 s when all that ended in U+FFFD was decoded again for each."""
    tokenizer = TOKENIZERS[name]
    tokens = [tokenizer.convert_tokens_to_ids("\ufffd"), *range(3, len(tokenizer) + 2, 37)]
    for token in [token for token in tokens if token is not None]:
        began = time.monotonic()
        text = streamed(tokenizer, [token] * 8000)
        assert time.monotonic() - began < 1.5, token
        assert text == tokenizer.decode([token] * 8000, skip_special_tokens=True)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_a_text_goes_on_where_its_prompt_ended(name: str, stream: bool, data: Any) -> None:
    """Prompt and answer together are what transformers makes of all tokens, at whatever token the prompt ends."""
    tokenizer = TOKENIZERS[name]
    texts = st.sampled_from(["the world, hello", "  he lo", "a   the\n    world", "caf\u00e9 \u20ac the world"])
    tokens = tokenizer(data.draw(texts), add_special_tokens=False)["input_ids"]
    place = data.draw(st.integers(0, len(tokens)))
    before = tokenizer.decode(tokens[:place], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if "\ufffd" in before[-4:] or {*tokens[place - 1 : place + 1]} <= TokenKinds(tokenizer).single_bytes:
        return  # the prompt ends within a character, or in a run of single bytes
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answer = pushed(detokenizer_of(tokenizer, tokens[:place], stream=stream), tokens[place:])
    assert before + answer == whole


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_keeps_a_space_of_its_own_and_gets_none_from_the_template(stream: bool) -> None:
    joined = TOKENIZERS["word_pieces"]
    hello, world = joined.convert_tokens_to_ids(["hello", "world"])
    for is_new_message, text in ((True, "world world"), (False, " world world")):
        detokenizer = detokenizer_of(joined, [hello], is_new_message=is_new_message, stream=stream)
        assert pushed(detokenizer, [world, world]) == text
    pieces = TOKENIZERS["sentencepiece"]
    the, space, world = pieces.convert_tokens_to_ids(["\u2581the", "\u2581", "\u2581world"])
    for is_new_message in (True, False):
        detokenizer = detokenizer_of(pieces, [the], is_new_message=is_new_message, stream=stream)
        assert pushed(detokenizer, [space, space, world]) == "   world", "an indentation of three, and not of two"


def test_special_tokens_stay_if_they_are_asked_for() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    the, world, end = tokenizer.convert_tokens_to_ids(["\u2581the", "\u2581world", "</s>"])
    tokens = [the, end, world]
    for skip in (True, False):
        whole = tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert pushed(detokenizer_of(tokenizer, skip_special_tokens=skip), tokens) == whole
        assert ("</s>" in whole) != skip


def test_a_stop_string_counts_after_the_fewest_tokens() -> None:
    detokenizer = Detokenizer(words, ["w2"], stops_after=3)
    assert pushed(detokenizer, [1, 2, 3]) == "w1 w2 w3"
    detokenizer = Detokenizer(words, ["w2"], stops_after=2)
    assert pushed(detokenizer, [1, 2, 3, 2, 4]) == "w1 w2 w3 "
    assert detokenizer.stopped


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_may_begin_within_the_fewest_tokens(stream: bool) -> None:
    detokenizer = Detokenizer(words, ["w1 w2"], stops_after=1, at_the_end=not stream)
    assert pushed(detokenizer, [1, 2, 3]) == ""
    assert detokenizer.stopped
    detokenizer = Detokenizer(words, ["w1 w2"], stops_after=2, at_the_end=not stream)
    assert pushed(detokenizer, [1, 2, 3]) == "w1 w2 w3"
