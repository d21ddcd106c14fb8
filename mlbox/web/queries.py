"""Every query about credentials: tokens, login codes, sessions. Only SHA-256 of a secret is ever written."""

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlbox.errors import Conflict
from mlbox.identity import Identity, Role, Scope

_CODES_PER_USER = 10
"""Unused login codes of one user; a new one beyond this replaces the oldest."""
_CODES_KEPT_S = 86_400.0
_SESSIONS_KEPT_S = 30 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A bearer token as its owner sees it: never its secret. Times are Unix seconds."""

    id: int
    name: str
    last4: str
    user: str
    uid: int
    role: Role
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A signed-in browser. `token_id` is set where a token opened it."""

    id: int
    sha256: str
    user: str
    uid: int
    role: Role
    scopes: frozenset[Scope]
    token_id: int | None
    expires_at: float


# Tokens


def add_token(
    connection: sqlite3.Connection,
    who: Identity,
    *,
    name: str,
    sha256: str,
    last4: str,
    scopes: frozenset[Scope],
    expires_at: float | None,
    idempotency_key: str | None,
    now: float,
) -> Token:
    """Insert a token. Raises Conflict when this idempotency key made one before: its secret is gone."""
    if idempotency_key is not None:
        earlier = connection.execute(
            "SELECT id FROM tokens WHERE uid = ? AND idempotency_key = ?", (who.uid, idempotency_key)
        ).fetchone()
        if earlier is not None:
            raise Conflict(
                f"this Idempotency-Key made token {earlier['id']}, whose secret was shown once: "
                "revoke that token and ask again with another key"
            )
    row = connection.execute(
        "INSERT INTO tokens (name, sha256, last4, user, uid, role, scopes, created_at, expires_at, idempotency_key) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
        (name, sha256, last4, who.user, who.uid, who.role, _joined(scopes), now, expires_at, idempotency_key),
    ).fetchone()
    return _token(row)


def tokens(connection: sqlite3.Connection, uid: int | None) -> list[Token]:
    """The tokens of one user, or of all (None), newest first, with those that are revoked or expired."""
    where = "" if uid is None else "WHERE uid = :uid "
    rows = connection.execute(f"SELECT * FROM tokens {where}ORDER BY id DESC LIMIT 1000", {"uid": uid})  # noqa: S608
    return [_token(row) for row in rows]


def live_tokens(connection: sqlite3.Connection, now: float) -> list[Token]:
    rows = connection.execute(
        "SELECT * FROM tokens WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > ?)", (now,)
    )
    return [_token(row) for row in rows]


def token(connection: sqlite3.Connection, token_id: int) -> Token | None:
    row = connection.execute("SELECT * FROM tokens WHERE id = ?", (token_id,)).fetchone()
    return _token(row) if row else None


def revoke(connection: sqlite3.Connection, token_id: int, now: float) -> None:
    """Revoke a token and end what it opened: its sessions and its unused login codes."""
    connection.execute("UPDATE tokens SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (now, token_id))
    connection.execute("UPDATE sessions SET ended_at = coalesce(ended_at, ?) WHERE token_id = ?", (now, token_id))
    connection.execute("DELETE FROM login_codes WHERE token_id = ? AND used_at IS NULL", (token_id,))


def note_use(connection: sqlite3.Connection, used: Mapping[int, float]) -> None:
    """Write down when tokens were last used, by id."""
    connection.executemany(
        "UPDATE tokens SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
        [(when, token_id) for token_id, when in used.items()],
    )


# Login codes and sessions


def add_login_code(
    connection: sqlite3.Connection,
    who: Identity,
    *,
    sha256: str,
    token_id: int | None,
    now: float,
    expires_at: float,
) -> None:
    connection.execute("DELETE FROM login_codes WHERE expires_at < ?", (now - _CODES_KEPT_S,))
    connection.execute(
        "DELETE FROM login_codes WHERE uid = :uid AND used_at IS NULL AND sha256 NOT IN (SELECT sha256 FROM login_codes"
        " WHERE uid = :uid AND used_at IS NULL ORDER BY created_at DESC LIMIT :kept)",
        {"uid": who.uid, "kept": _CODES_PER_USER - 1},
    )
    connection.execute(
        "INSERT INTO login_codes (sha256, user, uid, role, scopes, token_id, created_at, expires_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (sha256, who.user, who.uid, who.role, _joined(who.scopes), token_id, now, expires_at),
    )


def redeem_login_code(
    connection: sqlite3.Connection, code_sha256: str, *, session_sha256: str, now: float, expires_at: float
) -> Session | None:
    """Use up a login code and open the session it is good for; None when it is unknown, used or too old."""
    row = connection.execute(
        "UPDATE login_codes SET used_at = :now WHERE sha256 = :sha256 AND used_at IS NULL AND expires_at > :now "
        "AND NOT EXISTS (SELECT 1 FROM tokens WHERE id = token_id"
        " AND (revoked_at IS NOT NULL OR expires_at <= :now)) "
        "RETURNING user, uid, role, scopes, token_id",
        {"sha256": code_sha256, "now": now},
    ).fetchone()
    return _add_session(connection, row, session_sha256, now, expires_at) if row else None


def redeem_token(
    connection: sqlite3.Connection, token_id: int, *, session_sha256: str, now: float, expires_at: float
) -> Session | None:
    """Open a session with what a token may do; None when the token is no longer live."""
    row = connection.execute(
        "SELECT user, uid, role, scopes, id AS token_id FROM tokens "
        "WHERE id = :id AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > :now)",
        {"id": token_id, "now": now},
    ).fetchone()
    return _add_session(connection, row, session_sha256, now, expires_at) if row else None


def live_sessions(connection: sqlite3.Connection, now: float) -> list[Session]:
    rows = connection.execute("SELECT * FROM sessions WHERE ended_at IS NULL AND expires_at > ?", (now,))
    return [_session(row) for row in rows]


def end_sessions(connection: sqlite3.Connection, session_ids: Iterable[int], now: float) -> None:
    connection.executemany(
        "UPDATE sessions SET ended_at = coalesce(ended_at, ?) WHERE id = ?",
        [(now, session_id) for session_id in session_ids],
    )


def _add_session(
    connection: sqlite3.Connection, opener: sqlite3.Row, sha256: str, now: float, expires_at: float
) -> Session:
    """Insert a session for the user in `opener`; one that a token opened does not outlive it."""
    connection.execute("DELETE FROM sessions WHERE expires_at < ?", (now - _SESSIONS_KEPT_S,))
    row = connection.execute(
        "INSERT INTO sessions (sha256, user, uid, role, scopes, token_id, created_at, expires_at) "
        "SELECT :sha256, :user, :uid, :role, :scopes, :token_id, :now, "
        "min(:expires_at, coalesce((SELECT expires_at FROM tokens WHERE id = :token_id), :expires_at)) RETURNING *",
        {**dict(opener), "sha256": sha256, "now": now, "expires_at": expires_at},
    ).fetchone()
    return _session(row)


# Rows to values


def _token(row: sqlite3.Row) -> Token:
    return Token(
        id=row["id"],
        name=row["name"],
        last4=row["last4"],
        user=row["user"],
        uid=row["uid"],
        role=Role(row["role"]),
        scopes=_split(row["scopes"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
        revoked_at=row["revoked_at"],
        sha256=row["sha256"],
    )


def _session(row: sqlite3.Row) -> Session:
    return Session(
        id=row["id"],
        sha256=row["sha256"],
        user=row["user"],
        uid=row["uid"],
        role=Role(row["role"]),
        scopes=_split(row["scopes"]),
        token_id=row["token_id"],
        expires_at=row["expires_at"],
    )


def _joined(scopes: Iterable[Scope]) -> str:
    return ",".join(sorted(scopes))


def _split(text: str) -> frozenset[Scope]:
    return frozenset(Scope(word) for word in text.split(",") if word)
