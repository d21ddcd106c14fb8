"""JSON in, strictly (RFC 8259 and I-JSON, RFC 7493): what two parsers could read in two ways is refused. Pure.

Refused beside bad syntax: duplicate keys, NaN and Infinity, numbers that 64 bits cannot hold, lone surrogates, bytes
that are not UTF-8, nesting deeper than 32.
"""

import json
import math
from typing import Any, NoReturn, cast

from mlbox.errors import Invalid

DEPTH_MAX = 32
_INTEGER_DIGITS = 20
"""Enough for 64 bits and a sign; checked before int(), whose time grows with the square of the digits."""


def loads(body: bytes) -> object:
    """The value that `body` holds. Raises Invalid that says what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}") from None
    try:
        value = cast("object", _DECODER.decode(text))
    except json.JSONDecodeError as error:
        raise Invalid(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if text.count("[") + text.count("{") > DEPTH_MAX:
        _check_depth(value, DEPTH_MAX)
    if "\\u" in text:
        _check_surrogates(value)
    return value


def loads_object(body: bytes) -> dict[str, object]:
    """As `loads`, for a body that has to be an object."""
    value = loads(body)
    if not isinstance(value, dict):
        raise Invalid(f"the body is {_KINDS[type(value)]}; send a JSON object")
    return cast("dict[str, object]", value)


_KINDS: dict[type, str] = {
    list: "a JSON array",
    str: "a JSON string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Invalid(f"the key {ascii(key)[:80]} is there twice: which one is meant?")
            seen.add(key)
    return found


def _integer(digits: str) -> int:
    if len(digits) <= _INTEGER_DIGITS:
        number = int(digits)
        if -(2**63) <= number < 2**63:
            return number
    raise Invalid(f"the number {digits[:24]}{'...' * (len(digits) > 24)} does not fit into 64 bits")


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Invalid(f"the number {digits[:24]} is too large")
    return number


def _constant(name: str) -> NoReturn:
    raise Invalid(f"{name} is not JSON")


def _check_depth(value: object, left: int) -> None:
    if isinstance(value, (dict, list)):
        if left == 0:
            raise _too_deep()
        items = cast("dict[str, object] | list[object]", value)
        for item in items.values() if isinstance(items, dict) else items:
            _check_depth(item, left - 1)


def _too_deep() -> Invalid:
    return Invalid(f"the body is nested deeper than {DEPTH_MAX} levels")


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Invalid("the body holds half of a surrogate pair, which is no character") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer, parse_float=_real, parse_constant=_constant)
