"""The parts of every command: its options, its context, its errors, its progress.

Progress and logs go to stderr, results to stdout.
"""

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

from modelstore.cli.output import console
from modelstore.dtypes import DEFAULT_DTYPE, DTYPES
from modelstore.errors import ModelStoreError, Refused
from modelstore.fill.observer import LogObserver, Observer
from modelstore.logs import LINE_CHARACTERS, log_to_stderr
from modelstore.mount import check_place
from modelstore.settings import Settings, ineffective
from modelstore.store import ModelStore
from modelstore.units import one_line
from modelstore.volume import aliases
from modelstore.volume.layout import Layout
from modelstore.volume.snapshots import Catalog

if TYPE_CHECKING:  # a fifth of the time of a command that draws nothing, as with --json
    from rich.console import Console

logger = logging.getLogger(__name__)

_NO_TERMINAL = 1000  # columns: into a pipe lines are as long as they are, for grep and awk
INTERRUPTED = "interrupted: downloaded bytes are kept, the same command goes on from there"

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


REF_HELP = "org/name, org/name@revision, @alias or file:///folder"
REF = Annotated[str, typer.Argument(metavar="REF", help=REF_HELP, autocompletion=complete_reference)]
REFS = Annotated[list[str], typer.Argument(metavar="REF...", help=REF_HELP, autocompletion=complete_reference)]


def _dtype_option(default: str) -> Any:
    names = ", ".join(DTYPES)
    return typer.Option("--dtype", help=f"{names}; by default {default}", autocompletion=lambda: list(DTYPES))


DTYPE = Annotated[str | None, _dtype_option(DEFAULT_DTYPE)]
VARIANT = Annotated[str | None, _dtype_option("the one that was seeded last, or the only one on the volume")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Print the plan, and do nothing.")]
YES = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
REVISION = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, if REF names none.")]


@dataclass(frozen=True, slots=True)
class Context:
    """The options that every command takes, and their meaning."""

    root: Path | None
    json: bool
    quiet: bool
    debug: bool

    def store(self, **changes: Any) -> ModelStore:
        settings = replace(Settings.from_env(root=self.root), **changes)
        return ModelStore.of(settings)

    def volume(self) -> ModelStore:
        """The same, for reading. Raises RootUnusable if there is no place for a store: an empty list
        for a volume that is not mounted would be believed."""
        store = self.store()
        check_place(store.settings.root)
        return store

    def print(self, record: object, text: Callable[[Console], None]) -> None:
        """A result: `record` with --json, a list with one entry a line; else the drawing of `text`."""
        if self.json and isinstance(record, list):
            print("[" + ",\n ".join(map(json.dumps, record)) + "]")
        elif self.json:
            print(json.dumps(record, indent=2))
        elif not self.quiet:
            width = shutil.get_terminal_size((_NO_TERMINAL, 24)).columns
            try:
                text(console(soft_wrap=True, width=width))
            except SystemExit:  # rich's answer to a reader that has gone
                raise BrokenPipeError from None

    def report(self, line: str) -> None:
        """How far a long command is, on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def confirm(self, question: str, *, yes: bool, plan: Callable[[Console], None] = lambda _console: None) -> None:
        """Raise Refused unless the person confirms, by the option or on a terminal. `plan` is drawn on stderr
        before the question."""
        if yes:
            return
        plan(console(soft_wrap=True, stderr=True))
        if not sys.stdin.isatty():
            raise Refused(f"not done: {question} needs --yes")
        if not typer.confirm(f"{question[:1].upper()}{question[1:]}?", err=True):
            raise Refused("not done, as you said: nothing was changed")


def register(app: typer.Typer, name: str, body: Callable[..., None]) -> None:
    """Make `body` a command. Its first parameter is the Context, made of the options that all commands have; an error
    that it raises ends it with the error's own code and one line."""

    def run(**options: Any) -> None:
        context = Context(**{option: options.pop(option) for option in _COMMON})
        with _errors(context):
            body(context, **options)

    own_parameters = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    common = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for option, (annotation, default) in _COMMON.items()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own_parameters] + common
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = body.__doc__
    app.command(name)(run)


def prepare_streams() -> None:
    """Make all output possible: a stream that is closed, as cron's may be, takes everything and gives
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
    for line in ineffective():
        logger.warning("%s", line)
    before = signal.getsignal(signal.SIGINT)
    may_handle = before in (signal.default_int_handler, signal.SIG_DFL)
    try:
        if may_handle:
            signal.signal(signal.SIGINT, _interrupted)
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:  # the reader, such as `head`, has seen enough
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
        if may_handle:
            signal.signal(signal.SIGINT, before)


def _interrupted(_signum: int, _frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.unraisablehook = _interrupted_in_a_finalizer
    raise KeyboardInterrupt


def _interrupted_in_a_finalizer(raised: sys.UnraisableHookArgs) -> None:
    """End if the interruption came while an object was finalized, where Python would drop it with a traceback."""
    if isinstance(raised.exc_value, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)
    sys.__unraisablehook__(raised)


def report_error(error: ModelStoreError, context: Context) -> None:
    """Print an error. In one write, because models that are seeded at once fail at once."""
    sys.stderr.write(f"error: {error}\n")


@contextmanager
def observer_of(context: Context, models: int = 1, doing: str = "downloading") -> Iterator[Observer]:
    """The observer that shows the progress of so many models."""
    if context.quiet:
        yield Observer()
    elif not sys.stderr.isatty():
        logging.getLogger("modelstore.fill.observer").setLevel(logging.INFO)
        yield LogObserver(doing)
    else:
        from modelstore.cli.bars import bars  # a command that draws none starts sooner without

        with bars(models, "" if doing == "downloading" else f"{doing} ") as observer:
            yield observer
