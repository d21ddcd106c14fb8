"""`/api/me`, `/api/tokens`, `/api/login-codes`: who asks, and the credentials that they make for themselves."""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from mlbox.errors import Conflict, FieldError, Invalid
from mlbox.identity import Identity, Scope
from mlbox.scheduler import submission, values
from mlbox.web import bodies
from mlbox.web.answers import Json, Text, moment, table, token_json
from mlbox.web.credentials import DEFAULT_TOKEN_S, scopes_of
from mlbox.web.doors import Doors
from mlbox.web.negotiation import wants_text
from mlbox.web.routes import id_in_path, idempotency_key, identity_of

_DEFAULT_SCOPES = frozenset({Scope.READ, Scope.SUBMIT, Scope.INFER})
_EXPIRES_MAX_S = 10 * 366 * 86_400.0
_COLUMNS = ("id", "name", "user", "scopes", "expires_at", "last_used_at", "revoked_at")
_ANSWERS_KEPT = 200
"""Answers with a secret in them, kept in memory only for a client that asks again with the same Idempotency-Key."""
_ANSWERS_KEPT_S = 600.0


class IdentityApi:
    """The endpoints of identity."""

    def __init__(self, doors: Doors) -> None:
        self._credentials = doors.credentials
        self._endpoints = doors.endpoints
        self._answers: OrderedDict[tuple[str, str, str], tuple[float, _Made]] = OrderedDict()

    async def me(self, request: Request) -> Response:
        who = identity_of(request)
        return Json(
            {
                "user": who.user,
                "uid": who.uid,
                "role": who.role,
                "scopes": sorted(who.scopes),
                "credential": who.how,
                "job": who.job_id,
            }
        )

    async def create_token(self, request: Request) -> Response:
        who, key = identity_of(request), idempotency_key(request)
        fields = await bodies.fields_of(request)
        if (earlier := self._earlier(who, "token", key, fields)) is not None:
            return _made(request, earlier, again=True)
        bodies.known_only(fields, ("name", "scopes", "expires"))
        name = fields.get("name", "token")
        if not isinstance(name, str) or submission.NAME.fullmatch(name) is None:
            raise _bad("name", "wants 1 to 64 of letters, digits, '.', '_' and '-'")
        token, secret = await self._credentials.create_token(
            who,
            name=name,
            scopes=_scopes(fields.get("scopes"), who),
            expires_at=_expiry(fields),
            idempotency_key=key,
        )
        made = _Made({**token_json(token), "token": secret}, secret, fields, f"/api/tokens/{token.id}")
        self._keep(who, "token", key, made)
        return _made(request, made)

    async def tokens(self, request: Request) -> Response:
        rows = [token_json(token) for token in await self._credentials.tokens(identity_of(request))]
        if wants_text(request):
            return Text(table(_COLUMNS, rows))
        return Json({"tokens": rows})

    async def token(self, request: Request) -> Response:
        token = await self._credentials.token(identity_of(request), id_in_path(request, "token"))
        return Json(token_json(token))

    async def revoke_token(self, request: Request) -> Response:
        who, token_id = identity_of(request), id_in_path(request, "token")
        await self._credentials.revoke(who, token_id)
        return Json(token_json(await self._credentials.token(who, token_id)))

    async def create_login_code(self, request: Request) -> Response:
        who, key = identity_of(request), idempotency_key(request)
        fields = await bodies.fields_of(request)
        bodies.known_only(fields, ())
        if (earlier := self._earlier(who, "code", key, fields)) is not None:
            return _made(request, earlier, again=True)
        code, expires_at = await self._credentials.make_login_code(who)
        url = f"http://{self._endpoints()['http']}/login?code={code}"
        made = _Made({"code": code, "url": url, "expires_at": moment(expires_at)}, url, fields)
        self._keep(who, "code", key, made)
        return _made(request, made)

    def _earlier(self, who: Identity, what: str, key: str | None, fields: Mapping[str, object]) -> "_Made | None":
        """What was made for the first request with this key, while it is kept. Raises Conflict if that was another."""
        kept = self._answers.get((who.how, what, key)) if key is not None else None
        if kept is None or kept[0] <= time.monotonic():
            return None
        if kept[1].fields != fields:
            raise Conflict("this Idempotency-Key was used for another request: take a new one")
        return kept[1]

    def _keep(self, who: Identity, what: str, key: str | None, made: "_Made") -> None:
        if key is not None:
            # By credential: a weaker one of the same user must not be shown what a stronger one was given.
            self._answers[who.how, what, key] = (time.monotonic() + _ANSWERS_KEPT_S, made)
            if len(self._answers) > _ANSWERS_KEPT:
                self._answers.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Made:
    """A secret that was just made: as JSON, and as the one line that a shell wants."""

    shown: Mapping[str, object]
    line: str
    fields: Mapping[str, object]
    location: str | None = None


def _made(request: Request, made: _Made, *, again: bool = False) -> Response:
    headers = {"Location": made.location} if made.location else {}
    if again:
        headers["Idempotency-Replayed"] = "true"
    if wants_text(request):
        return Text(made.line + "\n", 201, headers)
    return Json(made.shown, 201, headers)


def _scopes(value: object, who: Identity) -> frozenset[Scope]:
    """The scopes asked for; where none are, the usual ones as far as the asker has them."""
    if value is None:
        return frozenset(scope for scope in _DEFAULT_SCOPES if who.may(scope))
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        raise _bad("scopes", f"wants some of {', '.join(Scope)}")
    try:
        return scopes_of(str(word) for word in cast("list[object]", words))
    except ValueError as error:
        raise _bad("scopes", str(error)) from None


def _expiry(fields: Mapping[str, object]) -> float | None:
    """Unix seconds from a duration, a time, or `never`; in 90 days where nothing is said."""
    now = time.time()
    value = fields.get("expires")
    if value is None and "expires" not in fields:
        return now + DEFAULT_TOKEN_S
    if value is None or value == "never":
        return None
    try:
        at = now + values.seconds(value)
    except values.Bad:
        at = _written_time(value)
    if at is None or not now < at <= now + _EXPIRES_MAX_S:
        raise _bad("expires", "wants a duration such as 90d, a coming time such as 2027-01-31T18:00:00Z, or never")
    return at


def _written_time(value: object) -> float | None:
    try:
        return values.moment(value)
    except values.Bad:
        return None


def _bad(field: str, message: str) -> Invalid:
    return Invalid(f"{field}: {message}", (FieldError(field, message),))
