"""Prometheus' own parser reads the metrics of a volume."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelstore.store import ModelStore
from modelstore.timeline import Span
from modelstore.volume import history
from modelstore.volume.evict import evict
from tests.conftest import Cli
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.starts import timeline, with_spans


def parsed(text: str) -> dict[tuple[str, str], float]:
    """Values by name and the value of the one label."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_starts_bytes_events_and_space_are_told(hub: Hub, cli: Cli, store: ModelStore, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two", "bad")):
        write_repo(hub.folder / "org" / name, random_tensors(2, seed=number))
        store.ensure(f"org/{name}")
    for outcome in ("hit", "hit", "downloaded"):
        history.add(
            store.layout, with_spans(timeline(outcome=outcome), Span("read", 0, 2, 10**9), Span("import", 0, 3))
        )
    history.add(store.layout, timeline(), error="x")
    one, bad = store.lookup("org/one"), store.lookup("org/bad")
    assert one is not None
    assert bad is not None
    assert evict(store.layout, one.key)
    (bad.path / bad.weights[0].path).write_bytes(bytes(bad.weights[0].size_bytes + 1))
    store.ensure("org/bad")
    cli.env["MODELSTORE_QUOTA"] = "1GB"
    found = parsed(cli("metrics").stdout)
    assert found["modelstore_starts", "hit"] == 2
    assert found["modelstore_starts", "downloaded"] == 1
    assert found["modelstore_starts", "failed"] == 1
    assert found["modelstore_starts", "waited"] == 0
    assert found["modelstore_start_seconds", "import"] == 9
    assert found["modelstore_start_bytes", "read"] == 3 * 10**9
    assert found["modelstore_ready_seconds", "0.5"] == 3
    assert found["modelstore_events", "evicted"] == 1
    assert found["modelstore_events", "quarantined"] == 1
    assert found["modelstore_quota_bytes", ""] == 10**9
    assert found["modelstore_snapshots", ""] == 2
    assert found["modelstore_taken_bytes", ""] == cli.json("du")["taken"]
    cli("metrics", "--file", str(tmp_path / "store.prom"))
    assert parsed((tmp_path / "store.prom").read_text()) == found


def test_an_empty_store_has_metrics_too(cli: Cli) -> None:
    found = parsed(cli("metrics").stdout)
    assert found["modelstore_starts", "hit"] == 0
    assert found["modelstore_snapshots", ""] == 0


def test_a_port_answers_scrapes_as_the_volume_changes(hub: Hub, store: ModelStore, store_env: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "modelstore", "metrics", "--port", str(port)],
        env=os.environ | store_env, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        text = ""
        while not text and time.monotonic() < deadline:
            try:
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
            except OSError:
                time.sleep(0.1)
        assert parsed(text)["modelstore_snapshots", ""] == 0
        with pytest.raises(OSError, match="refused"):  # who listens at every address listens at this one too
            urllib.request.urlopen(f"http://127.0.0.2:{port}/metrics", timeout=5)
        write_repo(hub.folder / "org" / "name")
        store.ensure("org/name")
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        assert parsed(text)["modelstore_snapshots", ""] == 1
        taken = subprocess.run(
            [sys.executable, "-m", "modelstore", "metrics", "--port", str(port)],
            env=os.environ | store_env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert taken.returncode == 1
        assert taken.stderr.startswith("error: ")
        assert len(taken.stderr.splitlines()) == 1
    finally:
        process.terminate()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
