"""A window on the lines of a log, for pages and editors: by place, around a place, or at the next match. Blocking.

Places are byte offsets, as everywhere in a log's interface: a window costs the same at the end of a gigabyte as at its
beginning, and no index of lines has to be kept.
"""

from dataclasses import dataclass

from mlbox.scheduler.logs import CHUNK_BYTES, LogFile

COUNT_MAX = 2000
_LINE_BYTES = 16 << 10
"""A longer line is shown cut: a log of progress bars may hold no newline at all."""
_WINDOW_BYTES = 4 << 20
SEARCH_BYTES = 64 << 20
"""How far one search goes before it says so and can be gone on with."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end: where it begins, where the next one does, and its text (U+FFFD for bad UTF-8)."""

    offset: int
    next: int
    text: str
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Lines in order. `match` is where the text searched for was found; `searched_to` how far it was looked for."""

    lines: tuple[Line, ...]
    size: int
    match: int | None = None
    searched_to: int | None = None


def window(log: LogFile, start: int, count: int) -> Window:
    """`count` lines from the one that holds byte `start` on."""
    size = log.size()
    return Window(lines=_lines(log, _line_start(log, min(start, size), 1), size, count), size=size)


def around(log: LogFile, offset: int, count: int) -> Window:
    """`count` lines, about half of them before the one that holds byte `offset`."""
    size = log.size()
    begin = _line_start(log, min(offset, size), count // 2 + 1)
    return Window(lines=_lines(log, begin, size, count), size=size)


def find(log: LogFile, text: bytes, start: int, count: int, *, back: bool) -> Window:
    """The lines around the first place from `start` on (or before it, `back`) where `text` is."""
    size = log.size()
    start = min(start, size)
    if back:
        match, searched_to = _find_back(log, text, start)
    else:
        match, searched_to = _find_on(log, text, start, size)
    if match is None:
        return Window(lines=(), size=size, searched_to=searched_to)
    begin = _line_start(log, match, count // 2 + 1)
    return Window(lines=_lines(log, begin, size, count), size=size, match=match, searched_to=searched_to)


def _find_on(log: LogFile, text: bytes, start: int, size: int) -> tuple[int | None, int]:
    """(place of the match, how far was searched); a match may lie across two blocks, not across a gap."""
    at, held = start, b""
    while at < size and at - start < SEARCH_BYTES:
        chunk = log.read(at)
        if not chunk.data:
            break
        held = held if chunk.offset == at else b""
        block = held + chunk.data
        place = block.find(text)
        if place >= 0:
            return chunk.offset - len(held) + place, chunk.end
        held = block[-(len(text) - 1) :] if len(text) > 1 else b""
        at = chunk.end
    return None, at


def _find_back(log: LogFile, text: bytes, start: int) -> tuple[int | None, int]:
    at, held = start, b""
    while at > 0 and start - at < SEARCH_BYTES:
        begin = max(0, at - CHUNK_BYTES)
        block = _between(log, begin, at) + held
        place = block.rfind(text)
        if place >= 0:
            return at + len(held) - len(block) + place, begin
        held = block[: len(text) - 1]
        at = begin
    return None, at


def _line_start(log: LogFile, offset: int, lines: int) -> int:
    """Where the line that holds `offset` begins; with `lines` of 2 the one before it, and so on."""
    at = offset
    while at > 0 and offset - at < _WINDOW_BYTES:
        begin = max(0, at - CHUNK_BYTES)
        block = _between(log, begin, at)
        newline = len(block)
        while (newline := block.rfind(b"\n", 0, newline)) >= 0:
            lines -= 1
            if lines == 0:
                return at - len(block) + newline + 1
        if len(block) < at - begin:  # what comes before was dropped
            return at - len(block)
        at = begin
    return at


def _between(log: LogFile, start: int, end: int) -> bytes:
    """The kept bytes that reach up to `end` without a gap, from `start` on at the earliest."""
    block = b""
    at = start
    while at < end:
        chunk = log.read(at, end - at)
        if chunk.offset > at:
            block = b""
        kept = chunk.data[: max(0, end - chunk.offset)]
        if not kept:
            break
        block += kept
        at = chunk.offset + len(kept)
    return block if at == end else b""


def _lines(log: LogFile, start: int, size: int, count: int) -> tuple[Line, ...]:
    found: list[Line] = []
    at, line, begin = start, bytearray(), start
    while len(found) < count and at < min(size, start + _WINDOW_BYTES):
        chunk = log.read(at)
        if not chunk.data:
            break
        if chunk.offset != at:  # a gap ends the line before it
            if line:
                found.append(_line(begin, at, line))
            line, begin = bytearray(), chunk.offset
        pieces = chunk.data.split(b"\n")
        position = chunk.offset
        for piece in pieces[:-1]:
            line += piece
            position += len(piece) + 1
            found.append(_line(begin, position, line))
            line, begin = bytearray(), position
        line += pieces[-1]
        at = chunk.end
    if line and len(found) < count:
        found.append(_line(begin, at, line))
    return tuple(found[:count])


def _line(begin: int, end: int, line: bytearray) -> Line:
    return Line(begin, end, line[:_LINE_BYTES].decode(errors="replace"), len(line) > _LINE_BYTES)
