"""The text of results: a console that prints everything as it is, tables, and the pages of single commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.operate.seed_plan import SeedPreview
from modelstore.units import ago, printable_lines, size
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot

if TYPE_CHECKING:  # a fifth of the time of a command that draws nothing, as with --json
    from rich.console import Console
    from rich.table import Table

_FIGURES = ("size", "files", "ready", "download")


def console(**options: Any) -> Console:
    """A console that shows every text as it is: without markup, and with nothing that a terminal would obey."""
    from rich.console import Console

    class PrintableConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*map(_printable, objects), **options)

    return PrintableConsole(highlight=False, markup=False, **options)


def _printable(value: Any) -> Any:
    return printable_lines(value) if isinstance(value, str) else value


def without_status(snapshot: Snapshot) -> dict[str, Any]:
    record = snapshot.as_json()
    return {name: record[name] for name in ("repo_id", "commit", "dtype", "path", "files", "bytes")}


def table(*names: str) -> Table:
    """An empty table with these columns, on a terminal of any width."""
    from rich.table import Table

    class PrintableTable(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            super().add_row(*map(_printable, cells), **options)

    made = PrintableTable(box=None, pad_edge=False, header_style="bold")
    for name in names:
        made.add_column(name, overflow="fold", justify="right" if name in _FIGURES else "left")
    return made


def print_seeded(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        if "error" not in record:
            console.print(
                f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {record['dtype']}, "
                f"{record['files']} files, {size(record['bytes'])}, {size(record['downloaded_bytes'])} "
                f"over the network\n{record['path']}"
            )


def print_snapshot(console: Console, snapshot: Snapshot) -> None:
    source = snapshot.manifest.source
    console.print(f"{snapshot.repo_id} at {snapshot.commit} as {snapshot.dtype}")
    console.print(f"{snapshot.path}\nfrom {source.kind} {source.location} {source.revision}")
    if source.compared_with == "cache":
        console.print("its files were compared with the names in that cache alone: the Hub could not be reached")
    if snapshot.manifest.stored_unchanged:
        console.print(f"stored unchanged: {snapshot.manifest.stored_unchanged}")
    for file in snapshot.manifest.files:
        console.print(f"{file.size_bytes:>15,}  {file.sha256[:12]}  {file.path}")


def print_collected(console: Console, record: Mapping[str, Any]) -> None:
    verb = "removed" if record["removed"] else "would remove"
    for item in record["collected"]:
        console.print(f"{verb} {item['kind']} {item['path']}, {size(item['bytes'])}")
    for item in record["evicted"]:
        console.print(
            f"{verb} {item['repo_id']} {item['commit'][:12]} {item['dtype']}, {size(item['bytes'])}, "
            f"last used {ago(item['idle_s'])}"
        )
    console.print(f"{verb} {size(record['bytes'])}")


def print_measured(console: Console, record: Mapping[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{record['environment']}; {record['bytes'] / 1e9:g} GB, {record['device']}, {record['runs']} runs")
    for name, rows in record["results"].items():
        table = Table("", "median s", "min", "max", "GB/s", "peak GB", title=name, title_justify="left")
        for row in rows:
            if row["missing"]:
                table.add_row(row["label"], f"not measured: {row['missing']}")
                continue
            seconds = [f"{row[key]:.2f}" for key in ("median_s", "min_s", "max_s")]
            rate = f"{record['bytes'] / row['median_s'] / 1e9:.2f}"
            table.add_row(row["label"], *seconds, rate, f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else "")
        console.print(table)


def print_verified(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        line = f"{'ok ' if record['ok'] else 'BAD'} {record['repo_id']} {record['commit'][:12]} {record['dtype']}"
        if not record["complete"]:
            share = record["compared_bytes"] / record["planned_bytes"]
            line += f" ({share:.0%} compared in this run: run it again to go on)"
        console.print(line)
        for finding in record["findings"]:
            _print_finding(console, finding)


def _print_finding(console: Console, finding: Mapping[str, str]) -> None:
    console.print(f"    {finding['path']}: {finding['problem']}")


def print_preview(console: Console, preview: SeedPreview) -> None:
    """The plan of a seed."""
    rows = table("model", "commit", "dtype", "size", "download", "")
    for record in preview.models:
        sizes = (size(record["bytes"]), size(record["downloaded_bytes"]))
        rows.add_row(record["repo_id"], record["commit"][:12], record["dtype"], *sizes, record["status"])
    console.print(rows)
    for name in preview.aliases_moved:
        console.print(f"would point @{name} somewhere else than now")
    for candidate in preview.removed:
        console.print(f"would remove {candidate.key}, {size(candidate.size_bytes)}")
    limit = f" of {size(preview.quota)}" if preview.quota else ""
    console.print(
        f"{size(preview.download_bytes)} over the network; the store takes {size(preview.taken_before)}, "
        f"{size(preview.taken_after)}{limit} then"
    )
    if preview.quota and preview.taken_after > preview.quota:
        console.print("that is more than MODELSTORE_QUOTA: raise it, or name less")


def print_seed_result(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """The result of a seed."""
    print_seeded(console, [record for record in records if "path" in record])
    for record in records:
        if "error" in record or "path" in record:
            continue
        text = f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {record['dtype']}"
        if "to" in record:
            console.print(f"{text} on {record['to']}, {size(record['uploaded_bytes'])} sent")
        else:
            console.print(f"{text}, {size(record['bytes'])}")


def key_record(key: SnapshotKey, folder: Path) -> dict[str, Any]:
    """The beginning of a record about the snapshot in `folder`."""
    return {**key.as_json(), "path": str(folder)}
