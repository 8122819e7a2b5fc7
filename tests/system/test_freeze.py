"""A worker that its host stops for a while, as FlashBoot does, and lets go on."""

from __future__ import annotations

import itertools
import os
import signal
import time

from modelstore import ModelStore
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.runpod_api import RunPod
from tests.support.workers import serving


def test_a_worker_that_was_stopped_serves_the_model_that_its_alias_names_meanwhile(
    hub: Hub, store: ModelStore, store_env: dict[str, str]
) -> None:
    write_model(hub.folder / "org" / "name", seed=1, ends=False)
    write_model(hub.folder / "org" / "other", seed=2, ends=False)
    for name in ("org/other", "org/name"):
        store.ensure(name)
        store.set_alias("chat", name)
    with RunPod().running() as runpod, serving(store_env | {"MODEL_ID": "@chat"} | runpod.env) as worker:
        jobs = itertools.count()

        def model_that_answers() -> str:
            runpod.submit(f"job-{next(jobs)}", {"prompt": "hello world", "max_tokens": 2})
            _job, result = runpod.result()
            return str(result["output"]["model"])

        assert model_that_answers() == "org/name"
        os.kill(worker.pid, signal.SIGSTOP)
        store.set_alias("chat", "org/other")
        time.sleep(1)
        os.kill(worker.pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while (model := model_that_answers()) != "org/other":
            assert model == "org/name", "each job is answered"
            assert time.monotonic() < deadline, "the alias was not looked at"
            time.sleep(0.2)
        other = store.lookup("org/other")
        assert other is not None
        assert [path for path in store.layout.used(other.key).iterdir() if not path.name.startswith(".")], (
            "marked as used"
        )
