"""Text out of tokens as they come: never half a character, never a part of a stop string, and all of it at the end."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from handler.engines.detokenizer import Detokenizer


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
    detokenizer = Detokenizer(words, at_once=True)
    assert [detokenizer.push(token) for token in (1, 2, 3)] == ["", "", ""]
    assert detokenizer.finish() == "w1 w2 w3"
    stopping = Detokenizer(words, ["w2"], at_once=True)
    assert [stopping.push(token) for token in (1, 2)] == ["w1", " "]
    assert stopping.stopped


def test_a_broken_character_at_the_end_is_said_after_all() -> None:
    detokenizer = Detokenizer(decode)
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"
