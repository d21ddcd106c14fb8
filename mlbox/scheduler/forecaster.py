"""Keeps the forecast fresh: made anew on a thread when the queue has changed, for a small part of one core."""

import asyncio
import logging
import time

from mlbox.events import JOBS, Events
from mlbox.scheduler.forecast import Forecast, Present, forecast
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.state import SchedulerState

log = logging.getLogger(__name__)

FORESEEN = 200
"""So many of the first waiting jobs get an estimate; behind them too much can happen."""
_PART = 20
"""A forecast that took x is followed by a pause of 20 x: 5 % of a core at most."""


class Forecaster:
    """Looks ahead after ticks of the loop, on whose thread `look` is called."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._task: asyncio.Task[None] | None = None
        self._stale = False

    def look(self, group: asyncio.TaskGroup, state: SchedulerState, gpus: GpuInventory) -> None:
        """Have the forecast made anew, as a task of `group`: now, or when the one under way was long enough ago."""
        if not len(state.backlog):
            state.forecast = Forecast()
            return
        self._stale = True
        if self._task is None or self._task.done():
            self._task = group.create_task(self._make(state, gpus), name="forecast")

    async def _make(self, state: SchedulerState, gpus: GpuInventory) -> None:
        """Make forecasts until nothing has changed since the latest one."""
        while self._stale:
            self._stale = False
            began = time.monotonic()
            try:
                state.forecast = await asyncio.to_thread(forecast, present(state, gpus))
            except Exception:  # an estimate that cannot be had must not keep jobs from starting
                log.exception("scheduler: no forecast")
            self._events.publish(JOBS)
            await asyncio.sleep(_PART * (time.monotonic() - began))


def present(state: SchedulerState, gpus: GpuInventory) -> Present:
    """What a forecast looks at: values that no longer change."""
    now = time.time()
    return Present(
        waiting=state.backlog.ordered(FORESEEN, state.standing(now), state.rules.weights, now),
        running=state.running(),
        box=state.box(gpus.current()),
        rules=state.rules,
        ledger=state.ledger.copy(),
        history=state.history.copy(),
        now=now,
    )
