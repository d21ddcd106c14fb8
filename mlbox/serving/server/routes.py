"""The routes of Open Inference Protocol v2 over HTTP, with Triton's repository, config and statistics extensions."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from mlbox import __version__
from mlbox.errors import Invalid, MlboxError, NotFound, Unavailable
from mlbox.identity import Scope as Permission
from mlbox.serving import repository
from mlbox.serving.server import bodies, jsontext, protocol
from mlbox.serving.server.access import Access, Door, demand
from mlbox.serving.server.answers import Unsupported, error_answer, json_answer
from mlbox.serving.server.dataplane import DataPlane, Wire
from mlbox.serving.server.lifecycle import Lifecycle
from mlbox.serving.server.models import Models
from mlbox.serving.server.protocol import Encoded

_EXTENSIONS = ["classification", "model_repository", "model_configuration", "binary_tensor_data", "statistics"]
_CONTROL_BODY_MAX = 1 << 20
"""Bodies of everything but an inference."""
_LENGTH_FIELD = "inference-header-content-length"

_Result = TypeVar("_Result")
_Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """What the routes are told: the server's name, the largest inference in bytes, and how long a load may take."""

    name: str
    body_max: int
    load_timeout_s: float


class Routes:
    """Every route of the server. `app` is the ASGI application, its door included."""

    def __init__(self, models: Models, plane: DataPlane, lifecycle: Lifecycle, settings: RouteSettings) -> None:
        self._models = models
        self._plane = plane
        self._lifecycle = lifecycle
        self._settings = settings
        self.stopping = False
        """Set when the server is about to end: it is not ready any more, though it still answers."""

    def app(self, access: Access) -> ASGIApp:
        infer, deploy = Permission.INFER, Permission.DEPLOY
        table: list[tuple[str, list[str], _Endpoint, Permission]] = [
            ("/v2", ["GET"], self._server, infer),
            ("/v2/health/live", ["GET"], self._live, infer),
            ("/v2/health/ready", ["GET"], self._ready, infer),
            ("/v2/models/stats", ["GET"], self._all_statistics, infer),
            ("/v2/repository/index", ["GET", "POST"], self._index, infer),
            ("/v2/repository/models/{model}/load", ["POST"], self._load, deploy),
            ("/v2/repository/models/{model}/unload", ["POST"], self._unload, deploy),
        ]
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            table += [
                (path, ["GET"], self._metadata, infer),
                (f"{path}/ready", ["GET"], self._model_ready, infer),
                (f"{path}/config", ["GET"], self._config, infer),
                (f"{path}/stats", ["GET"], self._statistics, infer),
                (f"{path}/infer", ["POST"], self._infer, infer),
            ]
        app = Starlette(
            routes=[
                Route(path, _guarded(endpoint, permission), methods=methods)
                for path, methods, endpoint, permission in table
            ],
            exception_handlers={
                MlboxError: _tell_error,
                HTTPException: _tell_http_error,
                ClientDisconnect: _tell_nobody,
                Exception: _tell_nothing,
            },
        )
        app.router.redirect_slashes = False  # Triton's clients take a redirect for an error
        return Door(app, access)

    # The server

    async def _server(self, request: Request) -> Response:
        return json_answer({"name": self._settings.name, "version": __version__, "extensions": _EXTENSIONS})

    async def _live(self, request: Request) -> Response:
        return json_answer({"live": True, "ready": self._is_ready})

    async def _ready(self, request: Request) -> Response:
        # Both keys in both answers: the specification's text and KServe's client want different ones.
        if self._is_ready:
            return json_answer({"live": True, "ready": True})
        why = "the server is stopping" if self.stopping else "the server is loading its models"
        return json_answer({"live": True, "ready": False, "error": why}, 503, {"retry-after": "1"})

    @property
    def _is_ready(self) -> bool:
        return self._lifecycle.ready and not self.stopping

    # Models

    async def _metadata(self, request: Request) -> Response:
        name, number = _model(request)
        _, served = self._models.serving(name, number)
        signature = served.signature
        return json_answer(
            {
                "name": name,
                "versions": [str(each) for each in self._models.model(name).ready()],
                "platform": "onnxruntime_onnx",
                "inputs": [spec.metadata() for spec in signature.inputs.values()],
                "outputs": [spec.metadata() for spec in signature.outputs.values()],
                "parameters": {"device": served.device},
            }
        )

    async def _model_ready(self, request: Request) -> Response:
        name, number = _model(request)
        self._models.serving(name, number)
        return json_answer({"name": name, "ready": True})

    async def _config(self, request: Request) -> Response:
        _, served = self._models.serving(*_model(request))
        return json_answer(served.config_json())

    async def _statistics(self, request: Request) -> Response:
        name, number = _model(request)
        model = self._models.model(name)
        if number is not None and number not in model.versions:
            raise NotFound(f"Request for unknown model: '{name}' version {number} is not found")
        versions = [each for each in sorted(model.versions) if number in (None, each)]
        return json_answer({"model_stats": [model.versions[each].statistics.as_json(name, each) for each in versions]})

    async def _all_statistics(self, request: Request) -> Response:
        return json_answer(
            {
                "model_stats": [
                    model.versions[number].statistics.as_json(model.name, number)
                    for model in self._models
                    for number in sorted(model.versions)
                ]
            }
        )

    # The repository

    async def _index(self, request: Request) -> Response:
        body = await bodies.read(request, _CONTROL_BODY_MAX)
        ready = _fields(body).get("ready", False)
        if not isinstance(ready, bool):
            raise Invalid("Invalid value for 'ready': expected a boolean")
        return json_answer(self._models.index(ready_only=ready))

    async def _load(self, request: Request) -> Response:
        name = request.path_params["model"]
        fields = _fields(await bodies.read(request, self._settings.body_max))
        if fields.get("parameters"):
            raise Unsupported(
                f"failed to load '{name}': this server takes a model's config and files from its folder only: put "
                f"config.pbtxt beside the versions and load without parameters"
            )
        await self._lifecycle.load(name, self._settings.load_timeout_s)
        return Response()

    async def _unload(self, request: Request) -> Response:
        _fields(await bodies.read(request, _CONTROL_BODY_MAX))
        self._lifecycle.unload(request.path_params["model"])
        return Response()

    # Inference

    async def _infer(self, request: Request) -> Response:
        name, number = _model(request)
        self._models.serving(name, number)  # told before the body is read
        limit = self._settings.body_max
        body = await bodies.read(request, limit)
        if encoding := request.headers.get("content-encoding"):
            body = await asyncio.to_thread(bodies.decompress, body, encoding, limit)
        length = protocol.header_length(request.headers.get(_LENGTH_FIELD), len(body))
        wire = Wire(
            parse=partial(protocol.parse, body, length),
            encode=partial(_answer, bodies.wanted_encoding(request.headers.get("accept-encoding", ""))),
            size=len(body),
        )
        try:
            return await _while_connected(request.receive, self._plane.infer(name, number, wire))
        except asyncio.CancelledError:
            # Only a stop whose patience is at its end does this; there is still time to say so.
            raise Unavailable("the server is stopping", retry_after_s=1.0) from None


def _answer(encoding: str | None, response: protocol.InferResponse, wishes: Any) -> Response:
    """An inference's answer, compressed where the client asked for it."""
    encoded: Encoded = protocol.encode(response, wishes)
    headers: dict[str, str] = {}
    if encoded.header_length is not None:
        headers[_LENGTH_FIELD] = str(encoded.header_length)
    parts = list(encoded.parts)
    if encoding is not None:
        headers |= {"content-encoding": encoding, "vary": "accept-encoding"}
        parts = [bodies.compress(parts, encoding)]
    kind = "application/json" if encoded.header_length is None else "application/octet-stream"
    return Response(parts[0] if len(parts) == 1 else b"".join(parts), headers=headers, media_type=kind)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientDisconnect then."""
    running = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait({running, left}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientDisconnect
        return running.result()
    finally:
        running.cancel()
        left.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _guarded(endpoint: _Endpoint, permission: Permission) -> _Endpoint:
    async def guarded(request: Request) -> Response:
        demand(request.scope, permission)
        return await endpoint(request)

    return guarded


def _model(request: Request) -> tuple[str, int | None]:
    """The model's name and version that the path names. Raises NotFound for what cannot be a version."""
    name: str = request.path_params["model"]
    text: str | None = request.path_params.get("version")
    if text is None:
        return name, None
    number = repository.version_number(text)
    if number is None:
        raise NotFound(f"Request for unknown model: '{name}' version {text[:40]} is not found")
    return name, number


def _fields(body: bytes) -> dict[str, object]:
    """The JSON object in a body that may be empty. Raises Invalid."""
    if not body.strip():
        return {}
    value = jsontext.loads(body)
    if not isinstance(value, dict):
        raise Invalid("the request must be a JSON object")
    return cast(dict[str, object], value)


# Errors


async def _tell_error(request: Request, error: Exception) -> Response:
    return error_answer(cast(MlboxError, error))


async def _tell_http_error(request: Request, error: Exception) -> Response:
    known = cast(HTTPException, error)
    return json_answer({"error": known.detail}, known.status_code, dict(known.headers or {}))


async def _tell_nobody(request: Request, error: Exception) -> Response:
    """The client has left: whatever is answered is thrown away."""
    return error_answer(Unavailable("the client closed the connection"))


async def _tell_nothing(request: Request, error: Exception) -> Response:
    """A fault of this program; Starlette raises it again, and uvicorn logs it with its traceback."""
    return json_answer({"error": "internal error: the server's log says more"}, 500)
