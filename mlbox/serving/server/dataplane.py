"""The road of one inference, whichever wire it came on: find the model, parse, check, run, encode, count."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mlbox.errors import MlboxError
from mlbox.serving.server.models import Models, Served
from mlbox.serving.server.protocol import classify
from mlbox.serving.server.signature import InferRequest, InferResponse, RequestedOutput, Signature, Tensor, check
from mlbox.serving.server.statistics import Timing
from mlbox.serving.server.tensors import Array

_IN_THREAD_BYTES = 64 << 10
"""From this size on a request is parsed, or an answer written, in a thread: 600 kB of JSON take 7 ms (measured)."""

Answer = TypeVar("Answer")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Wire(Generic[Answer]):
    """How a transport speaks: from what it received to a request, from a response to what it sends.

    Both may raise Invalid, and both may run in a thread. `size` is how many bytes were received.
    """

    parse: Callable[[Signature], InferRequest]
    encode: Callable[[InferResponse, Sequence[RequestedOutput]], Answer]
    size: int


class DataPlane:
    """Answers inferences from what is served. `run_timeout_s` is the longest that any may take."""

    def __init__(self, models: Models, *, run_timeout_s: float) -> None:
        self._models = models
        self._run_timeout_s = run_timeout_s

    async def infer(self, name: str, number: int | None, wire: Wire[Answer]) -> Answer:
        """The answer of version `number` of a model (None: the newest). Raises NotFound, Unavailable, Invalid."""
        version, served = self._models.serving(name, number)
        began = time.perf_counter_ns()
        with served.use():
            try:
                batch, answer, timing = await self._infer(served, wire, began)
            except MlboxError:
                version.statistics.failed(time.perf_counter_ns() - began)
                raise
        version.statistics.succeeded(batch, timing)
        return answer

    async def _infer(self, served: Served, wire: Wire[Answer], began: int) -> tuple[int, Answer, Timing]:
        signature = served.signature
        request = await _work(wire.size, lambda: wire.parse(signature))
        batch = check(request, signature)
        parsed = time.perf_counter_ns()
        ran = await served.instances.run(
            {name: tensor.array for name, tensor in request.inputs.items()},
            [output.name for output in request.outputs],
            min(self._run_timeout_s, request.timeout_s or self._run_timeout_s),
        )
        ended = time.perf_counter_ns()
        response = InferResponse(
            model=signature.model,
            version=served.number,
            id=request.id,
            outputs=[_output(signature, wish, array) for wish, array in zip(request.outputs, ran.outputs, strict=True)],
        )
        size = sum(tensor.array.nbytes for tensor in response.outputs)
        answer = await _work(size, lambda: wire.encode(response, request.outputs))
        timing = Timing(
            parse_ns=parsed - began,
            queue_ns=ran.queue_ns,
            infer_ns=ran.infer_ns,
            encode_ns=time.perf_counter_ns() - ended,
        )
        return batch, answer, timing


def _output(signature: Signature, wish: RequestedOutput, array: Array) -> Tensor:
    tensor = Tensor(wish.name, signature.outputs[wish.name].datatype, array)
    if not wish.classes:
        return tensor
    return classify(tensor, wish.classes, batched=signature.max_batch > 0 and array.ndim > 0)


async def _work(size: int, work: Callable[[], _Result]) -> _Result:
    """Do `work` here when it is small, in a thread when it would hold up the loop."""
    return work() if size < _IN_THREAD_BYTES else await asyncio.to_thread(work)
