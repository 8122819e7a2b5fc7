#!/usr/bin/env python3
"""Mixed jobs against real workers under the unmodified SDK, for minutes: `python scripts/dev/soak.py [--minutes 20]`.

Two workers serve an alias on one volume. One of them is killed and replaced again and again; the alias is repointed;
jobs of 19 kinds are sent, cancelled, timed out and refused, and name models that push each other out of the memory.
Every answer is compared with what transformers gives by itself. It fails if a job is lost, answered twice or answered
wrong, if a stream differs from the whole answer, or if the worker that lives takes more and more memory, descriptors or
threads. The order of events follows from --seed, which is printed; their timing does not.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HERE))

from handler.errors import Code
from modelstore import ModelStore
from modelstore.settings import Settings
from tests.support.hub import Hub, running_hub
from tests.support.runpod_api import FINAL, Job, RunPod

NAMES = ("org/one", "org/two", "org/three")
PROMPTS = ("hello world", "what is the capital", "paris of france", "the capital of paris is world")
LENGTH = 12
CONTEXT = 8192
BASELINE_JOBS = 500
RSS_RATIO = 1.25
LONG = ("timeout", "cancelled")
LATE_SHARE = 0.05  # on a machine that does much else; by itself it is a hundredth of that
SPARE_DESCRIPTORS, SPARE_THREADS = 16, 6  # connections that are open, threads that a load or a swap has just now
_AT_ONCE = 24  # jobs in the queue or running
_KILL_EVERY_S, _SWAP_EVERY_S, _SAMPLE_EVERY_S = 15.0, 5.0, 2.0

# The worker, with one call wrapped: memory for one model beside its own, so that jobs push models out.
WORKER = """
import sys
from handler.engines import multi
from modelstore.errors import DoesNotFit

real = multi.MultiModelEngine.__init__

def with_room_for_one(self, own, settings, load):
    def loaded(wanted):
        if self._others:
            raise DoesNotFit("this test has memory for one more model")
        return load(wanted)
    real(self, own, settings, loaded)

multi.MultiModelEngine.__init__ = with_room_for_one
from handler.__main__ import main
sys.exit(main())
"""


@dataclass
class Expected:
    """What transformers gives by itself for a model, by prompt: as a text, and as a conversation's only message."""

    texts: dict[str, str] = field(default_factory=dict)
    chats: dict[str, str] = field(default_factory=dict)


def expected(folder: Path) -> Expected:
    import torch
    import transformers as tf

    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    found = Expected()

    def greedy(tokens: list[int]) -> str:
        output = model.generate(torch.tensor([tokens]), max_new_tokens=LENGTH, do_sample=False, pad_token_id=1)
        text: str = tokenizer.decode(output[0][len(tokens) :], skip_special_tokens=True)
        return text

    for prompt in PROMPTS:
        found.texts[prompt] = greedy(tokenizer(prompt)["input_ids"])
        message = {"role": "user", "content": prompt}
        found.chats[prompt] = greedy(
            tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    return found


Check = Callable[[Job, dict[str, Expected]], str]


def _code(job: Job) -> str:
    """The code of a failed job: beside its error, or in it, as OpenAI's clients expect it."""
    answers = (job.output, job.error)
    return next((str(each["code"]) for each in answers if isinstance(each, dict) and "code" in each), "")


def _refused(code: Code) -> Check:
    def check(job: Job, _texts: dict[str, Expected]) -> str:
        return "" if _code(job) == code else f"it should have been refused with {code}: {job.output} {job.error}"

    return check


def _answered(texts_of: Callable[[Job, Expected], list[str]], model: str | None) -> Check:
    """Whether whole and streamed answers are those of the model that they name, and that is the one asked for."""

    def check(job: Job, texts: dict[str, Expected]) -> str:
        outputs = job.output if isinstance(job.output, list) else [job.output]
        last = outputs[-1]
        if not isinstance(last, dict) or "model" not in last:
            return f"it is no answer: {job.output} {job.error}"
        if model is not None and last["model"] != model:
            return f"{model} was asked for and {last['model']} answered"
        text = last["generated_text"]
        given = text if isinstance(text, list) else [text]
        if given != texts_of(job, texts[last["model"]]):
            return f"{given} is not what {last['model']} says to {job.input}"
        streamed = "".join(chunk["token"] for chunk in outputs if "token" in chunk)
        return f"the stream {streamed!r} is not the answer {text!r}" if len(outputs) > 1 and streamed != text else ""

    return check


def _openai(texts_of: Callable[[Expected], list[str]]) -> Check:
    def check(job: Job, texts: dict[str, Expected]) -> str:
        import json

        if isinstance(job.output, list):
            lines = [line for part in job.output for line in part.splitlines() if line.startswith("data: {")]
            events = [json.loads(line.removeprefix("data: ")) for line in lines]
            if not events:
                return f"it is no stream: {job.output} {job.error}"
            parts: Counter[int] = Counter()
            said: dict[int, str] = {}
            for event in events:
                for choice in event["choices"]:
                    parts[choice["index"]] += 1
                    said[choice["index"]] = said.get(choice["index"], "") + (choice["delta"].get("content") or "")
            model, given = events[0]["model"], [said[index] for index in sorted(said)]
        elif isinstance(job.output, dict) and "choices" in job.output:
            model, choices = job.output["model"], job.output["choices"]
            given = [choice.get("text", (choice.get("message") or {}).get("content")) for choice in choices]
        else:
            return f"it is no answer: {job.output} {job.error}"
        return "" if given == texts_of(texts[model]) else f"{given} is not what {model} says to {job.input}"

    return check


def kinds(number: int, chance: random.Random) -> tuple[str, dict[str, Any], Check]:
    """The name, the input and the check of job `number`."""
    prompt, other, name = chance.choice(PROMPTS), chance.choice(PROMPTS), chance.choice(NAMES)
    base: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0}
    messages = {"messages": [{"role": "user", "content": prompt}]}
    text = lambda _job, e: [e.texts[prompt]]  # noqa: E731
    chat = lambda _job, e: [e.chats[prompt]]  # noqa: E731

    def cut(_job: Job, e: Expected) -> list[str]:
        whole = e.texts[prompt]
        return [whole.partition(" the")[0] if " the" in whole else whole]

    route = {"openai_route": "/v1/chat/completions", "openai_input": base | messages | {"model": "@chat"}}
    several = {"openai_route": "/v1/completions", "openai_input": base | {"prompt": prompt, "n": 2, "model": "@chat"}}
    other_commit = f"{name}@{number:040x}"
    long = {"prompt": prompt, "max_tokens": 8000, "temperature": 0}
    table: list[tuple[str, dict[str, Any], Check]] = [
        ("prompt", base | {"prompt": prompt}, _answered(text, None)),
        ("prompt, streamed", base | {"prompt": prompt, "stream": True}, _answered(text, None)),
        ("messages", base | messages, _answered(chat, None)),
        ("messages, streamed", base | messages | {"stream": True}, _answered(chat, None)),
        (
            "prompts",
            base | {"prompts": [prompt, other]},
            _answered(lambda _job, e: [e.texts[prompt], e.texts[other]], None),
        ),
        ("model", base | {"prompt": prompt, "model": name}, _answered(text, name)),
        ("model, streamed", base | {"prompt": prompt, "model": name, "stream": True}, _answered(text, name)),
        ("stop", base | {"prompt": prompt, "stop": " the"}, _answered(cut, None)),
        ("stop, streamed", base | {"prompt": prompt, "stop": " the", "stream": True}, _answered(cut, None)),
        ("chat completion", route, _openai(lambda e: [e.chats[prompt]])),
        (
            "chat completion, streamed",
            {**route, "openai_input": {**route["openai_input"], "stream": True}},
            _openai(lambda e: [e.chats[prompt]]),
        ),
        ("completions", several, _openai(lambda e: [e.texts[prompt]] * 2)),
        ("status", {"op": "status"}, lambda job, _t: "" if job.output and "jobs" in job.output else f"{job.output}"),
        ("invalid", {"prompt": "", "max_tokens": -number}, _refused(Code.INVALID_INPUT)),
        ("not allowed", base | {"prompt": prompt, "model": f"org/m{number}"}, _refused(Code.MODEL_NOT_ALLOWED)),
        ("another commit", base | {"prompt": prompt, "model": other_commit}, _refused(Code.MODEL_NOT_ALLOWED)),
    ]
    rare: list[tuple[str, dict[str, Any], Check]] = [
        ("timeout", long, _refused(Code.TIMEOUT)),
        ("cancelled", long, _refused(Code.TIMEOUT)),  # unless it is cancelled before
        ("too large", {"messages": [{"role": "x" * 2_000_000, "content": "a"}]}, _refused(Code.INVALID_INPUT)),
    ]
    return chance.choice(rare) if number % 40 == 39 else table[number % len(table)]


@dataclass(frozen=True)
class Sample:
    """The living worker at one moment; `rss_mb` without its children's."""

    at_s: float
    jobs: int
    rss_mb: float
    descriptors: int
    threads: int


class Fleet:
    """The worker that lives, and the one that is killed and replaced."""

    def __init__(self, runpod: RunPod, env: dict[str, str], logs: Path) -> None:
        self._runpod, self._env, self._logs = runpod, env, logs
        self._count = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self.living = self.start()
        self.mortal = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self._count += 1
        env = os.environ | self._env | self._runpod.worker_env(f"pod-{self._count}")
        with (self._logs / f"{self._count}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER], env=env, stdout=log, stderr=log, start_new_session=True, cwd=HERE
            )
        self._processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)  # with the SDK's process that pings, as the end of a container would
        process.wait()
        self._processes.remove(process)

    def replace_mortal(self) -> None:
        self.kill(self.mortal)
        self.mortal = self.start()

    def sample(self, began: float, jobs: int) -> Sample:
        status = Path(f"/proc/{self.living.pid}/status").read_text()
        values = {line.partition(":")[0]: line.partition(":")[2].split() for line in status.splitlines()}
        descriptors = len(os.listdir(f"/proc/{self.living.pid}/fd"))
        rss_mb = int(values["VmRSS"][0]) / 1e3
        return Sample(time.monotonic() - began, jobs, rss_mb, descriptors, int(values["Threads"][0]))

    def stop(self) -> None:
        for process in list(self._processes):
            self.kill(process)

    def evictions(self) -> int:
        return sum(path.read_text(errors="replace").count("makes room for") for path in self._logs.glob("*.log"))


@contextmanager
def prepared(folder: Path, job_limit_s: float) -> Iterator[tuple[Hub, ModelStore, dict[str, str]]]:
    """A Hub with three models, a volume that holds them and an alias, and the environment of a worker."""
    from tests.support.models import write_model

    (folder / "hub").mkdir()
    with running_hub(folder / "hub") as hub:
        for number, name in enumerate(NAMES):
            write_model(hub.folder / name, seed=number, context=CONTEXT, ends=False)
        env = {"MODELSTORE_ROOT": str(folder / "volume" / "modelstore"), "HF_ENDPOINT": hub.url}
        (folder / "volume").mkdir()
        store = ModelStore(env["MODELSTORE_ROOT"], settings=Settings.from_env(env))
        for name in NAMES[::-1]:
            store.set_alias("chat", name)
        env |= {"MODEL_ID": "@chat", "MODELSTORE_ALLOWED_MODELS": ",".join(("@chat", *NAMES))}
        env |= {"MODELSTORE_MAX_JOB_S": f"{job_limit_s:g}", "MODELSTORE_MAX_TOKENS": str(CONTEXT)}
        yield hub, store, env | {"MALLOC_ARENA_MAX": "2"}  # as the image sets it


@dataclass
class Result:
    """What was sent, how it ended, and what went wrong."""

    sent: list[tuple[str, Job, Check]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    swaps: int = 0
    kills: int = 0
    evictions: int = 0
    texts: dict[str, Expected] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """One line for each fault; empty if all is well."""
        found = []
        for kind, job, check in self.sent:
            if len(job.answers) > job.taken:  # a job of a lost worker is taken, and may be answered, by another one
                found.append(f"{job.id} ({kind}) was taken {job.taken} times and answered {len(job.answers)} times")
            if job.status not in FINAL:
                found.append(f"{job.id} ({kind}) is lost: {job.status}")
            elif job.status == "CANCELLED" or (kind not in LONG and _code(job) == Code.TIMEOUT):
                continue
            elif wrong := check(job, self.texts):
                found.append(f"{job.id} ({kind}) is wrong: {wrong}")
        late = self._late()
        if late > LATE_SHARE * len(self.sent):
            found.append(f"{late} short jobs took longer than their limit")
        return found + self._growth()

    def _late(self) -> int:
        """How many short jobs came while models changed places after a long one, and waited beyond their limit."""
        return sum(kind not in LONG and _code(job) == Code.TIMEOUT for kind, job, _check in self.sent)

    def _growth(self) -> list[str]:
        base = next((sample for sample in self.samples if sample.jobs >= BASELINE_JOBS), None)
        if base is None:
            return [f"the living worker answered fewer than {BASELINE_JOBS} jobs: run it for longer"]
        later = self.samples[-max(3, len(self.samples) // 4) :]
        rss = sorted(sample.rss_mb for sample in later)[len(later) // 2]
        found = []
        if rss > RSS_RATIO * base.rss_mb:
            found.append(f"memory grew from {base.rss_mb:.0f} to {rss:.0f} MB")
        for name, spare in (("descriptors", SPARE_DESCRIPTORS), ("threads", SPARE_THREADS)):
            least = min(getattr(sample, name) for sample in later)
            if least > getattr(base, name) + spare:
                found.append(f"{name} grew from {getattr(base, name)} to {least}")
        return found

    def table(self) -> str:
        """What happened, and the living worker's curve in about a dozen rows, as Markdown."""
        jobs = [job for _kind, job, _check in self.sent]
        ends = Counter("cancelled" if job.status == "CANCELLED" else _code(job) or "answered" for job in jobs)
        said = ", ".join(f"{count} {name}" for name, count in ends.most_common())
        rows = [
            f"{len(jobs)} jobs ({said}), {self.swaps} swaps, {self.evictions} evictions, {self.kills} kills; "
            f"{self._late()} short jobs waited beyond their limit for models that changed places.",
            "",
        ]
        rows += ["| minutes | jobs of the living worker | RSS, MB | descriptors | threads |", "|---|---|---|---|---|"]
        step = max(1, len(self.samples) // 12)
        for sample in self.samples[::step]:
            cells = (f"{sample.at_s / 60:.1f}", sample.jobs, f"{sample.rss_mb:.0f}", sample.descriptors, sample.threads)
            rows.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(rows)


def soak(folder: Path, *, minutes: float, seed: int, job_limit_s: float) -> Result:
    """Run it all in `folder`, for longer if the machine is so busy that the memory cannot be told yet."""
    chance, result = random.Random(seed), Result()
    with prepared(folder, job_limit_s) as (hub, store, env), RunPod(lost_after_s=8).running() as runpod:
        result.texts = {name: expected(hub.folder / name) for name in NAMES}
        fleet = Fleet(runpod, env, folder)
        try:
            if not runpod.wait(lambda: len(runpod.pings) == 2, 120):
                raise SystemExit("the workers did not start: see their logs")
            _disturb(runpod, fleet, store, chance, result, minutes)
            runpod.wait(lambda: all(job.status in FINAL for _kind, job, _check in result.sent), 60)
        finally:
            result.evictions = fleet.evictions()
            fleet.stop()
    return result


def _disturb(
    runpod: RunPod, fleet: Fleet, store: ModelStore, chance: random.Random, result: Result, minutes: float
) -> None:
    began = time.monotonic()
    ended = threading.Event()

    def goes_on() -> bool:
        minutes_so_far = (time.monotonic() - began) / 60
        few = not result.samples or result.samples[-1].jobs < 1.2 * BASELINE_JOBS
        return minutes_so_far < minutes or (few and minutes_so_far < 3 * minutes)

    def swap() -> None:
        while not ended.wait(_SWAP_EVERY_S):
            result.swaps += 1
            store.set_alias("chat", NAMES[result.swaps % len(NAMES)])

    def kill() -> None:
        while not ended.wait(_KILL_EVERY_S):
            fleet.replace_mortal()
            result.kills += 1

    def sample() -> None:
        while not ended.wait(_SAMPLE_EVERY_S):
            jobs = sum(job.worker == "pod-1" and job.status in FINAL for _kind, job, _check in list(result.sent))
            result.samples.append(fleet.sample(began, jobs))

    threads = [threading.Thread(target=each) for each in (swap, kill, sample)]
    for thread in threads:
        thread.start()
    try:
        open_jobs: list[Job] = []
        while goes_on():
            kind, data, check = kinds(len(result.sent), chance)
            job = runpod.submit(f"job-{len(result.sent)}", data)
            result.sent.append((kind, job, check))
            open_jobs.append(job)
            if kind == "cancelled":
                threading.Timer(chance.uniform(0.1, 1.5), runpod.cancel, (job,)).start()
            while len(open_jobs) >= _AT_ONCE:
                runpod.wait(lambda: any(job.status in FINAL for job in open_jobs), 1)  # noqa: B023
                open_jobs = [job for job in open_jobs if job.status not in FINAL]
                if time.monotonic() - began > 180 * minutes + 30:
                    return
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def environment() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("runpod", "torch", "transformers"))
    return f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores, Linux {platform.release()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--job-limit-s", type=float, default=4.0, help="MODELSTORE_MAX_JOB_S; more on a busy machine")
    parser.add_argument("--write", type=Path, help="a document that has a section for it")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="modelstore-soak-") as folder:
        result = soak(Path(folder), minutes=options.minutes, seed=options.seed, job_limit_s=options.job_limit_s)
    given = f"--minutes {options.minutes:g} --seed {options.seed}"
    text = f"Measured by `python scripts/dev/soak.py {given}`:\n{environment()}.\n\n{result.table()}"
    print(text)
    faults = result.faults()
    if options.write is not None and not faults:
        from scripts.bench.sections import write_section

        write_section(options.write, "dev/soak.py", text)
    print("\n".join(faults[:40]) or "no job was lost, answered twice or wrong, and nothing grew")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
