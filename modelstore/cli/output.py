"""The text of results: a console that prints everything as it is, tables, and the pages of single commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.operate.seed_plan import SeedPreview
from modelstore.reference import is_local
from modelstore.units import ago, counted, printable_lines, size, span, variant
from modelstore.volume.layout import SnapshotKey
from modelstore.volume.snapshots import Snapshot

if TYPE_CHECKING:  # a fifth of the time of a command that draws nothing, as with --json
    from rich.console import Console
    from rich.table import Table

# The kinds of errors by their exit codes, for a line that counts several
FAILURES: Mapping[int, str] = {
    2: "usage",
    3: "not found",
    4: "no access",
    5: "damaged",
    6: "no space",
    7: "waited too long",
    8: "refused",
}
_PRUNED = ("removed", "kept")
WIDE = 80  # columns, for a table with sentences in it
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
    return {name: value for name, value in record.items() if name not in ("downloaded_bytes", "status")}


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


def fitting_table(
    console: Console, rows: Sequence[Mapping[str, str]], columns: Sequence[str], droppable: Sequence[str]
) -> Table:
    """A table of as many of `columns` as the console's width bears: first the columns of `droppable` go, in order."""
    from rich.measure import Measurement

    names = list(columns)
    for dropped in ("", *droppable):
        names = [name for name in names if name != dropped]
        made = table(*names)
        for row in rows:
            made.add_row(*(row[name] for name in names))
        if Measurement.get(console, console.options.update(width=10_000), made).maximum <= console.width:
            break
    return made


def print_seeded(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        if "error" in record:
            continue
        downloaded = record["downloaded_bytes"]
        how = "copied" if record["status"] == "downloaded" and not downloaded else record["status"]
        network = f", {size(downloaded)} over the network" if downloaded else ""
        console.print(f"{_outcome(how, record)}{network}\n{record['path']}")


def print_adopted(console: Console, records: Sequence[Mapping[str, Any]], *, planned: bool) -> None:
    for record in records:
        if "error" in record:
            continue
        if planned:
            how = "is there already" if record["status"] == "present" else "would adopt"
            console.print(f"{_outcome(how, record)}\n{record['from']}")
            continue
        how = "is there already" if record["status"] == "present" else "adopted"
        made = f", {record['made']}" if how == "adopted" else ""
        console.print(f"{_outcome(how, record)}{made}\n{record['path']}")


def _outcome(how: str, record: Mapping[str, Any]) -> str:
    model = f"{record['repo_id']} at {record['commit'][:12]} as {variant(record)}"
    return f"{how}: {model}, {counted(record['files'], 'file')}, {size(record['bytes'])}"


def print_snapshot(console: Console, snapshot: Snapshot, caches: Sequence[Mapping[str, Any]] = ()) -> None:
    """`caches`: the records of the code that engines have compiled for it."""
    source = snapshot.manifest.source
    console.print(f"{snapshot.repo_id} at {snapshot.commit} as {variant(snapshot.key.as_json())}")
    origin = f"hub {source.location} {source.revision}" if source.kind == "hub" else source.label
    console.print(f"{snapshot.path}\nfrom {origin}")
    if source.compared_with == "cache":
        console.print("its files were compared with the names in that cache alone: the Hub could not be reached")
    if snapshot.key.compressed:
        console.print(f"{size(snapshot.size_bytes)} on the volume for {size(snapshot.plain_bytes)}")
    if snapshot.manifest.stored_unchanged:
        console.print(f"stored unchanged: {snapshot.manifest.stored_unchanged}")
    for file in snapshot.manifest.files:
        console.print(f"{file.size_bytes:>15,}  {file.sha256[:12]}  {file.path}")
    for cache in caches:
        console.print(f"{cache['bytes']:>15,}  {cache['key'][:12]}  (compiled code of an engine)")


def print_collected(console: Console, record: Mapping[str, Any]) -> None:
    verb = "removed" if record["removed"] else "would remove"
    for item in record["collected"]:
        console.print(f"{verb} {item['kind']} {item['path']}, {size(item['bytes'])}")
    for item in record["evicted"]:
        console.print(
            f"{verb} {item['repo_id']} {item['commit'][:12]} {variant(item)}, {size(item['bytes'])}, "
            f"last used {ago(item['idle_s'])}"
        )
    nothing = not record["collected"] and not record["evicted"]
    console.print("nothing to remove" if nothing else f"{verb} {size(record['bytes'])}")
    print_unfinished(console, record.get("unfinished", ()))


def print_unfinished(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """The unfinished downloads, a line each."""
    for record in records:
        console.print(f"{unfinished_text(record)}, {size(record['bytes'])}")
    if any(not record["running"] for record in records):
        console.print(
            "an unfinished download goes on with the next seed or start; `modelstore rm --unfinished` drops it"
        )


def unfinished_text(record: Mapping[str, Any]) -> str:
    """An unfinished download in words: its model, how far it is, and how long it is kept."""
    share = f", {record['done'] / record['total']:.0%}" if record["total"] else ""
    state = "downloading" if record["running"] else "unfinished"
    kept = "" if record["running"] else f", kept for {span(record['kept_s'])} more"
    return f"{record['repo_id']} {record['commit'][:12]} {variant(record)}: {state}{share}{kept}"


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
        line = f"{'ok ' if record['ok'] else 'BAD'} {record['repo_id']} {record['commit'][:12]} {variant(record)}"
        if not record["complete"]:
            share = record["compared_bytes"] / record["planned_bytes"]
            line += f" ({share:.0%} compared in this run: run it again to go on)"
        console.print(line)
        for finding in record["findings"]:
            _print_finding(console, finding)
        if not record["ok"]:
            option = " --compress" if record.get("compressed") else ""
            command = f"modelstore seed {record['repo_id']}@{record['commit']} --dtype {record['dtype']}{option}"
            if all(finding["foreign"] for finding in record["findings"]):
                console.print("    a start never reads a file that the manifest does not name: remove it")
            elif is_local(record["repo_id"]):
                console.print(
                    f"    seed its folder again if that is unchanged, else: {command.replace(' seed ', ' rm ')}"
                )
            else:
                console.print(f"    it is made again at the next start, or now: {command}")


def _print_finding(console: Console, finding: Mapping[str, str]) -> None:
    console.print(f"    {finding['path']}: {finding['problem']}")


def print_preview(console: Console, preview: SeedPreview) -> None:
    """The plan of a seed."""
    rows = table("model", "commit", "dtype", "size", "download", "")
    for record in preview.models:
        if "error" in record:
            rows.add_row(
                record["reference"], "", "", "", "", f"failed: {FAILURES.get(record['exit_code'], 'see above')}"
            )
            continue
        is_bound = record.get("compressed") and record["status"] != "present"
        stored = f"{'at most ' if is_bound else ''}{size(record['bytes'])}"
        downloaded = size(record["downloaded_bytes"])
        rows.add_row(record["repo_id"], record["commit"][:12], variant(record), stored, downloaded, record["status"])
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
    needed = max(preview.taken_after, preview.taken_before + preview.peak_bytes)
    if preview.quota and needed > preview.quota:
        remedy = (
            "MODELSTORE_EVICT=1 lets it remove what was not used for longest"
            if preview.evicts
            else ("raise it, name less, or set MODELSTORE_EVICT=1")
        )
        console.print(f"while the models are made it takes up to {size(needed)}, more than MODELSTORE_QUOTA: {remedy}")


def print_seed_result(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """The result of a seed; of several models with a last line that counts."""
    print_seeded(console, [record for record in records if "path" in record])
    for record in records:
        if "error" in record or "path" in record:
            continue
        text = f"{record['status']}: {record['repo_id']} at {record['commit'][:12]} as {variant(record)}"
        if "to" in record:
            console.print(f"{text} on {record['to']}, {size(record['uploaded_bytes'])} sent")
        else:
            console.print(f"{text}, {size(record['bytes'])}")
    failed = [record for record in records if "error" in record]
    if failed:
        lines = dict.fromkeys(map(_failure_text, failed))
        done = {
            (record["repo_id"], record["commit"], record["dtype"], record.get("to"))
            for record in records
            if "error" not in record and record["status"] not in _PRUNED
        }
        verb = "uploaded" if any("to" in record for record in records) else "published"
        console.print(f"{len(done)} of {len(done) + len(lines)} {verb}; failed: {', '.join(lines)}")


def _failure_text(record: Mapping[str, Any]) -> str:
    place = f" on {record['to']}" if "to" in record else ""
    reason = FAILURES.get(record["exit_code"], "see above")
    return f"{record.get('reference') or record['repo_id']}{place} ({reason})"


def key_record(key: SnapshotKey, folder: Path) -> dict[str, Any]:
    """The beginning of a record about the snapshot in `folder`."""
    return {**key.as_json(), "path": str(folder)}
