"""The one SQLite file: its connections, transactions and migrations.

aiosqlite shared between tasks loses data: a bystander's statement joins another task's transaction and dies in its
ROLLBACK, and a task cancelled between two statements leaves the file locked. So a transaction here is one plain
function, run whole on the writing connection's thread; no `await` fits inside. There is one read-write connection
in the world (SQLite below 3.51.3 can corrupt a WAL file when two connections write or checkpoint at one instant,
sqlite.org/wal.html, "WAL-reset bug"); the others are read-only.

Writes that arrive while another commits share the next commit: each runs in a savepoint of its own, so one that
fails takes nobody along, and all are answered after the one fsync that makes them durable.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import aiosqlite

from mlbox.errors import Conflict, MlboxError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

BUSY_TIMEOUT_MS = 5_000
"""How long SQLite waits for a lock that an outsider holds before the waiting writes are refused."""
_GROUP = 256
"""Most writes in one commit: bounds how long the first of them waits for its fsync."""
_STATEMENTS_CACHED = 256
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class SchemaTooNew(MlboxError):
    """The file was written by a newer mlbox."""


@dataclass(slots=True)
class _Write:
    function: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class _Connection(aiosqlite.Connection):
    """An aiosqlite connection that runs whole functions on its thread.

    Its thread is a daemon thread: aiosqlite's own would keep a crashing process alive for ever.
    """

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        self._thread.daemon = True

    @classmethod
    async def made(cls, connector: Callable[[], sqlite3.Connection]) -> "_Connection":
        connection = cls(connector)
        try:
            await connection
        except BaseException:
            connection._thread.join()  # its last word goes to this loop, which may be closed in a moment
            raise
        return connection

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        execute = cast("Callable[[Callable[[], T]], Awaitable[T]]", super()._execute)  # pyright: ignore[reportUnknownMemberType]
        return await execute(partial(function, self._conn))

    def post(self, function: Callable[[sqlite3.Connection], None]) -> None:
        """Queue `function` without waiting for it."""
        queue = cast("SimpleQueue[tuple[None, Callable[[], None]]]", self._tx)  # pyright: ignore[reportUnknownMemberType]
        queue.put((None, partial(function, self._conn)))


class Database:
    """The open database. Made by `Database.open`; `close` is idempotent, later calls raise Unavailable."""

    def __init__(self, writer: _Connection, readers: Sequence[_Connection]) -> None:
        self._writer = writer
        self._readers = readers
        self._next_reader = 0
        self._pending: deque[_Write] = deque()
        self._idle = asyncio.Event()  # no write is queued or under way
        self._idle.set()
        self._closed = False

    @classmethod
    async def open(cls, path: Path, readers: int = 2) -> "Database":
        """Open and migrate the file, making it where it is missing.

        Raises SchemaTooNew, or Unavailable when the file cannot be opened, cannot be migrated or is no database.
        """
        opened: list[_Connection] = []
        try:
            writer = await _Connection.made(partial(_connect, path, read_only=False))
            opened.append(writer)
            await writer.run(partial(_migrate, path=path))
            opened += [await _Connection.made(partial(_connect, path, read_only=True)) for _ in range(readers)]
        except BaseException as error:
            for connection in reversed(opened):
                await connection.close()
            if isinstance(error, (sqlite3.OperationalError, OSError)):
                raise Unavailable(f"the database {path} cannot be opened: {error}") from error
            if isinstance(error, sqlite3.DatabaseError):
                raise Unavailable(
                    f"{path} is no sound database: {error}. Restore a backup, or move it away to start empty."
                ) from error
            raise
        return cls(writer, opened[1:])

    async def write(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `function(connection, ...)` as one transaction and return its result once it is durable.

        The function may run a second time when the commit it shared failed, so it touches nothing but the
        connection. Cancelling the caller neither interrupts nor undoes it. What it raises undoes it and is raised
        here; trouble of the file itself (full disk, locked by an outsider) is raised as Unavailable.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._pending.append(_Write(lambda connection: function(connection, *args, **kwargs), future))
        if self._idle.is_set():
            self._idle.clear()
            self._writer.post(partial(self._flush, loop=loop))
        return await future

    async def read(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `function(connection, ...)` on a read-only connection; it sees every write that was answered."""
        self._check_open()
        self._next_reader = (self._next_reader + 1) % len(self._readers)
        try:
            return await self._readers[self._next_reader].run(lambda connection: function(connection, *args, **kwargs))
        except sqlite3.OperationalError as error:
            raise _meant(error) from error

    async def backup(self, target: Path) -> None:
        """Copy the database to `target` while it is in use (SQLite's online backup, from the writer itself).

        Raises Unavailable when `target` cannot be written; what was there before then stays.
        """
        self._check_open()
        try:
            await self._writer.run(partial(_backup, target=target))
        except (sqlite3.OperationalError, OSError) as error:
            raise Unavailable(f"the database cannot be copied to {target}: {error}") from error

    async def close(self) -> None:
        """Finish the queued writes, then close every connection."""
        if self._closed:
            return
        self._closed = True
        await self._idle.wait()
        for connection in (*self._readers, self._writer):
            with contextlib.suppress(sqlite3.Error):
                await connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the database is closed: mlbox is stopping")

    def _flush(self, connection: sqlite3.Connection, *, loop: asyncio.AbstractEventLoop) -> None:
        """On the writer's thread: commit the next group of what is pending."""
        group = self._take(_GROUP)
        try:
            _commit(connection, group)
        except BaseException as error:  # whatever it is, somebody waits for an answer
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BUSY:
                # An outsider's lock is in everybody's way: waiting for it once per group would help nobody.
                group += self._take(len(self._pending))
                for write in group:
                    write.error = _meant(error)
            else:
                # The shared commit failed as a whole and is undone; alone, the innocent ones may still fit.
                for write in group:
                    _commit_alone(connection, write)
        # A loop that is already closed has nobody waiting on it.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._deliver, group, loop)

    def _take(self, most: int) -> list[_Write]:
        return [self._pending.popleft() for _ in range(min(len(self._pending), most))]

    def _deliver(self, group: list[_Write], loop: asyncio.AbstractEventLoop) -> None:
        """On the loop: have the next group committed and answer this one."""
        if self._pending:
            self._writer.post(partial(self._flush, loop=loop))
        else:
            self._idle.set()
        for write in group:
            if write.future.done():
                continue
            if write.error is None:
                write.future.set_result(write.result)
            else:
                write.future.set_exception(write.error)


class FolderLock:
    """Keeps a second daemon out of a state folder, for as long as this process lives. Raises Conflict."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 20, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise Conflict(
                f"another mlbox (pid {holder or 'unknown'}) uses the state folder {folder}: "
                "stop it, or give this one a folder of its own with --state"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    mode = "ro" if read_only else "rwc"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,  # transactions are begun by name, here and nowhere else
        check_same_thread=False,  # aiosqlite opens, uses and closes it on one thread
        cached_statements=_STATEMENTS_CACHED,
        timeout=BUSY_TIMEOUT_MS / 1000,
    )
    try:
        _configure(connection, path, read_only=read_only)
    except BaseException:
        connection.close()
        raise
    return connection


def _configure(connection: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA foreign_keys = ON")
    if read_only:
        connection.execute("PRAGMA query_only = ON")
        return
    path.chmod(0o600)
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise OSError("its file system has no shared memory for SQLite's WAL: keep the state on a local disk")


def _commit(connection: sqlite3.Connection, group: list[_Write]) -> None:
    """Run each write in a savepoint of one transaction. What it raises, it has undone the whole group for."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        for write in group:
            connection.execute("SAVEPOINT one")
            write.error = None
            try:
                write.result = write.function(connection)
            except BaseException as error:
                if not connection.in_transaction:  # a full disk makes SQLite roll everything back
                    raise
                write.error = _meant(error)
                connection.execute("ROLLBACK TO one")
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _commit_alone(connection: sqlite3.Connection, write: _Write) -> None:
    try:
        _commit(connection, [write])
    except BaseException as error:  # its caller waits for an answer
        write.error = _meant(error)


def _meant(error: BaseException) -> BaseException:
    """What a caller is told: trouble of the file (full, locked, unreadable) as Unavailable, a mistake as it is."""
    if isinstance(error, StopIteration):  # no future takes it (PEP 479)
        return RuntimeError("a transaction's function raised StopIteration")
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
        return Unavailable(f"the database cannot do that now: {error}; nothing was changed, try again")
    return error


def _migrations() -> list[tuple[int, str, str]]:
    """(number, name, SQL) of every migration, in order."""
    return sorted(
        (int(entry.name.split("_", 1)[0]), entry.name, entry.read_text(encoding="utf-8"))
        for entry in resources.files("mlbox.migrations").iterdir()
        if entry.name.endswith(".sql")
    )


def _migrate(connection: sqlite3.Connection, *, path: Path) -> None:
    """Bring the schema up to this program's, each migration in one transaction, with a copy of the file before."""
    known = _migrations()
    current = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if current > known[-1][0]:
        raise SchemaTooNew(
            f"{path} has schema {current}, this mlbox knows {known[-1][0]}: "
            "run the newer mlbox that wrote it, or restore the backup it made before upgrading"
        )
    waiting = [migration for migration in known if migration[0] > current]
    if waiting and current > 0:
        folder = path.parent / "backup"
        folder.mkdir(mode=0o700, exist_ok=True)
        _backup(connection, target=folder / f"before-schema-{waiting[-1][0]}.db")
    for number, name, sql in waiting:
        # executescript would commit first; inside its own BEGIN the whole file is one transaction.
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{sql}\nPRAGMA user_version = {number};\nCOMMIT;")
        except sqlite3.Error as error:
            raise Unavailable(f"{path} stays as it is: schema {number} ({name}) cannot be applied: {error}") from error
        log.info("database: schema %d (%s)", number, name)


def _backup(connection: sqlite3.Connection, *, target: Path) -> None:
    half = target.with_name(target.name + ".partial")
    half.unlink(missing_ok=True)
    try:
        half.touch(mode=0o600, exist_ok=False)
        with contextlib.closing(sqlite3.connect(half)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")  # half a copy is thrown away, not rolled back
            connection.backup(copy)
        half.replace(target)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
