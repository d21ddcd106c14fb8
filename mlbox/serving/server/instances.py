"""The runs of one loaded version: so many at once, the rest in a queue, each with a deadline.

Each version has its own threads, so that a slow or endless model holds up no other.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlbox.errors import Invalid, Unavailable
from mlbox.serving.server.sessions import DeviceFailed, RunFailed, RunStopped, Session, Stop
from mlbox.serving.server.tensors import Array

log = logging.getLogger(__name__)

_STUBBORN_S = 2.0
"""How long a run may take to notice that it was stopped; onnxruntime looks between two nodes of the graph."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The outputs of a run, and nanoseconds: in the queue, and in onnxruntime."""

    outputs: list[Array]
    queue_ns: int
    infer_ns: int


class Instances:
    """Runs a session. Used on the event loop's thread; the session runs in threads of its own."""

    def __init__(self, session: Session, model: str, *, count: int, queue_max: int) -> None:
        self.session = session
        self.count = count
        self._model = model
        self._queue_max = queue_max
        self._queued = 0
        self._free = asyncio.Semaphore(count)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=f"run-{model}")

    async def run(self, feeds: Mapping[str, Array], outputs: Sequence[str], timeout_s: float) -> Ran:
        """One run, within `timeout_s` altogether. Cancelled: it leaves the queue, or the run is ended.

        Raises Invalid when the model refuses the input, Unavailable when the queue is full or time is up.
        """
        began = time.perf_counter_ns()
        if self._queued >= self._queue_max:
            raise Unavailable(
                f"Exceeds maximum queue size: {self._queued} requests wait for model '{self._model}'", retry_after_s=1.0
            )
        self._queued += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise Unavailable(
                f"Request timeout expired: it waited {timeout_s:g} s for model '{self._model}'", retry_after_s=1.0
            ) from None
        finally:
            self._queued -= 1
        started = time.perf_counter_ns()
        result = await self._run(feeds, outputs, timeout_s - (started - began) / 1e9)
        return Ran(result, started - began, time.perf_counter_ns() - started)

    async def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], timeout_s: float) -> list[Array]:
        stop = Stop()
        future = asyncio.get_running_loop().run_in_executor(self._threads, self.session.run, feeds, outputs, stop)
        # The slot is free again when the thread is, not when the client has lost its patience.
        future.add_done_callback(self._ended)
        try:
            done, _ = await asyncio.wait({future}, timeout=max(0.0, timeout_s))
            if not done:
                stop.set()
                await asyncio.wait({future}, timeout=_STUBBORN_S)
        except asyncio.CancelledError:
            stop.set()
            raise
        if not future.done():
            log.error("model %s: a run does not react to being stopped; its thread is lost", self._model)
            raise Unavailable(f"inference of model '{self._model}' was stopped and did not end")
        try:
            return future.result()
        except RunFailed as error:
            raise Invalid(f"onnxruntime refused the input of model '{self._model}': {error}") from error
        except DeviceFailed as error:
            raise Unavailable(f"the GPU of model '{self._model}' failed: {error}") from error
        except RunStopped as error:
            raise Unavailable(f"inference of model '{self._model}' took too long and was ended") from error

    def _ended(self, future: "asyncio.Future[list[Array]]") -> None:
        self._free.release()
        if not future.cancelled():
            future.exception()  # looked at, so that asyncio does not report what nobody waits for any more

    def close(self) -> None:
        """Give up the session and its memory; nobody runs it any more. Blocking: freeing gigabytes takes time."""
        self._threads.shutdown()
        self.session.close()
