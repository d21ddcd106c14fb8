"""The style sheet, scripts and icon of the pages: read once, served from memory, each at its own exact address."""

import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from mlbox.web.routes import OPEN, Rule

_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def static_rules() -> list[Rule]:
    """One open route for each file of `static/`."""
    folder = resources.files("mlbox.web") / "static"
    return [
        Rule("GET", f"/static/{entry.name}", OPEN, _StaticFile(entry.name, entry.read_bytes()))
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.rpartition(".")[2] in _TYPES
    ]


class _StaticFile:
    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._type = _TYPES[name.rpartition(".")[2]]
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'

    async def __call__(self, request: Request) -> Response:
        # Asked for anew each time and answered with 304: an upgrade is seen at once.
        headers = {"ETag": self._etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == self._etag:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=self._type, headers=headers)
