"""Who is asking: a person or a job, by peer credentials, token or browser session, and what they may do."""

import hashlib
import secrets
import zlib
from dataclasses import dataclass
from enum import StrEnum

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43
"""Base 62 digits that hold 32 random bytes: ceil(256 / log2(62))."""
_CHECKSUM_LENGTH = 6
"""Base 62 digits that hold a CRC-32, so that scanners tell a real token from a lookalike without asking us."""


class Scope(StrEnum):
    """What a credential is good for. `admin` includes every other."""

    READ = "read"
    SUBMIT = "submit"
    DEPLOY = "deploy"
    INFER = "infer"
    ADMIN = "admin"


class Role(StrEnum):
    """What a person is on this box."""

    USER = "user"
    DEPLOYER = "deployer"
    ADMIN = "admin"


ROLE_SCOPES = {
    Role.USER: frozenset({Scope.READ, Scope.SUBMIT, Scope.INFER}),
    Role.DEPLOYER: frozenset({Scope.READ, Scope.SUBMIT, Scope.INFER, Scope.DEPLOY}),
    Role.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The asker of one request.

    `scopes` are the credential's, never more than the role's. `job_id` is set where a job's own token asks: it
    may touch that job and nothing else. `how` says which credential it was (`socket`, `token:7`, `session:3`,
    `job:12`), for logs.
    """

    user: str
    uid: int
    role: Role
    scopes: frozenset[Scope]
    how: str
    job_id: int | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    @property
    def admin(self) -> bool:
        return Scope.ADMIN in self.scopes


def new_token() -> str:
    """A fresh bearer token: `mlbx_`, 43 base 62 digits of 32 random bytes, 6 of their CRC-32."""
    secret = _base62(int.from_bytes(secrets.token_bytes(32)), _SECRET_LENGTH)
    return f"mlbx_{secret}{_checksum(secret)}"


def well_formed(token: str) -> bool:
    """Whether `token` has the form and checksum of one of ours (nothing is looked up)."""
    body = token.removeprefix("mlbx_")
    if body == token or len(body) != _SECRET_LENGTH + _CHECKSUM_LENGTH or not body.isascii():
        return False
    return _checksum(body[:_SECRET_LENGTH]) == body[_SECRET_LENGTH:]


def digest(token: str) -> str:
    """SHA-256 in hex: what is stored of a token. Its 256 random bits need no slow hash (ASVS 5.0, 6.5.2)."""
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _base62(number: int, length: int) -> str:
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _checksum(secret: str) -> str:
    return _base62(zlib.crc32(secret.encode()), _CHECKSUM_LENGTH)
