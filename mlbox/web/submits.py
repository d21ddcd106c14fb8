"""The four forms of a submit: form fields, JSON, multipart with files, and a script as the whole body.

All end as one mapping from field to value, in which the directives of a script count least and the query most.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.requests import Request

from mlbox.errors import FieldError, Invalid, TooLarge
from mlbox.scheduler import directives
from mlbox.web import bodies, multipart, strict_json
from mlbox.web.bodies import Upload
from mlbox.web.problems import UnknownMediaType

_REPEATABLE = frozenset({"env", "depends_on", "notify", "notify_on"})
_YIELDS = {
    "gpus": ("gpu_mem",),
    "gpu_mem": ("gpus", "launch"),
    "array": ("matrix", "at_once"),
    "matrix": ("array", "at_once"),
}
"""Fields of a script that give way to another one of the request, with which they cannot stand."""
_SCRIPT_TYPES = frozenset({"application/octet-stream", "application/x-sh", "application/x-shellscript"})
_ARCHIVES = ((b"\x1f\x8b", "tar.gz"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"))
"""How the two formats begin (RFC 1952, section 2.3.1; APPNOTE.TXT, 4.3.7 and, for an empty archive, 4.3.16)."""


@dataclass(frozen=True, slots=True)
class Submit:
    """What was sent: fields yet to be checked, and the code archive with its format where there is one."""

    fields: Mapping[str, object]
    code: Path | None = None
    code_format: str | None = None


@asynccontextmanager
async def receiving_submit(request: Request, folder: Path, limit: int) -> AsyncGenerator[Submit]:
    """Read a submit; an archive lies in `folder` and is removed at the end unless somebody moved it away.

    `limit` is the largest body in bytes. Raises Invalid, TooLarge, Unavailable.
    """
    query = bodies.query_fields(request, repeatable=_REPEATABLE)
    if bodies.media_type_of(request) == "multipart/form-data":
        bodies.check_announced(request, limit)
        async with bodies.receiving(folder, limit) as upload:
            fields = await _multipart(request, upload)
            code_format = _archive(upload) if upload.size else None
            merged = together(fields, query, with_code=code_format is not None)
            yield Submit(merged, upload.path if code_format else None, code_format)
    else:
        body = await bodies.read_body(request)
        if not body and not query.keys() & {"command", "script"}:
            raise Invalid("the body is empty: send a command, or a script with --data-binary @FILE (does it exist?)")
        fields = await bodies.parsed(partial(_one_body, bodies.media_type_of(request)), body)
        yield Submit(together(fields, query))


def together(
    fields: Mapping[str, object], query: Mapping[str, object], *, with_code: bool = False
) -> dict[str, object]:
    """All fields of a submit. A field that is null in the request takes the script's away."""
    if "code" in query:
        raise _code_is_a_file()
    script = query.get("script", fields.get("script"))
    from_script = directives.read(script) if isinstance(script, str) else {}
    request = {**fields, **query}
    for field, value in request.items():
        for yields in _YIELDS.get(field, ()) if value is not None else ():
            from_script.pop(yields, None)
    if with_code:
        from_script.pop("workdir", None)
    if request.get("gpus") in (0, "0"):  # the script's way to start on GPUs is of no use without one
        from_script.pop("launch", None)
    return {**from_script, **request}


def _one_body(kind: str, body: bytes) -> Mapping[str, object]:
    """The fields of a body that is not multipart.

    curl says `application/x-www-form-urlencoded` of anything sent with -d or --data-binary; a script is known by its
    `#!`, with which no form begins (the name of no field does).
    """
    if not body:
        return {}
    if body.startswith(b"#!") and kind in ("", bodies.FORM):
        if b"\n" not in body:
            raise Invalid("the script has lost its line ends, as curl -d does it: send it with --data-binary")
        return {"script": _script(body)}
    if kind == bodies.FORM:
        return _form(body)
    if kind == bodies.JSON or kind.endswith("+json") or (not kind and body.lstrip().startswith(b"{")):
        fields = strict_json.loads_object(body)
        if "code" in fields:
            raise _code_is_a_file()
        return fields
    if kind in _SCRIPT_TYPES or kind.startswith("text/") or not kind:
        return {"script": _script(body)}
    raise UnknownMediaType(
        f"a body of type {kind[:80]!r} is no job: send a form, JSON, multipart/form-data or a script"
    )


def _form(body: bytes) -> Mapping[str, object]:
    try:
        fields = bodies.form_fields(body, repeatable=_REPEATABLE)
    except Invalid as error:
        if b"\n" in body:
            raise Invalid(f"{error}; a script is known by its first line: begin it with #!/bin/bash") from None
        raise
    if "code" in fields:
        raise _code_is_a_file()
    return fields


async def _multipart(request: Request, upload: Upload) -> Mapping[str, object]:
    """The fields of a multipart body; its `code` goes to `upload`."""
    pairs: list[tuple[str, str]] = []
    name, is_file = "", False
    text, kept = bytearray(), 0
    async for item in multipart.parts(request.headers["content-type"], request.stream()):
        if isinstance(item, multipart.Part):
            name, is_file = item.name, item.filename is not None
            text.clear()
            if name == "code" and not is_file:
                raise _code_is_a_file()
            if name == "code" and upload.size:
                raise Invalid("the field 'code' is there twice", (FieldError("code", "is there twice"),))
        elif isinstance(item, bytes):
            if name == "code":
                await upload.write(item)
            else:
                text += item
                kept += len(item)
                if kept > bodies.TEXT_MAX:
                    raise TooLarge(f"the fields beside the code are larger than {bodies.TEXT_MAX >> 20} MiB")
        elif name == "code":
            await upload.flush()
            if not upload.size:
                raise Invalid("the code archive is empty", (FieldError("code", "is empty"),))
        else:
            pairs.append((name, _script(text) if is_file else _text(name, text)))
    return bodies.merged(pairs, _REPEATABLE)


def _archive(upload: Upload) -> str:
    for magic, code_format in _ARCHIVES:
        if upload.head.startswith(magic):
            return code_format
    message = f"is neither a tar.gz nor a zip archive (it begins with {upload.head[:4].hex(' ')})"
    raise Invalid(f"code: {message}", (FieldError("code", message),))


def _script(body: bytes | bytearray) -> str:
    return _text("script", body)


def _text(name: str, value: bytes | bytearray) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        message = f"is not UTF-8: byte {error.start} is 0x{value[error.start]:02x}"
        raise Invalid(f"{name[:80]}: {message}", (FieldError(name, message),)) from None


def _code_is_a_file() -> Invalid:
    message = "is an archive: send it as a file in multipart/form-data (curl -F code=@src.tar.gz)"
    return Invalid(f"code: {message}", (FieldError("code", message),))
