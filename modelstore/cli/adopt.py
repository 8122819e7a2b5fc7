"""`modelstore adopt` and `modelstore export`: to and from the caches that lie on the same volume."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstore.cli.app import DTYPE, REF, REVISION, Context, app, command, observer_of, print_seeded, report_error
from modelstore.errors import ModelStoreError, SnapshotNotFound
from modelstore.reference import parse_reference


@command(app)
def adopt(
    context: Context,
    path: Annotated[Path, typer.Argument(help="An HF cache, a model's folder, or a mirror by the SDK's VolumeCache.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="ORG/NAME", help="What to call a model whose folder has no such name.")
    ] = None,
    dtype: DTYPE = None,
) -> None:
    """Make snapshots of models that lie on this volume already. No download, and links where nothing is converted."""
    from modelstore.fill.adoption import find

    store = context.store()
    records: list[dict[str, Any]] = []
    worst = 0
    for found in find(path.absolute(), store.settings, repo_id=name):
        try:
            with observer_of(context, doing="adopting") as observer:
                snapshot = store.adopt(found.source, found.resolved, dtype=dtype, observer=observer)
        except ModelStoreError as error:
            report_error(error, context)
            worst = worst or error.exit_code
            records.append({"from": found.what, "error": str(error), "exit_code": error.exit_code})
            continue
        linked = sum(os.lstat(snapshot.path / file.path).st_nlink > 1 for file in snapshot.weights)
        records.append(snapshot.as_json() | {"from": found.what, "linked_files": linked})
    context.print(records, lambda console: print_seeded(console, records))
    raise typer.Exit(worst)


@command(app)
def export(
    context: Context,
    reference: REF,
    hf_cache: Annotated[
        Path, typer.Option("--hf-cache", help="The cache's folder, such as /runpod-volume/huggingface-cache/hub.")
    ],
    revision: REVISION = None,
) -> None:
    """Lay a snapshot out as an HF cache, for worker-vllm and others. It must have been seeded with --dtype keep, and is
    linked where that works."""
    from modelstore.fill.hf_cache import export_to_hf_cache

    store = context.store()
    wanted = parse_reference(reference, revision=revision)
    snapshot = store.lookup(wanted, dtype="keep")
    if snapshot is None:
        raise SnapshotNotFound(
            f"{reference} is not on the volume as the repo has it: run `modelstore seed {reference} --dtype keep` first"
        )
    folder = export_to_hf_cache(snapshot, hf_cache.absolute(), revision=wanted.revision or "main")
    record = {"repo_id": snapshot.repo_id, "commit": snapshot.commit, "path": str(folder)}
    context.print(record, lambda console: console.print(str(folder)))
