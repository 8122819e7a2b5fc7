"""The commands about the starts on record: `history`, `report` and `metrics`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstore.cli.app import Context
from modelstore.cli.output import WIDE, table
from modelstore.errors import UsageError, not_installed
from modelstore.operate import compression, fleet, inventory
from modelstore.timeline import OUTCOMES, outcome_of, total_s, verdict
from modelstore.units import counted
from modelstore.volume import durable, history, refs

if TYPE_CHECKING:
    from rich.console import Console

_LIMIT = Annotated[int, typer.Option("--limit", min=1, help="At most so many, the latest.")]


def past_starts(
    context: Context,
    limit: _LIMIT = 20,
    model: Annotated[str | None, typer.Option("--model", help="Only starts of this one, as MODEL_ID names it.")] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", help="Only later ones: 90min, 6h, 2d, or a day or time in UTC, as 2026-11-26."),
    ] = None,
    outcome: Annotated[str | None, typer.Option("--outcome", help=f"Only {', '.join(OUTCOMES)} or failed.")] = None,
) -> None:
    """List the fleet's starts, and the slowest part of each. And swaps of running workers."""
    if outcome is not None and outcome not in (*OUTCOMES, "failed"):
        raise UsageError(f"--outcome {outcome} is not known: use {', '.join(OUTCOMES)} or failed")
    after = history.parse_since(since) if since is not None else 0.0
    layout = context.volume().layout
    records = history.starts(layout, limit=limit, model=model, since=after, outcome=outcome)

    def text(console: Console) -> None:
        from rich.padding import Padding

        if not records:
            of_model = f" of {model}" if model else ""
            console.print(f"no start{of_model} has been recorded{' that matches' if since or outcome else ' yet'}")
            return
        rows = table("when, UTC", "model", "outcome", "worker", "ready", "first token", "slowest part")
        for record in records:
            row = (
                time.strftime("%m-%d %H:%M", time.gmtime(record["at"])),
                record["model"] or "none",
                outcome_of(record) + (" (swap)" if record["kind"] == "swap" else ""),
                record["worker"],
                f"{total_s(record):.1f} s",
                f"{record['first_job']['first_token']:.1f} s" if fleet.was_waited_for(record) else "",
            )
            if console.width >= WIDE:
                rows.add_row(*row, verdict(record))
            else:
                console.print("  ".join(row), soft_wrap=False)
                console.print(Padding(verdict(record), (0, 0, 0, 4)), soft_wrap=False)
        if console.width >= WIDE:
            console.print(rows)
        whole = fleet.totals(records)
        if whole.starts > 1:
            console.print(whole.text, soft_wrap=True)
            if (change := fleet.best_change(records, compression.compressed_form(layout))) is not None:
                console.print(change.text(whole.seconds), soft_wrap=True)

    context.print(records, text)


def write_report(
    context: Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("modelstore.html"),
    text: Annotated[bool, typer.Option("--text", help="The starts as bars in the terminal instead.")] = False,
    limit: _LIMIT = 200,
) -> None:
    """Write a page about starts, slow ones, and the volume. It needs no server and no network."""
    from modelstore.operate import report

    store = context.volume()
    if not text and out.is_dir():
        raise UsageError(f"--out {out} is a folder: name a file")
    starts = history.starts(store.layout, limit=limit)
    if text:
        width = max(40, min(shutil.get_terminal_size((80, 24)).columns, 100))
        shown = "\n\n".join(report.text(record, width=width) for record in starts)
        context.print(starts, lambda console: console.print(shown or report.NO_STARTS))
        return
    models, space = inventory.models(store.layout), inventory.space(store.layout, store.settings)
    page = report.html(
        models, space, starts, made_at=time.time(), compressed_form=compression.compressed_form(store.layout)
    )
    durable.write_atomic(out.absolute(), page.encode(errors="replace"))
    record = {"path": str(out.absolute()), "starts": len(starts), "models": len(models)}
    text_of_page = f"{out.absolute()}: {counted(len(starts), 'start')}, {counted(len(models), 'model')}"
    context.print(record, lambda console: console.print(text_of_page))


def metrics(
    context: Context,
    file: Annotated[Path | None, typer.Option("--file", help="Write them there instead, as a whole.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Answer scrapes there instead.")] = None,
    address: Annotated[
        str, typer.Option("--address", help="With --port: 0.0.0.0 lets other machines ask, without a password.")
    ] = "127.0.0.1",
) -> None:
    """Prometheus metrics of the volume and its fleet. Starts, seconds, bytes, events, space."""
    if file is not None and port is not None:
        raise UsageError("--file and --port are two ways: use one of them")
    try:
        from modelstore.operate.metrics import as_text, serve, write
    except ModuleNotFoundError as error:
        raise not_installed(error, "metrics") from error
    store = context.volume()
    refs.check_format(store.layout)
    if file is not None:
        write(store.layout, store.settings, file)
    if port is not None:
        server = serve(store.layout, store.settings, port, address=address)
        context.report(f"metrics of {store.settings.root} at {address}:{port}, until Ctrl-C")
        try:
            while True:
                time.sleep(3600)
        finally:
            server.shutdown()
    if file is None:
        text = as_text(store.layout, store.settings)
        print(json.dumps({"metrics": text}) if context.json else text, end="\n" if context.json else "")
