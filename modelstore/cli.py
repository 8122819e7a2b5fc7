"""The `modelstore` command: parse, call the store, print. Progress and logs go to stderr, results to stdout.

With `--json` stdout carries one JSON document and nothing else. An error is one line; its exit code is the error's own
(see `errors.py`); a traceback only with `--debug`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from modelstore import __version__
from modelstore.catalog import Snapshot
from modelstore.claim import Holder
from modelstore.errors import ModelStoreError, NotFound, Refused, SnapshotNotFound, UsageError
from modelstore.evict import Removal
from modelstore.layout import SnapshotKey
from modelstore.observer import Observer
from modelstore.reference import parse_reference
from modelstore.settings import Settings, parse_dtype
from modelstore.store import ModelStore
from modelstore.verify import verify_folder
from modelstore.warmstart import LogObserver

app = typer.Typer(
    name="modelstore",
    help="A shared model store on a network volume: seed it, look at it, start from it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@dataclass(frozen=True, slots=True)
class _Context:
    """What every command has: the options that all of them take."""

    root: Path | None
    json: bool
    quiet: bool
    debug: bool

    def store(self, **changes: Any) -> ModelStore:
        settings = replace(Settings.from_env(root=self.root), **changes)
        return ModelStore(settings.root, settings=settings)

    def print(self, record: object, text: Callable[[Console], None]) -> None:
        """A result: `record` with --json, else what `text` draws."""
        if self.json:
            print(json.dumps(record, indent=2))
        elif not self.quiet:
            text(Console(highlight=False, markup=False, soft_wrap=True))


_ROOT = Annotated[Path | None, typer.Option("--root", help="The store's folder; MODELSTORE_ROOT by default.")]
_JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")]
_REF = Annotated[str, typer.Argument(metavar="REF", help="org/name, org/name@revision or file:///folder")]
_REFS = Annotated[list[str], typer.Argument(metavar="REF...", help="org/name, org/name@revision or file:///folder")]
_DTYPE = Annotated[
    str | None, typer.Option("--dtype", help="float16 or fp16 (default), bfloat16 or bf16, float32, keep")
]
_REVISION = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, where REF names none.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelstore {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A shared model store on a network volume: seed it, look at it, start from it."""


@app.command()
def seed(
    references: _REFS,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    overflow: Annotated[
        str, typer.Option("--overflow", help="Where float16 cannot hold a weight: stop, or store bfloat16.")
    ] = "stop",
    wait_s: Annotated[float | None, typer.Option("--wait-s", help="Seconds to wait for another's download.")] = None,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Publish models before any worker needs them; fetches only what is missing."""
    context = _Context(root, as_json, quiet, debug)
    if overflow not in ("stop", "bfloat16"):
        raise typer.BadParameter("use stop or bfloat16", param_hint="--overflow")
    records: list[dict[str, Any]] = []
    worst = 0
    with _errors(context):
        store = context.store()
        for text in references:
            parse_reference(text, revision=revision)
        if wait_s is not None and not wait_s >= 0:
            raise UsageError("--wait-s must be a number of seconds, at least 0")
        for text in references:
            try:
                with _observer(context) as observer:
                    snapshot = store.ensure(
                        text,
                        revision=revision,
                        dtype=dtype,
                        refresh=True,
                        overflow="bfloat16" if overflow == "bfloat16" else "stop",
                        wait_s=wait_s,
                        observer=observer,
                    )
                records.append(snapshot.as_json())
            except ModelStoreError as error:
                if len(references) == 1:
                    raise
                _report(error, context)
                worst = worst or error.exit_code
                records.append({"reference": text, "error": str(error), "exit_code": error.exit_code})
    context.print(records[0] if len(references) == 1 else records, lambda console: _print_seeded(console, records))
    raise typer.Exit(worst)


@app.command()
def warm(
    reference: _REF,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu; cuda where there is one.")] = None,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Start as a worker would, up to the model in memory, and print the timeline."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        from modelstore.warmstart import begin

        changes: dict[str, Any] = {"model": parse_reference(reference, revision=revision)}
        if dtype is not None:
            changes["dtype"] = parse_dtype("--dtype", dtype)
        store = context.store(**changes)
        with _observer(context) as observer:
            begun = begin(store.settings, observer=observer)
        with begun.timeline.span("import"):
            try:
                from modelstore.loader import load_model
            except ModuleNotFoundError as error:
                raise NotFound(f"{error.name} is not installed: pip install 'runpod-modelstore[worker]'") from error
        load_model(begun.snapshot, device, reading=begun.reading, timeline=begun.timeline)
        begun.timeline.mark("ready")
    context.print(begun.timeline.as_json(), lambda console: _print_timeline(console, begun.timeline.waterfall()))


@app.command("ls")
def list_snapshots(root: _ROOT = None, as_json: _JSON = False, quiet: _QUIET = False, debug: _DEBUG = False) -> None:
    """List the published snapshots."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        store = context.store()
        found = list(store.snapshots())
    records = [_without_status(snapshot) for snapshot in found]
    context.print(records, lambda console: _print_list(console, found, store.settings.root))


@app.command()
def show(
    reference: _REF,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Show one snapshot: its files, their sizes and digests, and where it came from."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        snapshot = _found(context.store(), reference, revision, dtype)
    source = snapshot.manifest.source
    record = _without_status(snapshot) | {
        "created_at": snapshot.manifest.created_at,
        "source": {"kind": source.kind, "location": source.location, "revision": source.revision},
        "stored_unchanged": snapshot.manifest.stored_unchanged,
        "file_list": [
            {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256} for file in snapshot.manifest.files
        ],
    }
    context.print(record, lambda console: _print_snapshot(console, snapshot))


@app.command()
def path(
    reference: _REF,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Print the folder of a snapshot; touches no network."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        snapshot = _found(context.store(), reference, revision, dtype)
    print(json.dumps({"path": str(snapshot.path)}) if as_json else snapshot.path)


@app.command()
def verify(
    reference: Annotated[str | None, typer.Argument(metavar="[REF]", help="One model; all without it.")] = None,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Compare every byte of a snapshot, or of all, with its manifest; touches no network."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        store = context.store()
        keys = [_found_key(store, reference, revision, dtype)] if reference else list(store.catalog.keys())
        records = []
        for key in keys:
            folder = store.layout.snapshot(key)
            findings = verify_folder(folder, key)
            problems = [{"path": finding.path, "problem": finding.problem} for finding in findings]
            records.append(_key_record(key, folder) | {"ok": not findings, "findings": problems})
    context.print(records, lambda console: _print_verified(console, records))
    raise typer.Exit(0 if all(record["ok"] for record in records) else 5)


@app.command("rm")
def remove(
    reference: _REF,
    dtype: _DTYPE = None,
    revision: _REVISION = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    root: _ROOT = None,
    as_json: _JSON = False,
    quiet: _QUIET = False,
    debug: _DEBUG = False,
) -> None:
    """Remove one snapshot from the volume; a worker that is reading it is not hurt."""
    context = _Context(root, as_json, quiet, debug)
    with _errors(context):
        store = context.store()
        key = _found_key(store, reference, revision, dtype)
        plan, folder = Removal((key,)), store.layout.snapshot(key)
        size = plan.size_bytes(store.layout)
        question = f"remove {key}, {size / 1e9:.2f} GB, {folder}"
        if not dry_run:
            if not yes and not (sys.stdin.isatty() and typer.confirm(f"{question}?", err=True)):
                raise Refused(f"not removed: {question} needs --yes")
            plan.run(store.layout)
    record = _key_record(key, folder) | {"bytes": size, "removed": not dry_run}
    context.print(record, lambda console: console.print(f"{'would remove' if dry_run else 'removed'} {folder}"))


def main() -> NoReturn:
    """The entry point."""
    app(standalone_mode=True)
    sys.exit(0)


def _key_record(key: SnapshotKey, folder: Path) -> dict[str, Any]:
    return {"repo_id": key.repo_id, "commit": key.commit, "dtype": key.dtype, "path": str(folder)}


def _found_key(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> SnapshotKey:
    """What stands where the snapshot belongs, damaged or not."""
    wanted = parse_reference(reference, revision=revision)
    variant = parse_dtype("--dtype", dtype) if dtype else store.settings.dtype
    return store.catalog.find_key(wanted, variant) or _found(store, reference, revision, dtype).key


def _found(store: ModelStore, reference: str, revision: str | None, dtype: str | None) -> Snapshot:
    snapshot = store.lookup(reference, revision=revision, dtype=dtype)
    if snapshot is None:
        option = f" --dtype {dtype}" if dtype else ""
        raise SnapshotNotFound(
            f"{reference} is not in {store.settings.root} as {dtype or store.settings.dtype}: "
            f"run `modelstore seed {reference}{option}`, or look at `modelstore ls`"
        )
    return snapshot


@contextmanager
def _errors(context: _Context) -> Iterator[None]:
    """Set up logging; end with an error's own code and one line."""
    level = logging.DEBUG if context.debug else logging.ERROR if context.quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        yield
    except ModelStoreError as error:
        if context.debug:
            logging.getLogger(__name__).exception("failed")
        _report(error, context)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if context.debug:
            logging.getLogger(__name__).exception("failed")
        print(f"error: {error.strerror or error} ({error.filename or 'no file'}): check the volume", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted: what was downloaded is kept, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from error


def _report(error: ModelStoreError, context: _Context) -> None:
    print(f"error: {error}", file=sys.stderr)


class _BarObserver(Observer):
    """A progress bar on a terminal, with a line above it that says of what."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._said = ""

    def filling(self, key: SnapshotKey, *, done: int, total: int, reused: int, eta_s: float | None) -> None:
        self._draw(f"downloading {key}", done, total)

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        record = holder.record
        who = record.worker if record else "another worker"
        self._draw(f"waiting for {key} from {who}", record.done if record else 0, record.total if record else 0)

    def _draw(self, what: str, done: int, total: int) -> None:
        if what != self._said:
            self._said = what
            self._progress.console.print(what)
        if self._task is None:
            self._task = self._progress.add_task("", total=None)
        self._progress.update(self._task, completed=done, total=total or None)


@contextmanager
def _observer(context: _Context) -> Iterator[Observer]:
    if context.quiet:
        yield Observer()
    elif not sys.stderr.isatty():
        logging.getLogger("modelstore.warmstart").setLevel(logging.INFO)
        yield LogObserver()
    else:
        columns = (BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as progress:
            yield _BarObserver(progress)


def _without_status(snapshot: Snapshot) -> dict[str, Any]:
    record = snapshot.as_json()
    return {name: record[name] for name in ("repo_id", "commit", "dtype", "path", "files", "bytes")}


def _print_seeded(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        if "error" not in record:
            console.print(
                f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {record['dtype']}, "
                f"{record['files']} files, {record['bytes'] / 1e9:.2f} GB, {record['downloaded_bytes'] / 1e9:.2f} GB "
                f"over the network\n{record['path']}"
            )


def _print_timeline(console: Console, waterfall: str) -> None:
    console.print(waterfall)


def _print_list(console: Console, snapshots: list[Snapshot], root: Path) -> None:
    if not snapshots:
        console.print(f"no snapshots in {root}: publish one with `modelstore seed org/name`")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "commit", "dtype"):
        table.add_column(name, overflow="fold")
    for name in ("files", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for snapshot in snapshots:
        count, size = len(snapshot.manifest.files), snapshot.size_bytes / 1e9
        table.add_row(snapshot.repo_id, snapshot.commit[:12], snapshot.dtype, str(count), f"{size:.2f}")
    console.print(table)


def _print_snapshot(console: Console, snapshot: Snapshot) -> None:
    source = snapshot.manifest.source
    console.print(f"{snapshot.repo_id} at {snapshot.commit} as {snapshot.dtype}")
    console.print(f"{snapshot.path}\nfrom {source.kind} {source.location} {source.revision}")
    if snapshot.manifest.stored_unchanged:
        console.print(f"stored unchanged: {snapshot.manifest.stored_unchanged}")
    for file in snapshot.manifest.files:
        console.print(f"{file.size_bytes:>15,}  {file.sha256[:12]}  {file.path}")


def _print_verified(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        console.print(
            f"{'ok ' if record['ok'] else 'BAD'} {record['repo_id']} {record['commit'][:12]} {record['dtype']}"
        )
        for finding in record["findings"]:
            _print_finding(console, finding)


def _print_finding(console: Console, finding: Mapping[str, str]) -> None:
    console.print(f"    {finding['path']}: {finding['problem']}")
