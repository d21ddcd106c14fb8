"""Which form of an answer the asker prefers (RFC 9110, section 12.5.1). Pure."""

from functools import lru_cache

from starlette.requests import Request

JSON = "application/json"
TEXT = "text/plain"
HTML = "text/html"
EVENTS = "text/event-stream"


@lru_cache(maxsize=512)
def preferred(accept: str, offered: tuple[str, ...]) -> str:
    """The one of `offered` that an Accept header likes best; the first of them where it likes several the same.

    A header that likes none of them, or cannot be read, gets the first.
    """
    ranges = [_range(part) for part in accept[:1000].split(",") if part.strip()]
    best, best_quality = offered[0], 0.0
    for kind in offered:
        fitting = [(_specific(pattern), quality) for pattern, quality in ranges if _fits(pattern, kind)]
        quality = max(fitting)[1] if fitting else 0.0
        if quality > best_quality:
            best, best_quality = kind, quality
    return best


def accepts_events(accept: str) -> bool:
    """Whether the asker names server-sent events (a wildcard does not count)."""
    return any(pattern == EVENTS for pattern, _ in map(_range, accept[:1000].split(",")))


def wants_text(request: Request) -> bool:
    """Whether the asker is a person at a shell, who said `Accept: text/plain`; JSON is what everybody else gets."""
    return preferred(request.headers.get("accept", ""), (JSON, TEXT)) == TEXT


def _range(part: str) -> tuple[str, float]:
    pattern, *parameters = (item.strip().lower() for item in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = min(1.0, max(0.0, float(value)))
            except ValueError:
                quality = 0.0
    return pattern, quality if quality == quality else 0.0


def _fits(pattern: str, kind: str) -> bool:
    return pattern in (kind, "*/*", kind.partition("/")[0] + "/*")


def _specific(pattern: str) -> int:
    return 0 if pattern == "*/*" else 1 if pattern.endswith("/*") else 2
