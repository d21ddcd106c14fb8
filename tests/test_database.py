"""The database keeps what it acknowledged, whatever is cancelled, killed, full, locked or crashing."""

import asyncio
import contextlib
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

import mlbox.database
from mlbox.database import Database, FolderLock, SchemaTooNew
from mlbox.errors import Conflict, Unavailable

NEWEST = max(int(entry.name[:4]) for entry in resources.files("mlbox.migrations").iterdir() if ".sql" in entry.name)


@pytest.fixture
async def notes(database: Database) -> Database:
    """A database with a table for the tests' own rows."""
    await database.write(lambda connection: connection.execute("CREATE TABLE notes (id INTEGER, half TEXT)"))
    return database


def put(connection: sqlite3.Connection, number: int) -> int:
    """Two rows that belong together."""
    connection.execute("INSERT INTO notes VALUES (?, 'first')", (number,))
    connection.execute("INSERT INTO notes VALUES (?, 'second')", (number,))
    return number


def wide(connection: sqlite3.Connection, number: int) -> int:
    """The same with 20 KB in it, so that it needs room of its own on the disk."""
    connection.executemany("INSERT INTO notes VALUES (?, ?)", [(number, "x" * 10_000)] * 2)
    return number


def halves(connection: sqlite3.Connection) -> dict[int, int]:
    """How many of its two rows each number has."""
    return {row[0]: row[1] for row in connection.execute("SELECT id, count(*) FROM notes GROUP BY id")}


def pragma(name: str) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]


def contents(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


@contextlib.asynccontextmanager
async def one_group(database: Database) -> AsyncIterator[None]:
    """Hold the writing thread, so that the writes begun in this block share one commit."""
    held, go_on = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        held.set()
        go_on.wait(10)

    first = asyncio.create_task(database.write(hold))
    await asyncio.to_thread(held.wait, 10)
    yield
    await asyncio.sleep(0)  # the tasks made in the block queue their writes
    go_on.set()
    await first


@contextlib.contextmanager
def outsider(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody else, which waits for no lock."""
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
        yield connection


# Transactions


async def test_a_cancelled_writer_loses_nothing_and_locks_nothing(notes: Database, tmp_path: Path) -> None:
    chance = random.Random(2)
    acknowledged: set[int] = set()
    competitor_done = 0
    stop = False

    async def compete() -> None:
        nonlocal competitor_done
        while not stop:
            await notes.write(put, 1_000_000 + competitor_done)
            competitor_done += 1

    async def write(number: int) -> None:
        acknowledged.add(await notes.write(put, number))

    competitor = asyncio.create_task(compete())
    for number in range(200):
        writer = asyncio.create_task(write(number))
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(chance.choice((0, 0, 0.0005)))
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
    stop = True
    await competitor
    await notes.write(put, 2_000_000_000)  # behind what the last of the cancelled have queued

    found = await notes.read(halves)
    assert set(found.values()) == {2}
    assert acknowledged <= found.keys()
    assert {1_000_000 + done for done in range(competitor_done)} <= found.keys()
    assert 0 < len(acknowledged) < 200, "some were cancelled before, some after their commit"
    with outsider(tmp_path / "mlbox.db") as other:
        other.execute("BEGIN IMMEDIATE")  # raises at once if the file were left locked
        assert other.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


async def test_writes_of_one_commit_fail_alone(notes: Database) -> None:
    def spoil(connection: sqlite3.Connection, error: BaseException) -> None:
        put(connection, 66)
        raise error

    async with one_group(notes):
        errors = (ValueError("bad"), KeyError("x"), StopIteration())
        bad = [asyncio.create_task(notes.write(spoil, error)) for error in errors]
        good = [asyncio.create_task(notes.write(put, number)) for number in range(5)]
    assert await asyncio.gather(*good) == [0, 1, 2, 3, 4]
    outcomes = await asyncio.gather(*bad, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError, KeyError, RuntimeError]
    assert await notes.read(halves) == dict.fromkeys(range(5), 2)


async def test_a_mistake_in_a_query_is_raised_as_it_is(notes: Database) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await notes.write(lambda connection: connection.execute("INSERT INTO missing VALUES (1)"))
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await notes.read(lambda connection: connection.execute("SELECT * FROM missing"))
    with pytest.raises(sqlite3.IntegrityError):
        await notes.write(lambda connection: connection.execute("INSERT INTO job_counts VALUES ('queued', 1)"))


async def test_a_function_that_ends_the_transaction_itself_hangs_nobody(notes: Database) -> None:
    def meddle(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")
        raise ValueError("gone")

    async with one_group(notes):
        bad = asyncio.create_task(notes.write(meddle))
        good = asyncio.create_task(notes.write(put, 1))
    async with asyncio.timeout(10):
        with pytest.raises(ValueError, match="gone"):
            await bad
        assert await good == 1
    assert await notes.read(halves) == {1: 2}


async def test_a_read_sees_every_write_that_was_answered(notes: Database) -> None:
    for number in range(50):
        await notes.write(put, number)
        assert number in await notes.read(halves)


async def test_readers_cannot_write(notes: Database) -> None:
    with pytest.raises(Unavailable, match="readonly"):
        await notes.read(put, 1)
    assert await notes.read(halves) == {}


async def test_the_writer_is_durable_and_checks_foreign_keys(database: Database) -> None:
    assert await database.write(pragma("journal_mode")) == "wal"
    assert await database.write(pragma("synchronous")) == 2  # FULL
    assert await database.write(pragma("foreign_keys")) == 1
    assert await database.write(pragma("trusted_schema")) == 0
    assert await database.read(pragma("query_only")) == 1
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        await database.write(
            lambda connection: connection.execute(
                "INSERT INTO leases (gpu_uuid, job_id, attempt, leased_at) VALUES ('GPU-a', 1, 1, 0)"
            )
        )


async def test_only_the_owner_may_read_the_file(database: Database, tmp_path: Path) -> None:
    await database.write(lambda connection: connection.execute("CREATE TABLE t (x)"))
    modes = {name: stat.S_IMODE(path.stat().st_mode) for name, path in contents(tmp_path).items()}
    assert modes == {"mlbox.db": 0o600, "mlbox.db-wal": 0o600, "mlbox.db-shm": 0o600}


# Closing


async def test_close_finishes_what_was_queued_and_refuses_what_comes_later(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db")
    await database.write(lambda connection: connection.execute("CREATE TABLE notes (id INTEGER, half TEXT)"))
    writers = [asyncio.create_task(database.write(put, number)) for number in range(1000)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await database.close()
        assert await asyncio.gather(*writers) == list(range(1000))
    await database.close()
    for late in (database.write(put, 1), database.read(halves), database.backup(tmp_path / "b.db")):
        with pytest.raises(Unavailable, match="closed"):
            await late
    with outsider(tmp_path / "a.db") as other:
        assert len(halves(other)) == 1000
    assert not (tmp_path / "a.db-wal").exists()


CRASH = """
import asyncio, sys
from pathlib import Path
from mlbox.database import Database

async def main():
    database = await Database.open(Path(sys.argv[1]))
    writes = [asyncio.create_task(database.write(lambda c: c.execute("PRAGMA user_version"))) for _ in range(50)]
    await asyncio.sleep(0)
    raise RuntimeError("the daemon has a bug")

asyncio.run(main())
"""


@pytest.mark.parametrize("locked", [False, True], ids=["idle", "while a write waits for a lock"])
async def test_a_daemon_that_crashes_really_exits(tmp_path: Path, locked: bool) -> None:
    path = tmp_path / "mlbox.db"
    await (await Database.open(path)).close()
    with outsider(path) as other:
        if locked:
            other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        crashed = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", CRASH, str(path)], capture_output=True, text=True, timeout=20
        )
    assert crashed.returncode == 1
    assert "the daemon has a bug" in crashed.stderr
    assert time.monotonic() - began < 4, "before any wait of its own is over"


WRITER = """
import asyncio, sys
from pathlib import Path
from mlbox.database import Database

def put(connection, number):
    connection.execute("INSERT INTO notes VALUES (?, 'first')", (number,))
    connection.execute("INSERT INTO notes VALUES (?, 'second')", (number,))

async def main():
    database = await Database.open(Path(sys.argv[1]))
    first = int(sys.argv[2])
    async def work(lane):
        for number in range(first + lane, first + 10**6, 8):
            await database.write(put, number)
            print(number, flush=True)
    await asyncio.gather(*(work(lane) for lane in range(8)))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_writer_keeps_every_acknowledged_row(tmp_path: Path) -> None:
    chance = random.Random(9)
    path = tmp_path / "mlbox.db"

    async def prepare() -> None:
        database = await Database.open(path)
        await database.write(lambda connection: connection.execute("CREATE TABLE notes (id INTEGER, half TEXT)"))
        await database.close()

    asyncio.run(prepare())
    acknowledged: set[int] = set()
    for life in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(life * 10**6)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        with writer.stdout:
            for _ in range(chance.randrange(1, 400)):
                acknowledged.add(int(writer.stdout.readline()))
            writer.kill()
            acknowledged |= {int(line) for line in writer.stdout if line.endswith("\n")}
        writer.wait(10)
        with outsider(path) as other:
            assert other.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            found = halves(other)
        assert acknowledged <= found.keys()
        assert set(found.values()) == {2}


# Trouble of the file


async def fill_up(database: Database) -> None:
    """One write that does not fit, among others that do."""

    def large(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO notes VALUES (66, ?)", ("x" * (4 << 20),))

    async with one_group(database):
        before = asyncio.create_task(database.write(put, 1))
        full = asyncio.create_task(database.write(large))
        after = asyncio.create_task(database.write(put, 2))
    assert await before == 1
    assert await after == 2
    with pytest.raises(Unavailable, match="full") as trouble:
        await full
    assert "nothing was changed" in str(trouble.value)
    assert await database.write(put, 3) == 3
    assert await database.read(halves) == {1: 2, 2: 2, 3: 2}
    assert await database.read(pragma("integrity_check")) == "ok"


async def test_a_full_database_refuses_only_what_does_not_fit(notes: Database) -> None:
    pages = await notes.read(pragma("page_count"))
    await notes.write(pragma(f"max_page_count = {int(str(pages)) + 20}"))
    await fill_up(notes)
    await notes.write(pragma("max_page_count = 1000000"))
    await notes.write(lambda connection: connection.execute("INSERT INTO notes VALUES (66, ?)", ("x" * (4 << 20),)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_refuses_what_does_not_fit_and_heals(small_disk: Path) -> None:
    database = await Database.open(small_disk / "mlbox.db")
    try:
        await database.write(lambda connection: connection.execute("CREATE TABLE notes (id INTEGER, half TEXT)"))
        await fill_up(database)
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        answers = await asyncio.gather(*(database.write(wide, n) for n in range(100, 600)), return_exceptions=True)
        kept = {answer for answer in answers if isinstance(answer, int)}
        assert {type(answer) for answer in answers} == {int, Unavailable}
        ballast.unlink()
        assert await database.write(put, 1000) == 1000
        assert await database.read(halves) == dict.fromkeys(kept | {1, 2, 3, 1000}, 2)
    finally:
        await database.close()


async def test_a_backup_that_does_not_fit_leaves_nothing_and_the_old_one(small_disk: Path, notes: Database) -> None:
    for number in range(300):
        await notes.write(wide, number)
    (small_disk / "copy.db").write_bytes(b"an older backup")
    with pytest.raises(Unavailable, match=r"cannot be copied .*full"):
        await notes.backup(small_disk / "copy.db")
    assert contents(small_disk).keys() == {"copy.db"}
    assert (small_disk / "copy.db").read_bytes() == b"an older backup"


async def test_a_lock_held_by_an_outsider_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mlbox.database, "BUSY_TIMEOUT_MS", 700)
    database = await Database.open(tmp_path / "mlbox.db")
    try:
        await database.write(lambda connection: connection.execute("CREATE TABLE notes (id INTEGER, half TEXT)"))
        with outsider(tmp_path / "mlbox.db") as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            answers = await asyncio.gather(
                *(database.write(put, number) for number in range(1000)), return_exceptions=True
            )
            waited = time.monotonic() - began
            assert all(isinstance(answer, Unavailable) for answer in answers)
            assert 0.6 < waited < 2.0, "one timeout, not one for each commit"
            assert await database.read(halves) == {}
            other.execute("ROLLBACK")
        assert await database.write(put, 1) == 1
        assert await database.read(halves) == {1: 2}
    finally:
        await database.close()


async def test_a_lock_held_for_a_moment_only_delays(notes: Database, tmp_path: Path) -> None:
    with outsider(tmp_path / "mlbox.db") as other:
        other.execute("BEGIN IMMEDIATE")
        write = asyncio.create_task(notes.write(put, 1))
        done, _ = await asyncio.wait({write}, timeout=0.2)
        assert not done
        other.execute("ROLLBACK")
        assert await write == 1


# Opening


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
async def test_a_file_that_is_no_database_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mlbox.db"
    path.write_bytes(content)
    with pytest.raises(Unavailable, match=r"no sound database.*Restore a backup"):
        await Database.open(path)
    assert path.read_bytes() == content


async def test_a_folder_in_the_way_or_missing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "mlbox.db"):
        with pytest.raises(Unavailable, match="cannot be opened"):
            await Database.open(path)


async def test_names_with_signs_of_a_uri_open_the_file_so_called(tmp_path: Path) -> None:
    path = tmp_path / "a?mode=memory#%20 ü.db"
    await (await Database.open(path)).close()
    assert path.stat().st_size > 0


def test_a_second_daemon_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(Conflict, match=rf"pid {os.getpid()}\b.*--state"):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


HOLDER = """
import sys
from pathlib import Path
from mlbox.database import FolderLock

lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_daemon_leaves_no_lock_behind(tmp_path: Path) -> None:
    daemon = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        with pytest.raises(Conflict, match=rf"pid {daemon.pid}\b"):
            FolderLock(tmp_path)
        daemon.kill()
    FolderLock(tmp_path).release()


# Migrations and backups


def schema(path: Path) -> tuple[int, list[str]]:
    with outsider(path) as other:
        version = other.execute("PRAGMA user_version").fetchone()[0]
        return version, [row[0] for row in other.execute("SELECT sql FROM sqlite_master ORDER BY name")]


async def test_a_fresh_file_gets_the_newest_schema_and_opening_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mlbox.db"
    await (await Database.open(path)).close()
    first = schema(path)
    assert first[0] == NEWEST
    await (await Database.open(path)).close()
    assert schema(path) == first
    assert not (tmp_path / "backup").exists()


async def test_a_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "mlbox.db"
    with outsider(path) as other:
        other.execute("CREATE TABLE of_the_future (x)")
        other.execute(f"PRAGMA user_version = {NEWEST + 1}")
    before = schema(path)
    with pytest.raises(SchemaTooNew, match=f"has schema {NEWEST + 1}, this mlbox knows {NEWEST}"):
        await Database.open(path)
    assert schema(path) == before


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of migrations in the place of the program's own."""
    package = tmp_path / "migrations"
    package.mkdir()
    monkeypatch.setattr(mlbox.database.resources, "files", lambda name: package)
    (package / "0001_first.sql").write_text("CREATE TABLE notes (id INTEGER, half TEXT) STRICT;\n")
    return package


async def test_a_migration_is_preceded_by_a_copy(migrations: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlbox.db"
    database = await Database.open(path)
    await database.write(put, 7)
    await database.close()
    (migrations / "0002_more.sql").write_text("ALTER TABLE notes ADD COLUMN more TEXT;")
    (migrations / "0010_last.sql").write_text("CREATE TABLE last (x) -- no newline, no semicolon\n;")
    database = await Database.open(path)
    assert await database.read(halves) == {7: 2}
    await database.close()
    assert schema(path)[0] == 10
    copy = tmp_path / "backup" / "before-schema-10.db"
    assert schema(copy) == (1, ["CREATE TABLE notes (id INTEGER, half TEXT) STRICT"])
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with outsider(copy) as other:
        assert halves(other) == {7: 2}


async def test_a_migration_that_fails_half_way_leaves_the_old_schema(migrations: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlbox.db"
    database = await Database.open(path)
    await database.write(put, 7)
    await database.close()
    before = schema(path)
    (migrations / "0002_bad.sql").write_text(
        "CREATE TABLE half_done (x); UPDATE notes SET id = 8; INSERT INTO missing VALUES (1);"
    )
    with pytest.raises(Unavailable, match=r"stays as it is: schema 2 \(0002_bad.sql\).*missing"):
        await Database.open(path)
    assert schema(path) == before
    with outsider(path) as other:
        assert halves(other) == {7: 2}


async def test_a_backup_made_in_use_opens_and_is_complete(notes: Database, tmp_path: Path) -> None:
    for number in range(100):
        await notes.write(put, number)
    target = tmp_path / "copy.db"
    target.write_bytes(b"an older backup")
    writers = [asyncio.create_task(notes.write(put, number)) for number in range(100, 200)]
    await notes.backup(target)
    await asyncio.gather(*writers)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    copy = await Database.open(target)
    found = await copy.read(halves)
    assert set(range(100)) <= found.keys()
    assert set(found.values()) == {2}
    assert await copy.read(pragma("integrity_check")) == "ok"
    await copy.close()


async def test_a_backup_that_cannot_be_written_says_so(notes: Database, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot be copied"):
        await notes.backup(tmp_path / "missing" / "copy.db")
    assert await notes.write(put, 1) == 1
