"""`modelstore compress` and `modelstore expand`: the weights of a published snapshot compressed, or plain again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from modelstore.cli.app import DRY_RUN, REFS, REVISION, VARIANT, YES, Context, observer_of, report_error
from modelstore.cli.output import key_record
from modelstore.errors import DigestMismatch, ModelStoreError, Refused, SnapshotNotFound
from modelstore.fill.stored_file import is_compressible
from modelstore.operate.inventory import find_snapshot
from modelstore.store import ModelStore
from modelstore.units import size, variant
from modelstore.volume import pins
from modelstore.volume.evict import evict
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot
from modelstore.volume.verify import is_as_published

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
    """Compress published weights, without loss."""
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
        for snapshot in snapshots if self._compressed else ():
            _check_gains(snapshot)
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
        is_made = False
        if snapshot.key != wanted and store.catalog.published(wanted) is None:
            with observer_of(self._context, doing="converting") as observer:
                is_made = Recoding(store.layout, store.settings, snapshot, observer=observer).run()
            pins.mark_used(store.layout, wanted)
        published = store.catalog.published(wanted)
        if published is None:
            raise SnapshotNotFound(f"{wanted} was removed by another process: look with `modelstore ls`")
        status = "converted" if is_made else "present"
        other = store.catalog.published(wanted.twin)
        if self._keep or not store.layout.snapshot(wanted.twin).is_dir():
            return self._record(published, status, "")
        store.check_may_change()
        if not is_made:
            self._check_replaces(published, other)
        removed = evict(store.layout, wanted.twin, replaced_by_twin=True)
        stays = not removed and store.layout.snapshot(wanted.twin).is_dir()
        return self._record(published, status, f"the {self._other} form stays: it is in use" if stays else "")

    def _check_replaces(self, published: Snapshot, other: Snapshot | None) -> None:
        """Raise DigestMismatch if a form that was made before is damaged, and Refused if it holds another model than
        the form that is to be removed."""
        label = f"{published.repo_id}@{published.commit[:12]} --dtype {published.dtype}"
        commands = ("compress", "expand") if self._compressed else ("expand", "compress")
        if not is_as_published(published):
            raise DigestMismatch(
                f"{published.key} is damaged, and its {self._other} form stays: run `modelstore {commands[1]} "
                f"{label}`, which removes the damaged form, and then `modelstore {commands[0]} {label}`"
            )
        if other is not None and not _is_same_model(published, other):
            raise Refused(
                f"{published.key} and {other.key} were seeded with different settings, and differ: to keep the "
                f"{self._other} form, run `modelstore {commands[1]} {label} --keep`, else remove one with "
                f"`modelstore rm {label}` and seed it again"
            )

    def _record(self, snapshot: Snapshot, status: str, other: str) -> dict[str, Any]:
        record = key_record(snapshot.key, self._store.layout.snapshot(snapshot.key))
        sizes = {"bytes": snapshot.size_bytes, "plain_bytes": snapshot.plain_bytes}
        return {**record, **sizes, "status": status, "other": other}


def _is_same_model(one: Snapshot, other: Snapshot) -> bool:
    def stated(snapshot: Snapshot) -> tuple[str, bool]:
        return snapshot.manifest.stored_unchanged, snapshot.manifest.remote_code

    return stated(one) == stated(other) and one.manifest.has_contents_of(other.manifest)


def _check_gains(snapshot: Snapshot) -> None:
    """Raise Refused for a snapshot with no weights that are ever compressed."""
    if not any(is_compressible(file.path) for file in snapshot.manifest.contents):
        raise Refused(f"{snapshot.key} has no weights to compress: adapters are always stored as they are")
