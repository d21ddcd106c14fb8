"""JSON as inference speaks it: strict and fast, but with the tokens NaN, Infinity and -Infinity both ways. Pure.

msgspec knows no such tokens (and writes null for them); the standard library does, five times slower, so it reads
only what contains one.
"""

import json
import re
from typing import Any

import msgspec

from mlbox.errors import Invalid

_NOT_FINITE = re.compile(rb"\b(?:NaN|Infinity)\b")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(text: bytes | memoryview, what: str = "the request") -> object:
    """The value that `text` spells. Raises Invalid, whatever is wrong with it."""
    try:
        return msgspec.json.decode(text)
    except RecursionError:
        raise Invalid(f"{what} is not valid JSON: JSON nesting depth exceeds maximum allowed limit (100)") from None
    except ValueError as error:  # msgspec's own errors and UnicodeDecodeError are among them
        if _NOT_FINITE.search(text) is None:
            raise Invalid(f"{what} is not valid JSON: {error}") from error
    return _loads_not_finite(bytes(text), what)


def dumps(value: object) -> bytes:
    """`value` as JSON; the caller sees to it that no number in it is NaN or infinite.

    Half a surrogate pair (in a file's name that is not UTF-8, say) is written as `?`.
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def dumps_values(values: list[Any], *, finite: bool) -> bytes:
    """A flat list of values; where not all are `finite`, with the tokens NaN, Infinity and -Infinity."""
    return msgspec.json.encode(values) if finite else json.dumps(values, separators=(",", ":")).encode()


def _loads_not_finite(text: bytes, what: str) -> object:
    try:
        value: object = json.loads(text)
        if _SURROGATE.search(text):
            msgspec.json.encode(value)  # the standard library lets half of a surrogate pair through; this does not
    except RecursionError:
        raise Invalid(f"{what} is not valid JSON: JSON nesting depth exceeds maximum allowed limit (100)") from None
    except ValueError as error:
        raise Invalid(f"{what} is not valid JSON: {error}") from error
    return value
