"""The commands that keep and take away: `rm`, `gc`, `pin` and `unpin`."""

from __future__ import annotations

from typing import Annotated

import typer

from modelstore.cli.app import DRY_RUN, REF, REVISION, VARIANT, YES, Context
from modelstore.cli.output import key_record, print_collected
from modelstore.errors import NoSpace, Refused, UsageError
from modelstore.operate.inventory import find_key, find_snapshot
from modelstore.settings import parse_size
from modelstore.units import size
from modelstore.volume import pins, refs
from modelstore.volume.evict import evict, survey
from modelstore.volume.garbage import GRACE_S, plan_collection
from modelstore.volume.space import Space


def remove(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
    dry_run: DRY_RUN = False,
    yes: YES = False,
    force: Annotated[bool, typer.Option("--force", help="Also if it is pinned, or an alias points to it.")] = False,
) -> None:
    """Remove one snapshot from the volume. A worker that is reading it is not hurt."""
    store = context.store()
    key = find_key(store, reference, revision, dtype, exact=True)
    (candidate,), folder = survey(store.layout, [key]), store.layout.snapshot(key)
    if candidate.pinned and not force:
        raise Refused(f"{key} is pinned: run `modelstore unpin {reference}` first, or add --force")
    if candidate.aliases and not force:
        raise Refused(f"@{candidate.aliases[0]} points to {key}: repoint it first, or add --force")
    users = f", in use by {', '.join(candidate.users)}" if candidate.users else ""
    if not dry_run:
        context.confirm(f"remove {key}, {size(candidate.size_bytes)}, {folder}{users}", yes=yes)
        if not evict(store.layout, key, force=True):
            raise Refused(f"{key} is being removed by another process: look at `modelstore ls`")
    record = key_record(key, folder) | {"bytes": candidate.size_bytes, "removed": not dry_run}
    context.print(record, lambda console: console.print(f"{'would remove' if dry_run else 'removed'} {folder}"))


def collect_garbage(
    context: Context,
    to: Annotated[
        str | None, typer.Option("--to", help="Also evict the least recently used until the store takes this, as 50GB.")
    ] = None,
    grace_s: Annotated[float, typer.Option("--grace-s", help="Leave younger files alone.")] = GRACE_S,
    dry_run: DRY_RUN = False,
    yes: YES = False,
) -> None:
    """Remove abandoned downloads, trash and quarantine. With --to also the models that were not used for longest."""
    store = context.volume()
    layout, settings = store.layout, store.settings
    limit = parse_size("--to", to) if to is not None else None
    if to is not None and to.strip().isdigit() and 0 < int(to) < 10**6:  # 150 hardly means bytes
        raise UsageError(f"--to {to} has no unit: write it like {to}GB, or {to}B")
    if not grace_s >= settings.lease_s:
        raise UsageError(f"--grace-s must be at least the lease, {settings.lease_s:g} s")
    refs.check_format(store.layout)
    plan = plan_collection(layout, settings, grace_s=grace_s, limit_bytes=limit)
    if not dry_run and (plan.garbage or plan.evicted):
        label = f"leftovers: {len(plan.garbage)}, models: {len(plan.evicted)}, {size(plan.size_bytes)} in all"
        context.confirm(f"remove {label}", yes=yes)
        plan = plan.run(layout, settings, grace_s=grace_s)
    record = {
        "bytes": plan.size_bytes,
        "removed": not dry_run,
        "collected": [
            {
                "kind": item.kind,
                "path": str(item.path.relative_to(layout.root)),
                "bytes": item.size_bytes,
                "age_s": round(item.age_s),
            }
            for item in plan.garbage
        ],
        "evicted": [
            key_record(item.key, layout.snapshot(item.key)) | {"bytes": item.size_bytes, "idle_s": round(item.idle_s)}
            for item in plan.evicted
        ],
    }
    context.print(record, lambda console: print_collected(console, record))
    if limit is None:
        return
    taken = Space(layout, settings).taken() - (plan.size_bytes if dry_run else 0)
    if taken > limit:
        raise NoSpace(
            f"{layout.root} takes {size(taken)} then, more than {to}: the rest is in use, pinned or an alias's"
        )


def pin(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Keep a snapshot from eviction, even if the quota is exceeded."""
    store = context.store()
    key = find_snapshot(store, reference, revision, dtype, exact=True).key
    pins.pin(store.layout, key, store.settings.worker_id)
    record = key_record(key, store.layout.snapshot(key)) | {"pinned": True}
    context.print(record, lambda console: console.print(f"pinned {key}"))


def unpin(
    context: Context,
    reference: REF,
    dtype: VARIANT = None,
    revision: REVISION = None,
) -> None:
    """Let a snapshot be evicted again."""
    store = context.store()
    key = find_key(store, reference, revision, dtype, exact=True)
    was_pinned = pins.unpin(store.layout, key)
    record = key_record(key, store.layout.snapshot(key)) | {"pinned": False}
    text = f"unpinned {key}" if was_pinned else f"{key} was not pinned"
    others = sorted(f"{other}" for other in pins.pinned(store.layout) if other.repo_id == key.repo_id)
    text += f"; {' and '.join(others)} still is" if others else ""
    context.print(record, lambda console: console.print(text))
