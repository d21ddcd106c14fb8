"""The Range header: one range of bytes (RFC 9110, section 14). Pure."""

import re

from mlbox.web.problems import NoSuchRange

_ONE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, byte after the last) of what a Range header asks of `size` bytes; None: all of it.

    Several ranges and what cannot be read are ignored, as the standard allows. Raises NoSuchRange.
    """
    match = _ONE.fullmatch(header.strip()) if header else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1]:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < int(match[1]):
            return None
    else:
        start, end = max(0, size - int(match[2])), size
    if start >= end:
        raise NoSuchRange(f"there are {size} bytes; the range {match[0]!r} has none of them", size)
    return start, end


def content_range(start: int, end: int, size: int) -> str:
    return f"bytes {start}-{end - 1}/{size}"
