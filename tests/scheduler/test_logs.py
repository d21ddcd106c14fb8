"""Logs as readers see them: offsets, gaps, tails, and followers fast and slow."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler import logs
from mlbox.scheduler.executors.base import Liveness
from mlbox.scheduler.logs import Chunk, LogBoard, LogFile


def write(folder: Path, **parts: bytes) -> LogFile:
    """A log of files, given by the offset of their first byte (`at_0` is the head)."""
    for name, data in parts.items():
        start = int(name.removeprefix("at_"))
        (folder / (f"log.{start:020d}" if start else "log")).write_bytes(data)
    return LogFile(folder)


def in_the_way(path: Path, kind: str) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.write_text("no folder")
        case "link":
            path.symlink_to("secret")
        case "loop":
            path.symlink_to(path.name)
        case _:
            os.mkfifo(path)


def read_all(log: LogFile, offset: int = 0, limit: int = logs.CHUNK_BYTES) -> list[Chunk]:
    chunks: list[Chunk] = []
    while (chunk := log.read(offset, limit)).end > offset:
        chunks.append(chunk)
        offset = chunk.end
    return chunks


class TestReading:
    def test_a_log_that_is_not_there_is_empty(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            log = LogFile(folder)
            assert (log.size(), log.read(0), log.tail_offset(10)) == (0, Chunk(0, b""), 0)

    def test_it_is_read_by_offset(self, tmp_path):
        log = write(tmp_path, at_0=b"0123456789")
        assert log.size() == 10
        assert log.read(3, 4) == Chunk(3, b"3456")
        assert log.read(10) == Chunk(10, b"")
        assert log.read(99) == Chunk(99, b"")

    def test_it_goes_on_in_the_next_file(self, tmp_path):
        log = write(tmp_path, at_0=b"01234", at_5=b"567", at_8=b"89")
        assert log.size() == 10
        assert read_all(log, 2) == [Chunk(2, b"234"), Chunk(5, b"567"), Chunk(8, b"89")]

    def test_dropped_bytes_are_a_gap(self, tmp_path):
        log = write(tmp_path, at_0=b"0123", at_100=b"ab")
        assert read_all(log) == [Chunk(0, b"0123"), Chunk(100, b"ab")]
        assert log.read(50) == Chunk(100, b"ab")
        assert log.size() == 102

    def test_bytes_dropped_at_the_end_are_a_gap_to_the_end(self, tmp_path):
        log = write(tmp_path, at_0=b"0123", at_100=b"")
        assert read_all(log) == [Chunk(0, b"0123"), Chunk(100, b"")]
        assert log.size() == 100

    def test_a_missing_head_is_a_gap(self, tmp_path):
        assert write(tmp_path, at_7=b"789").read(0) == Chunk(7, b"789")

    def test_it_sees_what_comes_later(self, tmp_path):
        log = write(tmp_path, at_0=b"0123")
        for start in range(4, 64, 4):
            assert log.read(start) == Chunk(start, b"")
            write(tmp_path, **{f"at_{start}": b"more"})
            assert log.read(start) == Chunk(start, b"more")
            assert log.size() == start + 4

    def test_a_file_that_went_while_reading_is_a_gap(self, tmp_path):
        log = write(tmp_path, at_0=b"0", at_1=b"1", at_2=b"2", at_3=b"3")
        assert log.read(1) == Chunk(1, b"1")
        for start in (1, 2):
            (tmp_path / f"log.{start:020d}").unlink()
        assert log.read(1) == Chunk(3, b"3")

    def test_other_files_are_no_part_of_it(self, tmp_path):
        for name in ("log.1", "log.txt", f"log.{7:020d}.tmp", f"xlog.{7:020d}", "shim.log"):
            (tmp_path / name).write_bytes(b"?")
        assert LogFile(tmp_path).size() == 0

    @pytest.mark.parametrize("name", ["log", f"log.{4:020d}"])
    @pytest.mark.parametrize("kind", ["folder", "link", "fifo", "loop"])
    def test_what_is_no_plain_file_is_no_part_of_it(self, tmp_path, name, kind):
        (tmp_path / "secret").write_text("not the job's")
        log = write(tmp_path, at_0=b"0123", at_4=b"4567")
        assert log.size() == 8
        (tmp_path / name).unlink()
        in_the_way(tmp_path / name, kind)
        for reader in (log, LogFile(tmp_path)):
            assert reader.size() == (4 if name != "log" else 8)
            assert read_all(reader) == [Chunk(0, b"0123") if name != "log" else Chunk(4, b"4567")]
            assert reader.tail_offset(5) == (0 if name != "log" else 4)

    @pytest.mark.parametrize("kind", ["folder", "link", "fifo", "loop"])
    def test_a_file_that_is_replaced_after_the_list_was_made_is_gone(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(logs, "_SETTLED_NS", 0)
        (tmp_path / "secret").write_text("not the job's")
        log = write(tmp_path, at_0=b"0123")
        assert log.size() == 4
        listed = tmp_path.stat()
        (tmp_path / "log").unlink()
        in_the_way(tmp_path / "log", kind)
        os.utime(tmp_path, ns=(listed.st_atime_ns, listed.st_mtime_ns))
        assert (log.read(0), log.size()) == (Chunk(0, b""), 0)

    @pytest.mark.parametrize("kind", ["file", "link", "loop", "fifo"])
    def test_a_folder_that_is_none_any_more_has_no_log(self, tmp_path, kind):
        folder = tmp_path / "attempt-1"
        folder.mkdir()
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "log").write_text("not the job's")
        log = write(folder, at_0=b"0123")
        assert log.size() == 4
        (folder / "log").unlink()
        folder.rmdir()
        in_the_way(folder, kind)
        for reader in (log, LogFile(folder)):
            assert (reader.size(), reader.read(0), reader.tail_offset(3)) == (0, Chunk(0, b""), 0)

    def test_the_notice_says_how_much_was_dropped(self):
        assert logs.notice(123) == b"\n[mlbox: 123 bytes of log dropped: over the log's limit, or the disk was full]\n"

    @given(
        kept=st.lists(st.tuples(st.integers(0, 9), st.binary(min_size=1, max_size=20)), max_size=6),
        offset=st.integers(0, 150),
        limit=st.integers(1, 30),
    )
    def test_any_log_reads_as_what_is_kept_in_order(self, tmp_path_factory, kept, offset, limit):
        folder = tmp_path_factory.mktemp("log")
        position, expected = 0, {}
        for gap, data in kept:
            position += gap
            write(folder, **{f"at_{position}": data})
            expected |= {position + i: data[i : i + 1] for i in range(len(data))}
            position += len(data)
        chunks = read_all(LogFile(folder), offset, limit)
        assert LogFile(folder).size() == position
        assert {c.offset + i: c.data[i : i + 1] for c in chunks for i in range(len(c.data))} == {
            at: byte for at, byte in expected.items() if at >= offset
        }


class TestTail:
    @pytest.mark.parametrize(
        ("data", "lines", "tail"),
        [
            (b"a\nb\nc\n", 2, b"b\nc\n"),
            (b"a\nb\nc", 2, b"b\nc"),
            (b"a\nb\nc\n", 3, b"a\nb\nc\n"),
            (b"a\nb\nc\n", 99, b"a\nb\nc\n"),
            (b"a\nb\nc\n", 0, b""),
            (b"\n\n\n", 2, b"\n\n"),
            (b"a", 1, b"a"),
            (b"", 1, b""),
        ],
    )
    def test_it_begins_where_tail_would(self, tmp_path, data, lines, tail):
        log = write(tmp_path, at_0=data)
        assert data[log.tail_offset(lines) :] == tail

    def test_it_reaches_over_blocks_and_files(self, tmp_path):
        line = b"x" * 99 + b"\n"
        log = write(tmp_path, at_0=line * 2000, at_200000=line * 3, at_200300=b"last")
        assert log.tail_offset(1) == 200_300
        assert log.tail_offset(4) == 200_000
        assert log.tail_offset(1004) == 100_000

    def test_it_does_not_reach_over_a_gap(self, tmp_path):
        assert write(tmp_path, at_0=b"a\nb\n", at_100=b"c\nd\n").tail_offset(3) == 100

    def test_without_newlines_it_looks_back_no_further_than_it_may(self, tmp_path):
        log = write(tmp_path, at_0=b"50%\r" * (3 << 20))
        assert log.tail_offset(10) == log.size() - logs.TAIL_BYTES

    @given(data=st.lists(st.sampled_from([b"a", b"\n", b"b\n"]), max_size=30).map(b"".join), lines=st.integers(1, 9))
    def test_it_agrees_with_splitlines(self, tmp_path_factory, data, lines):
        log = write(tmp_path_factory.mktemp("log"), at_0=data)
        assert data[log.tail_offset(lines) :] == b"".join(data.splitlines(keepends=True)[-lines:])


@asynccontextmanager
async def running_board() -> AsyncIterator[LogBoard]:
    board = LogBoard()
    async with asyncio.TaskGroup() as group:
        run = group.create_task(board.run())
        yield board
        run.cancel()


async def collect(board: LogBoard, folder: Path, ended: Callable[[], bool], offset: int = 0, slow_s: float = 0.0):
    """Everything a follower gets: the bytes, and how many it was told were dropped."""
    data, dropped = bytearray(), 0
    async with aclosing(board.follow(folder, offset, ended)) as chunks:
        async for chunk in chunks:
            dropped += chunk.offset - offset
            data += chunk.data
            offset = chunk.end
            if slow_s:
                await asyncio.sleep(slow_s)
    return bytes(data), dropped


class Writer:
    """Appends to a log bit by bit."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.ended = False
        self._file = (folder / "log").open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def end(self) -> None:
        self._file.close()
        self.ended = True


class TestFollowing:
    async def test_a_log_that_has_ended_is_given_whole(self, tmp_path):
        write(tmp_path, at_0=b"x" * 200_000)
        async with running_board() as board, asyncio.timeout(10):
            assert await collect(board, tmp_path, lambda: True) == (b"x" * 200_000, 0)

    async def test_the_end_of_a_log_without_bytes_ends_the_following(self, tmp_path):
        async with running_board() as board, asyncio.timeout(10):
            assert await collect(board, tmp_path / "never", lambda: True) == (b"", 0)

    async def test_new_bytes_come_within_moments(self, tmp_path):
        writer = Writer(tmp_path)
        async with (
            running_board() as board,
            asyncio.timeout(20),
            aclosing(board.follow(tmp_path, 0, lambda: False)) as chunks,
        ):
            for number in range(5):
                writer.write(b"%d\n" % number)
                wrote_at = time.monotonic()
                assert (await anext(chunks)).data == b"%d\n" % number
                assert time.monotonic() - wrote_at < 1.0
        writer.end()

    async def test_an_attempt_that_has_not_begun_is_waited_for(self, tmp_path):
        folder = tmp_path / "attempt-1"
        state = {"ended": False}
        async with running_board() as board, asyncio.timeout(10):
            following = asyncio.create_task(collect(board, folder, lambda: state["ended"]))
            await asyncio.sleep(0)
            writer = Writer(folder)
            writer.write(b"hello")
            writer.end()
            state["ended"] = True
            assert await following == (b"hello", 0)

    async def test_bytes_written_just_before_the_end_are_given(self, tmp_path):
        async with running_board() as board, asyncio.timeout(60):
            for number in range(20):
                writer = Writer(tmp_path / str(number))
                following = asyncio.create_task(collect(board, tmp_path / str(number), lambda w=writer: w.ended))
                await asyncio.sleep(random.uniform(0, 0.02))
                writer.write(b"last words")
                writer.end()
                assert await following == (b"last words", 0)

    async def test_one_may_follow_from_any_offset(self, tmp_path):
        write(tmp_path, at_0=b"0123456789")
        async with running_board() as board, asyncio.timeout(10):
            for offset in (0, 4, 10, 11, 10**15):
                assert await collect(board, tmp_path, lambda: True, offset) == (b"0123456789"[offset:], 0)

    async def test_gaps_are_told(self, tmp_path):
        write(tmp_path, at_0=b"0123", at_100=b"ab", at_200=b"")
        async with running_board() as board, asyncio.timeout(10):
            assert await collect(board, tmp_path, lambda: True) == (b"0123ab", 96 + 98)

    async def test_all_get_every_byte_at_their_own_pace(self, tmp_path):
        writer = Writer(tmp_path)
        wrote = bytearray()
        async with running_board() as board, asyncio.timeout(60):
            followers = [
                asyncio.create_task(collect(board, tmp_path, lambda: writer.ended, slow_s=slow_s))
                for slow_s in (0, 0, 0, 0.003, 0.02)
            ]
            for number in range(400):
                line = b"%d " % number * random.randrange(2000)
                wrote += line
                writer.write(line)
                await asyncio.sleep(0.001)
                if number == 200:
                    followers.append(asyncio.create_task(collect(board, tmp_path, lambda: writer.ended)))
            writer.end()
            for follower in followers:
                assert await follower == (wrote, 0)

    async def test_a_follower_that_stops_reading_holds_nobody_up(self, tmp_path):
        writer = Writer(tmp_path)
        async with running_board() as board, asyncio.timeout(20):
            stuck = board.follow(tmp_path, 0, lambda: writer.ended)
            writer.write(b"first")
            assert (await anext(stuck)).data == b"first"
            following = asyncio.create_task(collect(board, tmp_path, lambda: writer.ended))
            writer.write(b"x" * 3_000_000)
            writer.end()
            assert len((await following)[0]) == 3_000_005
            assert len((await anext(stuck)).data) <= logs.CHUNK_BYTES
            await stuck.aclose()

    async def test_a_deleted_log_ends_the_following(self, tmp_path):
        write(tmp_path, at_0=b"x" * 100_000)
        state = {"ended": False}
        async with running_board() as board, asyncio.timeout(10):
            chunks = board.follow(tmp_path, 0, lambda: state["ended"])
            assert await anext(chunks)
            (tmp_path / "log").unlink()
            state["ended"] = True
            assert [chunk async for chunk in chunks] == []

    async def test_nothing_is_kept_of_logs_that_nobody_follows(self, tmp_path):
        write(tmp_path, at_0=b"x")
        async with running_board() as board, asyncio.timeout(10):
            chunks = board.follow(tmp_path, 0, lambda: False)
            await anext(chunks)
            await chunks.aclose()
            waiting = asyncio.create_task(collect(board, tmp_path / "never", lambda: False))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert board.followed == 0

    async def test_many_followers_wait_on_one_log(self, tmp_path):
        writer = Writer(tmp_path)
        async with running_board() as board, asyncio.timeout(60):
            followers = [asyncio.create_task(collect(board, tmp_path, lambda: writer.ended)) for _ in range(2000)]
            await asyncio.sleep(0)
            writer.write(b"hello")
            writer.end()
            assert set(await asyncio.gather(*followers)) == {(b"hello", 0)}


class TestLogsOfRealJobs:
    async def test_a_job_is_followed_from_before_its_start_to_its_end(self, attempt):
        def ended() -> bool:
            return attempt.observe().liveness is Liveness.ENDED

        async with running_board() as board, asyncio.timeout(60):
            followers = [asyncio.create_task(collect(board, attempt.folder, ended)) for _ in range(5)]
            await asyncio.sleep(0)
            attempt.python("import time\nfor i in range(50): print(i, flush=True); time.sleep(0.01)")
            expected = b"".join(b"%d\n" % number for number in range(50))
            for follower in followers:
                assert await follower == (expected, 0)

    async def test_a_log_over_its_cap_is_followed_with_its_gap(self, attempt):
        def ended() -> bool:
            return attempt.observe().liveness is Liveness.ENDED

        attempt.python("for i in range(100_000): print(i)", log_head_bytes=1000, log_tail_bytes=20_000)
        async with running_board() as board, asyncio.timeout(60):
            data, dropped = await collect(board, attempt.folder, ended)
        wrote = b"".join(b"%d\n" % number for number in range(100_000))
        assert len(data) + dropped == len(wrote)
        assert data.startswith(wrote[:1000])
        assert data.endswith(wrote[-18_000:])

    async def test_the_end_of_a_log_that_was_dropped_is_told(self, attempt):
        ended = attempt.run("head", "-c", "5000", "/dev/zero", log_head_bytes=100, log_tail_bytes=0)
        assert ended.log_dropped_bytes == 4900
        async with running_board() as board, asyncio.timeout(10):
            assert await collect(board, attempt.folder, lambda: True) == (bytes(100), 4900)
        assert LogFile(attempt.folder).size() == 5000
