"""Templates -> HTML. Everything that is put into one is escaped, and what is invisible is written out."""

import time
from collections.abc import Mapping
from typing import cast

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Scope

from mlbox import __version__
from mlbox.web import words
from mlbox.web.problems import Problem
from mlbox.web.signin import safe_next


class Renderer:
    """The templates of the pages."""

    def __init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("mlbox.web"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            finalize=words.visible,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        filters = cast("dict[str, object]", self._templates.filters)
        filters |= {
            "size": words.size,
            "mebibytes": words.mebibytes,
            "gibibytes": words.gibibytes,
            "duration": words.duration,
            "clock": words.clock,
            "needs": words.needs,
            "hour": words.hour,
        }
        everywhere = cast("dict[str, object]", self._templates.globals)  # macros see these and nothing else
        everywhere |= {"version": __version__, "ago": words.ago, "ran_for": words.ran_for}

    def page(self, request: Request, template: str, values: Mapping[str, object], status: int = 200) -> Response:
        """A template as an answer; it also knows `who` asks, the `path` and `now`."""
        return self._answer(request.scope, template, values, status)

    def error(self, scope: Scope, problem: Problem) -> Response:
        """The page for what went wrong; for somebody who is not signed in, the one to sign in."""
        if problem.status == 401:
            query: bytes = scope.get("query_string", b"")
            target = scope["path"] + (f"?{query.decode('latin-1')}" if query else "")
            values = {"message": None, "code": "", "next": safe_next(target)}
            return self._answer(scope, "login.html", values, 401)
        return self._answer(scope, "error.html", {"problem": problem}, problem.status)

    def _answer(self, scope: Scope, template: str, values: Mapping[str, object], status: int) -> Response:
        around = {"who": scope.get("identity"), "path": scope["path"], "now": time.time()}
        return HTMLResponse(self._templates.get_template(template).render({**around, **values}), status)
