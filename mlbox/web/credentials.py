"""Tokens, login codes and browser sessions: made, found, revoked. Finding one costs a dictionary look-up.

Every live credential is kept in memory by its SHA-256, which is all that is stored of it: the daemon is the only one
that opens the database, so what is not here does not exist, and a flood of wrong guesses never reaches the disk.
"""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from mlbox.database import Database
from mlbox.errors import Conflict, Denied, NotFound, Unauthenticated
from mlbox.identity import ROLE_SCOPES, Identity, Role, Scope, digest, new_token, well_formed
from mlbox.jobs import Job
from mlbox.web import queries
from mlbox.web.queries import Session, Token

log = logging.getLogger(__name__)

LOGIN_CODE_S = 300.0
"""A login code is good for so long: time to carry it from a terminal to a browser."""
DEFAULT_TOKEN_S = 90 * 86_400.0
_NOTE_USE_S = 60.0
"""Last use is written down at most so often: it must not turn every read into a write."""
_ENDED_KEPT = 1000
_CODE_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_CODE_LENGTH = 20
"""Crockford's base 32: 100 random bits, so that guessing within five minutes is hopeless without any rate limit."""
_TOKENS_MAX = 1000
_SESSIONS_MAX = 100
"""Live ones of one user; the next session ends the oldest."""
_JOB_SCOPES = frozenset({Scope.READ, Scope.SUBMIT})
_INFER_SCOPES = frozenset({Scope.INFER, Scope.DEPLOY, Scope.ADMIN})


class InferAccess(TypedDict):
    """A token that the inference server accepts. `expires` is Unix seconds; None: never."""

    sha256: str
    scopes: list[str]
    expires: float | None


@dataclass(frozen=True, slots=True)
class Known:
    """A live credential: whose it is, and until when (Unix seconds; None: until it is revoked)."""

    identity: Identity
    expires_at: float | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A new browser session: the cookie's secret, shown once, and when it expires (Unix seconds)."""

    secret: str
    expires_at: float


class Credentials:
    """The live credentials. `load` once, then `run` is a task for as long as the daemon lives.

    Used on the event loop's thread only.
    """

    def __init__(
        self,
        database: Database,
        *,
        job_of_token: Callable[[str], Awaitable[Job | None]],
        session_s: float = 12 * 3600.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`job_of_token` finds the job under way that was given a token; a browser session lasts `session_s`."""
        self._database = database
        self._job_of_token = job_of_token
        self._session_s = session_s
        self._now = now
        self._tokens: dict[str, Token] = {}
        self._sessions: dict[str, Session] = {}
        self._known: dict[str, Known] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._used: dict[int, float] = {}
        self.on_change: Callable[[], None] = lambda: None
        """Called whenever `infer_access` has changed."""
        self.on_end: Callable[[str], None] = lambda how: None
        """Called with the `Identity.how` of each credential that is no longer good."""

    async def load(self) -> None:
        """Take up every live credential; before the first request."""
        for token in await self._database.read(queries.live_tokens, self._now()):
            self._remember_token(token)
        for session in await self._database.read(queries.live_sessions, self._now()):
            self._remember_session(session)

    async def run(self) -> None:
        """Write down last uses and forget what has expired, until cancelled."""
        while True:
            await asyncio.sleep(_NOTE_USE_S)
            self._forget_expired()
            used, self._used = self._used, {}
            if used:
                try:
                    await self._database.write(queries.note_use, used)
                except Exception:
                    log.warning("tokens: their last use could not be written down", exc_info=True)
                    self._used = used | self._used

    def infer_access(self) -> list[InferAccess]:
        """What the inference server needs to know: the live tokens that may infer or deploy."""
        now = self._now()
        return [
            {"sha256": token.sha256, "scopes": sorted(token.scopes), "expires": token.expires_at}
            for token in self._tokens.values()
            if token.scopes & _INFER_SCOPES and (token.expires_at is None or token.expires_at > now)
        ]

    # Finding

    async def of_token(self, secret: str) -> Known | None:
        """The live token with this secret, or the running job whose own token it is."""
        sha256 = digest(secret)
        token = self._tokens.get(sha256)
        if token is not None and self._live(token.expires_at):
            self._used[token.id] = self._now()
            return self._known[sha256]
        if token is None and well_formed(secret) and (job := await self._job_of_token(sha256)) is not None:
            return Known(_job_identity(job), None)
        return None

    def of_session(self, secret: str) -> Known | None:
        """The live browser session with this cookie."""
        sha256 = digest(secret)
        session = self._sessions.get(sha256)
        if session is None or not self._live(session.expires_at):
            return None
        if session.token_id is not None:
            self._used[session.token_id] = self._now()
        return self._known[sha256]

    def has_ended(self, how: str) -> bool:
        """Whether the credential with this `Identity.how` was revoked, signed out or expired a moment ago.

        For whoever found it good and then had to wait: only the latest are remembered.
        """
        return how in self._ended

    # Tokens

    async def create_token(
        self,
        who: Identity,
        *,
        name: str,
        scopes: frozenset[Scope],
        expires_at: float | None,
        idempotency_key: str | None = None,
    ) -> tuple[Token, str]:
        """Make a token and return it with its secret, which nobody can show again. Raises Denied, Conflict."""
        _may_mint(who)
        if excess := [scope for scope in sorted(scopes) if not who.may(scope)]:
            raise Denied(f"a token cannot have more scopes than you: {', '.join(excess)} is not yours")
        if sum(token.uid == who.uid for token in self._tokens.values()) >= _TOKENS_MAX:
            raise Conflict(f"you have {_TOKENS_MAX} live tokens: revoke some of them")
        secret = new_token()
        token = await self._database.write(
            queries.add_token,
            who,
            name=name,
            sha256=digest(secret),
            last4=secret[-4:],
            scopes=scopes,
            expires_at=expires_at,
            idempotency_key=idempotency_key,
            now=self._now(),
        )
        log.info("token %d: made by %s (%s), scopes %s", token.id, who.user, who.how, ",".join(sorted(scopes)))
        self._remember_token(token)
        self.on_change()
        return token, secret

    async def tokens(self, who: Identity) -> Sequence[Token]:
        """The asker's tokens, newest first, revoked ones included; an admin sees everybody's."""
        return [self._with_use(row) for row in await self._database.read(queries.tokens, _uid_filter(who))]

    async def token(self, who: Identity, token_id: int) -> Token:
        """One of the tokens that the asker may see. Raises NotFound."""
        row = await self._database.read(queries.token, token_id) if 0 < token_id < 2**63 else None
        if row is None or not (who.admin or row.uid == who.uid):
            raise NotFound(f"there is no token {token_id} that you may see")
        return self._with_use(row)

    async def revoke(self, who: Identity, token_id: int) -> None:
        """End a token, and the sessions and open streams that came of it. Revoking twice is once."""
        token = await self.token(who, token_id)
        if not (who.admin or _same(who, token) or not _minted(who)):
            raise Denied(f"this credential ({who.how}) can revoke itself only: use the Unix socket or sign in by code")
        await self._database.write(queries.revoke, token_id, self._now())
        self._forget(token.sha256, f"token:{token_id}")
        for session in [row for row in self._sessions.values() if row.token_id == token_id]:
            self._forget(session.sha256, _session_how(session))
        log.info("token %d: revoked by %s (%s)", token_id, who.user, who.how)
        self.on_change()

    # Browsers

    async def make_login_code(self, who: Identity) -> tuple[str, float]:
        """A one-time code that signs a browser in as `who`, and when it expires. Raises Denied."""
        _may_mint(who)
        code = "".join(secrets.choice(_CODE_ALPHABET) for _ in range(_CODE_LENGTH))
        now = self._now()
        await self._database.write(
            queries.add_login_code,
            who,
            sha256=digest(code),
            token_id=_token_id(who),
            now=now,
            expires_at=now + LOGIN_CODE_S,
        )
        return "-".join(code[at : at + 5] for at in range(0, _CODE_LENGTH, 5)), now + LOGIN_CODE_S

    async def open_session(self, secret: str) -> Opened:
        """Sign a browser in with a login code or a token. Raises Unauthenticated; the answer never says why."""
        cookie = secrets.token_urlsafe(32)
        session = await self._redeem(secret.strip(), digest(cookie))
        if session is None:
            raise Unauthenticated("that code or token is not known here, was used already, or has expired")
        self._remember_session(session)  # before anything else is awaited: a revocation must find it
        log.info("session %d: %s signed in", session.id, session.user)
        mine = sorted((row for row in self._sessions.values() if row.uid == session.uid), key=lambda row: row.id)
        if surplus := mine[:-_SESSIONS_MAX]:
            await self._database.write(queries.end_sessions, [row.id for row in surplus], self._now())
            for row in surplus:
                self._forget(row.sha256, _session_how(row))
        return Opened(cookie, session.expires_at)

    async def end_session(self, who: Identity) -> None:
        """Sign the browser out that asks; nothing happens for other credentials."""
        for session in [row for row in self._sessions.values() if _session_how(row) == who.how]:
            await self._database.write(queries.end_sessions, [session.id], self._now())
            self._forget(session.sha256, who.how)

    async def _redeem(self, secret: str, session_sha256: str) -> Session | None:
        now = self._now()
        until = now + self._session_s
        if well_formed(secret):
            token = self._tokens.get(digest(secret))
            if token is None:
                return None
            return await self._database.write(
                queries.redeem_token, token.id, session_sha256=session_sha256, now=now, expires_at=until
            )
        code = secret.upper().replace("-", "").replace(" ", "")
        if len(code) != _CODE_LENGTH or not set(code) <= set(_CODE_ALPHABET):
            return None  # no need to bother the writer with it
        return await self._database.write(
            queries.redeem_login_code, digest(code), session_sha256=session_sha256, now=now, expires_at=until
        )

    # Memory

    def _live(self, expires_at: float | None) -> bool:
        return expires_at is None or expires_at > self._now()

    def _remember_token(self, token: Token) -> None:
        identity = _identity(token, f"token:{token.id}")
        self._tokens[token.sha256] = token
        self._known[token.sha256] = Known(identity, token.expires_at)

    def _remember_session(self, session: Session) -> None:
        identity = _identity(session, _session_how(session))
        self._sessions[session.sha256] = session
        self._known[session.sha256] = Known(identity, session.expires_at)

    def _forget(self, sha256: str, how: str) -> None:
        self._tokens.pop(sha256, None)
        self._sessions.pop(sha256, None)
        self._known.pop(sha256, None)
        self._ended[how] = None
        if len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)
        self.on_end(how)

    def _forget_expired(self) -> None:
        for sha256, known in list(self._known.items()):
            if not self._live(known.expires_at):
                self._forget(sha256, known.identity.how)

    def _with_use(self, token: Token) -> Token:
        used = max((when for when in (token.last_used_at, self._used.get(token.id)) if when is not None), default=None)
        return replace(token, last_used_at=used)


def _identity(row: Token | Session, how: str) -> Identity:
    scopes = row.scopes & ROLE_SCOPES[row.role]
    return Identity(user=row.user, uid=row.uid, role=row.role, scopes=scopes, how=how)


def _job_identity(job: Job) -> Identity:
    """What a job's own token may do; each route and the scheduler hold it to that job."""
    return Identity(user=job.user, uid=job.uid, role=Role.USER, scopes=_JOB_SCOPES, how=f"job:{job.id}", job_id=job.id)


def _session_how(session: Session) -> str:
    prefix = f"token:{session.token_id}/" if session.token_id is not None else ""
    return f"{prefix}session:{session.id}"


def _token_id(who: Identity) -> int | None:
    """The token that this credential is or came from."""
    kind, _, rest = who.how.partition(":")
    return int(rest.partition("/")[0]) if kind == "token" else None


def _minted(who: Identity) -> bool:
    """Whether the credential was itself handed out by mlbox, rather than proved by the Unix socket or a code."""
    return _token_id(who) is not None or who.job_id is not None


def _may_mint(who: Identity) -> None:
    """Raises Denied for a narrowed credential: a stolen one must not be able to make itself another."""
    if not who.admin and _minted(who):
        raise Denied(
            f"this credential ({who.how}) cannot make others: use the Unix socket, sign in by code, "
            "or use a token with the admin scope"
        )


def _same(who: Identity, token: Token) -> bool:
    return _token_id(who) == token.id


def _uid_filter(who: Identity) -> int | None:
    return None if who.admin else who.uid


def scopes_of(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by name. Raises ValueError that names the unknown one and the known ones."""
    found: set[Scope] = set()
    for name in names:
        try:
            found.add(Scope(name))
        except ValueError:
            raise ValueError(f"{name!r} is no scope; known: {', '.join(Scope)}") from None
    return frozenset(found)
