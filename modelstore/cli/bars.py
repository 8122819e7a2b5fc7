"""Progress on a terminal: a bar for all models, for each model, and for each of its files that is on its way."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column, Table

from modelstore.fill.observer import Observer
from modelstore.fill.progress import Progress
from modelstore.volume.claim import Holder
from modelstore.volume.layout import SnapshotKey

T = TypeVar("T")


@contextmanager
def bars(models: int, verb: str) -> Iterator[Observer]:
    """The observer that draws the progress of so many models on stderr; `verb` goes before their names."""
    with _Bars(Console(stderr=True, markup=False)) as drawn:
        yield _BarObserver(drawn, models, verb)


class _Bars(Bars):
    """Progress bars with names that are cut rather than wrapped, in the order of their `place`."""

    def __init__(self, console: Console) -> None:
        bar = max(8, min(40, console.width - 70))
        named = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        columns = (named, BarColumn(bar), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(compact=True))
        self._terminal = console  # rich's own is not there yet when it first asks for the rows
        super().__init__(*columns, console=console, transient=True, expand=True)

    def get_renderables(self) -> Iterator[Table]:
        rows = sorted(self.tasks, key=lambda task: task.fields["place"])
        if len(rows) > self._terminal.height:  # running downloads are shown rather than finished ones
            rows = rows[:1] + [task for task in rows[1:] if task.remaining != 0]
        yield self.make_tasks_table(rows)


class _BarObserver(Observer):
    """On a terminal: a bar for all models, and for each model, with its files that are on their way below it."""

    def __init__(self, bars: Bars, models: int, verb: str) -> None:
        self._verb = verb
        self._bars = bars
        self._models: dict[SnapshotKey, TaskID] = {}
        self._files: dict[tuple[SnapshotKey, str], TaskID] = {}
        self._all = bars.add_task("all", total=None, place=("",)) if models > 1 else None
        self._lock = threading.Lock()

    def filling(self, key: SnapshotKey, progress: Progress) -> None:
        with self._lock:
            self._draw(self._models, key, f"{self._verb}{key}", (str(key),), progress.done, progress.total)
            under_way = {(key, path): amounts for path, amounts in progress.files.items()}
            self._drop_files(key, but=under_way)
            for task, (arrived, size_bytes) in under_way.items():
                self._draw(self._files, task, f"  {task[1]}", (str(key), task[1]), arrived, size_bytes)
            self._sum_up()

    def waiting(self, key: SnapshotKey, holder: Holder, *, left_s: float) -> None:
        record = holder.record
        label = f"waiting for {record.worker if record else 'another worker'}: {key}"
        with self._lock:
            self._drop_files(key)
            self._draw(
                self._models, key, label, (str(key),), record.done if record else 0, record.total if record else 0
            )
            self._sum_up()

    def failed(self, key: SnapshotKey) -> None:
        with self._lock:
            self._drop_files(key)
            if key in self._models:
                self._bars.remove_task(self._models.pop(key))
            self._sum_up()

    def _drop_files(self, key: SnapshotKey, but: Container[tuple[SnapshotKey, str]] = ()) -> None:
        for done in [task for task in self._files if task[0] == key and task not in but]:
            self._bars.remove_task(self._files.pop(done))

    def _draw(self, tasks: dict[T, TaskID], task: T, label: str, place: tuple[str, ...], done: int, total: int) -> None:
        if task not in tasks:
            tasks[task] = self._bars.add_task(label, total=None, place=place)
        self._bars.update(tasks[task], description=label, completed=done, total=total or None)

    def _sum_up(self) -> None:
        if self._all is not None:
            models = [task for task in self._bars.tasks if task.id in self._models.values()]
            size = sum(task.total or 0 for task in models)
            self._bars.update(self._all, completed=sum(task.completed for task in models), total=size or None)
