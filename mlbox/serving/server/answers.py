"""Errors as the protocol tells them: a status and `{"error": "..."}`. Triton's clients read nothing else."""

import math

from starlette.responses import Response

from mlbox.errors import (
    Conflict,
    Denied,
    Impossible,
    Invalid,
    MlboxError,
    NotFound,
    TooLarge,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from mlbox.serving.server import jsontext

_TEXT_MAX = 2000
"""Longest error text: it may quote what the client sent."""


class Unsupported(MlboxError):
    """The protocol has it, this server has not."""


class UnknownEncoding(Unsupported):
    """A Content-Encoding that is neither gzip nor deflate."""


_STATUS: dict[type[MlboxError], int] = {
    Invalid: 400,
    Impossible: 400,
    Unauthenticated: 401,
    Denied: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    TooMany: 429,
    Unsupported: 501,
    UnknownEncoding: 501,
    Unavailable: 503,
}


def error_answer(error: MlboxError) -> Response:
    """The answer that tells `error`."""
    headers: dict[str, str] = {}
    if isinstance(error, Unavailable | TooMany):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = 'Bearer realm="mlbox inference"'
    if isinstance(error, UnknownEncoding):
        headers["accept-encoding"] = "gzip, deflate"
    return json_answer({"error": str(error)[:_TEXT_MAX]}, _STATUS.get(type(error), 500), headers)


def json_answer(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`value` as JSON."""
    return Response(jsontext.dumps(value), status, headers, media_type="application/json")


def error_body(status: int, message: str) -> tuple[bytes, bytes]:
    """Content type and body for what the transport refuses by itself."""
    return b"application/json", jsontext.dumps({"error": message})
