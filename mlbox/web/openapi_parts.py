"""The parts of which `/openapi.json` is put together: operations, parameters, answers."""

from mlbox.identity import Scope
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

BYTES = "application/octet-stream"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
BINARY: Json = {"type": "string", "format": "binary"}
ID: Json = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "integer", "minimum": 1, "maximum": 2**63 - 1},
}
IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A repeated request with the same key answers with the first result.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}


def operation(
    summary: str,
    scope: Scope,
    *,
    ok: dict[int, Json],
    errors: tuple[int, ...] = (),
    parameters: list[Json] | None = None,
    body: Json | None = None,
    body_required: bool = True,
) -> Json:
    """One method of a path. `ok` are its good answers by status, `errors` the bad ones beside those that all have."""
    responses: Json = {**{str(status): answer for status, answer in ok.items()}, **problems(*_ALWAYS, *errors)}
    described: Json = {"summary": summary, "description": f"Needs the scope `{scope}`.", "responses": responses}
    if parameters:
        described["parameters"] = parameters
    if body is not None:
        described["requestBody"] = {"required": body_required, "content": body}
    return described


def problems(*statuses: int) -> Json:
    """The bad answers with these statuses."""
    content: Json = {
        "application/problem+json": {"schema": ref("Problem")},
        "text/plain; charset=utf-8": {"schema": {"type": "string"}},
    }
    return {str(status): {"description": _MEANING[status], "content": content} for status in sorted(set(statuses))}


def query(name: str, schema: Json) -> Json:
    return {"name": name, "in": "query", "schema": schema}


def json_answer(schema: Json, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def text_answer(description: str, media_type: str) -> Json:
    return {"description": description, "content": {media_type: {"schema": {"type": "string"}}}}


def both_answers(schema: Json, description: str) -> Json:
    content: Json = {
        "application/json": {"schema": schema},
        "text/plain; charset=utf-8": {"schema": {"type": "string"}},
    }
    return {"description": description, "content": content}


def object_of(**properties: Json) -> Json:
    return schemas.an_object(properties)


def list_of(name: str) -> Json:
    return {"type": "array", "items": ref(name)}


def nullable(kind: str) -> Json:
    return {"type": [kind, "null"]}


def ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
