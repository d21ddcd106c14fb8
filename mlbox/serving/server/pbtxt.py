"""Reads protocol buffers' text format, as far as `config.pbtxt` files use it, into plain dicts. Pure.

The language is that of https://protobuf.dev/reference/protobuf/textformat-spec/ without extensions and `Any`.
There is no schema here: a field that occurs twice, or is written as `[...]`, becomes a list; the caller knows which
fields are lists even when they occur once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r\n\f\v]|\#[^\n]*)+)
      | (?P<number>-?\s*(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?))(?![\w.])
      | (?P<word>-?[A-Za-z_][A-Za-z0-9_]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<mark>[{}<>\[\]:,;])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{1,2})|([0-7]{1,3})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SIMPLE = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_DEPTH_MAX = 32
_DIGITS_MAX = 100
_CLOSING = {"{": "}", "<": ">"}


class BadText(ValueError):
    """Not text format; the message names the line."""


class Word(str):
    """An identifier: an enum value such as KIND_GPU. A quoted string is a plain `str`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str) -> dict[str, Any]:
    """The message in `text`: dicts, lists, strings, Words, ints, floats and booleans. Raises BadText."""
    reader = _Reader(_tokens(text))
    return reader.message(None, 0)


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise BadText(f"line {line}: unexpected {text[at : at + 20].splitlines()[0]!r}")
        kind = cast(str, match.lastgroup)
        if kind != "space":
            tokens.append(_Token(kind, match[0], line))
        line += match[0].count("\n")
        at = match.end()
    return [*tokens, _Token("end", "end of file", line)]


class _Reader:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def message(self, closing: str | None, depth: int) -> dict[str, Any]:
        """Fields up to `closing` (None: the end of the file)."""
        if depth > _DEPTH_MAX:
            raise BadText(f"line {self._here.line}: nested deeper than {_DEPTH_MAX}")
        fields: dict[str, Any] = {}
        while not (self._here.kind == "end" if closing is None else self._here.text == closing):
            name = self._take("word", "a field's name").text
            has_colon = self._skip(":")
            many = self._here.text == "["
            value = self._list(depth) if many else self._value(depth, message_only=not has_colon)
            _add(fields, name, value, many=many)
            if not self._skip(","):
                self._skip(";")
        if closing is not None:
            self._at += 1
        return fields

    def _list(self, depth: int) -> list[Any]:
        self._at += 1
        values: list[Any] = []
        while self._here.text != "]":
            values.append(self._value(depth, message_only=False))
            if self._here.text != "]":
                self._take("mark", "',' or ']'", ",")
        self._at += 1
        return values

    def _value(self, depth: int, *, message_only: bool) -> Any:
        token = self._here
        if token.text in _CLOSING:
            self._at += 1
            return self.message(_CLOSING[token.text], depth + 1)
        if message_only or token.kind not in ("number", "word", "string"):
            raise BadText(f"line {token.line}: expected a value, found {token.text[:20]!r}")
        self._at += 1
        if token.kind == "number":
            return _number(token)
        if token.kind == "word":
            return _word(token)
        parts = [_unquoted(token)]
        while self._here.kind == "string":  # adjacent strings are one, as in C
            parts.append(_unquoted(self._here))
            self._at += 1
        return "".join(parts)

    @property
    def _here(self) -> _Token:
        return self._tokens[self._at]

    def _skip(self, text: str) -> bool:
        found = self._here.kind == "mark" and self._here.text == text
        self._at += found
        return found

    def _take(self, kind: str, what: str, text: str | None = None) -> _Token:
        token = self._here
        if token.kind != kind or (text is not None and token.text != text):
            raise BadText(f"line {token.line}: expected {what}, found {token.text[:20]!r}")
        self._at += 1
        return token


def _add(fields: dict[str, Any], name: str, value: Any, *, many: bool) -> None:
    if name not in fields:
        fields[name] = value
        return
    before = fields[name]
    values = cast(list[Any], before) if isinstance(before, list) else [before]
    values.extend(value if many else (value,))
    fields[name] = values


def _number(token: _Token) -> int | float:
    text = re.sub(r"\s", "", token.text)
    bases = ((16, r"-?0[xX][0-9a-fA-F]+"), (8, r"-?0[0-7]+"), (10, r"-?\d+"))
    base = next((base for base, form in bases if re.fullmatch(form, text)), None)
    number = float(text.rstrip("fF")) if base is None else int(text[:_DIGITS_MAX], base)
    if len(text) > _DIGITS_MAX or not -(2**63) <= number < 2**64:
        raise BadText(f"line {token.line}: {token.text[:20]!r} is no number of 64 bits")
    return number


def _word(token: _Token) -> object:
    constants: Mapping[str, object] = {
        "true": True,
        "True": True,
        "t": True,
        "false": False,
        "False": False,
        "f": False,
    }
    lower = token.text.lower()
    if lower.lstrip("-") in ("inf", "infinity", "nan"):
        return float(lower)
    return constants.get(token.text, Word(token.text))


def _unquoted(token: _Token) -> str:
    def plain(match: re.Match[bytes]) -> bytes:
        hexadecimal, octal, code_point, simple = match.groups()
        if hexadecimal:
            return bytes([int(hexadecimal, 16)])
        if octal:
            return bytes([int(octal, 8) & 0xFF])
        if code_point:
            return chr(int(code_point, 16)).encode(errors="replace")
        return _SIMPLE.get(simple, simple)

    return _ESCAPE.sub(plain, token.text[1:-1].encode(errors="replace")).decode(errors="replace")
