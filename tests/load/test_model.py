"""A model from the store equals, bit for bit, the one that transformers loads from the original."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from modelstore import ModelStore, load_model, load_tensors
from modelstore.errors import DigestMismatch, DoesNotFit, IntegrityError, NoWeights, UsageError
from modelstore.load import blocks
from modelstore.load.reader import start_reading
from modelstore.load.torch_device import check_fits
from modelstore.timeline import Timeline
from modelstore.volume.header import TensorInfo, encode_header
from tests.support.models import MODELS, SMALL, assert_equal, save


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fp16_is_bit_for_bit(name: str, original: torch.dtype, shards: bool, store: ModelStore, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "original"
    save(MODELS[name]().to(original), folder, shards=shards)
    snapshot = store.ensure(f"file://{folder}")
    ours = load_model(snapshot, device="cpu")
    assert_equal(ours, type(ours).from_pretrained(folder, dtype=torch.float16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "keep"])
@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5, kept in fp32", "experts with a bias kept in fp32"])
def test_the_other_storage_dtypes_are_bit_for_bit_too(
    name: str, original: torch.dtype, dtype: str, store: ModelStore, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "original"
    save(MODELS[name]().to(original), folder, shards=False)
    ours = load_model(store.ensure(f"file://{folder}", dtype=dtype), device="cpu")
    asked = "auto" if dtype == "keep" else getattr(torch, dtype)
    assert_equal(ours, type(ours).from_pretrained(folder, dtype=asked))


def test_a_plain_from_pretrained_of_the_snapshot_gives_the_same(store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["t5, kept in fp32"](), tmp_path / "original", shards=True)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    plain = tf.T5ForConditionalGeneration.from_pretrained(snapshot.path)
    assert_equal(load_model(snapshot, device="cpu"), plain)


@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_through_a_ring_is_bit_for_bit_too(name: str, shards: bool, store: ModelStore, tmp_path: Path) -> None:
    """The way of a GPU, with the CPU as the device: stand-ins, allocations of its own, block by block."""
    torch.manual_seed(0)
    save(MODELS[name](), tmp_path / "original", shards=shards)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    ours = load_model(snapshot, device="cpu", reading=start_reading(snapshot, beside=True, ring_bytes=1))
    assert_equal(ours, type(ours).from_pretrained(tmp_path / "original", dtype=torch.float16))


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets the weights arrive only when it is set."""
    let_go = threading.Event()
    real = blocks.BlockReader._read

    def read(self: blocks.BlockReader, file: blocks.File, *where: Any) -> Any:
        if file.size_bytes > 40_000:
            assert let_go.wait(20), "the model waits for bytes that it should not need"
        return real(self, file, *where)

    monkeypatch.setattr(blocks.BlockReader, "_read", read)
    return let_go


@pytest.mark.parametrize("ring_bytes", [0, 1], ids=["whole", "ring"])
@pytest.mark.parametrize("name", [name for name in MODELS if "experts" not in name and name != "bert"])
def test_a_model_is_built_before_its_bytes_arrive(
    name: str, ring_bytes: int, store: ModelStore, tmp_path: Path, held_back: threading.Event
) -> None:
    save(MODELS[name](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    timeline = Timeline()
    load_model(
        snapshot,
        "cpu",
        reading=start_reading(snapshot, ring_bytes=ring_bytes),
        timeline=timeline,
        while_reading=held_back.set,
    )
    (built,) = [span for span in timeline.spans if span.name == "build"]
    (read,) = [span for span in timeline.spans if span.name == "read"]
    assert built.end < read.end


@pytest.mark.parametrize("name", ["mixture of experts", "bert"])
def test_weights_that_transformers_computes_with_are_waited_for(
    name: str, store: ModelStore, tmp_path: Path, held_back: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "modelstore")
    save(MODELS[name](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    ours = load_model(snapshot, "cpu", while_reading=held_back.set)
    assert "is built when its bytes are there" in caplog.text
    assert_equal(ours, type(ours).from_pretrained(tmp_path / "original", dtype=torch.float16))


def test_a_cast_that_another_thread_makes_is_seen_too(store: ModelStore, tmp_path: Path) -> None:
    """A checkpoint of several dtypes, loaded in one of them: transformers casts in threads, unseen by our watch."""
    model = MODELS["llama"]().to(torch.float16)
    state = {name: tensor.float() if "norm" in name else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "original", state_dict=state)
    ours = load_model(store.ensure(f"file://{tmp_path}/original", dtype="keep"), "cpu")
    assert_equal(ours, type(ours).from_pretrained(tmp_path / "original", dtype="auto"))
    assert all(torch.isfinite(parameter).all() for parameter in ours.parameters())


def test_unaligned_tensors_are_copied_and_right(store: ModelStore, tmp_path: Path) -> None:
    folder = tmp_path / "original"
    folder.mkdir()
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(5, dtype=torch.int16)}
    infos = (TensorInfo("a", "U8", (3,), 0, 3), TensorInfo("b", "I16", (5,), 3, 13))
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(encode_header(infos, {}) + data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    snapshot = store.ensure(f"file://{folder}", dtype="keep")
    for ring_bytes in (0, 1):
        got = load_tensors(snapshot, "cpu", reading=start_reading(snapshot, ring_bytes=ring_bytes))
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_a_device_map_places_the_modules(store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    plain = load_model(snapshot, "cpu")
    inputs = torch.arange(6).view(1, 6)
    for device_map in ({"model": "cpu", "lm_head": "cpu"}, {"": "cpu"}, "auto"):
        ours = load_model(snapshot, "cpu", device_map=device_map)
        assert_equal(ours, plain)
        if ours.device.type == "cpu":
            assert torch.equal(ours(inputs).logits, plain(inputs).logits)
    with pytest.raises(UsageError, match="is no device map"):
        load_model(snapshot, "cpu", device_map="sideways")


def test_a_model_that_does_not_fit_is_refused_with_both_figures_before_anything_is_read(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(MODELS["llama"](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    monkeypatch.setattr("modelstore.load.torch_device._free_bytes", lambda device: 100)
    monkeypatch.setattr("modelstore.load.reader.start_reading", lambda *_: pytest.fail("it was read"))
    with pytest.raises(DoesNotFit, match=r"takes \d+\.\d kB and cuda:0 has 100 B free"):
        check_fits(snapshot, [torch.device("cuda", 0)])
    check_fits(snapshot, [torch.device("cpu")])
    monkeypatch.setattr("modelstore.load.torch_device._free_bytes", lambda device: snapshot.size_bytes)
    check_fits(snapshot, [torch.device("cuda", 0), torch.device("cuda", 1)])


def test_tensors_on_the_cpu_are_views_of_the_read_buffer(store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    reading = start_reading(snapshot)
    tensors = load_tensors(snapshot, "cpu", reading=reading)
    whole = torch.frombuffer(reading.wait("model.safetensors"), dtype=torch.uint8)
    first, last = whole.data_ptr(), whole.data_ptr() + whole.numel()
    assert all(first <= tensor.data_ptr() < last for tensor in tensors.values())
    model = load_model(snapshot, "cpu", reading=reading)
    assert all(first <= p.data_ptr() < last for p in model.parameters())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_never_gets_into_a_model(name: str, store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    path = snapshot.path / name
    data = bytearray(path.read_bytes())
    digit = data.rindex(b"128") if name == "config.json" else len(data) - 3
    data[digit] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch):
        load_model(snapshot, device="cpu")


def test_missing_weights_are_an_error_and_not_random_numbers(store: ModelStore, tmp_path: Path) -> None:
    model = MODELS["llama"]()
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path / "original", state_dict=state)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp"):
        load_model(snapshot, device="cpu")


def test_a_class_that_transformers_does_not_know_is_named(store: ModelStore, tmp_path: Path) -> None:
    config = tf.LlamaConfig(**SMALL, num_key_value_heads=2)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    path.write_text(path.read_text().replace('"LlamaForCausalLM"', '"LlamaForTelepathy"'))
    assert type(load_model(store.ensure(f"file://{tmp_path}/original"), "cpu")) is tf.LlamaModel


def test_a_pipeline_is_not_a_model(store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path / "original" / "unet", shards=False)
    (tmp_path / "original" / "model_index.json").write_text('{"unet": ["transformers", "LlamaForCausalLM"]}')
    snapshot = store.ensure(f"file://{tmp_path}/original")
    with pytest.raises(NoWeights, match="pipeline"):
        load_model(snapshot, "cpu")
    assert all(
        name.startswith("unet/model.") or name == "unet/lm_head.weight" for name in load_tensors(snapshot, "cpu")
    )


def test_a_load_records_its_spans(store: ModelStore, tmp_path: Path) -> None:
    save(MODELS["llama"](), tmp_path / "original", shards=False)
    snapshot = store.ensure(f"file://{tmp_path}/original")
    timeline = Timeline()
    load_model(snapshot, device="cpu", timeline=timeline)
    spans = {span.name: span for span in timeline.spans}
    assert spans.keys() == {"read", "build"}
    assert spans["read"].size_bytes == snapshot.size_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_fp16_on_the_gpu_is_bit_for_bit(name: str, store: ModelStore, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(MODELS[name](), tmp_path / "original", shards=True)
    ours = load_model(store.ensure(f"file://{tmp_path}/original"), device="cuda")
    assert {parameter.device.type for parameter in ours.parameters()} == {"cuda"}
    assert_equal(ours.cpu(), type(ours).from_pretrained(tmp_path / "original", dtype=torch.float16))
