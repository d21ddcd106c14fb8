"""Tells people outside: notices of their jobs go to the addresses that they gave at submit.

A notice is a row, written in the transaction of what it tells; this sends it afterwards, so that none is lost in a
crash and a mail server that hangs keeps no job from its end. Mail goes through a sendmail(8) program, an http(s)
address gets a JSON document by POST.
"""

import asyncio
import json
import logging
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from email.message import EmailMessage

from mlbox.database import Database
from mlbox.errors import Unavailable
from mlbox.events import JOBS, Events
from mlbox.jobs import Job, JobState, Reason
from mlbox.scheduler import notices
from mlbox.scheduler.notices import Notice

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_PAUSE_S = 30.0
"""How long to wait after a look, unless a job changes."""


def begun(job: Job, now: float) -> Sequence[Notice]:
    """What is to be told when a job begins to run."""
    return _notices(job, ("begin",), f"job {job.id} ({job.spec.name}) has begun", now)


def ended(job: Job, reason: Reason | None, cause: str, now: float) -> Sequence[Notice]:
    """What is to be told when an attempt of `job` ended, whose state is the new one (Slurm's words of --mail-type)."""
    if job.state is JobState.QUEUED:
        return _notices(job, ("requeue",), f"job {job.id} ({job.spec.name}) waits again: {cause}", now)
    kinds = ("end",) if job.state is JobState.SUCCEEDED else ("fail", "end")
    if reason is Reason.TIME_LIMIT:
        kinds = ("time_limit", *kinds)
    return _notices(job, kinds, f"job {job.id} ({job.spec.name}) {job.state}: {cause}", now)


def _notices(job: Job, kinds: Sequence[str], text: str, now: float) -> Sequence[Notice]:
    kind = next((kind for kind in kinds if kind in job.spec.notify_on), None)
    if kind is None or not job.spec.notify:
        return ()
    return (Notice(user=job.user, uid=job.uid, at=now, kind=kind, text=text, job_id=job.id, addresses=job.spec.notify),)


class Notifier:
    """Sends what is unsent. `sendmail` is a program and its arguments; empty: mail cannot be sent."""

    def __init__(self, database: Database, events: Events, sendmail: str) -> None:
        self._database = database
        self._events = events
        self._sendmail = sendmail

    async def run(self) -> None:
        """Send notices until cancelled."""
        with self._events.subscribe(JOBS) as changes:
            while True:
                try:
                    for notice in await self._database.read(notices.unsent):
                        failure = await asyncio.to_thread(self._send, notice)
                        if failure:
                            log.warning("job %s: a notice could not be sent: %s", notice.job_id, failure)
                        await self._database.write(notices.mark_sent, notice.id, now=time.time(), failure=failure)
                except Unavailable as error:
                    log.warning("notices are sent later: %s", error)
                await changes.take(_PAUSE_S)

    def _send(self, notice: Notice) -> str | None:
        """Tell every address; returns what went wrong. Blocking."""
        failures: list[str] = []
        for address in notice.addresses:
            try:
                if address.startswith(("http://", "https://")):
                    _post(address, notice)
                else:
                    self._mail(address.removeprefix("mailto:"), notice)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                failures.append(f"{address}: {error}")
        return "; ".join(failures) or None

    def _mail(self, address: str, notice: Notice) -> None:
        if not self._sendmail:
            raise ValueError("no program sends mail here: set notify.sendmail in the configuration")
        message = EmailMessage()
        message["To"], message["Subject"] = address, f"[mlbox] {notice.text}"[:200]
        message.set_content(notice.text + "\n")
        subprocess.run(
            [*self._sendmail.split(), address], input=message.as_bytes(), timeout=_TIMEOUT_S, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def _post(address: str, notice: Notice) -> None:
    body = json.dumps({"kind": notice.kind, "job": notice.job_id, "user": notice.user, "text": notice.text}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})  # noqa: S310  # http(s) only
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
        pass
