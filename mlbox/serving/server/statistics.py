"""What has been inferred so far, by model version, in the words of Triton's statistics extension."""

import time
from dataclasses import dataclass, field

_BATCH_SIZES_MAX = 256


@dataclass(slots=True)
class Duration:
    """How often something was done and how long that took altogether; nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class _Batch:
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The parts of one answered request, in nanoseconds."""

    parse_ns: int
    queue_ns: int
    infer_ns: int
    encode_ns: int


@dataclass(slots=True)
class Statistics:
    """Counters of one version; they go on when its content is replaced. Used on the event loop's thread."""

    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, _Batch] = field(default_factory=dict[int, _Batch])

    def succeeded(self, batch: int, timing: Timing) -> None:
        """A request of `batch` elements was answered."""
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += batch
        self.execution_count += 1
        self.success.add(timing.parse_ns + timing.queue_ns + timing.infer_ns + timing.encode_ns)
        self.queue.add(timing.queue_ns)
        if batch not in self.batches and len(self.batches) >= _BATCH_SIZES_MAX:
            batch = -1  # clients choose the sizes: the rest is counted together
        by_size = self.batches.setdefault(batch, _Batch())
        for duration, in_batch, ns in (
            (self.compute_input, by_size.compute_input, timing.parse_ns),
            (self.compute_infer, by_size.compute_infer, timing.infer_ns),
            (self.compute_output, by_size.compute_output, timing.encode_ns),
        ):
            duration.add(ns)
            in_batch.add(ns)

    def failed(self, ns: int) -> None:
        """A request ended in an error after `ns`."""
        self.fail.add(ns)

    def as_json(self, model: str, version: int) -> dict[str, object]:
        nothing = Duration().as_json()
        return {
            "name": model,
            "version": str(version),
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.as_json(),
                "fail": self.fail.as_json(),
                "queue": self.queue.as_json(),
                "compute_input": self.compute_input.as_json(),
                "compute_infer": self.compute_infer.as_json(),
                "compute_output": self.compute_output.as_json(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": batch.compute_input.as_json(),
                    "compute_infer": batch.compute_infer.as_json(),
                    "compute_output": batch.compute_output.as_json(),
                }
                for size, batch in sorted(self.batches.items())
            ],
            "memory_usage": [],
        }
