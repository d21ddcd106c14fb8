"""`/openapi.json` (OpenAPI 3.1): every route of the interface, what it takes and what it answers.

Made by hand next to the routes it describes; a test compares it with the route table, and another fuzzes the API from
it, so that it stays true.
"""

from functools import cache

from mlbox import __version__
from mlbox.identity import Scope
from mlbox.jobs import JobState
from mlbox.web import openapi_schemas as schemas

Json = dict[str, object]

_MEANING = {
    400: "The request is malformed.",
    401: "No credential, or one that is not good.",
    403: "The credential does not reach so far.",
    404: "No such thing, or none that you may see.",
    409: "It is not in a state in which that can be done.",
    413: "The body is too large.",
    415: "The body is of a kind that is not read here.",
    416: "There are no such bytes.",
    422: "Well-formed, but can never be done on this box.",
    429: "Too many; wait as long as Retry-After says.",
    503: "Not now; try again as late as Retry-After says.",
}
_ALWAYS = (400, 401, 403, 429, 503)
"""429: also whoever shows many bad credentials."""


@cache
def document() -> Json:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlbox",
            "version": __version__,
            "description": "Job queue, live logs and model deployment of one GPU box.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": list[str]()}, {"session": list[str]()}],
        "paths": {**_jobs(), **_logs(), **_artifacts(), **_box(), **_models(), **_identity()},
        "components": {
            "schemas": schemas.SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token; not needed on the Unix socket."},
                "session": {"type": "apiKey", "in": "cookie", "name": "mlbox_session"},
            },
        },
    }


def _jobs() -> Json:
    submit = _operation(
        "Submit a job",
        Scope.SUBMIT,
        ok={201: _both(_ref("Job"), "The job; its id alone as text.")},
        errors=(409, 413, 415, 422, 429),
        parameters=[_IDEMPOTENCY],
        body={
            "application/json": {"schema": _ref("Submit")},
            "application/x-www-form-urlencoded": {"schema": _ref("SubmitForm")},
            "multipart/form-data": {"schema": _ref("SubmitUpload")},
            "text/x-shellscript": {"schema": {"type": "string", "minLength": 1}},
        },
    )
    listing = _operation(
        "List jobs, newest first",
        Scope.READ,
        ok={200: _both(_object(jobs=_list("JobRow"), next=_nullable("string")), "The jobs; a table as text.")},
        parameters=[
            _query("state", {"type": "array", "items": {"enum": list(JobState)}}),
            *(_query(name, {"type": "string"}) for name in ("user", "name", "project")),
            _query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
            _query("before", {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
        ],
    )
    shown = _both(_ref("JobDetail"), "The job; its facts as text.")
    changed = _both(_ref("Job"), "The job as it is now; a line as text.")
    paths: Json = {
        "/api/jobs": {"post": submit, "get": listing},
        "/api/jobs/{id}": {
            "parameters": [_ID],
            "get": _operation("Show a job", Scope.READ, ok={200: shown}, errors=(404,)),
            "patch": _operation(
                "Change a job that waits",
                Scope.SUBMIT,
                ok={200: changed},
                errors=(404, 409, 413, 415),
                body={"application/json": {"schema": _ref("JobChange")}},
            ),
            "delete": _operation(
                "Remove an ended job's log, artifacts and code",
                Scope.SUBMIT,
                ok={200: changed},
                errors=(404, 409, 413, 415),
            ),
        },
        "/api/jobs/{id}/wait": {
            "parameters": [_ID],
            "get": _operation(
                "Wait until a job has ended, or the time is up",
                Scope.READ,
                ok={200: shown},
                errors=(404, 429),
                parameters=[_query("timeout", {"type": "number", "minimum": 0, "maximum": 3600})],
            ),
        },
    }
    for verb, summary in (
        ("cancel", "End a job, whether it waits or runs"),
        ("hold", "Keep a waiting job from starting"),
        ("release", "Let a held job start"),
    ):
        operation = _operation(summary, Scope.SUBMIT, ok={200: changed}, errors=(404, 409, 413, 415))
        paths[f"/api/jobs/{{id}}/{verb}"] = {"parameters": [_ID], "post": operation}
    again = _operation(
        "Submit an ended job once more, as a new one",
        Scope.SUBMIT,
        ok={201: _both(_ref("Job"), "The new job.")},
        errors=(404, 409, 413, 415, 422, 429),
        parameters=[_IDEMPOTENCY],
    )
    return {**paths, "/api/jobs/{id}/retry": {"parameters": [_ID], "post": again}}


def _logs() -> Json:
    log: Json = {
        "description": "The log; as events with `id` (the offset after them), JSON text as data, and `end` last.",
        "headers": {"X-Log-Offset": {"schema": {"type": "string"}, "description": "Offset of the first byte."}},
        "content": {
            "text/plain; charset=utf-8": {"schema": {"type": "string"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    offset: Json = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
    attempt = _query("attempt", {**offset, "minimum": 1})
    return {
        "/api/jobs/{id}/log": {
            "parameters": [_ID],
            "get": _operation(
                "Read a job's log, as it is or as it grows",
                Scope.READ,
                ok={200: log, 206: log},
                errors=(404, 416, 429),
                parameters=[
                    attempt,
                    _query("offset", offset),
                    _query("tail", {"type": "integer", "minimum": 0, "maximum": 100_000}),
                    _query("follow", {"enum": ["0", "1"]}),
                ],
            ),
        },
        "/api/jobs/{id}/log/lines": {
            "parameters": [_ID],
            "get": _operation(
                "A window on the lines of a log; places are byte offsets",
                Scope.READ,
                ok={200: _json(_ref("Lines"), "The lines.")},
                errors=(404,),
                parameters=[
                    attempt,
                    _query("from", offset),
                    _query("count", {"type": "integer", "minimum": 1, "maximum": 2000}),
                    _query("around", offset),
                    _query("q", {"type": "string"}),
                    _query("dir", {"enum": ["on", "back"]}),
                ],
            ),
        },
    }


def _artifacts() -> Json:
    file: Json = {"description": "The file.", "content": {_BYTES: {"schema": _BINARY}}}
    path: Json = {
        "name": "path",
        "in": "path",
        "required": True,
        "description": "Path within the job's artifacts; may hold slashes.",
        "schema": {"type": "string", "minLength": 1},
    }
    return {
        "/api/jobs/{id}/artifacts": {
            "parameters": [_ID],
            "get": _operation(
                "List what a job left",
                Scope.READ,
                ok={200: _both(_object(artifacts=_list("Artifact")), "The files, by path.")},
                errors=(404,),
            ),
        },
        "/api/jobs/{id}/artifacts/{path}": {
            "parameters": [_ID, path],
            "get": _operation("Download one file", Scope.READ, ok={200: file, 206: file}, errors=(404, 416, 429)),
            "put": _operation(
                "Add a file, with the job's own token",
                Scope.SUBMIT,
                ok={201: _json(_object(path={"type": "string"}, size={"type": "integer"}), "It is stored.")},
                errors=(404, 409, 413),
                body={_BYTES: {"schema": _BINARY}},
            ),
        },
    }


def _box() -> Json:
    gpus = _object(
        gpus=_list("Gpu"),
        nvml={"enum": ["unasked", "ok", "absent", "failing"]},
        driver=_nullable("string"),
        message={"type": "string"},
        cpu_slots=_object(total={"type": "integer"}, free={"type": "integer"}),
    )
    uuid: Json = {"name": "uuid", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    events: Json = {"description": "Hints that something changed.", "content": {"text/event-stream": {"schema": {}}}}
    topics: Json = {"type": "string", "pattern": "^(gpus|queue|jobs|models)(,(gpus|queue|jobs|models))*$"}
    ready: Json = {"description": "Ready.", "content": {"application/json": {"schema": _ref("Ready")}}}
    not_ready: Json = {"description": "Not ready.", "content": {"application/json": {"schema": _ref("Ready")}}}
    drain = _operation(
        "Start nothing more on a GPU",
        Scope.ADMIN,
        ok={200: _json(_ref("Gpu"), "The GPU as it is now.")},
        errors=(404, 413, 415),
        body={"application/json": {"schema": _ref("Drain")}},
        body_required=False,
    )
    resume = _operation(
        "Take a GPU back into service",
        Scope.ADMIN,
        ok={200: _json(_ref("Gpu"), "The GPU as it is now.")},
        errors=(404, 413, 415),
    )
    waiting = _both(_object(jobs=_list("Waiting")), "Who waits, first to be tried first.")
    readyz = _operation("Whether everything works", Scope.READ, ok={200: ready})
    responses = readyz["responses"]
    if isinstance(responses, dict):
        responses["503"] = not_ready
    return {
        "/api/gpus": {"get": _operation("The GPUs", Scope.READ, ok={200: _both(gpus, "The GPUs, by index.")})},
        "/api/gpus/{uuid}/drain": {"parameters": [uuid], "post": drain},
        "/api/gpus/{uuid}/resume": {"parameters": [uuid], "post": resume},
        "/api/queue": {
            "get": _operation(
                "The queue",
                Scope.READ,
                ok={200: waiting},
                parameters=[_query("limit", {"type": "integer", "minimum": 1, "maximum": 1000})],
            )
        },
        "/api/events": {
            "get": _operation(
                "What happens, as server-sent events",
                Scope.READ,
                ok={200: events},
                errors=(404, 429),
                parameters=[_query("topics", topics)],
            )
        },
        "/healthz": {
            "get": {
                "summary": "Whether mlbox is alive",
                "security": list[str](),
                "responses": {"200": _json(_object(status={"const": "ok"}), "It is."), **_errors(400)},
            }
        },
        "/readyz": {"get": readyz},
        "/metrics": {
            "get": _operation("Metrics for Prometheus", Scope.READ, ok={200: _text("Text format 0.0.4.", _METRICS)})
        },
        "/openapi.json": {
            "get": _operation("This document", Scope.READ, ok={200: _json({"type": "object"}, "The document.")})
        },
    }


def _models() -> Json:
    def part(name: str, pattern: str) -> Json:
        return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": pattern}}

    name = part("name", "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    deploy = _operation(
        "Deploy a version from a file, or from what a job left",
        Scope.DEPLOY,
        ok={201: _both(_ref("ModelVersion"), "The version, which the inference server loads now.")},
        errors=(404, 409, 413),
        body={"application/octet-stream": {"schema": _BINARY}, "application/json": {"schema": _ref("DeployJob")}},
    )
    return {
        "/api/models": {
            "get": _operation(
                "The models", Scope.READ, ok={200: _both(_object(models=_list("Model")), "The models, by name.")}
            )
        },
        "/api/models/{name}": {
            "parameters": [name],
            "get": _operation("One model", Scope.READ, ok={200: _json(_ref("Model"), "The model.")}, errors=(404,)),
        },
        "/api/models/{name}/versions/{version}": {
            "parameters": [name, part("version", "^(next|[1-9][0-9]{0,8})$")],
            "put": deploy,
        },
    }


def _identity() -> Json:
    made = {**schemas.TOKEN, "properties": {**schemas.TOKEN_FIELDS, "token": {"type": "string"}}}
    create = _operation(
        "Make a token, shown once",
        Scope.READ,
        ok={201: _both(made, "The token; its secret alone as text.")},
        errors=(409, 413, 415),
        parameters=[_IDEMPOTENCY],
        body={"application/json": {"schema": _ref("NewToken")}},
        body_required=False,
    )
    code = _operation(
        "Make a one-time code that signs a browser in",
        Scope.READ,
        ok={201: _both(_ref("LoginCode"), "The code; its address alone as text.")},
        errors=(409, 413, 415),
        parameters=[_IDEMPOTENCY],
    )
    return {
        "/api/me": {"get": _operation("Who asks", Scope.READ, ok={200: _json(_ref("Me"), "You.")})},
        "/api/tokens": {
            "get": _operation(
                "Your tokens", Scope.READ, ok={200: _both(_object(tokens=_list("Token")), "Without their secrets.")}
            ),
            "post": create,
        },
        "/api/tokens/{id}": {
            "parameters": [_ID],
            "get": _operation("One token", Scope.READ, ok={200: _json(_ref("Token"), "The token.")}, errors=(404,)),
            "delete": _operation(
                "Revoke a token", Scope.READ, ok={200: _json(_ref("Token"), "It is revoked.")}, errors=(404,)
            ),
        },
        "/api/login-codes": {"post": code},
    }


_BYTES = "application/octet-stream"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_BINARY: Json = {"type": "string", "format": "binary"}
_ID: Json = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
}
_IDEMPOTENCY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A repeated request with the same key answers with the first result.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def _operation(
    summary: str,
    scope: Scope,
    *,
    ok: dict[int, Json],
    errors: tuple[int, ...] = (),
    parameters: list[Json] | None = None,
    body: Json | None = None,
    body_required: bool = True,
) -> Json:
    responses: Json = {**{str(status): answer for status, answer in ok.items()}, **_errors(*_ALWAYS, *errors)}
    operation: Json = {"summary": summary, "description": f"Needs the scope `{scope}`.", "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": body_required, "content": body}
    return operation


def _errors(*statuses: int) -> Json:
    content: Json = {
        "application/problem+json": {"schema": _ref("Problem")},
        "text/plain; charset=utf-8": {"schema": {"type": "string"}},
    }
    return {str(status): {"description": _MEANING[status], "content": content} for status in sorted(set(statuses))}


def _query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "schema": schema}


def _json(schema: Json, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _text(description: str, media_type: str) -> Json:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def _both(schema: Json, description: str) -> Json:
    content: Json = {
        "application/json": {"schema": schema},
        "text/plain; charset=utf-8": {"schema": {"type": "string"}},
    }
    return {"description": description, "content": content}


def _object(**properties: Json) -> Json:
    return schemas.an_object(properties)


def _list(name: str) -> Json:
    return {"type": "array", "items": _ref(name)}


def _nullable(kind: str) -> Json:
    return {"type": [kind, "null"]}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
