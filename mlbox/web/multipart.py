"""multipart/form-data (RFC 7578), part by part as it comes in: files go to disk, fields stay small."""

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from mlbox.errors import Invalid, TooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # there for type checkers only

_PARTS_MAX = 200


@dataclass(slots=True)
class Part:
    """The beginning of a part."""

    name: str
    filename: str | None


@dataclass(frozen=True, slots=True)
class End:
    """The end of the part that was begun last."""


async def parts(content_type: str, body: AsyncIterable[bytes]) -> AsyncGenerator[Part | bytes | End]:
    """Each part as it comes: its Part, its data in pieces, its End. Raises Invalid, TooLarge."""
    parser = _Parser(content_type)
    async for chunk in body:
        for item in parser.feed(chunk):
            yield item
    parser.finish()


@dataclass(slots=True)
class _Headers:
    name: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    disposition: bytes = b""


class _Parser:
    """python-multipart's callbacks, turned into a list of what came in with each chunk."""

    def __init__(self, content_type: str) -> None:
        kind, options = _options(content_type.encode("latin-1", "replace"))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Invalid("the Content-Type of a multipart body has to name its boundary")
        self._items: list[Part | bytes | End] = []
        self._headers = _Headers()
        self._count = 0
        self._ended = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _bad(error) from None

    def feed(self, chunk: bytes) -> list[Part | bytes | End]:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _bad(error) from None
        items, self._items = self._items, []
        return items

    def finish(self) -> None:
        """Raises Invalid when the body ended before its last part did."""
        if not self._ended:
            raise Invalid("the multipart body ends before its closing boundary: was the upload cut off?")

    def _part_begin(self) -> None:
        self._headers = _Headers()
        self._count += 1
        if self._count > _PARTS_MAX:
            raise TooLarge(f"the body has more than {_PARTS_MAX} parts")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._headers.name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._headers.value += data[start:end]

    def _header_end(self) -> None:
        if bytes(self._headers.name).lower() == b"content-disposition":
            self._headers.disposition = bytes(self._headers.value)
        self._headers.name.clear()
        self._headers.value.clear()

    def _headers_finished(self) -> None:
        kind, options = _options(self._headers.disposition)
        if kind != b"form-data" or b"name" not in options:
            raise Invalid("a part of the body has no Content-Disposition: form-data with a name")
        filename = options.get(b"filename")
        self._items.append(Part(_text(options[b"name"]), None if filename is None else _text(filename)))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._items.append(data[start:end])

    def _part_end(self) -> None:
        self._items.append(End())

    def _end(self) -> None:
        self._ended = True


def _options(value: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """A header with parameters, taken apart."""
    try:
        return parse_options_header(value)
    except (ValueError, LookupError) as error:
        raise _bad(error) from None


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Invalid("the name of a part is not UTF-8") from None


def _bad(error: Exception) -> Invalid:
    return Invalid(f"the body is not valid multipart/form-data: {error}")
