"""`mlbox submit`: flags to fields, a script or a folder of code along with them, and waiting for the end."""

import argparse
import http.client
import json
import secrets
import shlex
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from mlbox.cli import client, jobs

FIELDS = {
    "name": "label of the job",
    "project": "project it is counted under",
    "gpus": "whole GPUs",
    "gpu-mem": "instead: one shared GPU with so much memory, such as 20G",
    "cpus": "cores",
    "mem": "memory, such as 32G",
    "time-limit": "such as 90m, 2h, 1-12:00:00",
    "grace": "seconds between TERM and KILL",
    "priority": "-100 to 100; above 0 for admins",
    "array": "such as 0-99 or 0-99%%8 (8 at once)",
    "at-once": "how many elements of the array may run at once",
    "retries": "tries after a failure (never after running out of memory)",
    "launch": "plain or torchrun",
    "model": "when it succeeds, $MLBOX_OUT/MODEL.onnx becomes that model's next version",
    "not-before": "time or seconds; a time without a zone is this machine's",
    "signal": "signal before the time limit, such as USR1@120",
    "output": "file that gets a copy of what the job prints",
    "error": "file that gets a copy of what it prints as errors",
}
"""Flags that take one text, which the daemon checks."""
_NAMES = {"grace": "grace_s"}
LISTS = {
    "depends-on": ("JOB", "12, afterok:12, afterany:12, afternotok:12"),
    "notify": ("ADDRESS", "who is told; see the configuration"),
    "notify-on": ("EVENT", "begin, end, fail, requeue or time_limit"),
    "env": ("NAME=VALUE", "a variable"),
    "matrix": ("NAME=A,B,...", "one element for each combination; each is a variable"),
}
"""Flags that may come many times."""
FLAGS = {
    "preemptible": "may be stopped for others, and comes back",
    "requeue": "again after a crash of the box",
    "hold": "wait for a release",
}
_WAIT_S = 60


def submit(options: argparse.Namespace) -> int:
    """`mlbox submit`"""
    fields = _fields(options)
    if options.code is None:
        job = client.ask(options, "POST", "/api/jobs", fields)
    else:
        job = _with_code(options, fields, options.code)
    if not (options.wait or options.follow):
        return client.answer(options, job, str(job["id"]))
    place = job.get("array")
    if options.follow:
        _follow(options, job["id"])
    ids = range(place["id"], place["id"] + place["size"]) if place else (job["id"],)
    return jobs.wait_for(options, ids, bear_s=_WAIT_S)


def local_time(text: str) -> str:
    """A time as the daemon reads it: one without a zone is meant as this machine's."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return text if when.tzinfo else when.astimezone().isoformat()


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    words: list[str] = options.command or []
    if words and words[0] == "--":
        words = words[1:]
    if bool(words) == (options.script is not None):
        options.misuse("give either a command or --script FILE" if words else "give a command, or --script FILE")
    if words:
        fields["command"] = words[0] if len(words) == 1 else shlex.join(words)
    else:
        fields["script"] = _text_of(options, options.script)
    for flag in FIELDS:
        if (value := getattr(options, flag.replace("-", "_"))) is not None:
            fields[_NAMES.get(flag, flag.replace("-", "_"))] = local_time(value) if flag == "not-before" else value
    for flag in FLAGS:
        if getattr(options, flag):
            fields[flag] = "true"
    for flag in LISTS:
        if value := getattr(options, flag.replace("-", "_")):
            fields[flag.replace("-", "_")] = value
    if "matrix" in fields:
        fields["matrix"] = _matrix(options, fields["matrix"])
    if options.workdir:
        fields["workdir"] = str(Path(options.workdir).absolute())
    if options.follow and fields.keys() & {"array", "matrix"}:
        options.misuse("--follow shows the log of one job: use --wait for an array")
    return fields


def _matrix(options: argparse.Namespace, axes: list[str]) -> dict[str, list[str]]:
    """`lr=0.1,0.2` for each axis, or the whole as JSON."""
    matrix: dict[str, list[str]] = {}
    for axis in axes:
        if axis.lstrip().startswith("{"):
            try:
                matrix |= json.loads(axis)
            except ValueError as error:
                options.misuse(f"--matrix begins like JSON, but is none: {error}")
        else:
            name, equals, values = axis.partition("=")
            if not equals:
                options.misuse(f"--matrix wants NAME=VALUE,VALUE,..., got {axis!r}")
            matrix[name] = values.split(",")
    return matrix


def _text_of(options: argparse.Namespace, path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        return options.misuse(f"the script cannot be read: {error}")


def _with_code(options: argparse.Namespace, fields: Mapping[str, Any], code: Path) -> Any:
    """Submit as multipart/form-data, which is written to a file first: the archive may be larger than memory."""
    boundary = f"mlbox-{secrets.token_hex(16)}"
    with tempfile.TemporaryFile() as body:
        for name, value in fields.items():
            for text in _texts(name, value):
                body.write(_part_head(boundary, name) + text.encode() + b"\r\n")
        body.write(_part_head(boundary, "code", filename="code.tar.gz"))
        try:
            _archive(code, body)
        except (OSError, tarfile.TarError) as error:
            options.misuse(f"--code {code} cannot be packed: {error}")
        body.write(f"\r\n--{boundary}--\r\n".encode())
        body.seek(0)
        with client.connection(options) as daemon:
            kind = f"multipart/form-data; boundary={boundary}"
            return json.loads(daemon.send("POST", "/api/jobs", body, kind=kind, accept=client.JSON).read())


def _archive(code: Path, into: IO[bytes]) -> None:
    """A folder as tar.gz, its content at the top; an archive as it is."""
    if not code.is_dir():
        with code.open("rb") as archive:
            while block := archive.read(1 << 20):
                into.write(block)
        return
    with tarfile.open(fileobj=into, mode="w:gz", compresslevel=1) as packed:  # the wire is local; time is what counts
        for path in sorted(code.iterdir()):
            packed.add(path, arcname=path.name)


def _part_head(boundary: str, name: str, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename else ""
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()


def _texts(name: str, value: Any) -> list[str]:
    """A field as a form says it: one text, lists with commas; a variable may hold commas and has a field of its own."""
    if isinstance(value, list):
        texts = [str(text) for text in cast("list[object]", value)]
        return texts if name == "env" else [",".join(texts)]
    return [value if isinstance(value, str) else json.dumps(value)]


def _follow(options: argparse.Namespace, job_id: int) -> None:
    """Show the log as it grows; a connection that breaks is no end of the job, which is then waited for."""
    try:
        jobs.copy_log(options, job_id, {"follow": "1"})
    except (OSError, http.client.HTTPException) as error:
        print(f"mlbox: the log is followed no longer ({error}); waiting for job {job_id}", file=sys.stderr)
