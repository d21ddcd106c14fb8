"""`/metrics`: what Prometheus reads (text format 0.0.4)."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from mlbox import __version__
from mlbox.jobs import JobState
from mlbox.scheduler.gpus import GpuState
from mlbox.scheduler.state import GpuReport

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
_MIB = 1 << 20


class HttpMeter:
    """Counts answers by method and status; both are closed sets, so nobody can make the page grow."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()

    def answered(self, method: str, status: int) -> None:
        self.counts[method if method in _METHODS else "other", status] += 1


def exposition(
    *,
    counts: Mapping[JobState, int],
    gpus: Sequence[GpuReport],
    slots: tuple[int, int],
    streams: int,
    meter: HttpMeter,
) -> str:
    """The whole page."""
    total, free = slots
    by_gpu: list[tuple[dict[str, object], GpuReport]] = [
        ({"uuid": report.gpu.uuid, "index": report.gpu.index, "name": report.gpu.name}, report) for report in gpus
    ]
    states = [
        ({**labels, "state": state}, int(report.state == state)) for labels, report in by_gpu for state in GpuState
    ]
    parts = [
        _family("mlbox_info", "gauge", "The running version.", [({"version": __version__}, 1)]),
        _family("mlbox_jobs", "gauge", "Jobs by state.", [({"state": state}, n) for state, n in counts.items()]),
        _family("mlbox_cpu_slots", "gauge", "Slots for jobs without a GPU.", [({}, total)]),
        _family("mlbox_cpu_slots_free", "gauge", "Slots that no job holds.", [({}, free)]),
        _family("mlbox_gpu_state", "gauge", "1 for the state that a GPU is in.", states),
    ]
    for name, text, attribute, factor in (
        ("mlbox_gpu_memory_bytes", "Memory of the GPU.", "memory_mib", _MIB),
        ("mlbox_gpu_memory_used_bytes", "Memory in use.", "used_mib", _MIB),
        ("mlbox_gpu_utilization_ratio", "Part of the time in which a kernel ran.", "utilization", 0.01),
        ("mlbox_gpu_power_watts", "Power drawn.", "power_w", 1),
        ("mlbox_gpu_temperature_celsius", "Temperature.", "temperature_c", 1),
    ):
        values = [(labels, getattr(report.gpu, attribute)) for labels, report in by_gpu]
        known = [(labels, value * factor) for labels, value in values if value is not None]
        parts.append(_family(name, "gauge", text, known))
    answers = [({"method": method, "status": status}, n) for (method, status), n in sorted(meter.counts.items())]
    parts.append(_family("mlbox_http_requests_total", "counter", "Answers given.", answers))
    parts.append(_family("mlbox_streams", "gauge", "Streams that are open.", [({}, streams)]))
    return "".join(parts)


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, object], float]]) -> str:
    lines = [f"# HELP {name} {text}\n# TYPE {name} {kind}\n"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(str(given))}"' for label, given in labels.items())
        lines.append(f"{name}{{{inner}}} {value:.12g}\n")
    return "".join(lines)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
