"""The values of the interface as JSON Schema (2020-12), for `/openapi.json`."""

from collections.abc import Mapping
from typing import cast

from mlbox.identity import Role, Scope
from mlbox.jobs import JobState, Launcher, Reason
from mlbox.scheduler.gpus import GpuState

Json = dict[str, object]


def an_object(properties: Mapping[str, object], *, required: tuple[str, ...] | None = None) -> Json:
    """An object with these properties and no other; all required unless told which."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


def _maybe(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _whole(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


_TEXT: Json = {"type": "string"}
_INTEGER: Json = {"type": "integer"}
_NUMBER: Json = {"type": "number"}
_FLAG: Json = {"type": "boolean"}
_TIME: Json = {"type": "string", "format": "date-time"}
_LABEL: Json = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"}
_DURATION: Json = {
    "anyOf": [
        {"type": "number", "minimum": 1, "maximum": 316_224_000},
        {"type": "string", "pattern": "^[1-9][0-9]{0,3}(s|min|m|h)?$", "description": "90, 90m, 2h; also 1-12:00:00"},
    ]
}
_MEMORY: Json = {
    "anyOf": [
        {"type": "number", "minimum": 1, "maximum": 2**40, "description": "MiB"},
        {"type": "string", "pattern": "^[1-9][0-9]{0,5}[MG]$"},
    ]
}

_FILE: Json = {
    "type": "string",
    "pattern": "^[A-Za-z0-9_]{1,50}[.]txt$",
    "description": "Gets a copy of what the job prints; %j is its id, and further patterns of Slurm's.",
}

_ARTIFACT: Json = {"type": "string", "pattern": "^[A-Za-z0-9_]{1,50}$"}

_SUBMIT: Json = {
    "command": {
        "type": "string",
        "pattern": r"^[^\u0000]*[!-~][^\u0000]*$",
        "description": "A shell command line.",
    },
    "script": {
        "type": "string",
        "pattern": r"^#![!-~]+\n[^\u0000#]*$",
        "description": "A script with its own `#!`; its #MLBOX and #SBATCH lines are read.",
    },
    "workdir": {"type": "string", "pattern": r"^/[^\u0000]*$", "description": "An existing folder."},
    "name": _LABEL,
    "project": _LABEL,
    "env": {
        "type": "object",
        "propertyNames": {"pattern": "^(?!MLBOX_)[A-Za-z_][A-Za-z0-9_]{0,100}$"},
        "additionalProperties": {"type": "string", "pattern": r"^[^\u0000]*$"},
    },
    "gpus": {**_whole(0, 1024), "description": "Whole GPUs."},
    "gpu_mem": {**_MEMORY, "description": "Instead of gpus: so much memory of one shared GPU."},
    "cpus": {**_whole(1, 65_536), "description": "Cores."},
    "mem": _MEMORY,
    "time_limit": _DURATION,
    "signal": {
        "type": "string",
        "pattern": "^(B:)?(SIG)?(USR1|USR2|TERM|INT|HUP)(@[1-9][0-9]{0,2})?$",
        "description": "Sent so many seconds before the time limit; B: to the main process only.",
    },
    "grace_s": {"type": "number", "minimum": 0, "maximum": 86_400, "description": "Between TERM and KILL."},
    "priority": {**_whole(-100, 100), "description": "Above 0 for admins."},
    "preemptible": {**_FLAG, "description": "May be stopped for others, and comes back."},
    "depends_on": {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                _whole(1, 2**63 - 1),
                {"type": "string", "pattern": "^(afterok|afterany|afternotok):[1-9][0-9]{0,8}(_[*])?$"},
            ]
        },
    },
    "array": {
        "type": "string",
        "pattern": "^[0-9]{1,2}(-[1-9][0-9](:[1-9])?)?(%[1-9][0-9]?)?$",
        "description": "Indices and ranges with commas; behind % how many may run at once.",
    },
    "matrix": {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 64,
        "propertyNames": {"pattern": "^(?!MLBOX_)[A-Za-z_][A-Za-z0-9_]{0,100}$"},
        "additionalProperties": {
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "string", "pattern": r"^[^\u0000]*$"}, _whole(-(2**63), 2**63 - 1), _FLAG]},
        },
        "description": "One element for each combination of values, which are its variables.",
    },
    "at_once": {**_whole(1, 1_000_000_000), "description": "How many elements may run at once."},
    "retries": _whole(0, 100),
    "requeue": _FLAG,
    "launch": {"enum": list(Launcher)},
    "model": {"type": "string", "pattern": "^(?!stats$)[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"},
    "hold": _FLAG,
    "not_before": {"type": "number", "minimum": 0, "maximum": 253_402_300_799},
    "output": _FILE,
    "error": _FILE,
    "notify": {
        "type": "array",
        "minItems": 1,
        "maxItems": 8,
        "items": {"type": "string", "pattern": "^[a-z]{1,20}@[a-z]{1,20}[.]org$"},
    },
    "notify_on": {"type": "array", "minItems": 1, "items": {"enum": ["begin", "end", "fail", "requeue", "time_limit"]}},
}
"""A subset of what is understood: strings are taken for numbers, too, as a form needs it."""

_FORM: Json = {
    **_SUBMIT,
    "env": {"type": "string", "pattern": "^[A-Z]{1,10}=[ -~]*$"},
    "depends_on": {"type": "string", "pattern": "^[1-9][0-9]{0,8}(,afterany:[1-9][0-9]{0,8})?$"},
    "matrix": {"type": "string", "pattern": '^[{]"[a-z]{1,9}": [[][1-9](, [1-9]){0,2}[]][}]$'},
    "notify": {"type": "string", "pattern": "^[a-z]{1,20}@[a-z]{1,20}[.]org$"},
    "notify_on": {"enum": ["begin", "end", "fail", "requeue", "time_limit"]},
}


def _written(name: str) -> Json:
    """The JSON forms of a field: its own, a string that means the same, and null, which is as if it were not there."""
    kind = cast("Json", _SUBMIT[name])
    digits = "^[1-9][0-9]?$" if kind.get("minimum") == 1 else "^[0-9]{1,2}$"
    strings: Json = {"integer": {"pattern": digits}, "number": {"pattern": "^[1-9][0-9]{0,4}$"}}
    more: list[Json] = [{"type": "null"}]
    if kind.get("type") in strings:
        more.append({"type": "string", **cast("Json", strings[str(kind["type"])])})
    if kind.get("type") == "boolean":
        more.append({"enum": ["true", "false", "yes", "no", "on", "off", "1", "0", 1, 0]})
    return {"anyOf": [kind, *more]}


_JSON: Json = {name: kind if name in ("command", "script") else _written(name) for name, kind in _SUBMIT.items()}


def _one_of(properties: Json) -> Json:
    """Either a command or a script."""
    return {**an_object(properties, required=()), "oneOf": [{"required": ["command"]}, {"required": ["script"]}]}


_JOB: Json = {
    "id": _INTEGER,
    "name": _TEXT,
    "project": _TEXT,
    "user": _TEXT,
    "state": {"enum": list(JobState)},
    "reason": {"enum": [*Reason, None]},
    "cause": _maybe(_TEXT),
    "command": _maybe(_TEXT),
    "script": _maybe(_TEXT),
    "code": {"enum": ["tar.gz", "zip", None]},
    "workdir": _maybe(_TEXT),
    "env": {"type": "object", "additionalProperties": _TEXT},
    "gpus": _INTEGER,
    "gpu_mem_mib": _maybe(_INTEGER),
    "cpus": _maybe(_INTEGER),
    "mem_mib": _maybe(_INTEGER),
    "time_limit_s": _maybe(_NUMBER),
    "grace_s": _NUMBER,
    "priority": _INTEGER,
    "preemptible": _FLAG,
    "depends_on": {"type": "array", "items": _TEXT},
    "array": _maybe({"$ref": "#/components/schemas/ArrayPlace"}),
    "retries": _INTEGER,
    "requeue": _FLAG,
    "launch": {"enum": [*Launcher, None]},
    "model": _maybe(_TEXT),
    "hold": _FLAG,
    "not_before": _maybe(_TIME),
    "warn_signal": _maybe(an_object({"number": _INTEGER, "before_s": _NUMBER, "main_only": _FLAG})),
    "output": _maybe(_TEXT),
    "error": _maybe(_TEXT),
    "notify": {"type": "array", "items": _TEXT},
    "notify_on": {"type": "array", "items": _TEXT},
    "retry_of": _maybe(_INTEGER),
    "adopted": _FLAG,
    "submitted_at": _TIME,
    "eligible_at": _maybe(_TIME),
    "started_at": _maybe(_TIME),
    "ended_at": _maybe(_TIME),
    "cancel_requested_at": _maybe(_TIME),
    "exit_code": _maybe(_INTEGER),
    "signal": _maybe(_INTEGER),
    "attempt": _INTEGER,
    "gpu_uuids": {"type": "array", "items": _TEXT},
    "log_bytes": _maybe(_INTEGER),
    "files_removed": _FLAG,
    "usage": an_object(
        {
            "gpu_seconds": _NUMBER,
            "cpu_seconds": _maybe(_NUMBER),
            "max_rss_mib": _maybe(_NUMBER),
            "max_gpu_mib": _maybe(_NUMBER),
        }
    ),
    "progress": {"type": "null"},
    "verdict": {"type": "null"},
    "pending": _maybe({"$ref": "#/components/schemas/Pending"}),
}
_ATTEMPT: Json = {
    "attempt": _INTEGER,
    "gpu_uuids": {"type": "array", "items": _TEXT},
    "started_at": _maybe(_TIME),
    "ended_at": _maybe(_TIME),
    "exit_code": _maybe(_INTEGER),
    "signal": _maybe(_INTEGER),
    "reason": {"enum": [*Reason, None]},
    "cause": _maybe(_TEXT),
    "cpu_seconds": _maybe(_NUMBER),
    "max_rss_mib": _maybe(_NUMBER),
    "log_bytes": _maybe(_INTEGER),
}
TOKEN_FIELDS: Json = {
    "id": _INTEGER,
    "name": _TEXT,
    "last4": _TEXT,
    "user": _TEXT,
    "scopes": {"type": "array", "items": {"enum": list(Scope)}},
    "created_at": _TIME,
    "expires_at": _maybe(_TIME),
    "last_used_at": _maybe(_TIME),
    "revoked_at": _maybe(_TIME),
}
TOKEN = an_object(TOKEN_FIELDS)
_VERSION: Json = {
    "version": _INTEGER,
    "state": _TEXT,
    "ready": _FLAG,
    "reason": _maybe(_TEXT),
    "job": _maybe(_INTEGER),
    "sha256": _maybe(_TEXT),
    "by_user": _maybe(_TEXT),
    "deployed_at": _maybe(_TIME),
}
_PROCESS: Json = {
    "pid": _INTEGER,
    "user": _maybe(_TEXT),
    "command": _maybe(_TEXT),
    "memory_mib": _maybe(_INTEGER),
    "kind": {"enum": ["C", "G", "C+G", "F"]},
    "started_at": _maybe(_TIME),
    "container": _maybe(_TEXT),
    "job": _maybe(_INTEGER),
}
_BAR: Json = {
    "kind": {"enum": ["past", "running", "planned", "reserved", "foreign", "drained"]},
    "job": _maybe(_INTEGER),
    "name": _TEXT,
    "user": _maybe(_TEXT),
    "starts_at": _TIME,
    "ends_at": _maybe(_TIME),
}
_USAGE_ROW: Json = {
    "name": _TEXT,
    "gpu_hours": _NUMBER,
    "gpu_hours_idle": _NUMBER,
    "cpu_hours": _NUMBER,
    "jobs": _INTEGER,
    "wait_mean_s": _maybe(_NUMBER),
    "wait_p95_s": _maybe(_NUMBER),
}
_RESERVE: Json = {
    "name": _LABEL,
    "gpus": {
        "anyOf": [
            {"type": "array", "items": {"type": "string", "pattern": "^GPU-[0-9a-f]{1,32}$"}, "minItems": 1},
            {"enum": ["all"]},
        ],
        "description": "Uuids or indices, or all.",
    },
    "starts_at": {"type": "number", "minimum": 0, "maximum": 253_402_300_799, "description": "Now, if left out."},
    "ends_at": {"type": "number", "minimum": 0, "maximum": 253_402_300_799, "description": "Or give duration."},
    "duration": _DURATION,
    "for_user": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    "for_project": _LABEL,
}
_GPU: Json = {
    "uuid": _TEXT,
    "index": _INTEGER,
    "label": _TEXT,
    "parent": _maybe(_TEXT),
    "name": _TEXT,
    "memory_mib": _maybe(_INTEGER),
    "used_mib": _maybe(_INTEGER),
    "free_mib": _maybe(_INTEGER),
    "utilization": _maybe(_INTEGER),
    "power_w": _maybe(_NUMBER),
    "temperature_c": _maybe(_INTEGER),
    "shared_free_mib": _maybe(_INTEGER),
    "cpus": {"type": "array", "items": _INTEGER},
    "numa_node": _maybe(_INTEGER),
    "unused_since": _maybe(_TIME),
    "state": {"enum": list(GpuState)},
    "why": _maybe(_TEXT),
    "jobs": {"type": "array", "items": _INTEGER},
    "models": {"type": "array", "items": _TEXT},
    "processes": {"type": "array", "items": an_object(_PROCESS)},
    "links": {
        "type": "array",
        "items": an_object({"uuid": _TEXT, "level": _maybe(_TEXT), "nvlinks": _INTEGER}),
    },
}

SCHEMAS: Json = {
    "Problem": an_object(
        {
            "type": {"const": "about:blank"},
            "title": _TEXT,
            "status": _INTEGER,
            "detail": _TEXT,
            "errors": {"type": "array", "items": an_object({"field": _TEXT, "message": _TEXT})},
        },
        required=("type", "title", "status", "detail"),
    ),
    "Submit": _one_of(_JSON),
    "SubmitForm": _one_of(_FORM),
    "SubmitUpload": _one_of({**_FORM, "code": {"type": "string", "format": "binary", "description": "An archive."}}),
    "JobChange": {
        **an_object(
            {"priority": _SUBMIT["priority"], "time_limit": _DURATION, "notify": _SUBMIT["notify"]}, required=()
        ),
        "minProperties": 1,
    },
    "Job": an_object(_JOB),
    "JobRow": an_object({name: value for name, value in _JOB.items() if name not in ("script", "env")}),
    "JobDetail": an_object({**_JOB, "attempts": {"type": "array", "items": an_object(_ATTEMPT)}}),
    "Pending": an_object(
        {
            "why": _TEXT,
            "position": _maybe(_INTEGER),
            "estimated_start": _maybe(_TIME),
            "estimated_start_p90": _maybe(_TIME),
            "fewer_gpus": _maybe(an_object({"gpus": _INTEGER, "estimated_start": _TIME})),
        }
    ),
    "ArrayPlace": an_object({"id": _INTEGER, "index": _INTEGER, "size": _INTEGER, "at_once": _maybe(_INTEGER)}),
    "Rank": an_object(
        {
            "position": _maybe(_INTEGER),
            "score": _NUMBER,
            "priority": _NUMBER,
            "fair_share": _NUMBER,
            "usage_gpu_hours": _NUMBER,
            "usage_share": _NUMBER,
            "share": _NUMBER,
            "age": _NUMBER,
            "age_s": _NUMBER,
        }
    ),
    "Waiting": an_object(
        {
            "id": _INTEGER,
            "name": _TEXT,
            "project": _TEXT,
            "user": _TEXT,
            "gpus": _INTEGER,
            "gpu_mem_mib": _maybe(_INTEGER),
            "cpus": _maybe(_INTEGER),
            "priority": _INTEGER,
            "array": _maybe({"$ref": "#/components/schemas/ArrayPlace"}),
            "time_limit_s": _maybe(_NUMBER),
            "submitted_at": _TIME,
            "pending": _maybe({"$ref": "#/components/schemas/Pending"}),
        }
    ),
    "Lines": an_object(
        {
            "lines": {
                "type": "array",
                "items": an_object({"offset": _INTEGER, "next": _INTEGER, "text": _TEXT, "cut": _FLAG}),
            },
            "size": _INTEGER,
            "match": _maybe(_INTEGER),
            "searched_to": _maybe(_INTEGER),
        }
    ),
    "Artifact": an_object({"path": _TEXT, "size": _INTEGER, "modified_at": _TIME}),
    "Gpu": an_object(_GPU),
    "Drain": an_object({"reason": {"type": "string", "maxLength": 200, "pattern": "^[ -~]*$"}}, required=()),
    "Adopt": an_object(
        {"pid": _whole(1, 2**31 - 1), "name": _LABEL, "project": _LABEL, "time_limit": _DURATION}, required=()
    ),
    "Plan": an_object(
        {
            "now": _TIME,
            "starts_at": _TIME,
            "ends_at": _TIME,
            "gpus": {
                "type": "array",
                "items": an_object(
                    {
                        "uuid": _TEXT,
                        "index": _INTEGER,
                        "label": _TEXT,
                        "bars": {"type": "array", "items": an_object(_BAR)},
                    }
                ),
            },
        }
    ),
    "Usage": an_object(
        {
            "since": _TIME,
            "until": _TIME,
            "total": an_object(_USAGE_ROW),
            "users": {"type": "array", "items": an_object(_USAGE_ROW)},
            "projects": {"type": "array", "items": an_object(_USAGE_ROW)},
        }
    ),
    "Reservation": an_object(
        {
            "id": _INTEGER,
            "name": _TEXT,
            "gpu_uuids": {"type": "array", "items": _TEXT},
            "starts_at": _TIME,
            "ends_at": _TIME,
            "for_user": _maybe(_TEXT),
            "for_project": _maybe(_TEXT),
            "made_by": _TEXT,
        }
    ),
    "Reserve": {
        **an_object(_RESERVE, required=("name",)),
        "oneOf": [{"required": ["ends_at"]}, {"required": ["duration"]}],
    },
    "Notice": an_object(
        {
            "id": _INTEGER,
            "at": _TIME,
            "user": _TEXT,
            "job": _maybe(_INTEGER),
            "kind": _TEXT,
            "text": _TEXT,
            "sent_at": _maybe(_TIME),
            "failure": _maybe(_TEXT),
        }
    ),
    "Ready": an_object({"status": _TEXT, "version": _TEXT, "detail": _TEXT}, required=("status",)),
    "Model": an_object(
        {
            "name": _TEXT,
            "ready": _FLAG,
            "reason": _maybe(_TEXT),
            "versions": {"type": "array", "items": {"$ref": "#/components/schemas/ModelVersion"}},
        }
    ),
    "ModelVersion": an_object(_VERSION),
    "DeployJob": an_object(
        {"job": _whole(1, 2**63 - 1), "path": {"type": "string", "pattern": "^[A-Za-z0-9_]{1,50}$"}}, required=("job",)
    ),
    "Token": TOKEN,
    "NewToken": an_object(
        {
            "name": _LABEL,
            "scopes": _maybe({"type": "array", "items": {"enum": list(Scope)}, "minItems": 1}),
            "expires": {"anyOf": [_DURATION, {"enum": ["never", None]}]},
        },
        required=(),
    ),
    "LoginCode": an_object({"code": _TEXT, "url": _TEXT, "expires_at": _TIME}),
    "Me": an_object(
        {
            "user": _TEXT,
            "uid": _INTEGER,
            "role": {"enum": list(Role)},
            "scopes": {"type": "array", "items": {"enum": list(Scope)}},
            "credential": _TEXT,
            "job": _maybe(_INTEGER),
        }
    ),
}
