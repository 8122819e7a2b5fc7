"""A thousand jobs over three workers on one volume, while workers are killed and the alias that they serve is repointed:
every job ends in the right answer or a typed error, none is lost, none is answered by another model than it says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from handler.errors import Code
from modelstore import ModelStore
from modelstore.settings import Settings
from tests.support.hub import Hub
from tests.support.models import write_model
from tests.support.runpod_api import FINAL, Job, RunPod

JOBS = 1000
KILLS = 4
NAMES = ("org/name", "org/other")
PROMPTS = ("hello world", "what is the capital", "paris of france", "the capital of paris is world")
LENGTH = 8


def expected(hub: Hub) -> dict[tuple[str, str], str]:
    """What transformers says by itself, by model and prompt."""
    found = {}
    for name in NAMES:
        model = tf.AutoModelForCausalLM.from_pretrained(hub.folder / name, dtype=torch.float16)
        tokenizer = tf.AutoTokenizer.from_pretrained(hub.folder / name)
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=1)
            found[name, prompt] = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


class Fleet:
    """Workers that are killed and replaced."""

    def __init__(self, runpod: RunPod, env: dict[str, str], log: Path) -> None:
        self._runpod = runpod
        self._env = env
        self._log = log
        self._count = 0
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._count += 1
        env = os.environ | self._env | self._runpod.worker_env(f"pod-{self._count}")
        with (self._log / f"{self._count}.log").open("wb") as log:
            command = [sys.executable, "-m", "handler"]
            self.running.append(
                subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
            )

    def kill(self, which: int) -> None:
        process = self.running.pop(which % len(self.running))
        os.killpg(process.pid, signal.SIGKILL)  # with the SDK's process that pings, as the end of a container would
        process.wait()

    def stop(self) -> None:
        while self.running:
            self.kill(0)


def job_input(number: int) -> dict[str, Any]:
    prompt = PROMPTS[number % len(PROMPTS)]
    data: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0}
    if number % 10 == 7:
        return data | {"prompts": [prompt, PROMPTS[0]]}
    if number % 10 == 8:
        return data | {"prompt": prompt, "stream": True}
    if number % 10 == 9:
        return data | {"prompt": prompt, "model": NAMES[number % 2]}
    if number % 50 == 25:
        return data | {"prompt": ""}
    return data | {"prompt": prompt}


def check(job: Job, texts: dict[tuple[str, str], str]) -> str:
    """How a job ended; fails where it is wrong."""
    data: Any = job.input
    if job.error:
        assert job.output["code"] in set(Code), job.error
        return str(job.output["code"])
    output = job.output[-1] if isinstance(job.output, list) else job.output
    prompts = data.get("prompts") or [data["prompt"]]
    said = output["generated_text"] if "prompts" in data else [output["generated_text"]]
    assert said == [texts[output["model"], prompt] for prompt in prompts], "the answer is not the model's that it names"
    assert output["model"] == data.get("model", output["model"])
    return "answered"


def test_a_thousand_jobs_survive_kills_and_swaps(hub: Hub, store_env: dict[str, str], tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        write_model(hub.folder / name, seed=number, context=256)
    texts = expected(hub)
    assert len(set(texts.values())) > len(PROMPTS), "the two models do not say the same"
    env = store_env | {"MODEL_ID": "@chat", "MODELSTORE_ALLOWED_MODELS": ",".join(("@chat", *NAMES))}
    store = ModelStore(env["MODELSTORE_ROOT"], settings=Settings.from_env(store_env))
    for name in (*NAMES, NAMES[0]):
        store.set_alias("chat", name)
    chance = random.Random(1)
    with RunPod(lost_after_s=4).running() as runpod:
        fleet = Fleet(runpod, env, tmp_path)
        try:
            for _ in range(3):
                fleet.start()
            assert runpod.wait(lambda: len(runpod.pings) == 3)
            jobs = [runpod.submit(f"job-{number}", job_input(number)) for number in range(JOBS)]
            until, swaps = time.monotonic() + 240, 0
            ended = threading.Event()

            def disturb() -> None:
                nonlocal swaps
                for kill in range(KILLS):
                    runpod.wait(
                        lambda kill=kill: sum(job.status in FINAL for job in jobs) > JOBS * (kill + 1) // (KILLS + 2),
                        60,
                    )
                    swaps += 1
                    store.set_alias("chat", NAMES[swaps % 2])
                    fleet.kill(chance.randrange(3))
                    fleet.start()
                ended.set()

            disturbing = threading.Thread(target=disturb)
            disturbing.start()
            assert runpod.wait(lambda: all(job.status in FINAL for job in jobs), until - time.monotonic())
            disturbing.join()
        finally:
            fleet.stop()
    how = Counter(check(job, texts) for job in jobs)
    print(f"{JOBS} jobs, {KILLS} kills, {swaps} swaps: {dict(how)}; taken twice: {sum(job.taken > 1 for job in jobs)}")
    assert ended.is_set()
    assert how["INVALID_INPUT"] == sum(job_input(number).get("prompt") == "" for number in range(JOBS))
    assert how["answered"] + how["INVALID_INPUT"] == JOBS, how
    assert len({job.output["model"] for job in jobs if isinstance(job.output, dict) and "model" in job.output}) == 2
