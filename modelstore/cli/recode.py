"""`modelstore compress` and `modelstore expand`: a published snapshot in fewer bytes, or in plain files again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modelstore.cli.app import DRY_RUN, REFS, REVISION, VARIANT, Context, observer_of, report_error
from modelstore.cli.output import key_record, variant
from modelstore.errors import ModelStoreError
from modelstore.operate.inventory import find_snapshot
from modelstore.store import ModelStore
from modelstore.units import size
from modelstore.volume import pins
from modelstore.volume.evict import evict
from modelstore.volume.snapshots import Snapshot

_KEEP = Annotated[bool, typer.Option("--keep", help="Keep the other form, too.")]


def compress(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
    keep: _KEEP = False,
    dry_run: DRY_RUN = False,
) -> None:
    """Store published weights in fewer bytes, without loss."""
    _recode(context, references, dtype, revision, compressed=True, keep=keep, dry_run=dry_run)


def expand(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
    keep: _KEEP = False,
    dry_run: DRY_RUN = False,
) -> None:
    """Store compressed weights in plain files again."""
    _recode(context, references, dtype, revision, compressed=False, keep=keep, dry_run=dry_run)


def _recode(
    context: Context,
    references: list[str],
    dtype: str | None,
    revision: str | None,
    *,
    compressed: bool,
    keep: bool,
    dry_run: bool,
) -> None:
    store = context.store()
    records: list[dict[str, Any]] = []
    exit_code = 0
    for reference in references:
        try:
            snapshot = find_snapshot(store, reference, revision, dtype)
            records.append(_recoded(context, store, snapshot, compressed=compressed, keep=keep, dry_run=dry_run))
        except ModelStoreError as error:
            if len(references) == 1:
                raise
            report_error(error, context)
            exit_code = exit_code or error.exit_code
    context.print(
        records,
        lambda console: console.print(
            "\n".join(
                f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {variant(record)}, "
                f"{size(record['bytes'])} for {size(record['plain_bytes'])}{record['other']}"
                for record in records
            )
        ),
    )
    raise typer.Exit(exit_code)


def _recoded(
    context: Context, store: ModelStore, snapshot: Snapshot, *, compressed: bool, keep: bool, dry_run: bool
) -> dict[str, Any]:
    """Make the form that is wanted of a snapshot, if it is not there, and remove the other one, if there is one."""
    from modelstore.fill.recode import Recoding  # numpy and zstandard are for few commands

    wanted = snapshot.key.plain if not compressed else snapshot.key.plain.twin
    published = store.catalog.published(wanted)
    status = "present" if published is not None else "converted"
    if published is None and dry_run:
        return _record(store, snapshot, "would convert")
    if published is None:
        with observer_of(context, doing="converting") as observer:
            Recoding(store.layout, store.settings, snapshot, observer=observer).run()
        published = store.catalog.published(wanted)
        assert published is not None
        pins.mark_used(store.layout, wanted)
    other = ""
    if not keep and not dry_run and store.layout.snapshot(wanted.twin).is_dir():
        store.check_may_change()
        removed = evict(store.layout, wanted.twin, for_twin=True)
        other = "" if removed else f"; the {'plain' if compressed else 'compressed'} form stays: it is in use"
    return _record(store, published, status) | {"other": other}


def _record(store: ModelStore, snapshot: Snapshot, status: str) -> dict[str, Any]:
    record = key_record(snapshot.key, store.layout.snapshot(snapshot.key))
    return record | {"bytes": snapshot.size_bytes, "plain_bytes": snapshot.plain_bytes, "status": status, "other": ""}
