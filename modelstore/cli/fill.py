"""The commands that fill a volume: `seed`, and `adopt` and `export`, to and from caches on the same volume."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from modelstore.cli.app import DRY_RUN, DTYPE, INTERRUPTED, REF, REVISION, YES, Context, observer_of, report_error
from modelstore.cli.output import print_adopted, print_preview, print_seed_result
from modelstore.dtypes import OVERFLOWS, parse_dtype
from modelstore.errors import ModelStoreError, SnapshotNotFound, UsageError
from modelstore.fill.observer import Observer
from modelstore.mount import check_place
from modelstore.operate.seed_list import ListedModel, read_list
from modelstore.operate.seed_plan import SeedPlan
from modelstore.reference import parse_reference
from modelstore.settings import Settings
from modelstore.store import ModelStore
from modelstore.units import counted, size, those
from modelstore.volume import aliases
from modelstore.volume.layout import SnapshotKey

if TYPE_CHECKING:
    from modelstore.fill.bucket import Target
    from modelstore.fill.upload import RemoteVolume


def seed(
    context: Context,
    references: Annotated[
        list[str] | None, typer.Argument(metavar="[REF...]", help="org/name, org/name@revision or file:///folder")
    ] = None,
    dtype: DTYPE = None,
    revision: REVISION = None,
    compress: Annotated[
        bool | None,
        typer.Option("--compress/--plain", help="Compress the weights, or not; else as MODELSTORE_COMPRESS says."),
    ] = None,
    overflow: Annotated[
        str, typer.Option("--overflow", help="What to do if a weight does not fit float16: stop, or store bfloat16.")
    ] = "stop",
    listed: Annotated[
        Path | None,
        typer.Option(
            "--from", help="A TOML file of [[model]] tables: reference, dtype, overflow, aliases, pin, compress."
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="With --from: then remove models that the list does not name.")
    ] = False,
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=16, help="Models at once.")] = 2,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Convert weights that there are only as pickles.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Store a repo's own code too, if REF names its commit in full.")
    ] = False,
    wait_s: Annotated[float | None, typer.Option("--wait-s", help="Seconds to wait for another's download.")] = None,
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="Then upload to s3://VOLUME@DATACENTER; several times for several volumes."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="With --to: read all of it back and compare.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its sizes, and do nothing.")] = False,
    yes: YES = False,
) -> None:
    """Publish models before any worker needs them. Fetches only the missing bytes."""
    if overflow not in OVERFLOWS:
        raise typer.BadParameter(f"use {' or '.join(OVERFLOWS)}", param_hint="--overflow")
    if wait_s is not None and not wait_s >= 0:
        raise UsageError("--wait-s must be a number of seconds, at least 0")
    if prune and listed is None:
        raise UsageError("--prune makes the volume equal a list: name it with --from")
    targets = _targets(to) if to else []
    if prune and targets:
        raise UsageError("--prune removes from the volume that is mounted, and --to fills others: use one of them")
    if listed is not None and not references and (dtype or revision or overflow != "stop" or compress is not None):
        raise UsageError(
            "--dtype, --revision, --overflow and --compress are for models named here: write them into the list"
        )
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    store = context.store(**{name: True for name, is_allowed in allowed.items() if is_allowed})
    parsed_dtype = parse_dtype("--dtype", dtype) if dtype else None
    models = [
        ListedModel(parse_reference(text, revision=revision), parsed_dtype, overflow, compress=compress)
        for text in references or ()
    ]
    models += read_list(listed) if listed is not None else ()
    if not models:
        raise UsageError("REF is missing: name a model, as in `modelstore seed org/name`, or a list with --from")
    plan = SeedPlan(store, models, prune=prune)
    if dry_run:
        check_place(store.settings.root)
        preview = plan.preview()
        for record in preview.models:
            if "error" in record:
                print(f"error: {record['error']}", file=sys.stderr)
        context.print(preview.as_json(), lambda console: print_preview(console, preview))
        raise typer.Exit(preview.exit_code)
    if prune:
        store.check_may_change()
    volumes = _volumes(targets, store.settings)
    # Asked before the hours of a download, not after.
    may_remove: list[SnapshotKey] | None = None
    moved: tuple[str, ...] = ()
    if prune and not yes:
        preview = plan.preview()
        moved = preview.aliases_moved
        may_remove = [candidate.key for candidate in preview.removed]
        if may_remove:
            freed = size(sum(candidate.size_bytes for candidate in preview.removed))
            context.confirm(
                f"seed this list, and then remove {those(len(may_remove), 'model')} ({freed})",
                yes=yes,
                plan=lambda console: print_preview(console, preview),
            )
    elif not yes:
        moved = plan.moved_aliases()
    if moved:
        context.confirm("; ".join(_alias_move(store, models, name) for name in moved), yes=yes)

    def on_error(error: ModelStoreError) -> None:
        report_error(error, context)

    with observer_of(context, len(models)) as observer:
        result = plan.run(
            observer=observer,
            parallel=parallel,
            wait_s=wait_s,
            on_error=on_error,
            on_hang=_end_at_once,
            may_remove=may_remove,
        )
    if volumes:

        def uploading() -> AbstractContextManager[Observer]:
            return observer_of(context, doing="uploading")

        try:
            result = plan.upload(result, volumes, observer=uploading, verify=verify, on_error=on_error)
        except KeyboardInterrupt:  # a part may be on its way for minutes: it ends with the process
            _end_at_once()
    records = list(result.records)
    single = len(records) == 1 and listed is None
    context.print(records[0] if single else records, lambda console: print_seed_result(console, records))
    raise typer.Exit(result.exit_code)


def _alias_move(store: ModelStore, models: Sequence[ListedModel], name: str) -> str:
    now = aliases.history(store.layout, name)[-1].key
    target = next(model.reference for model in models if name in model.aliases)
    return f"point @{name} to {target} instead of {now}"


def adopt(
    context: Context,
    path: Annotated[Path, typer.Argument(help="An HF cache, a model's folder, or a mirror by the SDK's VolumeCache.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="ORG/NAME", help="The name for a model whose folder has none.")
    ] = None,
    dtype: DTYPE = None,
    dry_run: DRY_RUN = False,
) -> None:
    """Make snapshots of models that lie on this volume already. No download, and links if nothing is converted."""
    from modelstore.fill.adoption import Unreadable, find

    store = context.volume() if dry_run else context.store()
    records: list[dict[str, Any]] = []
    worst = 0
    for model in find(path.absolute(), store.settings, repo_id=name):
        try:
            if isinstance(model, Unreadable):
                raise model.error
            if dry_run:
                record = store.preview_adopted(model.source, model.resolved, dtype=dtype)
                records.append(record | {"from": model.label})
                continue
            with observer_of(context, doing="adopting") as observer:
                snapshot = store.adopt(model.source, model.resolved, dtype=dtype, observer=observer)
        except ModelStoreError as error:
            report_error(error, context)
            worst = worst or error.exit_code
            records.append({"from": model.label, "error": str(error), "exit_code": error.exit_code})
            continue
        linked = sum(os.lstat(snapshot.path / file.on_volume.path).st_nlink > 1 for file in snapshot.weights)
        made = "converted" if any(file.origin is not None for file in snapshot.weights) else "copied"
        made = f"{counted(linked, 'weights file')} linked" if linked else made
        records.append(snapshot.as_json() | {"from": model.label, "linked_files": linked, "made": made})
    context.print(records, lambda console: print_adopted(console, records, planned=dry_run))
    raise typer.Exit(worst)


def export(
    context: Context,
    reference: REF,
    hf_cache: Annotated[
        Path, typer.Option("--hf-cache", help="The cache's folder, such as /runpod-volume/huggingface-cache/hub.")
    ],
    revision: REVISION = None,
) -> None:
    """Lay a snapshot out as an HF cache, for worker-vllm and others. It must have been seeded with --dtype keep, and is
    linked if possible."""
    from modelstore.fill.hf_cache import export_to_hf_cache

    store = context.store()
    parsed = parse_reference(reference, revision=revision)
    snapshot = store.lookup(parsed, dtype="keep")
    if snapshot is None:
        raise SnapshotNotFound(
            f"{reference} is not on the volume as the repo has it: run `modelstore seed {reference} --dtype keep` first"
        )
    folder = export_to_hf_cache(snapshot, hf_cache.absolute(), revision=parsed.revision or "main")
    record = {"repo_id": snapshot.repo_id, "commit": snapshot.commit, "path": str(folder)}
    context.print(record, lambda console: console.print(str(folder)))


def _end_at_once() -> NoReturn:
    """End without waiting for threads that hang in the network."""
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


def _targets(texts: Sequence[str]) -> list[Target]:
    from modelstore.fill.bucket import parse_target  # most commands never need it

    return [parse_target(text) for text in texts]


def _volumes(targets: Sequence[Target], settings: Settings) -> list[RemoteVolume]:
    if not targets:
        return []
    from modelstore.fill.upload import RemoteVolume

    return [RemoteVolume(target, endpoint=settings.s3_endpoint) for target in targets]
