"""Every command with everything that goes wrong around it: a wrong name, no folder, a full or read-only volume, no network, Ctrl-C.
And the output on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyte
import pytest

from modelstore.cli.main import COMMANDS as REGISTERED
from modelstore.cli.main import app
from modelstore.store import ModelStore
from modelstore.volume import pins
from modelstore.volume.layout import SnapshotKey
from tests.conftest import Cli, MakeStore, OnMount, needs_mount
from tests.support.checkpoints import random_tensors, write_repo
from tests.support.hub import Hub
from tests.support.models import MODELS, save

pytestmark = pytest.mark.slow

# Every command as somebody types it, on a volume that holds org/name, org/second, @chat with a history, and a folder
# that no store made. The order is one in which they can follow each other.
COMMANDS: dict[str, str] = {
    "ls": "",
    "du": "",
    "claims": "",
    "watch": "--count 1",
    "history": "",
    "report": "--out {tmp}/page.html",
    "metrics": "",
    "doctor": "org/name",
    "show": "org/name",
    "path": "org/name",
    "verify": "org/name",
    "pin": "org/name",
    "unpin": "org/name",
    "export": "org/name --hf-cache {tmp}/volume/hub",
    "adopt": "{tmp}/volume/by-hand --as org/by-hand",
    "seed": "org/name org/other",
    "sync": "org/name --to {tmp}/copy",
    "compress": "org/name --keep",
    "expand": "org/name --keep",
    "alias set": "fresh org/third",
    "alias ls": "",
    "alias history": "chat",
    "alias rollback": "chat --yes",
    "alias rm": "chat --yes",
    "rm": "org/second --yes --force",
    "gc": "--yes",
    "warm": "org/name --device cpu",
    "bench": "--size 1MB --runs 1 --device cpu --folder {tmp}/volume",
}
SHORT = [name for name in COMMANDS if name not in ("warm", "bench")]  # those two take longer than all others together
ASK_THE_HUB = {"seed", "alias set"}
WRITE = {
    "compress", "doctor", "pin", "unpin", "export", "adopt", "seed", "alias set", "alias rollback", "alias rm", "rm", "bench",
}  # fmt: skip
LOOK_AT_ALL = ["ls", "du", "claims", "watch", "history", "report", "metrics", "verify", "gc", "alias ls"]


@pytest.fixture
def volume(hub: Hub, make_store: MakeStore, tmp_path: Path) -> ModelStore:
    """What COMMANDS says."""
    save(MODELS["llama"](), hub.folder / "org" / "name", shards=False)
    for seed, name in enumerate(("second", "other", "third")):
        write_repo(hub.folder / "org" / name, random_tensors(4, (256, 256), seed=seed))
    store = make_store()
    store.ensure("org/name", dtype="keep")
    store.set_alias("chat", "org/second")
    store.set_alias("chat", "org/name")
    pins.pin(store.layout, SnapshotKey("org/name", hub.commit(hub.folder / "org" / "name"), "float16"), "alice")
    shutil.copytree(hub.folder / "org" / "second", tmp_path / "volume" / "by-hand")
    return store


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(store_env: dict[str, str], tmp_path: Path) -> Run:
    """A command of COMMANDS in a process of its own, with another reference where one is given."""

    def run(name: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "modelstore", *words(name, tmp_path), *more],
            env=os.environ | store_env | env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, f"{name}: {done.stderr}"
        return done

    return run


def words(name: str, tmp_path: Path, reference: str = "org/name") -> list[str]:
    rest = COMMANDS[name].replace("org/name", reference).format(tmp=tmp_path)
    return [*name.split(), *rest.split()]


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_every_command_is_in_the_table() -> None:
    found = set()
    for group, prefix in [(app, ""), *((one.typer_instance, f"{one.name} ") for one in app.registered_groups)]:
        assert group is not None
        found |= {prefix + str(command.name) for command in group.registered_commands}
    assert found == set(COMMANDS)


def test_help_has_one_line_for_each_command(cli: Cli) -> None:
    cli.env["COLUMNS"] = "80"
    commands = cli("--help").stdout.partition("Commands:")[2].split("\n  ")[1:]
    assert [line.split()[0] for line in commands] == [*REGISTERED, "alias"]
    assert not [line for line in commands if "..." in line or len(line.split()) < 3]


def test_they_follow_each_other_and_json_is_one_document(volume: ModelStore, run: Run) -> None:
    for name in [*SHORT, "warm"]:
        done = run(name, "--json")
        assert done.returncode == 0, f"{name}: {done.stderr}"
        json.loads(done.stdout)
        assert "\x1b" not in done.stdout, name


@pytest.mark.parametrize(("reference", "code"), [("not-a-reference", 2), ("org/unknown", 3), ("@unknown", 3)])
def test_a_wrong_reference(volume: ModelStore, cli: Cli, tmp_path: Path, reference: str, code: int) -> None:
    for name in [name for name, rest in COMMANDS.items() if "org/name" in rest]:
        arguments = ["seed", reference] if name == "seed" else words(name, tmp_path, reference)
        done = cli(*arguments, code=code)
        if name == "doctor":  # its findings are what it prints
            assert "error   access" in done.stdout
            continue
        (error,) = errors_of(done)
        assert reference.lstrip("@") in error, name
        assert done.stdout == ""


def test_a_root_below_a_file(volume: ModelStore, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in [*SHORT, "warm"]:
        done = run(name, MODELSTORE_ROOT=str(tmp_path / "file" / "modelstore"))
        assert done.returncode in (1, 3), f"{name}: {done.stdout} {done.stderr}"
        if name == "doctor":
            assert "there is no folder" in done.stdout
        else:
            assert len(errors_of(done)) == (2 if name == "seed" else 1), f"{name}: {done.stderr}"  # seed has two models
            assert done.stdout == "" or name in ("seed", "adopt"), name


@pytest.mark.parametrize("name", LOOK_AT_ALL)
def test_a_mistyped_root_is_not_an_empty_store(cli: Cli, tmp_path: Path, name: str) -> None:
    done = cli(*name.split(), "--root", str(tmp_path / "mistyped" / "modelstore"), code=1)
    assert "there is no folder" in errors_of(done)[0]
    assert done.stdout == ""
    assert not (tmp_path / "mistyped").exists()


def test_seeding_below_a_mistyped_root_says_so(volume: ModelStore, cli: Cli, tmp_path: Path) -> None:
    """The first who fills a store makes its place, so it is no error; a plan changes nothing, so there it is one."""
    mistyped = ["org/name", "--root", str(tmp_path / "mistyped" / "modelstore")]
    done = cli("seed", *mistyped, "--dry-run", code=1)
    assert "there is no folder" in errors_of(done)[0]
    assert not (tmp_path / "mistyped").exists()
    assert "there is no folder" in cli("seed", *mistyped).stderr
    assert "there is no folder" not in cli("seed", *mistyped).stderr


def on_each(names: Iterable[str], tmp_path: Path) -> list[str]:
    """A shell that runs one command after the other, and prints what each said and its code as one JSON line."""
    code = (
        "import json, subprocess, sys\n"
        "for name, command in json.loads(sys.argv[1]).items():\n"
        "    done = subprocess.run([sys.executable, '-m', 'modelstore', *command], capture_output=True, text=True)\n"
        "    print(json.dumps({'name': name, 'code': done.returncode, 'out': done.stdout, 'err': done.stderr}), flush=True)\n"
    )
    return [sys.executable, "-c", code, json.dumps({name: words(name, tmp_path) for name in names})]


@needs_mount
def test_a_read_only_volume(volume: ModelStore, on_mount: OnMount, tmp_path: Path) -> None:
    before = sorted((tmp_path / "volume").rglob("*"))
    done = on_mount(
        'mount --bind "$VOLUME" "$VOLUME" && mount -o remount,bind,ro "$VOLUME"',
        *on_each([*SHORT, "warm"], tmp_path),
        timeout_s=280,
    )
    for line in done.stdout.splitlines():
        said = json.loads(line)
        assert "Traceback" not in said["err"], said
        if said["name"] in WRITE:
            assert said["code"] == 1, said
            assert "ead-only" in said["err"] + said["out"], said
            assert said["name"] != "doctor" or "ok      access" in said["out"], said
        else:
            assert said["code"] == 0, said
    assert len(done.stdout.splitlines()) == len(SHORT) + 1
    assert sorted((tmp_path / "volume").rglob("*")) == before


@needs_mount
def test_a_full_volume(volume: ModelStore, on_mount: OnMount, tmp_path: Path) -> None:
    """Looking and removing works; what needs room says so, and what is there stays whole."""
    (tmp_path / "volume").rename(tmp_path / "kept")
    full = (
        'mount -t tmpfs -o size=16m none "$VOLUME" && cp -a "$VOLUME"/../kept/. "$VOLUME" && '
        '{ cat /dev/zero > "$VOLUME/zeros" 2>/dev/null || true; }'
    )
    names = [name for name in [*SHORT, "warm", "verify"] if name != "rm"]
    done = on_mount(full, *on_each([*names, "rm"], tmp_path), then="rm zeros", timeout_s=280)
    codes = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        codes[said["name"]] = said["code"]
        assert "Traceback" not in said["err"], said
        assert said["code"] in (0, 6), said
        if said["code"]:
            assert said["name"] in WRITE, said
            if (
                said["name"] == "doctor"
            ):  # its findings are what it prints, those that need no room after the one that did
                assert re.search(r"error +space.*ok +access", said["out"], re.DOTALL), said
                continue
            assert "space" in said["err"] + said["out"], said
            assert len(errors_of(subprocess.CompletedProcess([], 6, "", said["err"]))) == 1, said
    assert codes["seed"] == codes["adopt"] == codes["alias set"] == codes["doctor"] == 6
    assert codes["rm"] == codes["verify"] == 0


def test_no_network(volume: ModelStore, hub: Hub, run: Run) -> None:
    hub.stop()
    for name in [*SHORT, "warm"]:
        done = run(name)
        assert done.returncode == (1 if name in ASK_THE_HUB else 0), f"{name}: {done.stderr}"
        if name in ASK_THE_HUB:
            assert "could not be reached" in done.stdout + done.stderr


def wait_until_ours(process: subprocess.Popen[str]) -> None:
    """Return when Python's own start is over, whose handler of Ctrl-C prints a traceback: the command takes that away,
    and sets its own later."""
    seen, until = False, time.monotonic() + 5
    while process.poll() is None and time.monotonic() < until:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        handled = caught is not None and bool(int(caught[1], 16) & (1 << (signal.SIGINT - 1)))
        if seen and not handled:
            return
        seen = seen or handled
        time.sleep(0.002)


@pytest.mark.parametrize("after_s", [0.0, 0.4])
def test_ctrl_c_and_then_again(
    volume: ModelStore, hub: Hub, cli: Cli, run: Run, tmp_path: Path, after_s: float
) -> None:
    """At any moment: in silence or with one line, nothing half-done, and the same command does it then."""
    for name in SHORT:
        hub.faults.bytes_per_s = 1e6
        process = subprocess.Popen(
            ["env", "--default-signal=INT", sys.executable, "-m", "modelstore", *words(name, tmp_path)],
            env=os.environ | cli.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until_ours(process)
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=240)
        assert process.returncode in (0, 130, -signal.SIGINT), f"{name}: {err}"
        assert "Traceback" not in err, name
        assert len([line for line in err.splitlines() if not line.startswith("INFO: ")]) <= 1, f"{name}: {err}"
        hub.faults.bytes_per_s = 0
        if name in WRITE:
            done = run(name)
            assert done.returncode == 0 or (name in ("rm", "alias rm", "alias rollback") and done.returncode == 3), (
                f"{name}: {done.stderr}"
            )
    cli("verify")


def screens(command: list[str], env: dict[str, str], columns: int, code: int = 0) -> Iterator[list[str]]:
    """The lines that a terminal shows, each time when the command has written something."""
    screen = pyte.Screen(columns, 24)
    stream = pyte.ByteStream(screen)
    main, side = pty.openpty()
    process = subprocess.Popen(
        command, env=os.environ | env | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"},
        stdin=side, stdout=side, stderr=side,
    )  # fmt: skip
    os.close(side)
    try:
        while True:
            try:
                stream.feed(os.read(main, 1 << 16))
            except OSError:  # the last writer has gone
                break
            yield [line.rstrip() for line in screen.display if line.strip()]
        assert process.wait(10) == code
    finally:
        process.kill()
        process.wait()
        os.close(main)


@pytest.mark.parametrize("columns", [60, 120])
@pytest.mark.parametrize("several", [False, True])
def test_a_terminal_shows_bars_for_all_for_each_model_and_for_its_files(
    hub: Hub, store_env: dict[str, str], columns: int, several: bool
) -> None:
    write_repo(hub.folder / "org" / "name", random_tensors(8, (512, 512)), shards=4)
    write_repo(hub.folder / "org" / "other", random_tensors(4, (512, 512), seed=1))
    hub.faults.bytes_per_s = 6e6
    command = [sys.executable, "-m", "modelstore", "seed", "org/name", *(["org/other"] if several else [])]
    shown = list(screens(command, store_env, columns))
    bar = re.compile(r"(.+?) +[━╸╺]+ [0-9.]+/[0-9.]+ MB +[0-9.]+ MB/s +00:0[0-9]")
    rows = {tuple(match[1].strip().split("0000")[0] for match in map(bar.fullmatch, lines) if match) for lines in shown}
    names = {name for row in rows for name in row}
    assert any(name.startswith("org/name@") for name in names), shown
    assert "model-" in names
    assert ("all" in names) == several
    both = [row for row in rows if "model-" in row and any(name.startswith("org/name@") for name in row)]
    assert both, rows
    for row in both:  # the files of a model stand below it
        assert row[row.index("model-") - 1].startswith("org/name@"), row
    # The last line of a screen may be one that is being drawn.
    assert all(len(line) > 10 for lines in shown[:-1] for line in lines[:-1]), "names are folded"
    assert "downloaded: org/name" in "".join(shown[-1])
    assert "━" not in "".join(shown[-1])


def test_running_downloads_are_shown_if_there_are_more_bars_than_rows(hub: Hub, store_env: dict[str, str]) -> None:
    small = [f"org/small-{number:02}" for number in range(26)]
    for name in small:
        write_repo(hub.folder / name, random_tensors(1, (8, 8)))
    write_repo(hub.folder / "org" / "the-last", random_tensors(8, (512, 512)))
    hub.faults.bytes_per_s = 2e6
    shown = list(screens([sys.executable, "-m", "modelstore", "seed", *small, "org/the-last"], store_env, 120))
    drawn = [[line.split()[0] for line in lines if "━" in line] for lines in shown]
    late = [names for names in drawn if any(name.startswith("org/the-last@") for name in names)]
    assert late
    for names in late:
        assert names[0] == "all"
        assert len(names) < 24


def test_a_model_that_fails_says_so_at_once_and_its_bar_goes(hub: Hub, store_env: dict[str, str]) -> None:
    """It fails when its one tensor has arrived, while most of the other one's is still on its way."""
    large = {"layers.0.weight": np.full((512, 512), 1e6, np.float32)}  # more than float16 holds
    write_repo(hub.folder / "org" / "large", large)
    write_repo(hub.folder / "org" / "name", random_tensors(12, (512, 512)))
    hub.faults.bytes_per_s = 3e6
    command = [sys.executable, "-m", "modelstore", "seed", "org/large", "org/name"]
    shown = list(screens(command, store_env, 120, code=8))
    failing = [lines for lines in shown if any(line.startswith("org/large@") and "━" in line for line in lines)]
    told = [
        lines for lines in shown
        if any("error: float16 ends at 65504" in line for line in lines) and any("━" in line for line in lines)
    ]  # fmt: skip
    assert failing, shown
    assert told, shown
    # A screen may be half drawn, and be shown before the bar goes: by the last one with a bar it is gone.
    assert not any(line.startswith("org/large@") for line in told[-1]), told
    assert "downloaded: org/name" in "".join(shown[-1])


def test_colours_are_for_terminals(volume: ModelStore, cli: Cli, store_env: dict[str, str]) -> None:
    main, side = pty.openpty()
    env = os.environ | store_env | {"TERM": "xterm"}
    subprocess.run(
        [sys.executable, "-m", "modelstore", "ls"], env=env, stdin=side, stdout=side, stderr=side, check=True
    )
    os.close(side)
    assert b"\x1b[1m" in os.read(main, 1 << 16)
    os.close(main)
    assert "\x1b" not in cli("ls").stdout
