"""Notices reach the addresses that a job named: a mail program, an address on the web, and their failures."""

import asyncio
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlbox.database import Database
from mlbox.events import JOBS, Events
from mlbox.jobs import Job, JobSpec, JobState, Reason
from mlbox.scheduler import notices, notifier
from mlbox.scheduler.notices import Notice
from mlbox.scheduler.notifier import Notifier
from tests.scheduler.box import eventually


def job(state: JobState, *on: str) -> Job:
    spec = JobSpec(command="true", name="train", notify=("ann@example.org",), notify_on=on)
    return Job(id=7, spec=spec, user="ann", uid=1, state=state, submitted_at=1.0)


@pytest.fixture
def hook() -> Iterator[tuple[str, list[Any]]]:
    """An address that takes notices, and what it got."""
    got: list[Any] = []

    class Taker(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Taker)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/x", got
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("state", "reason", "on", "kind"),
    [
        (JobState.SUCCEEDED, None, ("end", "fail"), "end"),
        (JobState.SUCCEEDED, None, ("fail",), None),
        (JobState.FAILED, Reason.EXIT_CODE, ("fail",), "fail"),
        (JobState.FAILED, Reason.TIME_LIMIT, ("time_limit",), "time_limit"),
        (JobState.CANCELLED, Reason.USER, ("end",), "end"),
        (JobState.QUEUED, Reason.PREEMPTED, ("end", "fail"), None),
        (JobState.QUEUED, Reason.PREEMPTED, ("requeue",), "requeue"),
    ],
)
def test_an_end_is_told_to_those_who_asked_for_its_kind(
    state: JobState, reason: Reason | None, on: tuple[str, ...], kind: str | None
) -> None:
    told = notifier.ended(job(state, *on), reason, "it gave way to job 9", 5.0)
    assert [(one.kind, one.addresses) for one in told] == ([(kind, ("ann@example.org",))] if kind else [])
    assert all("job 7 (train)" in one.text for one in told)


def test_a_beginning_is_told_only_where_that_was_asked() -> None:
    assert [one.kind for one in notifier.begun(job(JobState.RUNNING, "begin"), 5.0)] == ["begin"]
    assert notifier.begun(job(JobState.RUNNING, "end"), 5.0) == ()


async def test_every_address_is_told_once_and_what_fails_is_written_down(
    database: Database, hook: tuple[str, list[Any]], tmp_path: Path
) -> None:
    address, got = hook
    program, mail = tmp_path / "sendmail", tmp_path / "mail"
    program.write_text(f'#!/bin/sh\necho "$@" > {mail.with_suffix(".to")}; cat > {mail}\n')
    program.chmod(0o700)
    events = Events()
    rows = [
        Notice(user="ann", uid=1, at=1.0, kind="end", text="it ended", addresses=(address, "mailto:ann@example.org")),
        Notice(user="ann", uid=1, at=2.0, kind="end", text="nobody there", addresses=("http://127.0.0.1:1/",)),
    ]
    await database.write(notices.add, rows)
    task = asyncio.create_task(Notifier(database, events, f"{program} -i").run())

    async def sent() -> list[Notice]:
        told = await database.read(notices.for_user, 1)
        return told if all(one.sent_at for one in told) else []

    refused, fine = await eventually("they are sent", sent)
    assert (fine.failure, got) == (None, [{"kind": "end", "job": None, "user": "ann", "text": "it ended"}])
    assert "ann@example.org" in mail.with_suffix(".to").read_text()
    assert "Subject: [mlbox] it ended" in mail.read_text()
    assert "http://127.0.0.1:1/" in (refused.failure or "")
    events.publish(JOBS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(got) == 1
