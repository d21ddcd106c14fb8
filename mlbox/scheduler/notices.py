"""Every query about notices: what people were told of their jobs, or are to be told at addresses outside."""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A sentence for somebody. `kind` is Slurm's word of --mail-type, or ours (`idle`); `addresses` may be none."""

    user: str
    uid: int
    at: float
    kind: str
    text: str
    job_id: int | None = None
    addresses: tuple[str, ...] = ()
    id: int = 0
    sent_at: float | None = None
    failure: str | None = None
    """Why it could not be sent, where it could not."""


def add(connection: sqlite3.Connection, notices: Iterable[Notice]) -> None:
    connection.executemany(
        "INSERT INTO notices (at, user, uid, job_id, kind, text, addresses) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (
                one.at,
                one.user,
                one.uid,
                one.job_id,
                one.kind,
                one.text,
                json.dumps(one.addresses, separators=(",", ":")),
            )
            for one in notices
        ),
    )


def for_user(connection: sqlite3.Connection, uid: int, *, limit: int = 50) -> list[Notice]:
    """What somebody was told, the newest first."""
    rows = connection.execute("SELECT * FROM notices WHERE uid = ? ORDER BY id DESC LIMIT ?", (uid, limit))
    return [_notice(row) for row in rows]


def unsent(connection: sqlite3.Connection, *, limit: int = 100) -> list[Notice]:
    """Notices with addresses that are still to be sent, the oldest first."""
    rows = connection.execute(
        "SELECT * FROM notices WHERE sent_at IS NULL AND addresses <> '[]' ORDER BY id LIMIT ?", (limit,)
    )
    return [_notice(row) for row in rows]


def mark_sent(connection: sqlite3.Connection, notice_id: int, *, now: float, failure: str | None = None) -> None:
    """Note that nothing more is to be tried: it was sent, or given up because of `failure`."""
    connection.execute(
        "UPDATE notices SET sent_at = ?, failure = ? WHERE id = ? AND sent_at IS NULL", (now, failure, notice_id)
    )


def _notice(row: sqlite3.Row) -> Notice:
    return Notice(
        id=row["id"],
        user=row["user"],
        uid=row["uid"],
        at=row["at"],
        kind=row["kind"],
        text=row["text"],
        job_id=row["job_id"],
        addresses=tuple(json.loads(row["addresses"])),
        sent_at=row["sent_at"],
        failure=row["failure"],
    )
