"""Bodies of requests and answers: read with a limit, decompressed with the same limit, compressed when asked."""

import zlib

from starlette.requests import Request

from mlbox.errors import Invalid, TooLarge
from mlbox.serving.server.answers import UnknownEncoding

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""zlib's wbits: 31 is gzip, 15 the zlib format, which is what HTTP calls deflate (RFC 9110, 8.4.1.2)."""
_LEVEL = 4
"""Tensors of floats hardly shrink: a higher level costs time and saves next to nothing."""
_PIECE_BYTES = 64 << 10
"""What is decompressed at a time: the rest behind a member's end is copied, so the whole body at once would cost
its square."""
_MEMBERS_MAX = 1000


async def read(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known; ClientDisconnect when the client leaves."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """`body` without its Content-Encoding. Raises Invalid, TooLarge, UnknownEncoding."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in _WINDOW_BITS:
        raise UnknownEncoding(f"Unsupported compression type: {encoding[:40]!r}: gzip and deflate are known")
    parts: list[bytes] = []
    size = position = members = 0
    while position < len(body):  # gzip may come in several members, one after the other
        members += 1
        if members > _MEMBERS_MAX:
            raise Invalid(f"the body has more than {_MEMBERS_MAX} {encoding} members: compress it as one")
        stream = zlib.decompressobj(_WINDOW_BITS[encoding])
        while not stream.eof:
            piece = body[position : position + _PIECE_BYTES]
            if not piece:
                raise Invalid(f"the body ends within its {encoding} stream")
            try:
                part = stream.decompress(piece, limit - size + 1)
            except zlib.error as error:
                raise Invalid(f"the body is not {encoding}: {error}") from error
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
            position += len(piece) - len(stream.unused_data)
        if position < len(body) and encoding != "gzip":
            raise Invalid("there are bytes after the end of the deflate stream")
    return b"".join(parts)


def wanted_encoding(accept: str) -> str | None:
    """`gzip` or `deflate`, where an Accept-Encoding field asks for one; the one it likes better (RFC 9110, 12.5.3)."""
    liked: dict[str, float] = {}
    for item in accept.lower().split(","):
        name, _, rest = item.partition(";")
        weight = rest.strip().removeprefix("q=")
        try:
            liked[name.strip()] = float(weight) if weight else 1.0
        except ValueError:
            continue
    known = [name for name in _WINDOW_BITS if liked.get(name, 0.0) > 0.0]
    return max(known, key=lambda name: liked[name], default=None)


def compress(parts: list[bytes | memoryview], encoding: str) -> bytes:
    """The parts as one compressed body."""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return b"".join([*(stream.compress(part) for part in parts), stream.flush()])


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body of a request may have {limit} bytes, decompressed as well: send less at a time")
