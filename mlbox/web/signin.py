"""Signing a browser in and out. The only pages that answer somebody unknown."""

import time
from collections.abc import Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from mlbox.errors import TooMany, Unauthenticated
from mlbox.web import bodies, hosts
from mlbox.web.auth import cookie_name
from mlbox.web.credentials import Credentials
from mlbox.web.parameters import Parameters
from mlbox.web.routes import identity_of
from mlbox.web.throttle import Throttle

_SECRET_MAX = 200


class _Renderer(Protocol):
    def page(self, request: Request, template: str, values: Mapping[str, object], status: int = 200) -> Response: ...


class SignIn:
    """The endpoints of `/login` and `/logout`."""

    def __init__(self, credentials: Credentials, throttle: Throttle, renderer: _Renderer) -> None:
        self._credentials = credentials
        self._throttle = throttle
        self._renderer = renderer

    async def form(self, request: Request) -> Response:
        """The form; a code in the address is filled in, never used: only a click signs in."""
        asked = Parameters(request, "code", "next")
        return self._form(request, None, asked.text("next"), asked.text("code") or "")

    async def sign_in(self, request: Request) -> Response:
        hosts.check_own_form(dict(request.scope["headers"]))
        fields = await bodies.fields_of(request)
        bodies.known_only(fields, ("secret", "next"))
        secret, target = fields.get("secret", ""), str(fields.get("next", ""))
        try:
            if not isinstance(secret, str) or len(secret) > _SECRET_MAX:
                raise Unauthenticated("that is neither a code nor a token")
            opened = await self._credentials.open_session(secret)
        except Unauthenticated as error:
            try:
                self._throttle.count_failure(request.scope)
            except TooMany as impatience:
                return self._form(request, str(impatience), target, "", 429)
            return self._form(request, str(error), target, "", 401)
        response = RedirectResponse(safe_next(target), 303)
        secure = request.scope.get("scheme") == "https"
        response.set_cookie(
            cookie_name(request.scope),
            opened.secret,
            max_age=max(1, int(opened.expires_at - time.time())),
            path="/",
            secure=secure,
            httponly=True,
            samesite="strict",
        )
        return response

    async def sign_out(self, request: Request) -> Response:
        await self._credentials.end_session(identity_of(request))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(
            cookie_name(request.scope),
            path="/",
            secure=request.scope.get("scheme") == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    def _form(
        self, request: Request, message: str | None, target: str | None, code: str, status: int = 200
    ) -> Response:
        values = {"message": message, "next": safe_next(target or "/"), "code": code[:_SECRET_MAX]}
        return self._renderer.page(request, "login.html", values, status)


def safe_next(target: str) -> str:
    """Where to go after signing in: an address within this site, else the overview."""
    within = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return target if within and target.isascii() and target.isprintable() and " " not in target else "/"
