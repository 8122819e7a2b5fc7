"""Encoders and rerankers by sentence-transformers: the library's own answers, from tensors of the store's reader."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from handler.engines.embedding import EmbeddingEngine
from handler.worker import Worker
from modelstore import ModelStore
from modelstore.errors import NotServable
from modelstore.reference import parse_reference
from modelstore.warmstart import begin
from tests.support.hub import Hub
from tests.support.models import SMALL, write_model

TEXTS = ["hello world", "what is the capital", "paris"]


def base_of(folder: Path, cls: Any = tf.BertModel, **config: Any) -> Path:
    """A tiny BERT with the tokenizer of tests."""
    torch.manual_seed(0)
    write_model(folder, seed=1, template=False)
    cls(tf.BertConfig(**{**SMALL, "vocab_size": 12, **config})).save_pretrained(folder)
    tokenizer = tf.PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<end>"})
    tokenizer.save_pretrained(folder)
    return folder


def with_dense(folder: Path) -> None:
    word = Transformer(str(base_of(folder.parent / "base")), max_seq_length=5)
    parts = [word, Pooling(64), Dense(64, 16), Normalize()]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "what is "})
    model.save(str(folder))


def plain(folder: Path) -> None:
    base_of(folder)


def reranker(folder: Path) -> None:
    base_of(folder, tf.BertForSequenceClassification, num_labels=1)


def saved_reranker(folder: Path) -> None:
    base = base_of(folder.parent / "base", tf.BertForSequenceClassification, num_labels=1)
    sentence_transformers.CrossEncoder(str(base), device="cpu").save(str(folder))


def classifier(folder: Path) -> None:
    base_of(folder, tf.BertForSequenceClassification, num_labels=3)


Make = Callable[[Callable[[Path], None]], Worker]


@pytest.fixture
def serving(hub: Hub, store: ModelStore) -> Iterator[Make]:
    engines: list[EmbeddingEngine] = []

    def make(write: Callable[[Path], None]) -> Worker:
        write(hub.folder / "org" / "name")
        settings = replace(store.settings, model=parse_reference("org/name"), dtype="float32")
        engine = begin(settings).load(EmbeddingEngine.load)
        engines.append(engine)
        return Worker(engine, settings)

    yield make
    for engine in engines:
        engine.close()


def answer(worker: Worker, route: str = "", **data: Any) -> Any:
    job = {"openai_route": route, "openai_input": data or None} if route else data
    return asyncio.run(worker.handle({"id": "7", "input": job}))


@pytest.mark.parametrize("write", [with_dense, plain])
def test_vectors_are_the_librarys(serving: Make, hub: Hub, write: Callable[[Path], None]) -> None:
    worker = serving(write)
    theirs = sentence_transformers.SentenceTransformer(str(hub.folder / "org" / "name"), device="cpu")
    expected = theirs.encode(TEXTS)
    output = answer(worker, texts=TEXTS)
    assert torch.equal(torch.tensor(output["embeddings"]), torch.from_numpy(expected))
    assert output["dimensions"] == expected.shape[1]
    assert output["model"] == "org/name"
    body = answer(worker, "/v1/embeddings", input=TEXTS, model="org/name", encoding_format="base64", user="me")
    assert [each["index"] for each in body["data"]] == [0, 1, 2]
    bytes_of = [base64.b64decode(each["embedding"]) for each in body["data"]]
    vectors = [struct.unpack(f"<{len(data) // 4}f", data) for data in bytes_of]
    assert torch.equal(torch.tensor(vectors), torch.from_numpy(expected))
    assert body["usage"]["total_tokens"] == output["tokens"] > 0
    alone = answer(worker, "/v1/embeddings", input=TEXTS[0])["data"][0]["embedding"]
    assert alone == pytest.approx(expected[0].tolist(), abs=1e-6)


def test_weights_come_from_the_reader_and_not_from_the_files(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: Any, **_keywords: Any) -> None:
        raise AssertionError("a file of weights was opened by the library")

    def write(folder: Path) -> None:
        with_dense(folder)
        monkeypatch.setattr("sentence_transformers.base.modules.module.load_safetensors_model", never)
        monkeypatch.setattr("sentence_transformers.base.modules.module.load_safetensors_file", never)
        monkeypatch.setattr("transformers.modeling_utils.safe_open", never)

    worker = serving(write)
    assert len(answer(worker, texts="hello")["embeddings"]) == 1


def test_dimensions_prompts_and_long_texts(serving: Make, hub: Hub) -> None:
    worker = serving(with_dense)
    theirs = sentence_transformers.SentenceTransformer(str(hub.folder / "org" / "name"), device="cpu")
    short = answer(worker, texts="hello world", dimensions=4, normalize=True)
    expected = theirs.encode("hello world", truncate_dim=4, normalize_embeddings=True)
    assert short["embeddings"][0] == pytest.approx(expected.tolist(), abs=1e-6)
    asked = answer(worker, texts="paris", prompt_name="query")["embeddings"][0]
    assert asked == pytest.approx(theirs.encode("paris", prompt_name="query").tolist(), abs=1e-6)
    body = answer(worker, "/v1/embeddings", input="hello world", dimensions=4)
    vector = body["data"][0]["embedding"]
    assert sum(each * each for each in vector) == pytest.approx(1.0, abs=1e-5), "as OpenAI has it after a cut"
    prompted = answer(worker, texts="hello world paris the", prompt_name="query")
    assert (prompted["tokens"], prompted["truncated"]) == (5, [0]), "its prompt counts"
    cut = answer(worker, texts=["hello", "what is the capital of paris hello world"])
    assert cut["truncated"] == [1]
    assert cut["tokens"] == 1 + 5
    assert "truncated" not in short


@pytest.mark.parametrize("write", [reranker, saved_reranker])
def test_documents_are_ordered_as_the_library_orders_them(
    serving: Make, hub: Hub, write: Callable[[Path], None]
) -> None:
    worker = serving(write)
    theirs = sentence_transformers.CrossEncoder(str(hub.folder / "org" / "name"), device="cpu")
    expected = theirs.rank("paris", TEXTS)
    output = answer(worker, query="paris", documents=TEXTS)
    assert [each["index"] for each in output["results"]] == [each["corpus_id"] for each in expected]
    scores = [each["relevance_score"] for each in output["results"]]
    assert scores == pytest.approx([float(each["score"]) for each in expected], abs=1e-6)
    assert output["results"][0]["document"] == {"text": TEXTS[output["results"][0]["index"]]}
    body = answer(
        worker, "/v1/rerank", model="org/name", query="paris", documents=[{"text": text} for text in TEXTS], top_n=2,
        return_documents=False,
    )  # fmt: skip
    assert [each["index"] for each in body["results"]] == [each["corpus_id"] for each in expected[:2]]
    assert "document" not in body["results"][0]
    assert body["usage"]["total_tokens"] == output["tokens"]


def test_a_classifier_is_no_reranker(serving: Make) -> None:
    with pytest.raises(NotServable, match="gives 3 scores a document"):
        serving(classifier)


@pytest.mark.parametrize(
    ("route", "data", "words"),
    [
        ("", {}, "texts must be a text"),
        ("", {"texts": []}, "texts must be a text, or a list of 1 to 2048 of them"),
        ("", {"texts": ["a", ""]}, "texts must hold texts that are not empty"),
        ("", {"texts": [7]}, "texts must hold texts"),
        ("", {"prompt": "a"}, "prompt is not served here; the fields that are: texts, dimensions"),
        ("", {"texts": "a", "stream": True}, "stream is not served"),
        ("", {"texts": "a", "dimensions": 17}, "dimensions must be at most 16"),
        ("", {"texts": "a", "prompt_name": "x"}, "prompt_name must be one of the prompts of org/name (query"),
        ("", {"query": "a", "documents": ["b"]}, "org/name makes vectors: send texts"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "makes vectors"),
        ("/v1/embeddings", {"input": [[1, 2]]}, "no token ids (LangChain: check_embedding_ctx_length=False)"),
        ("/v1/embeddings", {"input": ["a", " "]}, "text number 1 has no tokens for org/name"),
        (
            "/v2/rerank",
            {"query": "a", "documents": ["b"], "rank_fields": ["x"]},
            "the fields that are: query, documents",
        ),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, "encoding_format must be"),
        ("/v1/embeddings", {"input": "a", "model": "gpt"}, "this worker serves org/name"),
        ("/v1/completions", {"prompt": "a"}, "/v1/embeddings, /v1/rerank, /v1/models"),
    ],
)
def test_bad_input_names_the_field(serving: Make, route: str, data: dict[str, Any], words: str) -> None:
    assert words in answer(serving(with_dense), route, **data)["error"]


@pytest.mark.parametrize(
    ("write", "data"), [(plain, {"texts": TEXTS}), (reranker, {"query": "paris", "documents": TEXTS})]
)
def test_an_output_that_is_no_number_is_an_error(
    serving: Make, write: Callable[[Path], None], data: dict[str, Any]
) -> None:
    """As of an encoder that overflows in 16 bits: JSON has no number for it."""
    worker = serving(write)
    with torch.no_grad():
        next(iter(worker._engine._encoder.parameters())).fill_(float("inf"))  # type: ignore[attr-defined]
    output = answer(worker, **data)
    assert output["code"] == "INTERNAL_ERROR"
    assert "not a number" in output["error"]
    assert "MODEL_DTYPE=float32" in output["error"]


def test_texts_of_a_job_that_has_ended_are_left_at_the_next_batch(serving: Make) -> None:
    worker = serving(plain)
    engine = worker._engine
    encoder = engine._encoder  # type: ignore[attr-defined]
    batches: list[int] = []
    release = threading.Event()

    def slow(*_: object) -> None:
        batches.append(1)
        release.wait(30)

    encoder[0].register_forward_pre_hook(slow)

    async def run() -> None:
        job = {"id": "1", "input": {"texts": ["hello"] * 320}}
        task = asyncio.create_task(worker.handle(job))
        while not batches and not task.done():
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(worker.handle(job | {"id": "2"}))
        await asyncio.sleep(0.05)
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        assert engine.broken == ""

    asyncio.run(run())
    release.set()
    assert len(answer(worker, texts=TEXTS)["embeddings"]) == 3
    assert len(batches) == 2, "one of ten of the first job, none of the second"


def test_a_batch_that_does_not_end_has_the_worker_replaced(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = serving(plain)
    engine = worker._engine
    release = threading.Event()
    monkeypatch.setattr("handler.engines.embedding._STUCK_S", 0.2)
    encoder = engine._encoder  # type: ignore[attr-defined]
    hook = encoder[0].register_forward_pre_hook(lambda *_: release.wait(30) and None)
    late = Worker(engine, replace(worker._settings, max_job_s=0.1))

    async def run() -> None:
        assert (await late.handle({"id": "1", "input": {"texts": TEXTS}}))["code"] == "TIMEOUT"
        await asyncio.sleep(0.3)
        assert "a batch of texts has not ended" in engine.broken
        assert late.retiring

    asyncio.run(run())
    release.set()
    hook.remove()
    assert answer(worker, texts=TEXTS)["embeddings"]
    assert engine.broken == ""


def test_models_and_status(serving: Make) -> None:
    worker = serving(with_dense)
    assert answer(worker, "/v1/models")["data"][0]["id"] == "org/name"
    status = answer(worker, op="status")
    assert (status["engine"], status["dtype"]) == ("embedding", "float32")
    json.dumps(status)
