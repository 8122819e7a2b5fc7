"""`modelstore sync`: what one store has, copied to others, in other datacenters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modelstore.cli.app import DRY_RUN, Context, observer_of, report_error
from modelstore.errors import ModelStoreError, UsageError
from modelstore.operate.sync_plan import SyncPlan
from modelstore.units import counted, size, variant


def sync(
    context: Context,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF...]", help="org/name, org/name@commit or @alias; without any, all models."),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="s3://VOLUME@DATACENTER or the full path of a store's folder; several times."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", help="The place that has the models, as in --to; the store by default."),
    ] = None,
    dry_run: DRY_RUN = False,
) -> None:
    """Copy models, pins and aliases to other volumes. Files that a target has already are not copied."""
    from modelstore.fill.store_roots import FolderRoot, parse_store_root  # boto3 and HTTP are for few commands

    if not to:
        raise UsageError("--to is missing: name a place, as in `modelstore sync --to s3://VOLUME@DATACENTER`")
    settings = context.store().settings
    root = parse_store_root(source, settings) if source is not None else FolderRoot(context.volume().settings.root)
    targets = [parse_store_root(text, settings) for text in to]
    if any(target.label == root.label for target in targets):
        raise UsageError(f"{root.label} is the place that is copied from: name another one with --to")
    plan = SyncPlan(root, settings)
    records: list[dict[str, Any]] = []
    exit_code, failed = 0, 0
    for target in targets:
        try:
            if dry_run:
                records += plan.preview(target, references or ())
                continue
            with observer_of(context, doing="copying") as observer:
                for outcome in plan.run(target, references or (), observer=observer):
                    if isinstance(outcome, ModelStoreError):
                        report_error(outcome, context)
                        exit_code, failed = exit_code or outcome.exit_code, failed + 1
                    else:
                        records.append(outcome)
        except ModelStoreError as error:  # of this target alone, if there are others
            if len(targets) == 1:
                raise
            report_error(error, context)
            exit_code, failed = exit_code or error.exit_code, failed + 1
    lines = [
        f"{record['status']}: {record['repo_id']} {record['commit'][:12]} {variant(record)} on {record['to']}"
        + (f", {size(record['copied_bytes'])}" if record["copied_bytes"] else "")
        for record in records
    ]
    if failed:
        lines.append(f"{counted(failed, 'step')} failed: see above, and run it again")
    context.print(records, lambda console: console.print("\n".join(lines or ["there is nothing to copy"])))
    raise typer.Exit(exit_code)
