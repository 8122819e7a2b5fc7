"""What the command line shows: errors, progress, tables. Progress and logs go to stderr, results to stdout."""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.dtypes import DEFAULT_DTYPE, DTYPES
from modelstore.errors import ModelStoreError, Refused
from modelstore.fill.observer import LogObserver, Observer
from modelstore.logs import LINE_CHARACTERS, log_to_stderr
from modelstore.mount import check_place
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.units import ago, one_line, printable_lines, size
from modelstore.volume import aliases
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog, Snapshot

if TYPE_CHECKING:  # a fifth of the time of a command that draws nothing, as with --json
    from rich.console import Console
    from rich.table import Table

_NO_TERMINAL = 1000  # columns: into a pipe lines are as long as they are, for grep and awk
_FIGURES = ("size", "files", "ready", "download")
INTERRUPTED = "interrupted: what was downloaded is kept, the same command goes on from there"

app = typer.Typer(
    name="modelstore",
    help="A shared model store on a network volume: seed it, look at it, start from it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The options that every command has, and those that several share.
_COMMON: Mapping[str, tuple[Any, Any]] = {
    "root": (
        Annotated[Path | None, typer.Option("--root", help="The store's folder; MODELSTORE_ROOT by default.")],
        None,
    ),
    "json": (Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")], False),
    "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks and every log line.")], False),
}


def complete_alias(incomplete: str) -> list[str]:
    """The aliases of the store that the environment names, for the shell to go on with."""
    with suppress(ModelStoreError):
        return [name for name in sorted(aliases.names(Layout(Settings.from_env().root))) if name.startswith(incomplete)]
    return []


def complete_reference(incomplete: str) -> list[str]:
    """The same of models and, with their @, of aliases."""
    named = [f"@{name}" for name in complete_alias("")]
    with suppress(ModelStoreError):
        keys = Catalog(Layout(Settings.from_env().root)).keys()
        named += sorted({key.repo_id for key in keys})
    return [name for name in named if name.startswith(incomplete)]


_REF_HELP = "org/name, org/name@revision, @alias or file:///folder"
REF = Annotated[str, typer.Argument(metavar="REF", help=_REF_HELP, autocompletion=complete_reference)]
REFS = Annotated[list[str], typer.Argument(metavar="REF...", help=_REF_HELP, autocompletion=complete_reference)]
DTYPE = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=f"{', '.join(DTYPES)}; {DEFAULT_DTYPE} by default",
        autocompletion=lambda: list(DTYPES),
    ),
]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
YES = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
REVISION = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, where REF names none.")]


@dataclass(frozen=True, slots=True)
class Context:
    """The options that every command takes, and what they mean."""

    root: Path | None
    json: bool
    quiet: bool
    debug: bool

    def store(self, **changes: Any) -> ModelStore:
        settings = replace(Settings.from_env(root=self.root), **changes)
        return ModelStore(settings.root, settings=settings)

    def volume(self) -> ModelStore:
        """The same, to look at what is there. Raises RootUnusable where there is no place for a store: an empty list
        for a volume that is not mounted would be believed."""
        store = self.store()
        check_place(store.settings.root)
        return store

    def print(self, record: object, text: Callable[[Console], None]) -> None:
        """A result: `record` with --json, a list with one entry a line; else what `text` draws."""
        if self.json and isinstance(record, list):
            print("[" + ",\n ".join(map(json.dumps, record)) + "]")
        elif self.json:
            print(json.dumps(record, indent=2))
        elif not self.quiet:
            width = shutil.get_terminal_size((_NO_TERMINAL, 24)).columns
            try:
                text(console(soft_wrap=True, width=width))
            except SystemExit:  # what rich makes of a reader that has gone
                raise BrokenPipeError from None

    def report(self, line: str) -> None:
        """How far a long command is, on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def confirm(self, question: str, *, yes: bool) -> None:
        """Raise Refused unless the person said yes, by the option or on a terminal."""
        if not yes and not sys.stdin.isatty():
            raise Refused(f"not done: {question} needs --yes")
        if not yes and not typer.confirm(f"{question}?", err=True):
            raise Refused("not done, as you said: nothing was changed")


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: its first parameter is the Context, which the options that all have make; an error that it
    raises ends it with the error's own code and one line."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        def run(**options: Any) -> None:
            context = Context(**{name: options.pop(name) for name in _COMMON})
            with _errors(context):
                body(context, **options)

        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        common = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in _COMMON.items()
        ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + common
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__doc__ = body.__doc__
        app.command(name or body.__name__)(run)
        return body

    return register


def prepare_streams() -> None:
    """Let output be written whatever holds it: a stream that is closed, as cron's may be, takes everything and gives
    nothing, and a character that it cannot encode is escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _errors(context: Context) -> Iterator[None]:
    """Set up logging; end with an error's own code and one line. A second Ctrl-C ends at once."""
    level = logging.DEBUG if context.debug else logging.ERROR if context.quiet else logging.WARNING
    log_to_stderr(level, "%(levelname)s: %(message)s")
    before = signal.getsignal(signal.SIGINT)
    ours = before in (signal.default_int_handler, signal.SIG_DFL)
    try:
        if ours:
            signal.signal(signal.SIGINT, _interrupted)
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:  # whoever read this, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from error
    except ModelStoreError as error:
        if context.debug:
            logging.getLogger(__name__).exception("failed")
        report_error(error, context)
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if context.debug:
            logging.getLogger(__name__).exception("failed")
        reason = f"{error.strerror or error} ({error.filename or 'no file'})"
        print(f"error: {one_line(reason, LINE_CHARACTERS)}: check the volume", file=sys.stderr)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(130) from error
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _interrupted(_signum: int, _frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def report_error(error: ModelStoreError, context: Context) -> None:
    print(f"error: {error}", file=sys.stderr)


@contextmanager
def observer_of(context: Context, models: int = 1, doing: str = "downloading") -> Iterator[Observer]:
    """What shows the progress of so many models."""
    if context.quiet:
        yield Observer()
    elif not sys.stderr.isatty():
        logging.getLogger("modelstore.fill.observer").setLevel(logging.INFO)
        yield LogObserver(doing)
    else:
        from modelstore.cli.bars import bars  # a command that draws none starts sooner without

        with bars(models, "" if doing == "downloading" else f"{doing} ") as observer:
            yield observer


def console(**options: Any) -> Console:
    """A console that shows every text as it is: without markup, and with nothing that a terminal would obey."""
    from rich.console import Console

    class PrintableConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*map(_printable, objects), **options)

    return PrintableConsole(highlight=False, markup=False, **options)


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) else value


def without_status(snapshot: Snapshot) -> dict[str, Any]:
    record = snapshot.as_json()
    return {name: record[name] for name in ("repo_id", "commit", "dtype", "path", "files", "bytes")}


def table(*names: str) -> Table:
    """An empty table with these columns, on a terminal of any width."""
    from rich.table import Table

    class PrintableTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*map(_printable, cells), **options)

    made = PrintableTable(box=None, pad_edge=False, header_style="bold")
    for name in names:
        made.add_column(name, overflow="fold", justify="right" if name in _FIGURES else "left")
    return made


def print_seeded(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        if "error" not in record:
            console.print(
                f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {record['dtype']}, "
                f"{record['files']} files, {size(record['bytes'])}, {size(record['downloaded_bytes'])} "
                f"over the network\n{record['path']}"
            )


def print_snapshot(console: Console, snapshot: Snapshot) -> None:
    source = snapshot.manifest.source
    console.print(f"{snapshot.repo_id} at {snapshot.commit} as {snapshot.dtype}")
    console.print(f"{snapshot.path}\nfrom {source.kind} {source.location} {source.revision}")
    if source.compared_with == "cache":
        console.print("its files were compared with the names in that cache alone: the Hub could not be reached")
    if snapshot.manifest.stored_unchanged:
        console.print(f"stored unchanged: {snapshot.manifest.stored_unchanged}")
    for file in snapshot.manifest.files:
        console.print(f"{file.size_bytes:>15,}  {file.sha256[:12]}  {file.path}")


def print_collected(console: Console, record: Mapping[str, Any]) -> None:
    verb = "removed" if record["removed"] else "would remove"
    for item in record["collected"]:
        console.print(f"{verb} {item['kind']} {item['path']}, {size(item['bytes'])}")
    for item in record["evicted"]:
        console.print(
            f"{verb} {item['repo_id']} {item['commit'][:12]} {item['dtype']}, {size(item['bytes'])}, "
            f"last used {ago(item['idle_s'])}"
        )
    console.print(f"{verb} {size(record['bytes'])}")


def print_measured(console: Console, record: Mapping[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{record['environment']}; {record['bytes'] / 1e9:g} GB, {record['device']}, {record['runs']} runs")
    for name, rows in record["results"].items():
        table = Table("", "median s", "min", "max", "GB/s", "peak GB", title=name, title_justify="left")
        for row in rows:
            if row["missing"]:
                table.add_row(row["label"], f"not measured: {row['missing']}")
                continue
            seconds = [f"{row[key]:.2f}" for key in ("median_s", "min_s", "max_s")]
            rate = f"{record['bytes'] / row['median_s'] / 1e9:.2f}"
            table.add_row(row["label"], *seconds, rate, f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "")
        console.print(table)


def print_verified(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        line = f"{'ok ' if record['ok'] else 'BAD'} {record['repo_id']} {record['commit'][:12]} {record['dtype']}"
        if not record["complete"]:
            share = record["compared_bytes"] / record["planned_bytes"]
            line += f" ({share:.0%} compared in this run: run it again to go on)"
        console.print(line)
        for finding in record["findings"]:
            _print_finding(console, finding)


def _print_finding(console: Console, finding: Mapping[str, str]) -> None:
    console.print(f"    {finding['path']}: {finding['problem']}")
