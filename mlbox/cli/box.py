"""Commands about the box: its GPUs, the queue and the plan, usage, reservations, models, credentials."""

import argparse
import shutil
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlencode

from mlbox.cli import client
from mlbox.cli.submits import local_time


def plain(path: str) -> Callable[[argparse.Namespace], int]:
    """A command that prints what the daemon says at `path`."""
    return lambda options: client.show(options, path)


def plan(options: argparse.Namespace) -> int:
    """`mlbox plan`: as wide as the terminal."""
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 400)
    return client.show(options, "/api/plan" if options.json else f"/api/plan?columns={columns}")


def usage(options: argparse.Namespace) -> int:
    """`mlbox usage`"""
    return client.show(options, "/api/usage?" + urlencode({"since": local_time(options.since)}))


def drain(options: argparse.Namespace) -> int:
    """`mlbox drain | resume`, for several GPUs."""
    fields = {"reason": options.reason} if options.verb == "drain" and options.reason else None
    done = [
        client.ask(options, "POST", f"/api/gpus/{quote(gpu['uuid'], safe='')}/{options.verb}", fields)
        for gpu in _gpus(options, options.gpu)
    ]
    return client.answers(options, done, [f"GPU {gpu['label']}: {gpu['state']}" for gpu in done])


def adopt(options: argparse.Namespace) -> int:
    """`mlbox adopt`: a program that was started past mlbox becomes a job."""
    gpu = _gpus(options, [options.gpu])[0]
    fields = {key: value for key in ("pid", "name", "project", "time_limit") if (value := getattr(options, key))}
    job = client.ask(options, "POST", f"/api/gpus/{quote(gpu['uuid'], safe='')}/adopt", fields)
    return client.answer(options, job, str(job["id"]))


def reserve(options: argparse.Namespace) -> int:
    """`mlbox reserve`"""
    wanted = [word for text in options.gpus for word in text.split(",") if word]
    fields: dict[str, Any] = {
        "name": options.name,
        "gpus": [gpu["uuid"] for gpu in _gpus(options, wanted or ["all"])],
        "starts_at": options.start and local_time(options.start),
        "ends_at": options.until and local_time(options.until),
        "duration": options.duration,
        "for_user": options.user,
        "for_project": options.project,
    }
    made = client.ask(options, "POST", "/api/reservations", {key: value for key, value in fields.items() if value})
    return client.answer(options, made, f"reservation {made['id']}: {made['starts_at']} to {made['ends_at']}")


def reservations(options: argparse.Namespace) -> int:
    """`mlbox reservations`"""
    if options.cancel is None:
        return client.show(options, "/api/reservations")
    gone = client.ask(options, "DELETE", f"/api/reservations/{options.cancel}")
    return client.answer(options, gone, f"reservation {gone['id']} is cancelled")


def token(options: argparse.Namespace) -> int:
    """`mlbox token`"""
    fields = {"name": options.name, "scopes": options.scope or ["read", "submit", "infer"], "expires": options.expires}
    made = client.ask(options, "POST", "/api/tokens", {key: value for key, value in fields.items() if value})
    return client.answer(options, made, made["token"])


def login(options: argparse.Namespace) -> int:
    """`mlbox login`"""
    made = client.ask(options, "POST", "/api/login-codes")
    return client.answer(options, made, made["url"])


def _gpus(options: argparse.Namespace, wanted: list[str]) -> list[Any]:
    """The GPUs that are meant: by index, by uuid, or all of them. Raises Refused."""
    known = client.ask(options, "GET", "/api/gpus")["gpus"]
    found: list[Any] = []
    for word in wanted:
        fitting = [gpu for gpu in known if word in ("all", gpu["label"], gpu["uuid"])]
        if not fitting:
            if not known:
                raise client.Refused("this box has no GPU that mlbox can see")
            have = ", ".join(f"{gpu['label']} ({gpu['uuid']})" for gpu in known)
            raise client.Refused(f"there is no GPU {word} here; known: {have}")
        found += [gpu for gpu in fitting if gpu not in found]
    return found
