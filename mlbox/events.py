"""Hints that something changed: "job 12", "gpus". The database is the truth; a lost hint costs a moment.

A subscriber gets at most one pending hint per topic, however many are published: it looks the truth up anyway.
"""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

JOBS = "jobs"
"""Any job changed; published beside the job's own `job:12`."""
GPUS = "gpus"
MODELS = "models"


def job_topic(job_id: int) -> str:
    return f"job:{job_id}"


class Subscription:
    """The topics that changed since they were last taken."""

    def __init__(self) -> None:
        self._changed: set[str] = set()
        self._wake = asyncio.Event()

    async def take(self, timeout_s: float | None = None) -> frozenset[str]:
        """Wait for a change and return the topics that changed; empty when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return frozenset()
        self._wake.clear()
        changed = frozenset(self._changed)
        self._changed.clear()
        return changed

    def _hint(self, topic: str) -> None:
        self._changed.add(topic)
        self._wake.set()


class Events:
    """The board on which hints are published. Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._subscriptions: dict[str, set[Subscription]] = {}

    def publish(self, *topics: str) -> None:
        for topic in topics:
            for subscription in self._subscriptions.get(topic, ()):
                subscription._hint(topic)  # pyright: ignore[reportPrivateUsage]  # the two are one mechanism

    @contextmanager
    def subscribe(self, *topics: str) -> Generator[Subscription]:
        """What changes in `topics` from now on, until the block is left."""
        subscription = Subscription()
        for topic in topics:
            self._subscriptions.setdefault(topic, set()).add(subscription)
        try:
            yield subscription
        finally:
            for topic in frozenset(topics):
                others = self._subscriptions[topic]
                others.discard(subscription)
                if not others:
                    del self._subscriptions[topic]
