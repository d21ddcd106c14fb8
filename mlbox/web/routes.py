"""What a route is: a method, a path, who may use it, and what it does. No route exists without its permission."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Send
from starlette.types import Scope as Connection

from mlbox.errors import Denied, Invalid, NotFound
from mlbox.identity import Identity, Scope
from mlbox.web.problems import WrongMethod

Endpoint = Callable[[Request], Awaitable[Response]]

_KEY = re.compile(r"[!-~]{1,255}")
_ID_DIGITS = 19
"""Digits of the largest 64-bit id; longer numbers need not be looked up."""


@dataclass(frozen=True, slots=True)
class Permission:
    """Who may use a route: whoever has `scope`. `scope` None: anybody at all, without a credential.

    A job's own token gets in where `job_tokens` says so only, and sees no more than its job there.
    """

    scope: Scope | None
    job_tokens: bool = False


OPEN = Permission(None)
READ = Permission(Scope.READ)
SUBMIT = Permission(Scope.SUBMIT)
DEPLOY = Permission(Scope.DEPLOY)
ADMIN = Permission(Scope.ADMIN)
READ_JOB = Permission(Scope.READ, job_tokens=True)
WRITE_JOB = Permission(Scope.SUBMIT, job_tokens=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the route table. GET answers HEAD as well."""

    method: str
    path: str
    permission: Permission
    endpoint: Endpoint


def router(rules: Sequence[Rule]) -> Router:
    """An app that answers by `rules`. Raises ValueError for a table that leaves who may use a route open to doubt."""
    by_path: dict[str, dict[str, Rule]] = {}
    for rule in rules:
        if not isinstance(rule.permission, Permission):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{rule.method} {rule.path} has no permission")
        if rule.permission.scope is None and "{" in rule.path:
            raise ValueError(f"{rule.method} {rule.path} is open to anybody: such a path cannot have parameters")
        methods = by_path.setdefault(rule.path, {})
        if rule.method in methods:
            raise ValueError(f"{rule.method} {rule.path} is there twice")
        methods[rule.method] = rule
    routes: list[BaseRoute] = [Route(path, _Resource(methods)) for path, methods in by_path.items()]
    return Router(routes, redirect_slashes=False, default=_nothing)


def open_paths(rules: Sequence[Rule]) -> frozenset[tuple[str, str]]:
    """(method, path) of every route that answers without a credential, to be compared with a request as a whole."""
    found = {(rule.method, rule.path) for rule in rules if rule.permission.scope is None}
    return frozenset(found | {("HEAD", path) for method, path in found if method == "GET"})


def identity_of(request: Request) -> Identity:
    """Who asks; the route is not an open one."""
    identity: Identity = request.scope["identity"]
    return identity


def id_in_path(request: Request, what: str) -> int:
    """The `{id}` of the path. Raises NotFound when it is no number, or none that could be one of ours."""
    text: str = request.path_params["id"]
    if text.isascii() and text.isdigit() and len(text) <= _ID_DIGITS:
        return int(text)
    raise NotFound(f"there is no {what} {text[:40]!r}: it has a number")


def idempotency_key(request: Request) -> str | None:
    """The Idempotency-Key header. Raises Invalid for one that cannot be kept."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1 or _KEY.fullmatch(keys[0]) is None:
        raise Invalid("Idempotency-Key wants 1 to 255 visible ASCII characters, once")
    return keys[0]


class _Resource:
    """The methods of one path."""

    def __init__(self, rules: dict[str, Rule]) -> None:
        self._rules = rules
        self._allowed = ", ".join(sorted({*rules, "HEAD"} if "GET" in rules else rules))

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        method: str = scope["method"]
        rule = self._rules.get("GET" if method == "HEAD" else method)
        if rule is None:
            raise WrongMethod(f"{method} is not for this address; it takes {self._allowed}", self._allowed)
        _check_permission(rule, scope)
        response = await rule.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def _check_permission(rule: Rule, scope: Connection) -> None:
    wanted = rule.permission.scope
    if wanted is None:
        return
    who: Identity = scope["identity"]
    if who.job_id is not None and not rule.permission.job_tokens:
        raise Denied(f"the token of job {who.job_id} is good for that job only: use a token of your own")
    if not who.may(wanted):
        have = ", ".join(sorted(who.scopes)) or "none"
        raise Denied(f"this needs the scope '{wanted}'; this credential ({who.how}) has: {have}")


async def _nothing(scope: Connection, receive: Receive, send: Send) -> None:
    del receive, send
    raise NotFound(f"there is nothing at {scope['path'][:200]!r}")
