"""Errors -> answers; the only place that knows which status an error has. problem+json (RFC 9457), text or a page."""

import http
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from mlbox.errors import (
    Conflict,
    Denied,
    FieldError,
    Impossible,
    Invalid,
    MlboxError,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from mlbox.web.negotiation import HTML, JSON, TEXT, preferred

log = logging.getLogger(__name__)


class Misdirected(MlboxError):
    """The request names a host that this server does not answer for."""


class UnknownMediaType(Invalid):
    """The body is of a kind that this route does not read."""


class NoSuchRange(MlboxError):
    """The bytes asked for lie beyond the end. `size` is what there is."""

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class WrongMethod(MlboxError):
    """The address is known, but not with this method."""

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


_STATUS: tuple[tuple[type[MlboxError], int], ...] = (
    (Impossible, 422),
    (UnknownMediaType, 415),
    (Invalid, 400),
    (Unauthenticated, 401),
    (Denied, 403),
    (NotFound, 404),
    (WrongMethod, 405),
    (Conflict, 409),
    (TooLarge, 413),
    (NoSuchRange, 416),
    (Misdirected, 421),
    (TooMany, 429),
    (Unavailable, 503),
)
"""From the special to the general: the first that fits counts."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What went wrong, ready to be told in any form."""

    status: int
    detail: str
    errors: tuple[FieldError, ...] = ()
    headers: Mapping[str, str] | None = None

    @property
    def title(self) -> str:
        return http.HTTPStatus(self.status).phrase


def problem_of(error: Exception) -> Problem:
    """The problem that `error` is to the asker. What nobody expected is logged and told in general words."""
    if isinstance(error, HTTPException):
        return Problem(error.status_code, error.detail, headers=error.headers)
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), None)
    if status is None:
        log.error("a request failed in a way that nobody expected", exc_info=error)
        return Problem(500, "something went wrong inside mlbox; its log says what")
    headers: dict[str, str] = {}
    if isinstance(error, (TooMany, Unavailable)):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="mlbox"'
    if isinstance(error, WrongMethod):
        headers["Allow"] = error.allowed
    if isinstance(error, NoSuchRange):
        headers["Content-Range"] = f"bytes */{error.size}"
    errors = error.errors if isinstance(error, Invalid) else ()
    return Problem(status, str(error), errors, headers)


def answer(problem: Problem, accept: str, page: Callable[[Problem], Response] | None = None) -> Response:
    """`problem` in the form that `accept` (the header's value) prefers; `page` makes the HTML where there is one."""
    offered = (JSON, TEXT, HTML) if page is not None else (JSON, TEXT)
    match preferred(accept, offered):
        case "text/html" if page is not None:
            response = page(problem)
        case "text/plain":
            response = PlainTextResponse(problem.detail + "\n", problem.status)
        case _:
            response = Response(_json(problem), problem.status, media_type="application/problem+json")
    for name, value in (problem.headers or {}).items():
        response.headers[name] = value
    return response


def protocol_error(status: int, message: str) -> tuple[bytes, bytes]:
    """Content type and body of what the HTTP protocol itself refuses, before there is a request (400, 408, 431)."""
    return b"application/problem+json", _json(Problem(status, message))


def _json(problem: Problem) -> bytes:
    body: dict[str, object] = {
        "type": "about:blank",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
    }
    if problem.errors:
        body["errors"] = [{"field": error.field, "message": error.message} for error in problem.errors]
    return msgspec.json.encode(body)
