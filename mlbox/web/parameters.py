"""The query of an address, read strictly: unknown names and values that cannot be meant are refused. Pure."""

import re
from typing import NoReturn, TypedDict

from starlette.requests import Request

from mlbox.errors import FieldError, Invalid
from mlbox.jobs import JobState
from mlbox.scheduler import values
from mlbox.web import bodies

LIST_MAX = 1000
_LIST_DEFAULT = 100
_INT64 = 2**63 - 1
_SPAN_MAX_S = 10 * 366 * 86_400.0
"""A larger number is no time span, but Unix seconds."""
_NUMBER = re.compile(r"\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?")
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "": True, "0": False, "false": False, "no": False}


class JobFilters(TypedDict):
    """Which jobs a list is to hold: the arguments of `JobService.list`."""

    states: frozenset[JobState]
    user: str | None
    name: str | None
    project: str | None
    array: int | None
    limit: int
    before: int | None


class Parameters:
    """The parameters of one request. Raises Invalid for one that is not in `known`, as each method does."""

    def __init__(self, request: Request, *known: str, repeatable: frozenset[str] = frozenset()) -> None:
        query: bytes = request.scope["query_string"]
        self._values = bodies.form_fields(query, repeatable=repeatable)
        bodies.known_only(self._values, known)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def many(self, name: str) -> list[str]:
        """Every value of a repeatable parameter, commas taken apart."""
        value = self._values.get(name, "")
        texts = value if isinstance(value, list) else [value]
        return [word.strip() for text in texts for word in text.split(",") if word.strip()]

    def text(self, name: str) -> str | None:
        """The value; None where it is missing or empty, as a page's form sends what was not filled in."""
        value = self._values.get(name)
        return value if isinstance(value, str) and value else None

    def integer(self, name: str, default: int, low: int = 0, high: int = _INT64) -> int:
        if name not in self:
            return default
        text = self.text(name) or ""
        if not (text.isascii() and text.isdigit() and len(text) <= 19 and low <= int(text) <= high):
            _refuse(name, f"wants a whole number from {low} to {high}, got {text[:40]!r}")
        return int(text)

    def seconds(self, name: str, default: float, high: float) -> float:
        if name not in self:
            return default
        text = self.text(name) or ""
        try:
            number = float(text) if _NUMBER.fullmatch(text) else values.seconds(text)
        except values.Bad as error:
            _refuse(name, str(error))
        if number > high:
            _refuse(name, f"wants {high:g} seconds or less, got {text[:40]!r}")
        return number

    def since(self, name: str, default_s: float, now: float) -> float:
        """Unix seconds: a time, or so long before `now` (`7d`)."""
        text = self.text(name)
        if text is None:
            return now - default_s
        try:
            span = values.seconds(text)
            if span <= _SPAN_MAX_S:
                return max(0.0, now - span)
        except values.Bad:
            pass
        try:
            return values.moment(text)
        except values.Bad:
            _refuse(name, f"wants a time span such as 7d, or a time such as 2027-01-31T18:00:00Z, got {text[:40]!r}")

    def flag(self, name: str) -> bool:
        """Whether it is there and not said to be off."""
        if name not in self._values:
            return False
        word = (self.text(name) or "").lower()
        if word not in _WORDS:
            _refuse(name, f"wants 1 or 0, got {word[:40]!r}")
        return _WORDS[word]


def job_filters(request: Request, default_limit: int = _LIST_DEFAULT) -> JobFilters:
    """The filters of a list of jobs."""
    known = ("state", "user", "name", "project", "array", "limit", "before")
    asked = Parameters(request, *known, repeatable=frozenset({"state"}))
    states = set(asked.many("state"))
    if unknown := sorted(states - set(JobState)):
        _refuse("state", f"{unknown[0][:40]!r} is no state; known: {', '.join(JobState)}")
    return {
        "states": frozenset(JobState(state) for state in states),
        "user": asked.text("user"),
        "name": asked.text("name"),
        "project": asked.text("project"),
        "array": asked.integer("array", 0) or None,
        "limit": asked.integer("limit", default_limit, 1, LIST_MAX),
        "before": asked.integer("before", 0) or None,
    }


def _refuse(name: str, message: str) -> NoReturn:
    raise Invalid(f"{name}: {message}", (FieldError(name, message),))
