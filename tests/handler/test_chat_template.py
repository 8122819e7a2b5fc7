"""Chat templates in their own process: the texts of transformers, and templates that mean harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from handler.engines.chat_template import LIMIT_S, Renderer
from handler.errors import TemplateError, TemplateTimeout
from tests.support.models import write_model

MESSAGES = [{"role": "user", "content": "hello \ud800 \u20ac"}, {"role": "assistant", "content": ""}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}"
    "<{{ m.role }}>{{ m.content | tojson }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def test_a_template_gives_the_text_of_transformers(renderer: Renderer, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert renderer.render(TEMPLATE, MESSAGES, tokenizer.special_tokens_map) == expected


def test_the_error_of_a_template_is_one_printable_line(renderer: Renderer) -> None:
    evil = [{"role": "user", "content": "\nstart failed: \x1b[2J" + "x" * 5000}]
    with pytest.raises(TemplateError) as caught:
        renderer.render("{{ raise_exception(messages[0].content) }}", evil, {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for _ in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
    ids=["loops", "holds the interpreter's lock"],
)
def test_a_template_that_does_not_end_is_ended_and_the_next_is_rendered(renderer: Renderer, template: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateTimeout, match="did not end within"):
        renderer.render(template, MESSAGES, {})
    assert time.monotonic() - began < LIMIT_S + 5
    assert renderer.render("{{ messages | length }}", MESSAGES, {}) == "2"


def test_a_template_that_takes_all_memory_takes_none_of_the_workers(renderer: Renderer) -> None:
    with pytest.raises((TemplateError, TemplateTimeout)):
        renderer.render("{{ 'x' * 10 ** 11 }}", MESSAGES, {})
    assert renderer.render("{{ messages | length }}", MESSAGES, {}) == "2"


def test_a_text_that_is_far_longer_than_the_messages_is_refused(renderer: Renderer) -> None:
    with pytest.raises(TemplateError, match="too long a text"):
        renderer.render("{{ 'x ' * 10 ** 8 }}", MESSAGES, {})
    long = [{"role": "user", "content": "\U0001f600" * 1_000_000}]
    assert len(renderer.render("{{ messages[0].content }}", long, {})) == 1_000_000


def test_templates_are_rendered_too_if_root_is_an_ordinary_account() -> None:
    """A container without root: `geteuid` is 0, and no user may be changed to."""
    code = (
        "from handler.engines.chat_template import Renderer; r = Renderer(); "
        "print(r.render('{{ messages | length }}', [{'role': 'u'}], {})); r.close()"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    if subprocess.run([*command[:3], "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr


def test_a_process_that_was_killed_is_started_again(renderer: Renderer) -> None:
    process: Any = renderer._process
    process.kill()
    process.wait()
    assert renderer.render("{{ messages | length }}", MESSAGES, {}) == "2"


def test_the_process_has_no_token_and_is_not_root(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    made = Renderer()
    made.render("", MESSAGES, {})
    process: Any = made._process
    status = Path(f"/proc/{process.pid}/status").read_text()
    if os.geteuid() == 0:
        assert b"hf_secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
        assert "Uid:\t65534\t65534\t65534\t65534" in status
    assert int(status.partition("VmRSS:")[2].split()[0]) < 150_000
    made.close()


ORDINARY = """
import ctypes, os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this process imports ahead, while it can read root's files
from transformers.utils.chat_template_utils import render_jinja_template
from handler.engines.chat_template import _WARM_UP, main
render_jinja_template(conversations=[[{"role": "user"}]], chat_template=_WARM_UP)
before = os.readlink("/proc/self/ns/net")
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
code = main(str(os.getppid()))
os.write(1, f"{code} {before != os.readlink('/proc/self/ns/net')}".encode())
"""


def test_the_process_of_an_ordinary_account_has_no_network() -> None:
    """The kernel gives it a namespace only as long as it has a single thread."""
    account = {"user": 65534} if os.geteuid() == 0 else {}
    namespaces: Any = partial(subprocess.run, ["unshare", "--user", "--net", "true"], capture_output=True)
    if namespaces(**account).returncode:
        pytest.skip("needs user namespaces for an ordinary account")
    command = [sys.executable, "-W", "ignore", "-c", ORDINARY]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.stdout == "0 True", done.stderr


KILLED = """
import os, signal, time
from handler.engines.chat_template import Renderer
renderer = Renderer()
renderer.render("", [{"role": "u"}], {})
other = os.fork()  # as the SDK's process that pings: it has all that the worker has open
if other == 0:
    time.sleep(60)
    os._exit(0)
print(renderer._process.pid, other, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_a_worker_that_is_killed() -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    renderer, other = map(int, worker.stdout.readline().split())
    worker.stdout.close()
    worker.wait()
    try:
        until = time.monotonic() + 60
        while Path(f"/proc/{renderer}").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert not Path(f"/proc/{renderer}").exists()
    finally:
        os.kill(other, signal.SIGKILL)


def test_the_process_ends_with_the_worker() -> None:
    made = Renderer()
    made.render("", MESSAGES, {})
    process: Any = made._process
    process.stdin.close()
    assert process.wait(10) == 0
    made.close()
