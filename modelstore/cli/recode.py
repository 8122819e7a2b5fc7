"""`modelstore compress` and `modelstore expand`: a published snapshot in fewer bytes, or in plain files again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from modelstore.cli.app import DRY_RUN, REFS, REVISION, VARIANT, YES, Context, observer_of, report_error
from modelstore.cli.output import key_record, variant
from modelstore.errors import DigestMismatch, ModelStoreError
from modelstore.operate.inventory import find_snapshot
from modelstore.store import ModelStore
from modelstore.units import size
from modelstore.volume import pins
from modelstore.volume.evict import evict
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import verify_snapshot, wrong_bytes

_KEEP = Annotated[bool, typer.Option("--keep", help="Keep the other form, too.")]


def compress(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
    keep: _KEEP = False,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Store published weights in fewer bytes, without loss."""
    _Recode(context, compressed=True, keep=keep).run(references, dtype, revision, dry_run=dry_run, yes=yes)


def expand(
    context: Context,
    references: REFS,
    dtype: VARIANT = None,
    revision: REVISION = None,
    keep: _KEEP = False,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Store compressed weights in plain files again."""
    _Recode(context, compressed=False, keep=keep).run(references, dtype, revision, dry_run=dry_run, yes=yes)


class _Recode:
    """One of the two commands: makes a form of snapshots, and removes the other one."""

    def __init__(self, context: Context, *, compressed: bool, keep: bool) -> None:
        self._context = context
        self._store: ModelStore = context.store()
        self._compressed = compressed
        self._keep = keep

    def run(
        self, references: Sequence[str], dtype: str | None, revision: str | None, *, dry_run: bool, yes: bool
    ) -> None:
        snapshots = dict.fromkeys(find_snapshot(self._store, each, revision, dtype) for each in references)
        if not dry_run and (lines := [line for line in map(self._plan, snapshots) if line]):
            self._context.confirm("; ".join(lines), yes=yes)
        records: list[dict[str, Any]] = []
        exit_code = 0
        for snapshot in snapshots:
            try:
                records.append(self._preview(snapshot) if dry_run else self._recoded(snapshot))
            except ModelStoreError as error:
                if len(snapshots) == 1:
                    raise
                report_error(error, self._context)
                exit_code = exit_code or error.exit_code
        lines = [
            f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {variant(record)}, "
            f"{size(record['bytes'])} for {size(record['plain_bytes'])}{record['other'] and '; '}{record['other']}"
            for record in records
        ]
        self._context.print(records, lambda console: console.print("\n".join(lines)))
        raise typer.Exit(exit_code)

    def _wanted(self, snapshot: Snapshot) -> SnapshotKey:
        return snapshot.key.plain.twin if self._compressed else snapshot.key.plain

    @property
    def _other(self) -> str:
        return "plain" if self._compressed else "compressed"

    def _plan(self, snapshot: Snapshot) -> str:
        """What is removed, for a person who is asked."""
        wanted = self._wanted(snapshot)
        if self._keep or not self._store.layout.snapshot(wanted.twin).is_dir():
            return ""
        return f"{'compress' if self._compressed else 'expand'} {snapshot.key.plain} and remove its {self._other} form"

    def _preview(self, snapshot: Snapshot) -> dict[str, Any]:
        published = self._store.catalog.published(self._wanted(snapshot))
        status = "would convert" if published is None else "present"
        other = f"would remove the {self._other} form" if self._plan(snapshot) else ""
        return self._record(published or snapshot, status, other)

    def _recoded(self, snapshot: Snapshot) -> dict[str, Any]:
        """Make the form that is wanted, if it is not there, and remove the other one, if there is one."""
        from modelstore.fill.recode import Recoding  # numpy and zstandard are for few commands

        store, wanted = self._store, self._wanted(snapshot)
        published = store.catalog.published(wanted)
        status = "present"
        if published is None:
            status = "converted"
            with observer_of(self._context, doing="converting") as observer:
                Recoding(store.layout, store.settings, snapshot, observer=observer).run()
            published = store.catalog.published(wanted)
            assert published is not None
            pins.mark_used(store.layout, wanted)
        if not self._plan(snapshot):
            return self._record(published, status, "")
        store.check_may_change()
        if status == "present":
            _check_intact(published)
        removed = evict(store.layout, wanted.twin, for_twin=True)
        return self._record(published, status, "" if removed else f"the {self._other} form stays: it is in use")

    def _record(self, snapshot: Snapshot, status: str, other: str) -> dict[str, Any]:
        record = key_record(snapshot.key, self._store.layout.snapshot(snapshot.key))
        sizes = {"bytes": snapshot.size_bytes, "plain_bytes": snapshot.plain_bytes}
        return {**record, **sizes, "status": status, "other": other}


def _check_intact(snapshot: Snapshot) -> None:
    """Raise DigestMismatch if a form that was made before is damaged: the other one may be all that there is."""
    intact = verify_snapshot(snapshot).intact
    if not intact or (snapshot.key.compressed and wrong_bytes(snapshot.path, snapshot.key)):
        raise DigestMismatch(
            f"{snapshot.key} is damaged, and the other form stays: `modelstore verify`, and seed it again"
        )
