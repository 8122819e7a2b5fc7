"""The documents are true."""

from __future__ import annotations

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.main import get_command

from modelstore import errors
from modelstore.cli.main import app
from scripts.dev.configuration import table, worker_vllm_table
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.models import MODELS, save
from tests.support.workers import free_port

HERE = Path(__file__).parent.parent.parent
README = (HERE / "README.md").read_text()
CLI = (HERE / "docs" / "cli.md").read_text()


def test_the_settings_table_is_the_one_of_the_code() -> None:
    page = (HERE / "docs" / "configuration.md").read_text()
    assert f"<!-- settings -->\n{table()}<!-- /settings -->" in page, "run scripts/dev/configuration.py"
    page = (HERE / "docs" / "migrate.md").read_text()
    assert f"<!-- worker-vllm -->\n{worker_vllm_table()}<!-- /worker-vllm -->" in page


def test_every_command_that_is_shown_exists_and_every_command_is_shown() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^modelstore (\w+)", CLI, re.MULTILINE)) == commands
    assert set(re.findall(r"^modelstore (\w+)", README, re.MULTILINE)) <= commands


def test_the_readme_is_for_the_first_five_minutes() -> None:
    assert len(README.split()) <= 700
    for page in re.findall(r"\]\(([^)#]+)\)", README):
        assert (HERE / page).exists(), page


def test_the_command_lines_that_are_shown_work_one_after_the_other(
    hub: Hub, store_env: dict[str, str], tmp_path: Path
) -> None:
    """As written, but for the volume's place and a port that is free; `bench` takes minutes, and test_bench.py runs it."""
    save(MODELS["llama"](), hub.folder / "org" / "name", shards=False)
    write_repo(hub.folder / "org" / "new", random_tensors(4, (64, 64)))
    shutil.copytree(hub.folder / "org" / "new", tmp_path / "volume" / "my-model")
    (tmp_path / "models.toml").write_text('[[model]]\nreference = "org/name"\n\n[[model]]\nreference = "org/new"\n')
    port = str(free_port())
    places = {"/workspace": "volume", "/runpod-volume": "volume", "9400": port}
    block = re.search(r"## The commands\n\n```bash\n(.*?)```", CLI, re.DOTALL)
    assert block is not None

    def run(line: str) -> None:
        """On a terminal, whose user says yes, and who has seen enough of what does not end by itself."""
        for written, here in places.items():
            line = line.replace(written, str(tmp_path / here) if here == "volume" else here)
        main, side = pty.openpty()
        process = subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", *shlex.split(line, comments=True)],
            env=os.environ | store_env | {"TERM": "xterm"}, cwd=tmp_path, stdin=side, stdout=side, stderr=side,
        )  # fmt: skip
        os.close(side)
        shown, asked, seen = "", False, False
        try:
            while True:
                try:
                    shown += os.read(main, 1 << 16).decode(errors="replace")
                except OSError:  # the last writer has gone
                    break
                if "[y/N]" in shown and not asked:
                    asked = True
                    os.write(main, b"y\n")
                if not seen and (("watch" in line and "models, " in shown) or "until Ctrl-C" in shown):
                    seen = True
                    if "metrics" in line:
                        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                            assert b"modelstore_starts" in page.read()
                    process.send_signal(signal.SIGINT)
            code = process.wait(10)
        finally:
            process.kill()
            process.wait()
            os.close(main)
        assert code == (130 if "metrics" in line else 0), f"{line}: {shown}"
        assert seen == (line.split()[1] in ("watch", "metrics")), line
        asks = (
            line.startswith(("modelstore rm", "modelstore alias", "modelstore compress", "modelstore expand"))
            and "--yes" not in line
        )
        assert asked == asks or " gc " in line, line

    run("modelstore seed org/name --dtype keep")
    for line in block[1].splitlines():
        if not line.startswith("modelstore bench"):
            run(line)
        if line.startswith("modelstore rm"):
            run("modelstore alias set chat org/name --yes")


def test_every_script_that_is_shown_has_the_options_it_is_shown_with() -> None:
    """Most of them measure for minutes; what they do, other tests try on less."""
    shown = "\n".join(
        [
            README,
            *(path.read_text() for path in (HERE / "docs").rglob("*.md")),
            (HERE / "scripts" / "bench" / "all").read_text(),
        ]
    )
    lines = re.findall(r"(scripts/[\w/]+(?:\.py)?)((?: (?:--)?[\w.,'\"/…:@-]+)+)", shown)
    assert len(lines) > 10
    for script, arguments in lines:
        for option in re.findall(r"--[a-z0-9-]+", arguments):
            assert f'"{option}"' in "".join(path.read_text() for path in scripts_of(script)), f"{script} {option}"


def scripts_of(script: str) -> list[Path]:
    """A script, and the one that it hands its arguments to."""
    return [path for path in (HERE / script, HERE / f"{script}.py") if path.exists()]


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", CLI, re.MULTILINE)}
    raised = {getattr(errors, name).exit_code for name in errors.__all__}
    assert listed == raised | {0}


def test_every_file_that_is_named_is_there() -> None:
    for document in (README, *(path.read_text() for path in (HERE / "docs").rglob("*.md"))):
        for name in re.findall(r"(?:scripts|docs|modelstore|tests)/[\w./-]+\w", document):
            assert (HERE / name).exists() or name.startswith("modelstore/models"), name


def test_the_error_tree_in_its_docstring_is_the_tree() -> None:
    drawn = re.findall(r"(\w+)(?: \(\w+\))? +(\d)", errors.__doc__ or "")
    assert {name for name, _ in drawn} <= set(errors.__all__)
    for name, code in drawn:
        assert getattr(errors, name).exit_code == int(code), name


@pytest.mark.parametrize("page", ["features.md", "security.md"])
def test_every_row_of_a_page_of_tests_names_one_that_is_there(page: str) -> None:
    rows = re.findall(
        r"^\| .* \| `((?:\w+/)?test_\w+\.py)::(test_\w+)` \|$", (HERE / "docs" / page).read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    for file, name in rows:
        assert re.search(rf"^def {name}\(", (HERE / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_the_recorded_sessions_print_the_same_now() -> None:
    from scripts.dev.record_session import PAGE, session

    def words(page: str) -> list[str]:
        """The text without the parts that change from run to run: numbers, hardware, progress, the slowest import."""
        page = re.sub(r"\bimporting (?:torch|transformers|runpod)\b", "importing #", page)
        lines = [re.sub(r"[\d.]+( [kMGT]?B| s| MB/s)?|is on .*", "#", line) for line in page.splitlines()]
        return [" ".join(line.split()) for line in lines if not line.startswith(("INFO", "warning", "ok ", "  "))]

    page = PAGE.read_text()
    assert words(session(page)) == words(page), "run scripts/dev/record_session.py"


def test_the_map_names_every_file_and_no_other() -> None:
    page = (HERE / "docs" / "architecture.md").read_text()
    table = page[page.index("| file | holds |") : page.index("`scripts/` holds")]
    folder, named = "", set()
    for line in filter(None, table.splitlines()[2:]):
        cell = line.split("|")[1].strip()
        if cell.startswith("**"):
            folder = cell.strip("*")
        else:
            named |= {folder + name for name in re.findall(r"`([\w./]+)`", cell)}
    files = [path for package in ("modelstore", "handler") for path in (HERE / package).rglob("*.py")]
    doors = {"modelstore/__init__.py", "handler/engines/__init__.py"}  # the others hold a map alone
    present = {str(path.relative_to(HERE)) for path in files}
    assert named == {path for path in present if not path.endswith("__init__.py")} | doors
