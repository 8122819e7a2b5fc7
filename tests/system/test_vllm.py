"""The real vLLM behind our handler: SmolLM2, the unmodified SDK, and the `openai` client, through the stand-in."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, NotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from handler.engines.vllm_start import NO_DOMAIN
from handler.fields import FIELDS
from modelstore.store import ModelStore
from modelstore.worker_vllm import VARIABLES
from scripts.dev.field_table import in_vllm
from tests.support.adapters import write_adapter
from tests.support.runpod_api import RunPod
from tests.support.vllm import GREEDY, MODEL, NAME, PYTHON, QUESTION, environment, needs_vllm, processes_of
from tests.support.workers import serving

pytestmark = pytest.mark.timeout(900)  # the first one boots vLLM


@needs_vllm
def test_the_options_of_worker_vllms_variables_are_vllms() -> None:
    program = (
        "import json; from vllm.entrypoints.cli.serve import ServeSubcommand; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
        "s = P().add_subparsers(); ServeSubcommand().subparser_init(s); "
        "print(json.dumps({o: a.nargs for a in s.choices['serve']._actions for o in a.option_strings}))"
    )
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, check=True)
    options: dict[str, int | str | None] = json.loads(done.stdout.splitlines()[-1])
    for name, variable in VARIABLES.items():
        if variable.becomes in ("option", "switch"):
            assert (options[variable.name] == 0) == (variable.becomes == "switch"), name
        if variable.becomes == "switch":
            assert f"--no-{variable.name[2:]}" in options


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A volume with SmolLM2 on it; the environment of a worker that serves it with vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "volume").mkdir()
    env = environment(folder)
    for seed, name in enumerate(("one", "two")):
        write_adapter(folder / name, MODEL, seed=seed, base="HuggingFaceTB/SmolLM2-135M-Instruct", std=0.04)
    ModelStore(env["MODELSTORE_ROOT"]).set_alias("style", f"file://{folder}/one", dtype="keep")
    return env | {"MODEL_ADAPTERS": f"style=@style,other=file://{folder}/two"}


def by_peft(folder: Path, prompt: str, tokens: int) -> str:
    """The answer of transformers and peft by themselves."""
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = PeftModel.from_pretrained(plain, folder).generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def runpod(volume: dict[str, str]) -> Iterator[RunPod]:
    with RunPod().running() as runpod, serving(volume | runpod.env) as worker:
        yield runpod
        started = processes_of(worker.pid)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()], "vLLM ends with the worker"


@needs_vllm
def test_it_answers_and_says_how_it_started(endpoint: Any) -> None:
    output = endpoint.run_sync({"messages": QUESTION} | GREEDY, timeout=240)
    assert output["generated_text"] == "The capital of France is Paris."
    assert output["finish_reason"] == "stop"
    assert output["tokens_generated"] == 8
    status = endpoint.run_sync({"op": "status"})
    assert status["engine"] == "vllm"
    assert status["dtype"] == "float16"
    spans = status["timeline"]["spans"]
    read = [span for span in spans if span["name"] == "read"]
    assert read[0]["bytes"] > 270_000_000, "by our reader, not by vLLM"
    engine = [span["detail"] for span in spans if span["name"] == "engine"]
    assert engine == ["imports", "configuration", "processes", "weights", "profiling", "graphs", "API"]
    assert read[0]["start"] < next(span["end"] for span in spans if span.get("detail") == "imports")


@needs_vllm
def test_an_adapter_answers_by_its_name_and_follows_its_alias(
    endpoint: Any, runpod: RunPod, client: Any, volume: dict[str, str]
) -> None:
    folder = Path(volume["TMPDIR"]).parent
    prompt, tokens = "The capital of France is", 4  # later ones differ by rounding: vLLM has adapters in float16
    right = {name: by_peft(folder / name, prompt, tokens) for name in ("one", "two")}
    job = {"prompt": prompt, "temperature": 0, "max_tokens": tokens}
    outputs = [endpoint.run_sync(job | {"model": name}, timeout=240) for name in ("style", "other", NAME)]
    assert [output["generated_text"] for output in outputs[:2]] == [right["one"], right["two"]]
    assert [output["model"] for output in outputs] == ["style", "other", NAME]
    assert outputs[2]["generated_text"].startswith(" Paris")
    assert {model.id for model in client.models.list()} >= {"style", "other", NAME}
    running = endpoint.run({"input": job | {"model": "style", "max_tokens": 200, "ignore_eos": True, "stream": True}})
    assert runpod.wait(lambda: runpod.jobs[running.job_id].stream)
    ModelStore(volume["MODELSTORE_ROOT"]).set_alias("style", f"file://{folder}/two", dtype="keep")
    deadline = time.monotonic() + 60
    text = ""
    while text != right["two"] and time.monotonic() < deadline:
        text = client.completions.create(model="style", prompt=prompt, temperature=0, max_tokens=tokens).choices[0].text
    assert text == right["two"]
    assert "".join(chunk["token"] for chunk in running.stream()).startswith(right["one"]), "it ended with its own"
    assert endpoint.run_sync({"op": "status"})["adapters"]["style"].startswith("local/two@")
    (weights,) = Path(volume["MODELSTORE_ROOT"]).glob("models/local--two/*/adapter_model.safetensors")
    weights.rename(weights.with_name("aside"))  # vLLM does not read it again
    try:
        again = client.completions.create(model="style", prompt=prompt, temperature=0, max_tokens=tokens)
        assert again.choices[0].text == right["two"]
    finally:
        weights.with_name("aside").rename(weights)
    assert volume["MODELSTORE_ROOT"] not in client.models.list().model_dump_json()


@needs_vllm
def test_prompts_are_answered_in_their_order(endpoint: Any) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    together = endpoint.run_sync({"prompts": prompts} | GREEDY, timeout=240)
    one_by_one = [endpoint.run_sync({"prompt": prompt} | GREEDY, timeout=240) for prompt in prompts]
    assert together["generated_text"] == [output["generated_text"] for output in one_by_one]
    assert together["tokens_generated"] == [output["tokens_generated"] for output in one_by_one]
    assert together["generated_text"][0].startswith(" Paris")


@needs_vllm
def test_a_stream_comes_in_chunks_and_has_the_same_text(endpoint: Any) -> None:
    whole = endpoint.run_sync({"messages": QUESTION} | GREEDY, timeout=240)
    chunks = list(endpoint.run({"input": {"messages": QUESTION, "stream": True} | GREEDY}).stream())
    assert "".join(chunk["token"] for chunk in chunks) == whole["generated_text"]
    assert len(chunks) > 2
    assert chunks[-1]["tokens_generated"] == whole["tokens_generated"]


@needs_vllm
def test_sampling_is_passed_on(endpoint: Any) -> None:
    job = {"prompt": "Once upon a time", "temperature": 1.5, "max_tokens": 12, "top_k": 50, "repetition_penalty": 1.1}
    first, again, other = (
        endpoint.run_sync(job | {"seed": seed}, timeout=240)["generated_text"] for seed in (1, 1, 2)
    )  # fmt: skip
    assert first == again != other
    stopped = endpoint.run_sync({"messages": QUESTION, "stop": " France"} | GREEDY, timeout=240)
    assert stopped["generated_text"] == "The capital of"
    assert stopped["finish_reason"] == "stop"


@needs_vllm
@pytest.mark.parametrize(
    ("job", "code", "words"),
    [
        ({"prompt": "a", "max_tokens": 600}, "INVALID_INPUT", "600"),
        ({"prompt": "word " * 600}, "INVALID_INPUT", "512"),
        ({"prompt": "a", "model": "org/other"}, "MODEL_NOT_ALLOWED", "org/other"),
        ({"prompt": 7}, "INVALID_INPUT", "prompt must be a string"),
    ],
)
def test_a_request_that_cannot_be_answered_is_an_error(
    endpoint: Any, runpod: RunPod, job: dict[str, Any], code: str, words: str
) -> None:
    sent = endpoint.run({"input": job})
    sent.output(timeout=240)
    assert runpod.jobs[sent.job_id].output == {"code": code}
    assert words in runpod.jobs[sent.job_id].error


@needs_vllm
def test_the_room_of_the_context_is_used_if_no_length_is_asked_for(endpoint: Any) -> None:
    output = endpoint.run_sync({"prompt": "word " * 480, "temperature": 0}, timeout=240)
    assert 1 <= output["tokens_generated"] <= 32


@needs_vllm
def test_a_job_that_is_cancelled_ends_in_vllm_too(endpoint: Any, runpod: RunPod) -> None:
    job = endpoint.run({"input": {"prompt": "Once", "max_tokens": 490, "temperature": 1.5, "seed": 5, "stream": True}})
    assert runpod.wait(lambda: runpod.jobs[job.job_id].stream)
    job.cancel()
    deadline = time.monotonic() + 60
    while (jobs := endpoint.run_sync({"op": "status"})["jobs"])["cancelled"] == 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert jobs["cancelled"] == 1
    assert endpoint.run_sync({"messages": QUESTION} | GREEDY)["generated_text"] == "The capital of France is Paris."


@needs_vllm
def test_the_openai_client_speaks_with_vllm_itself(client: Any) -> None:
    name = client.models.list().data[0].id
    assert name == "local/SmolLM2-135M-Instruct"
    whole = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    stream = client.chat.completions.create(
        model=name, messages=QUESTION, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == "The capital of France is Paris."
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    said = client.completions.create(
        model=name, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2
    )
    assert said.choices[0].text.startswith(" Paris")
    assert said.choices[0].logprobs.top_logprobs, "what our own routes refuse, vLLM serves"


@needs_vllm
def test_the_openai_client_gets_vllms_errors_and_our_limits(client: Any) -> None:
    for more, words in (({"max_tokens": 9999}, "max_tokens"), ({"temperature": -1}, "temperature"), ({"n": 99}, "n ")):
        for stream in (False, True):
            with pytest.raises(BadRequestError, match=words):
                client.chat.completions.create(
                    model="local/SmolLM2-135M-Instruct", messages=QUESTION, stream=stream, **more
                )
    with pytest.raises(NotFoundError, match="does not exist"):
        client.chat.completions.create(model="org/other", messages=QUESTION)


@needs_vllm
def test_a_field_reaches_vllm_or_is_refused_by_its_name(endpoint: Any, runpod: RunPod, client: Any) -> None:
    choice = {"structured_outputs": {"choice": ["blue", "green"]}}
    assert endpoint.run_sync({"messages": QUESTION} | GREEDY | choice, timeout=240)["generated_text"] in (
        "blue",
        "green",
    )
    params = GREEDY | {"max_tokens": 3, "n": 2, "logprobs": 1, "bad_words": [" Paris"]}
    output = endpoint.run_sync({"prompt": "The capital of France is", "sampling_params": params}, timeout=240)
    assert len(output["generated_text"]) == 2
    assert "Paris" not in output["generated_text"][0]
    assert [len(logprobs) for logprobs in output["logprobs"]] == [3, 3]
    tokens = endpoint.run_sync({"prompt": [504, 3575, 282, 4649, 314]} | GREEDY, timeout=240)
    assert tokens["generated_text"].startswith(" Paris")
    for fields, words in (
        ({"guided_json": {}}, "vLLM takes structured_outputs instead"),
        ({"max_token": 3}, "max_token is not served; the nearest field that is: max_tokens"),
    ):
        job = endpoint.run({"input": {"messages": QUESTION} | fields})
        job.output(timeout=240)
        assert words in runpod.jobs[job.job_id].error
        with pytest.raises(BadRequestError, match=words):
            client.chat.completions.create(model=NAME, messages=QUESTION, extra_body=fields)
    client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=2, user="me", store=False)
    job = endpoint.run({"input": {"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "f"}}]}})
    job.output(timeout=240)
    assert "tools are served on OpenAI's routes" in runpod.jobs[job.job_id].error


@needs_vllm
def test_the_table_of_fields_is_that_of_vllm(volume: dict[str, str]) -> None:
    """Each field of its schema is in the table on its route, and each that the table passes on is in its schema."""
    code = (
        "import json; from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as C; "
        "from vllm.entrypoints.openai.completion.protocol import CompletionRequest as T; "
        "print('FIELDS', json.dumps([sorted(C.model_fields), sorted(T.model_fields)]))"
    )
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, timeout=120, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIELDS "))
    chat, text = json.loads(line.removeprefix("FIELDS "))
    for route, names in (("chat/completions", chat), ("completions", text)):
        on_route = {name for name, field in FIELDS.items() if route in field.routes}
        assert set(names) - on_route == set(), "decide on them in handler/fields.py"
    passed_on = {
        name for name, field in FIELDS.items() if in_vllm(field) == "passed on" and field.routes != ("native",)
    }
    assert passed_on - {*chat, *text} == set()


@needs_vllm
def test_no_address_of_a_picture_is_opened() -> None:
    """vLLM's own reader of pictures, with the option that the worker sets."""
    program = (
        "import sys; from vllm.multimodal.media import MediaConnector; from vllm.multimodal.media.image import ImageMediaIO\n"
        "connector = MediaConnector(allowed_media_domains=[sys.argv[1]])\n"
        "for url in sys.argv[2:]:\n"
        "    try: print(connector.load_from_url(url, ImageMediaIO()))\n"
        "    except (ValueError, RuntimeError) as error: print(error)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/a.png", f"http://localhost:{port}/a.png", "file:///etc/hostname"]
        done = subprocess.run([PYTHON, "-c", program, NO_DOMAIN, *urls], capture_output=True, text=True, check=True)
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.stdout.count("send data: addresses") == 2
    assert "Cannot load local files" in done.stdout
