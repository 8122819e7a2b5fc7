"""`modelstore alias`: names that point to snapshots, and are repointed to swap the model of a fleet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli.app import DRY_RUN, REF, REVISION, VARIANT, YES, Context, complete_alias, observer_of
from modelstore.cli.output import table
from modelstore.dtypes import parse_dtype
from modelstore.errors import InvalidReference, SnapshotNotFound, UsageError
from modelstore.reference import Reference, parse_reference
from modelstore.store import ModelStore
from modelstore.units import clock
from modelstore.volume import aliases, refs
from modelstore.volume.layout import Layout, SnapshotKey
from modelstore.volume.verify import known_problem

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

_NAME = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The alias: lower-case letters, digits, '.', '_' and '-'.", autocompletion=complete_alias
    ),
]


def set_alias(
    context: Context,
    name: _NAME,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
    percent: Annotated[
        int,
        typer.Option("--percent", min=1, max=100, help="Only for this share of the workers; the others stay."),
    ] = 100,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Point an alias to a model, which is published first if it is not there."""
    store = context.store()
    if not dry_run:
        store.check_may_change()
    name = aliases.checked(name.removeprefix("@"))
    target = parse_reference(reference, revision=revision)
    before = _now(context, name)
    if percent < 100 and before is None:
        raise UsageError(f"@{name} points nowhere yet: set it for all before you try another for {percent} %")
    variant = parse_dtype("--dtype", dtype) if dtype else store.settings.dtype
    if variant is None and target.kind != "alias":
        variant = parse_dtype("dtype", store.catalog.dtype_of(target))
    snapshot = store.lookup(target, dtype=variant)
    key = snapshot.key if snapshot else None
    if key is not None:
        _warn_of_damage(store, key)
    if not dry_run:
        if before is not None:
            context.confirm(_question(context, name, target, key, percent), yes=yes)
        with observer_of(context) as observer:
            key = store.set_alias(name, target, dtype=dtype, percent=percent, observer=observer).key
    record = _record(name, key) | {"before": _record(name, before), "changed": not dry_run}
    label = f"{key}" if key else f"{target}, once it is published"
    if percent < 100:
        record["percent"] = percent
        label += f" for {percent} % of the workers"
    context.print(record, lambda console: console.print(f"@{name} {'would point' if dry_run else 'points'} to {label}"))


def list_aliases(context: Context) -> None:
    """List the target of each alias, and its age."""
    layout = context.volume().layout
    refs.check_format(layout)
    histories, damaged = {}, False
    for name in sorted(aliases.names(layout)):
        try:
            histories[name] = aliases.history(layout, name)
        except InvalidReference as error:
            logger.warning("%s", error)
            damaged = True
    records = [
        {
            "alias": name,
            "history": [entry.as_json() for entry in entries],
            "published": _is_published(layout, entries[-1].key),
        }
        for name, entries in histories.items()
    ]

    def drawn() -> Table:
        made = table("alias", "model", "since, UTC", "by")
        for name, entries in histories.items():
            shown = [aliases.stable(entries)] if entries[-1].percent == 100 else [aliases.stable(entries), entries[-1]]
            for entry in shown:
                model = f"{entry.key}" if entry.percent == 100 else f"{entry.key} for {entry.percent} %"
                model += "" if _is_published(layout, entry.key) else ", not on the volume"
                made.add_row(f"@{name}", model, clock(entry.at), entry.by)
        return made

    context.print(
        records,
        lambda console: console.print(
            drawn() if histories else "no alias can be read" if damaged else "there are no aliases"
        ),
    )


def past_targets(context: Context, name: _NAME) -> None:
    """List the snapshots that an alias has pointed to, the latest first."""
    layout = context.volume().layout
    refs.check_format(layout)
    name = aliases.checked(name.removeprefix("@"))
    entries = aliases.history(layout, name)
    if not entries:
        raise aliases.no_alias(layout, name)
    numbered = [(number, entry) for number, entry in enumerate(entries, 1)][::-1]
    records = [
        {
            "number": number,
            **entry.as_json(),
            "published": _is_published(layout, entry.key),
            "problem": known_problem(layout, entry.key) or known_problem(layout, entry.key.twin),
        }
        for number, entry in numbered
    ]

    def drawn() -> Table:
        made = table("#", "model", "since, UTC", "by", "")
        for (number, entry), record in zip(numbered, records, strict=True):
            share = "" if entry.percent == 100 else f" for {entry.percent} %"
            state = "" if record["published"] else "not on the volume"
            now = "now" if number == len(entries) else ""
            notes = ", ".join(filter(None, (now, state, record["problem"] and f"damaged: {record['problem']}")))
            made.add_row(str(number), f"{entry.key}{share}", clock(entry.at), entry.by, notes)
        return made

    context.print(records, lambda console: console.print(drawn()))


def rollback(
    context: Context,
    name: _NAME,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="TARGET", help="A number or a model of `alias history`; the previous without it."),
    ] = None,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Point an alias back to a snapshot that it pointed to before."""
    store = context.volume()
    if not dry_run:
        store.check_may_change()
    name = aliases.checked(name.removeprefix("@"))
    entries = aliases.history(store.layout, name)
    now = entries[-1].key if entries else aliases.target(store.layout, name)
    target = _earlier(name, entries, to) if to is not None else aliases.previous(entries)
    if target is None:
        if {entry.key for entry in entries} <= {now}:
            raise SnapshotNotFound(f"@{name} has pointed nowhere but to {now}: use `modelstore alias set`")
        raise SnapshotNotFound(
            f"@{name} is back at its first target, {now}: name another one with --to, see `modelstore alias history "
            f"{name}`"
        )
    _warn_of_damage(store, target.key)
    missing = "" if _is_published(store.layout, target.key) else ", which is downloaded first"
    tried = f", which was tried for {target.percent} %, for all workers" if target.percent < 100 else ""
    if not dry_run:
        context.confirm(f"point @{name} to {target.key}{tried}{missing} instead of {now}", yes=yes)
        with observer_of(context) as observer:
            reference = f"{target.key.repo_id}@{target.key.commit}"
            store.set_alias(name, reference, dtype=target.key.dtype, observer=observer)
    record = _record(name, target.key) | {"before": _record(name, now), "changed": not dry_run}
    text = (
        f"@{name} {'would point' if dry_run else 'points'} to {target.key} again{(tried + missing) if dry_run else ''}"
    )
    context.print(record, lambda console: console.print(text))


def _is_published(layout: Layout, key: SnapshotKey) -> bool:
    """Whether a folder is in the place of a snapshot or of its twin: either answers for an alias."""
    return any(layout.snapshot(each).is_dir() for each in (key, key.twin))


def _earlier(name: str, entries: Sequence[aliases.Pointed], to: str) -> aliases.Pointed:
    """The latest entry that `to` names, but for the present one: its number, or its model with or without a commit."""
    repo_id, _at, commit = to.partition("@")
    for number, entry in reversed(list(enumerate(entries, 1))):
        is_named = to == str(number) or (entry.key.repo_id == repo_id and entry.key.commit.startswith(commit))
        if is_named and (entry.key != entries[-1].key or entries[-1].percent < 100):
            return entry
        if is_named and to == str(number):
            raise SnapshotNotFound(f"@{name} points to {entry.key} already: name another one")
    raise SnapshotNotFound(f"@{name} has not pointed to {to}: look at `modelstore alias history {name}`")


def remove(
    context: Context,
    name: _NAME,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Remove an alias. The models that it pointed to stay."""
    store = context.volume()
    if not dry_run:
        store.check_may_change()
    layout = store.layout
    name = aliases.checked(name.removeprefix("@"))
    if name not in aliases.names(layout):
        raise aliases.no_alias(layout, name)
    before = _now(context, name)
    if not dry_run:
        context.confirm(f"remove @{name}, which points to {before or 'nothing'}", yes=yes)
        aliases.remove(layout, name)
    record = _record(name, before) | {"removed": not dry_run}
    context.print(record, lambda console: console.print(f"{'would remove' if dry_run else 'removed'} @{name}"))


def _now(context: Context, name: str) -> SnapshotKey | None:
    """The target of an alias; None if it points nowhere, or its record is damaged, which setting it anew mends."""
    try:
        entries = aliases.history(context.store().layout, name)
    except InvalidReference as error:
        logger.warning("%s", error)
        return None
    return entries[-1].key if entries else None


def _warn_of_damage(store: ModelStore, key: SnapshotKey) -> None:
    if problem := known_problem(store.layout, key):
        logger.warning("%s is damaged (%s): it is made again first", key, problem)


def _question(context: Context, name: str, target: Reference, key: SnapshotKey | None, percent: int) -> str:
    """What a change of an alias is, for the person who is asked. `key`: the target's, if it is published."""
    entries = aliases.history(context.store().layout, name)
    stays, canary = aliases.stable(entries), entries[-1]
    first = "" if key is not None else ", which is downloaded first"
    if percent < 100:
        return (
            f"send {percent} % of @{name}'s workers to {target}{first} ({100 - percent} % stay on {stays.key.repo_id})"
        )
    tried = f", and of {canary.key}, which {canary.percent} % try" if canary.percent < 100 else ""
    return f"point @{name} to {target}{first} instead of {stays.key}{tried}"


def _record(name: str, key: SnapshotKey | None) -> dict[str, Any]:
    if key is None:
        return {"alias": name}
    return {"alias": name, **key.as_json()}
