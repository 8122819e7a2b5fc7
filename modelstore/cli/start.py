"""The commands that start from a volume: `warm` and `bench`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstore.cli.app import REF, REVISION, VARIANT, Context, observer_of
from modelstore.cli.output import print_measured
from modelstore.dtypes import parse_dtype
from modelstore.errors import not_installed
from modelstore.reference import parse_reference
from modelstore.servable import check_loadable
from modelstore.settings import parse_size
from modelstore.timeline import Timeline
from modelstore.volume import history


def warm(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu; cuda if there is one.")] = None,
) -> None:
    """Load a model as a worker would. Prints the timeline, and records the start."""
    from modelstore.startup import gc_paused
    from modelstore.warmstart import begin

    changes: dict[str, Any] = {"model": parse_reference(reference, revision=revision)}
    if dtype is not None:
        changes["dtype"] = parse_dtype("--dtype", dtype)
    store = context.store(**changes)
    settings = store.settings
    timeline = Timeline(worker=settings.worker_id, model=str(settings.model or ""), dtype=settings.dtype or "")
    try:
        with gc_paused():
            with observer_of(context) as observer:
                pending = begin(
                    settings,
                    observer=observer,
                    timeline=timeline,
                    target="host" if device == "cpu" else "device",
                    gpu="cuda:0" if device in (None, "cuda") else device,
                    while_filling=lambda: import_module("modelstore.load.model"),
                    check_config=check_loadable,
                )
            with timeline.span("import", "transformers"):
                try:
                    from modelstore.load.model import load_model
                except ModuleNotFoundError as error:
                    raise not_installed(error, "worker") from error
            pending.load(
                lambda start: load_model(
                    start.snapshot,
                    device,
                    reading=start.reading,
                    transfer=start.transfer,
                    timeline=start.timeline,
                    trust_remote_code=start.trusted,
                )
            )
    except BaseException as error:
        history.add(store.layout, timeline, error=f"{type(error).__name__}: {error}")
        raise
    timeline.mark("ready")
    pending.in_use.end()
    history.add(store.layout, timeline)
    context.print(timeline.as_json(), lambda console: console.print(timeline.waterfall()))


def bench_volume(
    context: Context,
    size: Annotated[str, typer.Option("--size", help="Of the model, in 16 bits; seven times that is needed.")] = "1GB",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Of each contender, in turn.")] = 5,
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu; cuda if there is one.")] = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="On the volume to measure; beside the store.")] = None,
) -> None:
    """Measure loading and starting on a volume, beside other loaders."""
    size_bytes = parse_size("--size", size)
    place = (folder or context.store().settings.root.parent).absolute()
    try:
        from modelstore.bench.race import bench_volume, environment
        from modelstore.load.torch_device import usable_device
    except ModuleNotFoundError as error:
        raise not_installed(error, "worker,bench") from error
    target = str(usable_device(device))
    results = bench_volume(place, size_bytes=size_bytes, runs=runs, device=target, report=context.report)
    record = {
        "environment": environment(place),
        "bytes": size_bytes,
        "runs": runs,
        "device": target,
        "results": {name: [row.as_json() for row in rows] for name, rows in results.items()},
    }
    context.print(record, lambda console: print_measured(console, record))
