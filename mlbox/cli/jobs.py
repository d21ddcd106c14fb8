"""Commands about jobs that are there already: list, show, log, wait, and what may be done with them."""

import argparse
import http.client
import re
import sys
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from mlbox.cli import client

ASK_AGAIN_S = 1.0
_WAIT_S = 60
"""How long one request waits for the end of a job, and how long `wait` bears with a daemon that is restarting."""
_CHUNK = 64 << 10
_ELEMENTS_MAX = 1000
"""Jobs of one page of a list; an array is read page by page."""
_JOB = re.compile(r"(\d{1,19})(?:_(\*|\d{1,9}))?")


def job_word(text: str) -> str:
    """A job as it is written: `12`, the element `12_3` of an array, the whole array `12_*`. Raises ValueError."""
    if _JOB.fullmatch(text) is None:
        raise ValueError(text)
    return text


def ls(options: argparse.Namespace) -> int:
    """`mlbox ls`"""
    asked = [("state", state) for state in options.wanted]
    asked += [(key, value) for key in ("user", "project", "name", "array", "limit") if (value := getattr(options, key))]
    return client.show(options, "/api/jobs?" + urlencode(asked))


def show(options: argparse.Namespace) -> int:
    """`mlbox show`"""
    return client.show(options, f"/api/jobs/{_only(options, options.job)}")


def rank(options: argparse.Namespace) -> int:
    """`mlbox rank`"""
    return client.show(options, f"/api/jobs/{_only(options, options.job)}/rank")


def wait(options: argparse.Namespace) -> int:
    """`mlbox wait`: ends with the status of the first of the jobs that did not succeed."""
    return wait_for(options, [job_id for word in options.jobs for job_id in ids(options, word)])


def wait_for(options: argparse.Namespace, job_ids: Sequence[int], bear_s: float = 0.0) -> int:
    """Wait until all have ended; the status of the first that did not succeed, in the order given.

    Jobs survive a restart of the daemon, and so does waiting for one. `bear_s`: how long a daemon may be away before
    it has answered once.
    """
    ended = [_ended(options, job_id, bear_s) for job_id in job_ids]
    client.answers(options, ended, [f"job {job['id']} {job['state']}: {job['cause']}" for job in ended])
    return next((status for job in ended if (status := _status(job))), 0)


def act(options: argparse.Namespace) -> int:
    """`mlbox cancel | retry | clone | hold | release`, for several jobs; a refusal does not keep the others."""
    done: list[Any] = []
    refused = 0
    for word in options.jobs:
        try:
            done += _act_on(options, word)
        except client.Refused as error:
            refused += 1
            print(f"mlbox: {error}", file=sys.stderr)
    if done:
        client.answers(options, done, [f"job {job['id']}: {job['state']}" for job in done])
    return 1 if refused else 0


def _act_on(options: argparse.Namespace, word: str) -> list[Any]:
    array, star = _whole_array(word)
    if star and options.verb == "cancel":
        return client.ask(options, "POST", f"/api/arrays/{array}/cancel")["jobs"]
    return [client.ask(options, "POST", f"/api/jobs/{at}/{options.verb}") for at in ids(options, word)]


def log(options: argparse.Namespace) -> int:
    """`mlbox log`"""
    query = {"follow": "1"} if options.follow else {}
    if options.tail is not None:
        query["tail"] = str(options.tail)
    if options.attempt is not None:
        query["attempt"] = str(options.attempt)
    copy_log(options, _only(options, options.job), query)
    return 0


def copy_log(options: argparse.Namespace, job_id: int, query: dict[str, str]) -> None:
    """Write a job's log to stdout, byte by byte as it is, until it or the connection ends."""
    with client.connection(options) as daemon:
        response = daemon.send("GET", f"/api/jobs/{job_id}/log?{urlencode(query)}", accept=client.TEXT)
        while chunk := response.read1(_CHUNK):
            client.write(chunk)


def ids(options: argparse.Namespace, word: str) -> list[int]:
    """The ids of the jobs that `word` (see `job_word`) means; for `12_3` and `12_*` the daemon is asked."""
    array, rest = _parts(word)
    if rest is None:
        return [array]
    elements = _elements(options, array)
    found = [job["id"] for job in elements if rest == "*" or job["array"]["index"] == int(rest)]
    if not found:
        raise client.Refused(f"there is no job {word} that you may see")
    return sorted(found)


def _elements(options: argparse.Namespace, array: int) -> list[Any]:
    elements: list[Any] = []
    query: dict[str, object] = {"array": array, "limit": _ELEMENTS_MAX}
    while True:
        page = client.ask(options, "GET", f"/api/jobs?{urlencode(query)}")
        elements += page["jobs"]
        if page["next"] is None:
            return elements
        query["before"] = page["next"]


def _only(options: argparse.Namespace, word: str) -> int:
    """The one job that `word` means."""
    found = ids(options, word)
    if len(found) > 1:
        raise client.Refused(f"{word} is {len(found)} jobs: name one of them, such as {word.replace('*', '0')}")
    return found[0]


def _parts(word: str) -> tuple[int, str | None]:
    number, _, rest = word.partition("_")
    return int(number), rest or None


def _whole_array(word: str) -> tuple[int, bool]:
    array, rest = _parts(word)
    return array, rest == "*"


def _ended(options: argparse.Namespace, job_id: int, bear_s: float) -> Any:
    patience_until = time.monotonic() + bear_s
    while True:
        try:
            job = client.ask(options, "GET", f"/api/jobs/{job_id}/wait?timeout={_WAIT_S}")
        except (OSError, http.client.HTTPException):
            if time.monotonic() >= patience_until:
                raise
            time.sleep(ASK_AGAIN_S)
            continue
        if job["ended_at"]:
            return job
        patience_until = time.monotonic() + _WAIT_S


def _status(job: Any) -> int:
    """The exit status that is a job's own, as a shell would tell it."""
    if job["state"] == "succeeded":
        return 0
    return 128 + job["signal"] if job["signal"] else job["exit_code"] or 1
