"""How long jobs like this one took: quantiles of past run times, from the nearest kin that has enough of them. Pure.

Kin, nearest first: the same program of this user in this project, everything of this user in this project, the same
program of anybody, everything of this user, everything on the box. Estimates rest on this; guarantees never do.
"""

import re
import shlex
from bisect import bisect_right, insort
from collections import deque

from mlbox.scheduler.policy import RunningJob

_KEPT = 200
"""Run times kept of each kin: the newest, so that estimates follow a project as it changes."""
_ENOUGH = 3
"""So few run times say nothing yet: kin further away is asked."""
_OVERSTAY = 0.5
"""A job that outlived every one before it is thought to take half as long again as it already took."""
_WORD_CHARACTERS = 80

Kin = tuple[str, ...]


def kind_of(command: str | None, name: str) -> str:
    """What a job's run time is learned under: its program and script, without options and values; else its name."""
    if command is None:
        return name
    try:
        words = shlex.split(command.split("\n", 1)[0])
    except ValueError:
        words = command.split()
    words = [word for word in words if not re.fullmatch(r"\w+=.*", word)]
    plain = [word for word in words[:3] if not word.startswith("-") and not re.fullmatch(r"[\d.]+", word)]
    return " ".join(word[:_WORD_CHARACTERS] for word in plain[:2]) or name


class History:
    """Run times of jobs that succeeded."""

    def __init__(self) -> None:
        self._newest: dict[Kin, deque[float]] = {}
        self._sorted: dict[Kin, list[float]] = {}

    def add(self, user: str, project: str, kind: str, seconds: float) -> None:
        """Learn from a job that succeeded."""
        for kin in _kin(user, project, kind):
            newest = self._newest.setdefault(kin, deque())
            ordered = self._sorted.setdefault(kin, [])
            newest.append(seconds)
            insort(ordered, seconds)
            if len(newest) > _KEPT:
                del ordered[bisect_right(ordered, newest.popleft()) - 1]

    def copy(self) -> "History":
        """What is known now, to be read on another thread."""
        twin = History()
        twin._sorted = {kin: list(times) for kin, times in self._sorted.items()}
        return twin

    def quantile(
        self, user: str, project: str, kind: str, part: float, *, limit_s: float | None = None, ran_s: float = 0.0
    ) -> float | None:
        """The run time in seconds that `part` (0 to 1) of such jobs do not exceed, given that this one ran `ran_s`.

        Never above the time limit, which alone answers where nothing is known; None: nobody can say.
        """
        for kin in _kin(user, project, kind):
            times = self._sorted.get(kin, ())
            if len(times) < _ENOUGH:
                continue
            first = bisect_right(times, ran_s)
            longer = times[first:]
            found = longer[min(len(longer) - 1, int(part * len(longer)))] if longer else ran_s * (1 + _OVERSTAY)
            return found if limit_s is None else min(found, max(limit_s, ran_s))
        return limit_s

    def left_s(self, job: RunningJob, now: float) -> float | None:
        """How many seconds a running job probably still takes; None: nobody can say."""
        ran_s = now - job.started_at
        total = self.quantile(job.user, job.project, job.kind, 0.5, limit_s=job.time_limit_s, ran_s=ran_s)
        return None if total is None else max(0.0, total - ran_s)


def _kin(user: str, project: str, kind: str) -> tuple[Kin, ...]:
    return ((user, project, kind), (user, project, ""), ("", "", kind), (user, "", ""), ("", "", ""))
