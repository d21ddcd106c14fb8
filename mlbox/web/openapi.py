"""`/openapi.json` (OpenAPI 3.1): every route of the interface, what it takes and what it answers.

Made by hand next to the routes it describes; a test compares it with the route table, and another fuzzes the API from
it, so that it stays true.
"""

from functools import cache

from mlbox import __version__
from mlbox.identity import Scope
from mlbox.jobs import JobState
from mlbox.web import openapi_schemas as schemas
from mlbox.web.openapi_parts import (
    BINARY,
    BYTES,
    ID,
    IDEMPOTENCY_KEY,
    METRICS,
    both_answers,
    json_answer,
    list_of,
    nullable,
    object_of,
    operation,
    problems,
    query,
    ref,
    text_answer,
)

Json = dict[str, object]


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
        "paths": {**_jobs(), **_logs(), **_artifacts(), **_box(), **_reports(), **_models(), **_identity()},
        "components": {
            "schemas": schemas.SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token; not needed on the Unix socket."},
                "session": {"type": "apiKey", "in": "cookie", "name": "mlbox_session"},
            },
        },
    }


def _jobs() -> Json:
    submit = operation(
        "Submit a job",
        Scope.SUBMIT,
        ok={201: both_answers(ref("Job"), "The job; its id alone as text.")},
        errors=(409, 413, 415, 422, 429),
        parameters=[IDEMPOTENCY_KEY],
        body={
            "application/json": {"schema": ref("Submit")},
            "application/x-www-form-urlencoded": {"schema": ref("SubmitForm")},
            "multipart/form-data": {"schema": ref("SubmitUpload")},
            "text/x-shellscript": {"schema": {"type": "string", "minLength": 1}},
        },
    )
    listing = operation(
        "List jobs, newest first",
        Scope.READ,
        ok={
            200: both_answers(object_of(jobs=list_of("JobRow"), next=nullable("string")), "The jobs; a table as text.")
        },
        errors=(404,),
        parameters=[
            query("state", {"type": "array", "items": {"enum": list(JobState)}}),
            *(query(name, {"type": "string"}) for name in ("user", "name", "project")),
            query("array", {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
            query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
            query("before", {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}),
        ],
    )
    shown = both_answers(ref("JobDetail"), "The job; its facts as text.")
    changed = both_answers(ref("Job"), "The job as it is now; a line as text.")
    paths: Json = {
        "/api/jobs": {"post": submit, "get": listing},
        "/api/jobs/{id}": {
            "parameters": [ID],
            "get": operation("Show a job", Scope.READ, ok={200: shown}, errors=(404,)),
            "patch": operation(
                "Change a job that waits",
                Scope.SUBMIT,
                ok={200: changed},
                errors=(404, 409, 413, 415),
                body={"application/json": {"schema": ref("JobChange")}},
            ),
            "delete": operation(
                "Remove an ended job's log, artifacts and code",
                Scope.SUBMIT,
                ok={200: changed},
                errors=(404, 409, 413, 415),
            ),
        },
        "/api/jobs/{id}/wait": {
            "parameters": [ID],
            "get": operation(
                "Wait until a job has ended, or the time is up",
                Scope.READ,
                ok={200: shown},
                errors=(404, 429),
                parameters=[query("timeout", {"type": "number", "minimum": 0, "maximum": 3600})],
            ),
        },
    }
    for verb, summary in (
        ("cancel", "End a job, whether it waits or runs"),
        ("hold", "Keep a waiting job from starting"),
        ("release", "Let a held job start"),
    ):
        act = operation(summary, Scope.SUBMIT, ok={200: changed}, errors=(404, 409, 413, 415))
        paths[f"/api/jobs/{{id}}/{verb}"] = {"parameters": [ID], "post": act}
    again = operation(
        "Submit an ended job once more, as a new one",
        Scope.SUBMIT,
        ok={201: both_answers(ref("Job"), "The new job.")},
        errors=(404, 409, 413, 415, 422, 429),
        parameters=[IDEMPOTENCY_KEY],
    )
    clone = operation(
        "Submit the same job once more, as a new one, whatever became of it",
        Scope.SUBMIT,
        ok={201: both_answers(ref("Job"), "The new job.")},
        errors=(404, 409, 413, 415, 422, 429),
        parameters=[IDEMPOTENCY_KEY],
    )
    rank = operation(
        "Why a waiting job stands where it does, part by part",
        Scope.READ,
        ok={200: both_answers(ref("Rank"), "The parts.")},
        errors=(404, 409),
    )
    cancel = operation(
        "Cancel every job of an array that has not ended",
        Scope.SUBMIT,
        ok={200: both_answers(object_of(jobs=list_of("JobRow")), "The jobs as they are now; a line for each as text.")},
        errors=(404, 409, 413, 415),
    )
    return {
        **paths,
        "/api/jobs/{id}/retry": {"parameters": [ID], "post": again},
        "/api/jobs/{id}/clone": {"parameters": [ID], "post": clone},
        "/api/jobs/{id}/rank": {"parameters": [ID], "get": rank},
        "/api/arrays/{id}/cancel": {"parameters": [ID], "post": cancel},
    }


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
    attempt = query("attempt", {**offset, "minimum": 1})
    return {
        "/api/jobs/{id}/log": {
            "parameters": [ID],
            "get": operation(
                "Read a job's log, as it is or as it grows",
                Scope.READ,
                ok={200: log, 206: log},
                errors=(404, 416, 429),
                parameters=[
                    attempt,
                    query("offset", offset),
                    query("tail", {"type": "integer", "minimum": 0, "maximum": 100_000}),
                    query("follow", {"enum": ["0", "1"]}),
                ],
            ),
        },
        "/api/jobs/{id}/log/lines": {
            "parameters": [ID],
            "get": operation(
                "A window on the lines of a log; places are byte offsets",
                Scope.READ,
                ok={200: json_answer(ref("Lines"), "The lines.")},
                errors=(404,),
                parameters=[
                    attempt,
                    query("from", offset),
                    query("count", {"type": "integer", "minimum": 1, "maximum": 2000}),
                    query("around", offset),
                    query("q", {"type": "string"}),
                    query("dir", {"enum": ["on", "back"]}),
                ],
            ),
        },
    }


def _artifacts() -> Json:
    file: Json = {"description": "The file.", "content": {BYTES: {"schema": BINARY}}}
    path: Json = {
        "name": "path",
        "in": "path",
        "required": True,
        "description": "Path within the job's artifacts; may hold slashes.",
        "schema": {"type": "string", "minLength": 1},
    }
    return {
        "/api/jobs/{id}/artifacts": {
            "parameters": [ID],
            "get": operation(
                "List what a job left",
                Scope.READ,
                ok={200: both_answers(object_of(artifacts=list_of("Artifact")), "The files, by path.")},
                errors=(404,),
            ),
        },
        "/api/jobs/{id}/artifacts/{path}": {
            "parameters": [ID, path],
            "get": operation("Download one file", Scope.READ, ok={200: file, 206: file}, errors=(404, 416, 429)),
            "put": operation(
                "Add a file, with the job's own token",
                Scope.SUBMIT,
                ok={201: json_answer(object_of(path={"type": "string"}, size={"type": "integer"}), "It is stored.")},
                errors=(404, 409, 413),
                body={BYTES: {"schema": BINARY}},
            ),
        },
    }


def _box() -> Json:
    gpus = object_of(
        gpus=list_of("Gpu"),
        nvml={"enum": ["unasked", "ok", "absent", "failing"]},
        driver=nullable("string"),
        message={"type": "string"},
        cpu_slots=object_of(total={"type": "integer"}, free={"type": "integer"}),
    )
    uuid: Json = {"name": "uuid", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    events: Json = {"description": "Hints that something changed.", "content": {"text/event-stream": {"schema": {}}}}
    topics: Json = {"type": "string", "pattern": "^(gpus|queue|jobs|models)(,(gpus|queue|jobs|models))*$"}
    ready: Json = {"description": "Ready.", "content": {"application/json": {"schema": ref("Ready")}}}
    not_ready: Json = {"description": "Not ready.", "content": {"application/json": {"schema": ref("Ready")}}}
    drain = operation(
        "Start nothing more on a GPU",
        Scope.ADMIN,
        ok={200: json_answer(ref("Gpu"), "The GPU as it is now.")},
        errors=(404, 413, 415),
        body={"application/json": {"schema": ref("Drain")}},
        body_required=False,
    )
    resume = operation(
        "Take a GPU back into service",
        Scope.ADMIN,
        ok={200: json_answer(ref("Gpu"), "The GPU as it is now.")},
        errors=(404, 413, 415),
    )
    waiting = both_answers(object_of(jobs=list_of("Waiting")), "Who waits, first to be tried first.")
    readyz = operation("Whether everything works", Scope.READ, ok={200: ready})
    responses = readyz["responses"]
    if isinstance(responses, dict):
        responses["503"] = not_ready
    return {
        "/api/gpus": {"get": operation("The GPUs", Scope.READ, ok={200: both_answers(gpus, "The GPUs, by index.")})},
        "/api/gpus/{uuid}/drain": {"parameters": [uuid], "post": drain},
        "/api/gpus/{uuid}/resume": {"parameters": [uuid], "post": resume},
        "/api/gpus/{uuid}/adopt": {
            "parameters": [uuid],
            "post": operation(
                "Take a process that was started past mlbox in as a running job",
                Scope.SUBMIT,
                ok={201: both_answers(ref("Job"), "The job; its id alone as text.")},
                errors=(404, 409, 413, 415, 422),
                body={"application/json": {"schema": ref("Adopt")}},
                body_required=False,
            ),
        },
        "/api/queue": {
            "get": operation(
                "The queue",
                Scope.READ,
                ok={200: waiting},
                parameters=[query("limit", {"type": "integer", "minimum": 1, "maximum": 1000})],
            )
        },
        "/api/events": {
            "get": operation(
                "What happens, as server-sent events",
                Scope.READ,
                ok={200: events},
                errors=(404, 429),
                parameters=[query("topics", topics)],
            )
        },
        "/healthz": {
            "get": {
                "summary": "Whether mlbox is alive",
                "security": list[str](),
                "responses": {"200": json_answer(object_of(status={"const": "ok"}), "It is."), **problems(400)},
            }
        },
        "/readyz": {"get": readyz},
        "/metrics": {
            "get": operation("Metrics for Prometheus", Scope.READ, ok={200: text_answer("Text format 0.0.4.", METRICS)})
        },
        "/openapi.json": {
            "get": operation("This document", Scope.READ, ok={200: json_answer({"type": "object"}, "The document.")})
        },
    }


def _reports() -> Json:
    limit = query("limit", {"type": "integer", "minimum": 1, "maximum": 1000})
    since: Json = {"type": "string", "pattern": "^([1-9][0-9]{0,2}(s|min|m|h|d))?$", "description": "Or a time."}
    kept = both_answers(ref("Reservation"), "The reservation.")
    return {
        "/api/plan": {
            "get": operation(
                "GPUs x time, past and planned",
                Scope.READ,
                ok={200: both_answers(ref("Plan"), "The plan; a picture of so many columns as text.")},
                errors=(404,),
                parameters=[query("columns", {"type": "integer", "minimum": 40, "maximum": 400})],
            )
        },
        "/api/usage": {
            "get": operation(
                "Who used how much, and how long they waited",
                Scope.READ,
                ok={200: both_answers(ref("Usage"), "By user and by project; tables as text.")},
                errors=(404,),
                parameters=[query("since", since)],
            )
        },
        "/api/notices": {
            "get": operation(
                "What you were told, newest first",
                Scope.READ,
                ok={200: both_answers(object_of(notices=list_of("Notice")), "The notices.")},
                errors=(404,),
                parameters=[limit],
            )
        },
        "/api/reservations": {
            "get": operation(
                "The reservations that are not over",
                Scope.READ,
                ok={200: both_answers(object_of(reservations=list_of("Reservation")), "The next first.")},
                errors=(404,),
            ),
            "post": operation(
                "Keep GPUs for somebody, or for nobody, for a time",
                Scope.ADMIN,
                ok={201: both_answers(ref("Reservation"), "The reservation; its id alone as text.")},
                errors=(404, 409, 413, 415, 422),
                body={"application/json": {"schema": ref("Reserve")}},
            ),
        },
        "/api/reservations/{id}": {
            "parameters": [ID],
            "delete": operation("Give a reservation up", Scope.ADMIN, ok={200: kept}, errors=(404, 409, 413, 415)),
        },
    }


def _models() -> Json:
    def part(name: str, pattern: str) -> Json:
        return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": pattern}}

    name = part("name", "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")
    deploy = operation(
        "Deploy a version from a file, or from what a job left",
        Scope.DEPLOY,
        ok={201: both_answers(ref("ModelVersion"), "The version, which the inference server loads now.")},
        errors=(404, 409, 413),
        body={"application/octet-stream": {"schema": BINARY}, "application/json": {"schema": ref("DeployJob")}},
    )
    return {
        "/api/models": {
            "get": operation(
                "The models",
                Scope.READ,
                ok={200: both_answers(object_of(models=list_of("Model")), "The models, by name.")},
            )
        },
        "/api/models/{name}": {
            "parameters": [name],
            "get": operation("One model", Scope.READ, ok={200: json_answer(ref("Model"), "The model.")}, errors=(404,)),
        },
        "/api/models/{name}/versions/{version}": {
            "parameters": [name, part("version", "^(next|[1-9][0-9]{0,8})$")],
            "put": deploy,
        },
    }


def _identity() -> Json:
    made = {**schemas.TOKEN, "properties": {**schemas.TOKEN_FIELDS, "token": {"type": "string"}}}
    create = operation(
        "Make a token, shown once",
        Scope.READ,
        ok={201: both_answers(made, "The token; its secret alone as text.")},
        errors=(409, 413, 415),
        parameters=[IDEMPOTENCY_KEY],
        body={"application/json": {"schema": ref("NewToken")}},
        body_required=False,
    )
    code = operation(
        "Make a one-time code that signs a browser in",
        Scope.READ,
        ok={201: both_answers(ref("LoginCode"), "The code; its address alone as text.")},
        errors=(409, 413, 415),
        parameters=[IDEMPOTENCY_KEY],
    )
    return {
        "/api/me": {"get": operation("Who asks", Scope.READ, ok={200: json_answer(ref("Me"), "You.")})},
        "/api/tokens": {
            "get": operation(
                "Your tokens",
                Scope.READ,
                ok={200: both_answers(object_of(tokens=list_of("Token")), "Without their secrets.")},
            ),
            "post": create,
        },
        "/api/tokens/{id}": {
            "parameters": [ID],
            "get": operation("One token", Scope.READ, ok={200: json_answer(ref("Token"), "The token.")}, errors=(404,)),
            "delete": operation(
                "Revoke a token", Scope.READ, ok={200: json_answer(ref("Token"), "It is revoked.")}, errors=(404,)
            ),
        },
        "/api/login-codes": {"post": code},
    }
