"""Who may ask this server: bearer tokens from a file that the daemon replaces, and one door before every route.

The file holds digests only: `{"tokens": [{"sha256": "...", "scopes": ["infer"], "expires": 1790000000.0}]}`, where
`expires` is Unix seconds or null. Whatever is wrong with it, nobody gets in who is not in it.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from mlbox.errors import Denied, Unauthenticated
from mlbox.identity import Scope as Permission
from mlbox.identity import digest
from mlbox.serving.server.answers import error_answer

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""How soon a changed file is noticed; a revoked token must be out within 1 s."""
_TOKEN_BYTES_MAX = 1024


class _Token(msgspec.Struct):
    sha256: str
    scopes: list[str]
    expires: float | None = None


class _File(msgspec.Struct):
    tokens: list[_Token]


@dataclass(frozen=True, slots=True)
class Credential:
    """What a token is good for. `expires` is Unix seconds."""

    scopes: frozenset[str]
    expires: float | None

    def may(self, permission: Permission) -> bool:
        return permission in self.scopes or Permission.ADMIN in self.scopes


class Access:
    """The tokens in force. `watch` is a task of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._complained = ""
        self._tokens: Mapping[str, Credential] = {}
        self.look()

    async def watch(self) -> None:
        """Follow the file, for ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Read the file if it is another one than before. Short: it is small and on a local disk."""
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if seen == self._seen:
                return
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, ValueError) as error:
            self._seen, self._tokens = None, {}
            if str(error) != self._complained:
                log.error("nobody may ask anything: the access file %s cannot be used: %s", self._path, error)
            self._complained = str(error)
            return
        self._seen, self._complained = seen, ""
        self._tokens = {
            token.sha256.lower(): Credential(frozenset(token.scopes), token.expires) for token in file.tokens
        }

    def credential(self, authorization: list[str]) -> Credential:
        """What the Authorization fields of a request are good for. Raises Unauthenticated."""
        if len(authorization) != 1:
            raise Unauthenticated("one Authorization header is needed: 'Authorization: Bearer <token>'")
        kind, _, token = authorization[0].partition(" ")
        token = token.strip()
        if kind.lower() != "bearer" or not token or len(token) > _TOKEN_BYTES_MAX:
            raise Unauthenticated("the Authorization header must be 'Authorization: Bearer <token>'")
        # Looking up a digest tells an attacker by its timing nothing that would help to find a token for it.
        sha256 = digest(token)
        if sha256 not in self._tokens:
            self.look()  # it may be so new that the file was not looked at since
        credential = self._tokens.get(sha256)
        if credential is None:
            raise Unauthenticated("this token is not known, or it was revoked")
        if credential.expires is not None and credential.expires <= time.time():
            raise Unauthenticated("this token has expired: ask for a new one")
        return credential


class Door:
    """The outermost ASGI layer: nothing behind it is reached without a token, whatever the path.

    The credential is `scope["state"]["credential"]`; what it suffices for is each route's to say.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"nothing here speaks {scope['type']}")  # uvicorn is told not to send any
        try:
            fields = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
            credential = self._access.credential(fields)
        except Unauthenticated as error:
            await error_answer(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["credential"] = credential
        await self._app(scope, receive, send)


def demand(scope: Mapping[str, Any], permission: Permission) -> None:
    """Raises Denied unless the request's credential has this scope."""
    credential: Credential = scope["state"]["credential"]
    if not credential.may(permission):
        raise Denied(f"this token may not do that: it needs the scope '{permission.value}'")
