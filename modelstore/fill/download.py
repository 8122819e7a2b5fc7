"""Fill staging from a source: several files and byte ranges at once, each file verified once it is whole.

Bytes are kept granule by granule (`staged_file.py`): if a download was cut, another process on another host goes on
at that byte. A source that fails is tried again from there; one that sends wrong bytes once more from the
start; one that ignores ranges is read as a whole by one thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

from modelstore.errors import DigestMismatch, HubUnavailable, ModelStoreError
from modelstore.fill.progress import Progress
from modelstore.fill.source import ByteStream, Resolved, Source, SourceFile, backoff_s
from modelstore.fill.staged_file import GRANULE_BYTES, StagedFile
from modelstore.volume.layout import StagingLayout

CONNECTIONS = 8
_MIN_SPAN_BYTES = 1 << 20
_MAX_SPAN_BYTES = 64 << 20
_ATTEMPTS = 6
_POLL_S = 0.05
_FIRST_CONNECTIONS = 2
_RAMP_S = 0.2
_FAST_BYTES_PER_S = 150e6

logger = logging.getLogger(__name__)


Memory = Callable[[SourceFile], memoryview | None]


class Download:
    """Fetches files of one commit into staging.

    `guard` is called before each request and each granule and raises if the claim was lost. `inherited` is staging
    of earlier generations, to copy from. `memory` gives memory that a file's bytes shall go to as well.
    """

    def __init__(
        self,
        source: Source,
        resolved: Resolved,
        staging: StagingLayout,
        *,
        inherited: Sequence[StagingLayout] = (),
        guard: Callable[[], None],
        progress: Progress,
        memory: Memory = lambda _file: None,
        connections: int = CONNECTIONS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source = source
        self._resolved = resolved
        self._staging = staging
        self._inherited = inherited
        self._guard = guard
        self._progress = progress
        self._memory = memory
        self._connections = connections
        self._sleep = sleep

    def fetch(
        self,
        files: Iterable[SourceFile],
        *,
        try_begin: Callable[[SourceFile], bool] = lambda _file: True,
        on_begin: Callable[[StagedFile], object] = lambda _staged: None,
    ) -> list[StagedFile]:
        """Fetch `files`, in this order as far as parallel ranges allow; returns them, verified, in this order.

        `try_begin` is called again and again until it lets the next file begin. `on_begin` gets each file when its
        bytes begin to arrive, from the thread that fetches it. The first error, theirs or ours, stops the download; the
        bytes that have arrived stay for a resume.
        """
        wanted = list(files)
        queue = _SpanQueue(wanted, self._connections, try_begin)
        begun: dict[str, StagedFile] = {}

        def begin(file: SourceFile) -> StagedFile:
            staged = begun[file.path] = StagedFile(file, self._staging, self._memory(file))
            on_begin(staged)
            kept = staged.resume(self._inherited)
            self._progress.begin(file.path, file.size_bytes)
            self._progress.add(file.path, done=kept, reused=kept)
            return staged

        try:
            with ThreadPoolExecutor(self._connections, thread_name_prefix="fetch") as pool:
                workers = [pool.submit(self._work, queue, begin, number) for number in range(self._connections)]
                try:
                    wait(workers)
                except BaseException as error:  # Ctrl-C: without this the pool's end would wait for the whole download
                    queue.stop(error)
                    raise
            if queue.error is not None:
                raise queue.error
        finally:
            for staged in begun.values():
                with suppress(ModelStoreError, OSError):  # of files that were not finished: another error is reported
                    staged.close()
        return [begun[file.path] for file in wanted]

    def _work(self, queue: _SpanQueue, begin: Callable[[SourceFile], StagedFile], number: int) -> None:
        try:
            self._join_in(queue, number)
            while (span := queue.next(begin)) is not None:
                self._fetch_span(span, queue)
                if queue.stopped:
                    return
                if queue.finish_span(span):
                    self._finish(span.staged, queue)
        except BaseException as error:  # reported by `fetch`, after every thread has stopped
            queue.stop(error)

    def _join_in(self, queue: _SpanQueue, number: int) -> None:
        """Return when connection `number` is wanted: the first two at once, the others one by one while those at work
        are slow. If two are fast, more of them only get in each other's way (measured: 0.6 s with two, 1.2 s with
        eight for 0.5 GB on loopback)."""
        began, before, pause_s = time.monotonic(), self._progress.done, _RAMP_S * (number - 1)
        while number >= _FIRST_CONNECTIONS and queue.wait_while_busy(pause_s):
            rate = (self._progress.done - before) / (time.monotonic() - began)
            if rate < queue.working * _FAST_BYTES_PER_S:
                break
            pause_s = _RAMP_S
        queue.working += 1

    def _finish(self, staged: StagedFile, queue: _SpanQueue) -> None:
        """Check the digests; on a mismatch fetch the whole file once more, then give up."""
        try:
            staged.finish()
        except DigestMismatch as error:
            logger.warning("%s (fetching it once more)", error)
            staged.forget()
            self._progress.add(done=-staged.file.size_bytes)
            self._progress.begin(staged.file.path, staged.file.size_bytes)
            self._fetch_span(_Span(staged, 0, staged.granules), queue)
            if queue.stopped:
                return
            try:
                staged.finish()
            except DigestMismatch:
                staged.forget()
                raise

    def _fetch_span(self, span: _Span, queue: _SpanQueue) -> None:
        """Fetch the missing granules of a span; if the source fails, go on from there."""
        attempt = 0
        while (index := span.first_missing()) is not None and not queue.stopped:
            self._guard()
            try:
                self._stream(span, index, queue)
            except HubUnavailable as error:
                attempt = 1 if span.first_missing() != index else attempt + 1
                if attempt >= _ATTEMPTS:
                    raise
                delay = backoff_s(attempt, error.retry_after_s)
                logger.info("%s (going on in %.1f s)", error, delay)
                self._sleep(delay)

    def _stream(self, span: _Span, index: int, queue: _SpanQueue) -> None:
        """One request, from granule `index` to the end of the span."""
        file = span.staged.file
        start, end = index * GRANULE_BYTES, min(span.end * GRANULE_BYTES, file.size_bytes)
        with self._source.open(self._resolved, file, start, end - start) as stream:
            if stream.offset == start:
                self._store(span.staged, stream, end, queue)
                return
            # The source ignores ranges. One thread takes the whole file from its stream; the others, whose streams
            # would give the same, drop theirs and wait for it.
            if span.staged.whole_stream.acquire(blocking=False):
                try:
                    if span.first_missing() is not None:
                        self._store(span.staged, stream, file.size_bytes, queue)
                finally:
                    span.staged.whole_stream.release()
                return
        with span.staged.whole_stream:
            return

    def _store(self, staged: StagedFile, stream: ByteStream, end: int, queue: _SpanQueue) -> None:
        """Cut a stream into granules and store them, until `end`."""
        position = stream.offset
        while position < end and not queue.stopped:
            granule = bytearray(min(GRANULE_BYTES, end - position))
            self._fill(memoryview(granule), stream, staged)
            self._guard()
            if staged.put(position // GRANULE_BYTES, granule):
                self._progress.add(staged.file.path, done=len(granule))
            position += len(granule)

    def _fill(self, view: memoryview, stream: ByteStream, staged: StagedFile) -> None:
        while view:
            count = stream.readinto(view)
            if count == 0:
                raise HubUnavailable(f"the connection for {staged.file.path} ended early")
            if self._source.over_network:
                self._progress.add(network=count)
            view = view[count:]


@dataclass(slots=True)
class _Span:
    """Granules [first, end) of one file: the range of one request."""

    staged: StagedFile
    first: int
    end: int

    def first_missing(self) -> int | None:
        return next((i for i in range(self.first, self.end) if not self.staged.has(i)), None)


class _SpanQueue:
    """Hands out spans in file order to many threads, and knows when a file's last one is done."""

    def __init__(
        self, files: list[SourceFile], connections: int, try_begin: Callable[[SourceFile], bool] = lambda _: True
    ) -> None:
        self._files = deque(files)
        self._try_begin = try_begin
        share = sum(file.size_bytes for file in files) // (connections * 4)
        self._span_granules = max(_MIN_SPAN_BYTES, min(_MAX_SPAN_BYTES, share)) // GRANULE_BYTES
        self._spans: deque[_Span] = deque()
        self._left: dict[str, int] = {}
        self._opening = 0
        self.working = 0
        self._changed = threading.Condition()
        self.stopped = False
        self.error: BaseException | None = None

    def next(self, open_file: Callable[[SourceFile], StagedFile]) -> _Span | None:
        """The next span, or None if no more will come. It may open a file, and read what staging has of it."""
        with self._changed:
            while not self._spans:
                if self.stopped or (not self._files and not self._opening):
                    return None
                # A fresh file opens in no time: waiting for its spans keeps the download in file order. One with much
                # to compare takes long, and another thread goes on with the next file.
                if self._files and not (self._opening and self._changed.wait(_POLL_S)):
                    if not self._spans and self._files and self._try_begin(self._files[0]):
                        break
                    self._changed.wait(_POLL_S)
                elif not self._files:
                    self._changed.wait(0.5)
            if self._spans:
                span = self._spans.popleft()
                self._changed.notify_all()  # that may have been the last
                return span
            file = self._files.popleft()
            self._opening += 1
        try:
            staged = open_file(file)
            spans = list(self._split(staged))
        finally:
            with self._changed:
                self._opening -= 1
                self._changed.notify_all()
        with self._changed:
            self._left[file.path] = len(spans)
            self._spans.extend(spans[1:])
            self._changed.notify_all()
        return spans[0]

    def wait_while_busy(self, seconds: float) -> bool:
        """Wait so long, or until nothing is left to hand out. Returns whether something is left."""
        with self._changed:
            return not self._changed.wait_for(lambda: self.stopped or not (self._spans or self._files), seconds)

    def finish_span(self, span: _Span) -> bool:
        """Count a span as done; True if it was its file's last."""
        with self._changed:
            self._left[span.staged.file.path] -= 1
            return self._left[span.staged.file.path] == 0

    def stop(self, error: BaseException) -> None:
        """Let every thread stop at its next granule; the first error is the one that counts."""
        with self._changed:
            self.error = self.error or error
            self.stopped = True
            self._changed.notify_all()

    def _split(self, staged: StagedFile) -> Iterator[_Span]:
        gaps = staged.missing()
        if not gaps:
            yield _Span(staged, 0, 0)
        for first, end in gaps:
            for start in range(first, end, self._span_granules):
                yield _Span(staged, start, min(end, start + self._span_granules))
