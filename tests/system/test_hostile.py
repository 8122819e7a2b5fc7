"""Repos and volumes that mean harm: code, pickles, planted links."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from modelstore import load_model
from modelstore.errors import (
    ClaimLost,
    CodeRefused,
    ModelStoreError,
    NoWeights,
    PickleRefused,
    UnsafeName,
)
from modelstore.fill import pickles
from modelstore.fill.repo_code import code_in
from modelstore.fill.repo_files import stored_path
from modelstore.reference import parse_reference
from modelstore.store import ModelStore
from modelstore.volume.claim import Contender
from modelstore.volume.evict import evict
from modelstore.volume.verify import Position, save_position, saved_position, verify_snapshot
from modelstore.warmstart import begin
from tests.conftest import MakeStore, leave_unfinished
from tests.support.checkpoints import LLAMA_CONFIG, write_repo
from tests.support.hub import Hub
from tests.support.records import record

CONFIG = json.dumps({"auto_map": {"AutoModel": "modeling_own.Own"}, "model_type": "own"}).encode()


@pytest.mark.parametrize(
    ("path", "record"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.X"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "other/repo--configuration.X"}}}),
        ("config.json", {"_attn_implementation_internal": "somebody/kernel"}),
        ("config.json", {"layers": [{"deep": {"_experts_implementation_internal": "x"}}]}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization.X", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "p.X"}}),
        ("unet/config.json", {"auto_map": {"AutoModel": "modeling.X"}}),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling"}, {"type": "custom.Layer"}]),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"], "unet": ["diffusers", "UNet"]}),
        ("model_index.json", {"_class_name": "P", "unet": ["unet_own", "UNet"]}),
    ],
)
def test_a_config_that_names_code_is_found(path: str, record: Any) -> None:
    repo = {"pipeline.py", "unet/unet_own.py", "config.json"}
    assert code_in(path, json.dumps(record).encode(), repo)


@pytest.mark.parametrize(
    ("path", "record"),
    [
        ("config.json", dict(LLAMA_CONFIG)),
        ("config.json", {"auto_map": {}, "_attn_implementation_internal": None}),
        ("tokenizer.json", {"model": {"vocab": {"auto_map": 7, "x_internal": 8}}}),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer"}]),
        ("model_index.json", {"_class_name": "FluxPipeline", "unet": ["diffusers", "UNet"]}),
    ],
)
def test_a_config_that_names_none_passes(path: str, record: Any) -> None:
    assert code_in(path, json.dumps(record).encode(), {"helper.py"}) == ""


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_repo_with_code_is_refused_unless_its_commit_is_named_and_trusted(
    hub: Hub, make_store: MakeStore, name: str, trust: bool
) -> None:
    repo = write_repo(hub.folder / "org" / "name", extra={"modeling_own.py": b"import os\n"})
    (repo / name).write_bytes(CONFIG)
    store = make_store(trust_remote_code=trust)
    with pytest.raises(CodeRefused, match=r"auto_map.*org/name@[0-9a-f]{40}.*--trust-remote-code") as caught:
        store.ensure("org/name")
    assert caught.value.exit_code == 8
    assert hub.served.bytes["model.safetensors"] == 0
    assert not list(store.settings.root.glob("models/*/*"))
    assert not list(store.settings.root.glob("staging/*/*/*"))
    commit = hub.commit(repo)
    if not trust:
        with pytest.raises(CodeRefused):
            store.ensure(f"org/name@{commit}")
        return
    snapshot = store.ensure(f"org/name@{commit}")
    assert snapshot.manifest.remote_code
    assert (snapshot.path / "modeling_own.py").read_text() == "import os\n"
    with pytest.raises(CodeRefused, match="MODELSTORE_TRUST_REMOTE_CODE"):
        load_model(snapshot, "cpu")


def test_python_files_that_no_config_names_are_left_behind(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name", extra={"convert.py": b"import os\n", "handler.py": b""})
    snapshot = make_store().ensure("org/name")
    assert not list(snapshot.path.rglob("*.py"))
    assert not snapshot.manifest.remote_code


def test_trusted_code_runs_and_gives_the_model_of_transformers(hub: Hub, make_store: MakeStore) -> None:
    folder = hub.folder / "org" / "own"
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["OwnModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnModel(LlamaForCausalLM):\n    mine = True\n"
    )
    store = make_store(trust_remote_code=True)
    snapshot = store.ensure(f"org/own@{hub.commit(folder)}")
    loaded: Any = load_model(snapshot, "cpu", trust_remote_code=True)
    assert loaded.mine
    for name, tensor in model.half().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("model", "listed", "trusted"),
    [
        ("org/own@COMMIT", "", True),
        ("org/own", "", False),
        ("@own", "", False),
        ("@own", "@own,org/own@COMMIT", True),
        ("org/own", "org/own", False),
    ],
)
def test_code_runs_only_if_the_settings_name_its_commit(
    hub: Hub, make_store: MakeStore, model: str, listed: str, trusted: bool
) -> None:
    """An alias is a record on the volume and a branch is the Hub's: either may lead to code that nobody has read."""
    repo = write_repo(hub.folder / "org" / "own", extra={"modeling_own.py": b"import os\n"})
    (repo / "config.json").write_bytes(CONFIG)
    commit = hub.commit(repo)
    store = make_store(trust_remote_code=True)
    store.set_alias("own", f"org/own@{commit}")
    store.settings.root.joinpath("refs/org--own").mkdir(parents=True, exist_ok=True)
    store.layout.ref("org/own", "main").write_text(json.dumps({"commit": commit}))
    entries = listed.replace("COMMIT", commit).split(",") if listed else []
    settings = replace(
        store.settings,
        model=parse_reference(model.replace("COMMIT", commit)),
        allowed_models=tuple(map(parse_reference, entries)),
    )
    pending = begin(settings)
    pending.in_use.end()
    pending.reading.close()
    assert pending.trusted == trusted
    evict(store.layout, pending.snapshot.key, force=True)
    again = ModelStore(settings.root, settings=settings)
    if trusted:
        assert again.ensure(settings.model).manifest.remote_code
    else:
        with pytest.raises(CodeRefused):
            again.ensure(settings.model)


def write_pickles(folder: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """A repo whose weights are there only as pickles, two of them one tensor."""
    torch.manual_seed(0)
    tensors = {f"layers.{n}.weight": torch.randn(64, 64) for n in range(4)}
    tensors["tied.weight"] = tensors["layers.0.weight"]
    write_repo(folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    weight_map = {}
    for n in range(shards):
        part = dict(list(tensors.items())[n::shards])
        file = f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("dtype", ["float16", "keep"])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_are_refused_and_with_permission_converted(
    hub: Hub, make_store: MakeStore, shards: int, dtype: str
) -> None:
    tensors = write_pickles(hub.folder / "org" / "name", shards=shards)
    with pytest.raises(PickleRefused, match="--allow-pickle"):
        make_store().ensure("org/name", dtype=dtype)
    snapshot = make_store(allow_pickle=True).ensure("org/name", dtype=dtype)
    loaded: dict[str, torch.Tensor] = {}
    for path in snapshot.path.glob("*.safetensors"):
        loaded |= load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor if dtype == "keep" else tensor.half())
    assert verify_snapshot(snapshot).ok
    assert not list(snapshot.path.rglob("*.bin*"))
    if shards > 1:
        index = json.loads((snapshot.path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in snapshot.path.glob("*.safetensors")}
    assert all(file.origin for file in snapshot.weights)


def test_safetensors_go_before_pickles(hub: Hub, make_store: MakeStore) -> None:
    write_repo(hub.folder / "org" / "name", extra={"pytorch_model.bin": b"not even a pickle"})
    assert make_store(allow_pickle=True).ensure("org/name").path.exists()
    assert hub.served.bytes["pytorch_model.bin"] == 0


class Runs:
    """What a pickle makes its reader call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("what", ["system", "popen", "connect", "not tensors", "not a table", "garbage", "a huge one"])
def test_a_pickle_that_is_more_than_tensors_does_nothing_and_is_refused(
    hub: Hub, make_store: MakeStore, tmp_path: Path, what: str
) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    (repo / "model.safetensors").unlink()
    witness = tmp_path / "witness"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        bad: dict[str, Any] = {
            "system": {"w": Runs(os.system, f"touch {witness}")},
            "popen": {"w": Runs(subprocess.Popen, ["touch", str(witness)])},
            "connect": {"w": Runs(socket.create_connection, server.getsockname())},
            "not tensors": {"w": "text"},
            "not a table": [torch.zeros(3)],
            "a huge one": {"w": torch.zeros(1).expand(1 << 38)},
        }
        if what == "garbage":
            (repo / "pytorch_model.bin").write_bytes(os.urandom(3000))
        elif what in ("system", "popen", "connect"):
            (repo / "pytorch_model.bin").write_bytes(pickle.dumps(bad[what]))
        else:
            torch.save(bad[what], repo / "pytorch_model.bin")
        store = make_store(allow_pickle=True)
        with pytest.raises(PickleRefused, match=r"pytorch_model\.bin of org/name was not converted") as caught:
            store.ensure("org/name")
        with pytest.raises(TimeoutError):
            server.accept()
    assert caught.value.exit_code == 8
    assert len(str(caught.value)) < 600
    assert not witness.exists()
    record(
        "Hostile input does nothing",
        f"a pickle, allowed, that is {what!r}",
        tried=1,
        survived=1,
        figure="refused; nothing ran",
    )
    assert not list(store.settings.root.glob("models/*/*"))
    assert not list(store.settings.root.glob("staging/*/*/*"))


def nested_key_pickle() -> bytes:
    """A table with one key, a tuple of the same tuple twice, sixty deep: each hash takes twice as long as the next.

    Written by hand, since to build the table here would take as long; in the format that `torch.load` reads.
    """
    twice = b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))  # BINPUT n, BINGET n, TUPLE2
    pickled = b"\x80\x02})" + twice + b"K\x01s."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return buffer.getvalue()


def test_a_pickle_that_hashes_for_ever_is_ended(tmp_path: Path) -> None:
    source, began = tmp_path / "pytorch_model.bin", time.monotonic()
    source.write_bytes(nested_key_pickle())
    assert source.stat().st_size < 2000
    for limits in (pickles.Limits(processor_s=4, time_s=120), pickles.Limits(processor_s=600, time_s=4)):
        with pytest.raises(PickleRefused, match="takes longer than a checkpoint of its size can need"):
            pickles.convert(source, tmp_path / "out", name="pytorch_model.bin of org/name", limits=limits)
    assert time.monotonic() - began < 60


def test_a_conversion_ends_when_the_claim_is_lost(tmp_path: Path) -> None:
    source, began = tmp_path / "pytorch_model.bin", time.monotonic()
    source.write_bytes(nested_key_pickle())

    def guard() -> None:
        if time.monotonic() - began > 3:
            raise ClaimLost("another worker goes on")

    with pytest.raises(ClaimLost):
        pickles.convert(source, tmp_path / "out", name="x", guard=guard)
    assert time.monotonic() - began < 20


CONVERTS = """
import sys
from pathlib import Path
from modelstore.fill import pickles
pickles.convert(Path(sys.argv[1]), Path(sys.argv[2]), name="x")
"""


def test_a_conversion_dies_with_its_parent(tmp_path: Path) -> None:
    source = tmp_path / "pytorch_model.bin"
    source.write_bytes(nested_key_pickle())
    parent = subprocess.Popen([sys.executable, "-c", CONVERTS, str(source), str(tmp_path / "out")])

    def children() -> list[Path]:
        found = []
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(source).encode() in status.read_bytes() and status.parent.name != str(parent.pid):
                    found.append(status.parent)
            except OSError:
                continue
        return found

    until = time.monotonic() + 60
    while not children() and time.monotonic() < until:
        time.sleep(0.05)
    assert children()
    time.sleep(1)  # past the first lines of its program
    parent.kill()
    parent.wait()
    until = time.monotonic() + 60
    while children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not children()


INSIDE = """
import os, socket, sys
from modelstore import isolation
isolation.leave_the_network()
print(sorted(os.environ))
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1)
except OSError as error:
    print("no network:", error)
isolation.forbid_all_but_computing()
for attempt in (lambda: os.system("true"), lambda: socket.socket()):
    try:
        attempt()
        print("it ran")
    except PermissionError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace")
def test_pickles_are_read_without_network_and_programs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-I", "-c", INSIDE, str(server.getsockname()[1])],
            env={"PATH": os.defpath},
            capture_output=True,
            text=True,
            check=True,
        )
    assert "HF_TOKEN" not in done.stdout
    assert "no network:" in done.stdout
    assert "it ran" not in done.stdout
    assert done.stdout.count("this process may not do this") == 2


@pytest.mark.parametrize(
    ("path", "stored"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors"),
        ("unet/diffusion_pytorch_model.bin.index.json", "unet/diffusion_pytorch_model.safetensors.index.json"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_a_converted_pickle_goes_by_the_name_that_transformers_looks_for(path: str, stored: str) -> None:
    assert stored_path(path) == stored


@pytest.mark.parametrize("part", ["models", "staging", "claims", "refs", "used", "quarantine"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_folder_that_was_replaced_by_a_link_is_not_followed(
    hub: Hub, store: ModelStore, tmp_path: Path, part: str, depth: int
) -> None:
    """Another tenant of the volume points a folder of the store somewhere else."""
    write_repo(hub.folder / "org" / "name")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (outside / "org--name").mkdir()
    store.settings.root.mkdir(parents=True)
    if depth == 1:
        (store.settings.root / part).symlink_to(outside)
    else:
        (store.settings.root / part).mkdir()
        (store.settings.root / part / "org--name").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    if part == "quarantine":
        broken = store.settings.root / "models" / "org--name"
        broken.mkdir(parents=True)
        (broken / f"{hub.commit(hub.folder / 'org' / 'name')}.float16").mkdir()
    if part in ("used", "quarantine"):  # nothing has to be written there, so it goes on
        store.ensure("org/name")
    else:
        with pytest.raises(UnsafeName, match="is a link"):
            store.ensure("org/name")
    assert sorted(outside.rglob("*")) == before


def test_a_link_in_the_place_of_a_claim_or_a_mark_is_not_written_through(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x" * 2000)
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / "1").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        Contender(folder, worker="w", lease_s=30).try_claim()
    assert precious.read_text() == "x" * 2000


def test_nothing_but_weights_is_no_model(hub: Hub, make_store: MakeStore) -> None:
    repo = write_repo(hub.folder / "org" / "name")
    (repo / "model.safetensors").unlink()
    with pytest.raises(NoWeights):
        make_store(allow_pickle=True).ensure("org/name")


@pytest.mark.parametrize("what", ["a pipe", "a folder", "nested", "wrong types", "huge numbers", "random", "empty"])
@pytest.mark.parametrize("record", ["FORMAT", "manifest", "claim", "ref", "verified", "mark", "done", "journal"])
def test_a_spoiled_record_hangs_no_command_and_ends_in_one_of_our_errors(
    hub: Hub, make_store: MakeStore, record: str, what: str
) -> None:
    write_repo(hub.folder / "org" / "name", shards=2)
    store = make_store(sleep=lambda _seconds: None, quota_bytes=10_000_000, wait_s=3.0)
    if record in ("done", "journal"):
        leave_unfinished(hub, store)
        pattern = {"done": "staging/*/*/*/done/config.json.json", "journal": "staging/*/*/*/journal/*/*"}[record]
        paths = list(store.settings.root.glob(pattern))
    else:
        key = store.ensure("org/name").key
        save_position(store.layout, key, Position(3, 1, 1))
        paths = [
            {
                "FORMAT": store.layout.format_file,
                "manifest": store.layout.snapshot(key) / "manifest.json",
                "claim": store.layout.claims(key) / "1",
                "ref": store.layout.ref("org/name", "main"),
                "verified": store.layout.verified(key),
                "mark": store.layout.used(key) / ".evicting",
            }[record]
        ]
        if record == "claim":
            (store.layout.snapshot(key) / "config.json").unlink()
    nested = b"[" * 1000 + b"]" * 24
    wrong = {"state": "held", "worker": 1, "host": [], "pid": "x", "reserved": "x", "total": "y", "eta_s": {}}
    for path in paths:
        path.unlink(missing_ok=True)
        if what == "a pipe":
            os.mkfifo(path)
        elif what == "a folder":
            path.mkdir()
        else:
            data = {
                "nested": nested,
                "wrong types": json.dumps(wrong | {"stride": "3", "commit": 7, "record": []}).encode(),
                "huge numbers": b'{"stride": 1e999, "first": 9e999, "done": 1, "reserved": 1e999}',
                "random": os.urandom(1024),
                "empty": b"",
            }
            path.write_bytes(data[what])
    try:
        snapshot = store.ensure("org/name")
        assert verify_snapshot(snapshot).ok
        saved_position(store.layout, snapshot.key, 3)
    except (ModelStoreError, OSError) as error:
        told = str(error)
        assert len(told.splitlines()) == 1
