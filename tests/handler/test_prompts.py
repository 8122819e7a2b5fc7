"""From a prompt to its tokens, with real tokenizers: what a chat template reads, and tokens that the model lacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import transformers as tf

from handler.engines.chat_template import Renderer
from handler.engines.loaded import Loaded, encode, pad_token_id
from handler.errors import Code, JobError
from handler.jobs import Limits, parse_text
from handler.prompts import Prompt
from modelstore.settings import Settings
from tests.support.models import WORDS, write_model

LIMITS = Limits.of(Settings(root=Path("/")))
READS_STRINGS = "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} {% endfor %}"
READS_PARTS = (
    "{% for m in messages %}<{{ m.role }}> {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }} {% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
)
READS_BOTH = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }} {% else %}"
    "{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    """As much of a loaded model as tells its tokens."""
    write_model(tmp_path, seed=0)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    parts = SimpleNamespace(
        tokenizer=tokenizer, model=SimpleNamespace(config=config), key=SimpleNamespace(repo_id="a/b")
    )
    return cast(Loaded, parts)


def prompt(content: Any, **more: Any) -> Prompt:
    return parse_text({"messages": [{"role": "user", "content": content}], **more}, LIMITS).prompts[0]


@pytest.mark.parametrize("template", [READS_STRINGS, READS_PARTS, READS_BOTH], ids=["strings", "parts", "both"])
@pytest.mark.parametrize(
    "content",
    ["what is the capital", [{"type": "text", "text": "what is"}, {"type": "text", "text": "the capital"}]],
    ids=["a string", "parts"],
)
def test_a_template_gets_contents_as_it_reads_them(
    renderer: Renderer, loaded: Loaded, template: str, content: Any
) -> None:
    loaded.tokenizer.chat_template = template
    tokens = encode(prompt(content), loaded, renderer)
    assert [WORDS[token] for token in tokens] == ["<user>", "what", "is", "the", "capital"]


def test_a_template_that_reads_parts_goes_on_with_the_last_message(renderer: Renderer, loaded: Loaded) -> None:
    loaded.tokenizer.chat_template = READS_PARTS
    tokens = encode(prompt("hello world", continue_final_message=True), loaded, renderer)
    assert [WORDS[token] for token in tokens] == ["<user>", "hello", "world"]


def test_a_template_that_takes_no_conversation_of_one_message_is_given_strings(renderer: Renderer) -> None:
    for template in ("{{ raise_exception('no') }}", "", "{{ messages[1].content }}"):
        assert not renderer.reads_parts(template, {})
    assert renderer.reads_parts(READS_PARTS, {})


def test_tokens_that_the_model_has_no_row_for_are_refused(renderer: Renderer, loaded: Loaded) -> None:
    """On a GPU one of them would end the process for everybody."""
    loaded.tokenizer.add_tokens(["[PAD]"])
    loaded.tokenizer.chat_template = READS_STRINGS
    beyond = len(WORDS)
    for one in (prompt("hello [PAD]"), Prompt(text="hello [PAD]"), Prompt(tokens=(3, beyond))):
        with pytest.raises(JobError, match=f"the token id {beyond}: a/b has {beyond} tokens") as caught:
            encode(one, loaded, renderer)
        assert caught.value.code is Code.INVALID_INPUT
    assert encode(Prompt(text="hello"), loaded, renderer) == [3]


def test_an_encoder_has_a_vocabulary_of_its_own(renderer: Renderer, loaded: Loaded) -> None:
    """As FSMT has one for each language."""
    config = tf.FSMTConfig(
        src_vocab_size=40, tgt_vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    parts = SimpleNamespace(
        tokenizer=loaded.tokenizer, model=tf.FSMTForConditionalGeneration(config), key=SimpleNamespace(repo_id="a/b")
    )
    translator = cast(Loaded, parts)
    assert encode(Prompt(tokens=(3, 39)), translator, renderer) == [3, 39]
    with pytest.raises(JobError, match="has 40 tokens"):
        encode(Prompt(tokens=(3, 40)), translator, renderer)


def test_a_batch_is_padded_with_a_token_of_the_model(loaded: Loaded) -> None:
    assert pad_token_id(loaded) == WORDS.index("<end>")
    loaded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert loaded.tokenizer.pad_token_id == len(WORDS)
    assert pad_token_id(loaded) == WORDS.index("<end>")
    loaded.tokenizer.pad_token = "hello"
    assert pad_token_id(loaded) == 3
