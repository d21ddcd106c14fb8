"""Request bodies, read with a cap while they come in: small ones into memory, uploads straight to disk.

`fields_of` makes JSON and forms the same mapping from field to value. `Upload` is a file being received; it is gone
again unless somebody moved it away.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from starlette.requests import Request

from mlbox.errors import FieldError, Invalid, TooLarge, Unavailable
from mlbox.scheduler import submission
from mlbox.scheduler.values import Bad
from mlbox.web import strict_json
from mlbox.web.problems import UnknownMediaType

T = TypeVar("T")

FORM = "application/x-www-form-urlencoded"
JSON = "application/json"
TEXT_MAX = 4 << 20
"""A body that is read into memory. The largest script is 1 MiB; JSON and forms may need several bytes for one."""
_SMALL_BYTES = 64 << 10
"""Parsed in well under a millisecond."""
_FIELDS_MAX = 1000
_ERRORS_MAX = 32
"""Further unknown fields are not looked at: each costs a search for the nearest known one."""
_BLOCK_BYTES = 1 << 20
"""So much is collected before a thread writes it: a thread switch for every 64 KiB would cost more than the write."""


def media_type_of(request: Request) -> str:
    """The body's media type in lower case, without parameters; empty where none is named."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, limit: int = TEXT_MAX) -> bytes:
    """The whole body. Raises TooLarge as soon as it is clear that it is longer than `limit`."""
    check_announced(request, limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


async def fields_of(request: Request) -> dict[str, object]:
    """The fields of a JSON object or a form; none where there is no body. Raises Invalid."""
    body = await read_body(request)
    kind = media_type_of(request)
    if not body:
        return {}
    if kind == FORM:
        return {**await parsed(form_fields, body)}
    if kind in (JSON, "") or kind.endswith("+json"):
        return await parsed(strict_json.loads_object, body)
    raise UnknownMediaType(f"a body of type {kind[:80]!r} is not read here: send {JSON} or {FORM}")


async def parsed(parse: Callable[[bytes], T], body: bytes) -> T:
    """`parse(body)`, in a thread when it may take long: a few megabytes would hold everybody up for as long."""
    return parse(body) if len(body) <= _SMALL_BYTES else await asyncio.to_thread(parse, body)


def form_fields(body: bytes, *, repeatable: frozenset[str] = frozenset()) -> dict[str, str | list[str]]:
    """The fields of an urlencoded form or query; `repeatable` ones may come many times and are a list then."""
    if not body:
        return {}
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=_FIELDS_MAX,
        )
    except ValueError as error:  # also bytes that are not ASCII and escapes that are not UTF-8
        raise Invalid(
            f"the fields are not an urlencoded form (name=value&name=value): {error}; "
            "send a value that holds & + or % with curl --data-urlencode"
        ) from None
    return merged(pairs, repeatable)


def merged(pairs: Sequence[tuple[str, str]], repeatable: frozenset[str]) -> dict[str, str | list[str]]:
    """Pairs as a mapping. Raises Invalid where a field that cannot be repeated is."""
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    for name, several in values.items():
        if len(several) > 1 and name not in repeatable:
            raise Invalid(f"the field {name[:80]!r} is there twice", (FieldError(name, "is there twice"),))
    return {name: several if len(several) > 1 else several[0] for name, several in values.items()}


def query_fields(request: Request, *, repeatable: frozenset[str] = frozenset()) -> dict[str, str | list[str]]:
    """The fields in the query of the address."""
    query: bytes = request.scope["query_string"]
    return form_fields(query, repeatable=repeatable)


def known_only(fields: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raises Invalid when there is a field that is not one of `known`."""
    unknown = [name for name in fields if name not in known][:_ERRORS_MAX]
    errors = tuple(FieldError(name, submission.unknown(name, known)) for name in unknown)
    if errors:
        raise Invalid("; ".join(f"{error.field[:80]}: {error.message}" for error in errors), errors)


def checked(
    fields: Mapping[str, object], parsers: Mapping[str, Callable[[object], Any]], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The values of `fields`; null is as if it were not there. Raises Invalid with one FieldError for each bad one."""
    known_only(fields, tuple(parsers))
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for field, value in fields.items():
        if value is None:
            continue
        try:
            values[field] = parsers[field](value)
        except Bad as error:
            errors.append(FieldError(field, str(error)))
    errors += [FieldError(field, "is missing") for field in required if fields.get(field) is None]
    if errors:
        raise Invalid("; ".join(f"{error.field}: {error.message}" for error in errors), tuple(errors))
    return values


def check_announced(request: Request, limit: int) -> None:
    """Raises TooLarge when the Content-Length says already that the body is longer than `limit`."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and (len(announced) > 19 or int(announced) > limit):
        raise _too_large(limit)


class Upload:
    """A file being received. Made by `receiving`."""

    def __init__(self, path: Path, fd: int, limit: int) -> None:
        self.path = path
        self.size = 0
        self.head = b""
        """The first bytes, enough to tell what kind of file it is."""
        self._fd = fd
        self._limit = limit
        self._block = bytearray()
        self._writing: asyncio.Future[None] | None = None

    async def write(self, data: bytes) -> None:
        """Add `data`. Raises TooLarge, Unavailable."""
        self.size += len(data)
        if self.size > self._limit:
            raise _too_large(self._limit)
        if len(self.head) < 512:
            self.head = (self.head + data)[:512]
        self._block += data
        if len(self._block) >= _BLOCK_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Have everything in the file."""
        block, self._block = self._block, bytearray()
        if block:
            self._writing = asyncio.get_running_loop().run_in_executor(None, partial(_write_all, self._fd, block))
            await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Wait for a write that is still under way (its thread goes on when its task is cancelled), then close."""
        if self._writing is not None:
            await asyncio.wait((self._writing,))
            self._writing.exception()
        os.close(self._fd)


@asynccontextmanager
async def receiving(folder: Path, limit: int) -> AsyncGenerator[Upload]:
    """A new file in `folder`, removed at the end unless it was moved away. Raises Unavailable."""
    path = folder / f"upload-{secrets.token_hex(8)}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Unavailable(f"the upload cannot be stored now: {error.strerror}") from error
    upload = Upload(path, fd, limit)
    try:
        yield upload
    finally:
        await upload.close()
        path.unlink(missing_ok=True)


async def receive_whole(request: Request, upload: Upload, limit: int) -> None:
    """The whole body into `upload`. Raises TooLarge, Unavailable."""
    check_announced(request, limit)
    async for part in request.stream():
        await upload.write(part)
    await upload.flush()


def _write_all(fd: int, data: bytearray) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise Unavailable(f"the upload cannot be stored now: {error.strerror}") from error


def _too_large(limit: int) -> TooLarge:
    shown = f"{limit >> 20} MiB" if limit >= 1 << 20 else f"{limit} bytes"
    return TooLarge(f"the body is larger than {shown}, which is the limit here")
