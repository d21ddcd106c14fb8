"""Reads the logs of attempts as streams of bytes, and follows them as they grow. The door to log files.

An offset counts all bytes that the job wrote. The shim keeps a log in several files, each named by the offset of its
first byte; where one ends before the next begins, bytes were dropped (see `shim.Log`). The folder is within the job's
reach: what is no plain file there is taken as gone.
"""

import asyncio
import bisect
import os
import re
import stat
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mlbox.scheduler.folders import facts_of, open_plain

CHUNK_BYTES = 1 << 16
"""The most a follower gets at once: what an HTTP server buffers for one connection, too."""
TAIL_BYTES = 8 << 20
"""How far back `tail_offset` looks: a log of progress bars may hold no newline at all."""
_HEAD = "log"
_SEGMENT = re.compile(r"log\.[0-9]{20}")
_TRIES = 3
_PAUSE_S = 0.1
_IDLE_PAUSE_S = 0.25
"""A log that does not grow is looked at less and less often, down to this."""
_BEHIND_PAUSE_S = 0.01
_SHARED_BYTES = 1 << 20
"""How much of one log is shared at a time: a tenth of a second at 10 MB/s."""
_FAR_BEHIND_BYTES = 8 * _SHARED_BYTES
"""When the board is this far behind a log, it goes to the end, and followers read what is between themselves."""
_READS = 2
"""How many followers read files at a time: they share the daemon's few threads with everything else."""
_WOKEN_AT_ONCE = 256
_SETTLED_NS = 50_000_000
"""A folder's time stamp is as coarse as the kernel's tick (up to 10 ms): a list made sooner may miss a later file."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a log and the offset of the first of them, which is past the one asked for where bytes were dropped."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


def notice(dropped_bytes: int) -> bytes:
    """The line that stands for dropped bytes where a log is shown to people."""
    return f"\n[mlbox: {dropped_bytes} bytes of log dropped: over the log's limit, or the disk was full]\n".encode()


class LogFile:
    """The log of the attempt in `folder`; empty as long as there is none. Blocking, for one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts: list[int] = []
        self._changed_ns = -1
        self._listed_ns = 0

    def size(self) -> int:
        """The offset of the log's end: how many bytes the job has written so far."""
        for _ in range(_TRIES):
            starts = self._files()
            if not starts:
                return 0
            with suppress(FileNotFoundError):
                return starts[-1] + facts_of(self._path(starts[-1]), stat.S_IFREG).st_size
            self._forget()
        return 0

    def read(self, offset: int, limit: int = CHUNK_BYTES) -> Chunk:
        """Up to `limit` bytes from `offset` on, or from the next byte that was kept; none at the end of the log.

        Fewer than `limit` do not mean the end: a read stays within one file.
        """
        chunk = self._read(offset, limit)
        if chunk.offset != offset:  # believed of a fresh list only
            self._forget()
            chunk = self._read(offset, limit)
        return chunk

    def tail_offset(self, lines: int) -> int:
        """Where the last `lines` lines begin; no further back than TAIL_BYTES or the last dropped byte."""
        end = position = self.size()
        floor = max(0, end - TAIL_BYTES)
        while position > floor and lines > 0:
            start = max(floor, position - CHUNK_BYTES)
            block = self._contiguous(start, position)
            newline = len(block.data)
            if block.end == end and block.data.endswith(b"\n"):
                newline -= 1  # ends the last line, begins none
            while (newline := block.data.rfind(b"\n", 0, newline)) >= 0:
                lines -= 1
                if lines == 0:
                    return block.offset + newline + 1
            position = block.offset
            if position > start:
                break
        return position

    def _contiguous(self, start: int, end: int) -> Chunk:
        """The longest part of `start` to `end` that reaches `end` without a gap."""
        block = Chunk(start, b"")
        while block.end < end:
            chunk = self.read(block.end, end - block.end)
            if chunk.offset > block.end:
                block = Chunk(min(chunk.offset, end), chunk.data[: max(0, end - chunk.offset)])
            elif chunk.data:
                block = Chunk(block.offset, block.data + chunk.data)
            else:
                return Chunk(end, b"")  # its files are gone
        return block

    def _read(self, offset: int, limit: int) -> Chunk:
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                return self._first_kept(offset, limit)
            self._forget()
        return Chunk(offset, b"")

    def _first_kept(self, offset: int, limit: int) -> Chunk:
        # A file is written before the next one is made, so what is listed but last does not grow any more.
        starts = self._files()
        chunk = Chunk(offset, b"")
        for start in starts[max(0, bisect.bisect_right(starts, offset) - 1) :]:
            chunk = self._read_file(start, max(start, offset), limit)
            if chunk.data:
                break
        return chunk

    def _read_file(self, start: int, offset: int, limit: int) -> Chunk:
        file = open_plain(self._path(start))
        try:
            return Chunk(offset, os.pread(file, limit, offset - start))
        finally:
            os.close(file)

    def _files(self) -> list[int]:
        """Where the files of the log begin, ascending. Listed again only when the folder has changed."""
        try:
            changed_ns = facts_of(self._folder, stat.S_IFDIR).st_mtime_ns
            if changed_ns != self._changed_ns or self._listed_ns - changed_ns < _SETTLED_NS:
                self._listed_ns = time.time_ns()
                self._starts = sorted(_starts(os.scandir(self._folder)))
                self._changed_ns = changed_ns
        except (FileNotFoundError, NotADirectoryError):
            self._starts = []
        return self._starts

    def _forget(self) -> None:
        self._changed_ns = -1

    def _path(self, start: int) -> Path:
        return self._folder / (f"{_HEAD}.{start:020d}" if start else _HEAD)


def _starts(entries: Iterable[os.DirEntry[str]]) -> Iterable[int]:
    for entry in entries:
        if (entry.name == _HEAD or _SEGMENT.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
            yield int(entry.name.removeprefix(_HEAD).removeprefix(".") or 0)


@dataclass(frozen=True, slots=True)
class _View:
    """What one look at a log found: its end, up to where it was read, and the chunks read.

    Each chunk is under the offset at which it was asked for.
    """

    end: int
    read_to: int
    chunks: tuple[tuple[int, Chunk], ...] = ()

    def chunk_at(self, offset: int) -> Chunk | None:
        """The chunk that goes on at `offset`, if it is here."""
        for asked, chunk in self.chunks:
            if asked == offset:
                return chunk
            if chunk.offset <= offset < chunk.end:
                return Chunk(offset, chunk.data[offset - chunk.offset :])
        return None


@dataclass(slots=True)
class _Watch:
    """What all followers of one log share. Only `log` is touched outside the event loop, by one look at a time."""

    log: LogFile
    ended: Callable[[], bool]
    view: _View | None = None
    finished: bool = False
    followers: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list[asyncio.Future[None]])
    due: float = 0.0
    pause_s: float = _PAUSE_S


class LogBoard:
    """Lets any number of followers read logs as they grow, each at its own pace.

    The board looks at each followed log ten times a second and hands the new bytes to all who have read that far;
    whoever is behind reads for itself. A follower holds one chunk at most, so a slow one costs nobody anything.
    `run` must be running, on the same event loop.
    """

    def __init__(self) -> None:
        self._watches: dict[Path, _Watch] = {}
        self._new_watch = asyncio.Event()
        self._reads = asyncio.Semaphore(_READS)

    @property
    def followed(self) -> int:
        """How many logs are followed now."""
        return len(self._watches)

    async def run(self) -> None:
        """Look at the followed logs, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            due = [watch for watch in self._watches.values() if watch.due <= now]
            if due:
                await self._look(due)
            self._new_watch.clear()
            next_due = min((watch.due for watch in self._watches.values()), default=None)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_due):
                    await self._new_watch.wait()

    async def follow(self, folder: Path, offset: int, ended: Callable[[], bool]) -> AsyncGenerator[Chunk]:
        """The log of the attempt in `folder` from `offset` on, until `ended` says so and every byte was given.

        The attempt need not have begun. `ended` is asked on the event loop, often: it must be a mere look-up, the
        same for all followers of one attempt, and True only when nothing is written to the log any more. A chunk
        without bytes says that everything before its offset was dropped. Close it with `contextlib.aclosing`.
        """
        watch = self._enter(folder, ended)
        log = LogFile(folder)
        try:
            while True:
                if watch.view is not None and offset < watch.view.end:
                    chunk = watch.view.chunk_at(offset) or await self._read(log, offset)
                    if chunk.end > offset:
                        yield chunk
                        offset = chunk.end
                        continue
                if watch.finished:
                    return
                news = asyncio.get_running_loop().create_future()
                watch.waiting.append(news)
                await news
        finally:
            watch.followers -= 1
            if not watch.followers and self._watches.get(folder) is watch:
                del self._watches[folder]

    def _enter(self, folder: Path, ended: Callable[[], bool]) -> _Watch:
        watch = self._watches.get(folder)
        if watch is None:
            watch = self._watches[folder] = _Watch(LogFile(folder), ended)
            self._new_watch.set()
        watch.followers += 1
        return watch

    async def _read(self, log: LogFile, offset: int) -> Chunk:
        async with self._reads:
            return await asyncio.to_thread(log.read, offset)

    async def _look(self, watches: list[_Watch]) -> None:
        # Asked before the look, so that the look sees the last bytes of a log that has ended.
        ended = [watch.ended() for watch in watches]
        views = await asyncio.to_thread(_look_at, [(watch.log, watch.view) for watch in watches])
        now = asyncio.get_running_loop().time()
        for watch, finished, view in zip(watches, ended, views, strict=True):
            grown = watch.view is None or watch.view.end != view.end
            if view.read_to < view.end:
                watch.pause_s = _BEHIND_PAUSE_S
            else:
                watch.pause_s = _PAUSE_S if grown else min(_IDLE_PAUSE_S, watch.pause_s * 1.5)
            watch.due = now + watch.pause_s
            watch.view = view
            watch.finished = finished
            if grown or finished:
                await _wake(watch)


def _look_at(logs: list[tuple[LogFile, _View | None]]) -> list[_View]:
    return [_look(log, before) for log, before in logs]


def _look(log: LogFile, before: _View | None) -> _View:
    """Read what came since `before`, or a part of it."""
    end = log.size()
    if before is None or end - before.read_to > _FAR_BEHIND_BYTES:
        return _View(end, end)
    chunks: list[tuple[int, Chunk]] = []
    position = before.read_to
    while position < min(end, before.read_to + _SHARED_BYTES):
        chunk = log.read(position)
        if chunk.end == position:
            break
        chunks.append((position, chunk))
        position = chunk.end
    return _View(end, position, tuple(chunks))


async def _wake(watch: _Watch) -> None:
    """Let the followers go on, some at a time, so that ten thousand of them do not hold everybody else up."""
    waiting, watch.waiting = watch.waiting, []
    for start in range(0, len(waiting), _WOKEN_AT_ONCE):
        for news in waiting[start : start + _WOKEN_AT_ONCE]:
            if not news.done():
                news.set_result(None)
        await asyncio.sleep(0)
