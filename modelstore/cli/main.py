"""The `modelstore` command: every command in one page. Parse, call the store, print.

With `--json` stdout carries one JSON document and nothing else. An error is one line; its exit code is the error's own
(see `errors.py`); a traceback only with `--debug`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, NoReturn

import typer

from modelstore import __version__
from modelstore.cli import alias, fill, history, inspect, manage, recode, start, sync
from modelstore.cli.app import prepare_streams, register

# In the order of `--help`: fill, start, look, ask why, keep and take away.
COMMANDS: Mapping[str, Callable[..., None]] = {
    "seed": fill.seed,
    "sync": sync.sync,
    "compress": recode.compress,
    "expand": recode.expand,
    "adopt": fill.adopt,
    "export": fill.export,
    "warm": start.warm,
    "bench": start.bench_volume,
    "ls": inspect.list_models,
    "show": inspect.show,
    "path": inspect.path,
    "du": inspect.du,
    "claims": inspect.claims,
    "watch": inspect.watch,
    "history": history.past_starts,
    "report": history.write_report,
    "metrics": history.metrics,
    "doctor": inspect.doctor,
    "verify": inspect.verify,
    "rm": manage.remove,
    "gc": manage.collect_garbage,
    "pin": manage.pin,
    "unpin": manage.unpin,
}
ALIAS_COMMANDS: Mapping[str, Callable[..., None]] = {
    "set": alias.set_alias,
    "ls": alias.list_aliases,
    "history": alias.past_targets,
    "rollback": alias.rollback,
    "rm": alias.remove,
}

app = typer.Typer(
    name="modelstore",
    help="A shared model store on a network volume: seed it, look at it, start from it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
alias_app = typer.Typer(
    help="Names that point to models. Repoint one, and workers that serve it swap.", no_args_is_help=True
)
for _name, _body in COMMANDS.items():
    register(app, _name, _body)
for _name, _body in ALIAS_COMMANDS.items():
    register(alias_app, _name, _body)
app.add_typer(alias_app, name="alias", rich_help_panel=None)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"modelstore {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A shared model store on a network volume: seed it, look at it, start from it."""


def run() -> NoReturn:
    """Run the command of the command line, and end the process."""
    prepare_streams()
    app(standalone_mode=True)
    raise SystemExit(0)
