"""Which GPUs a job gets: what the box has, and the choice among those that are free. Pure.

Links are scored as NVIDIA's device plugin does (k8s-device-plugin, `bestEffortPolicy`): 10 for GPUs on different CPUs
up to 60 on one board, and 100 for each NVLink. A job gets the set with the largest sum of scores within; among
equals the one that cuts the fewest links to GPUs that stay free, so that a single GPU never breaks a pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

LEVEL_SCORES = {"SYS": 10, "NODE": 20, "PHB": 30, "PXB": 40, "PIX": 50, "PSB": 60}
"""By the words of `nvidia-smi topo -m`; PSB is two GPUs on one board."""
NVLINK_SCORE = 100
_SETS_MAX = 500
"""So many sets are compared one by one; beyond that a set is grown from each GPU, which finds any clique of links."""

Scores = Sequence[Sequence[int]]
"""Pair scores by place in `Box.gpus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """A window in which GPUs are kept for a user or a project, or for nobody (maintenance). Unix seconds."""

    id: int
    name: str
    gpu_uuids: tuple[str, ...]
    starts_at: float
    ends_at: float
    for_user: str | None = None
    for_project: str | None = None
    made_by: str = ""

    def admits(self, user: str, project: str) -> bool:
        return (self.for_user is not None and self.for_user == user) or (
            self.for_project is not None and self.for_project == project
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """One GPU as placement sees it. `busy` says in words why nothing more may start on it; None: it is free.

    `shared_free_mib` is set where jobs hold shares of it: what further shares may take (`busy` is None then, too, but
    the GPU cannot be had whole). `weight` is what one second of it costs. A `slice` is a MIG device: CUDA uses one
    at a time, so a job on several GPUs gets none. `clears_s` is set where it is about to be given back; a `closed` one
    takes nothing new even when what runs on it has ended.
    """

    uuid: str
    index: int
    busy: str | None
    memory_mib: int | None = None
    shared_free_mib: int | None = None
    weight: float = 1.0
    slice: bool = False
    clears_s: float | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What there is to give away. `gpus` are in the order of their index; slots are for jobs without GPUs.

    `scores` are the pair scores of `gpus`; empty: all alike.
    """

    gpus: tuple[GpuView, ...]
    slots: int
    slots_free: int
    scores: Scores = ()
    reservations: tuple[Reservation, ...] = field(default=())

    @property
    def free_gpus(self) -> tuple[GpuView, ...]:
        """Those that can be had whole."""
        return tuple(gpu for gpu in self.gpus if gpu.busy is None and gpu.shared_free_mib is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A decision: this job starts now on these GPUs (none for a CPU job). `memory_mib`: it gets a share of one."""

    job_id: int
    gpu_uuids: tuple[str, ...]
    memory_mib: int | None = None
    backfilled: bool = False
    """It starts while a job before it is blocked."""
    rate: float = 0.0
    """What it is charged each second: GPUs by weight and share, or CPU slots by theirs."""


def pair_score(level: str | None, nvlinks: int) -> int:
    """How near two GPUs are."""
    return LEVEL_SCORES.get(level or "", 0) + NVLINK_SCORE * nvlinks


def score_matrix(count: int, links: Mapping[tuple[int, int], int]) -> Scores:
    """Pair scores as a square, from those of (lower, higher) places."""
    return tuple(
        tuple(links.get((min(a, b), max(a, b)), 0) if a != b else 0 for b in range(count)) for a in range(count)
    )


def choose(candidates: Sequence[int], count: int, scores: Scores, idle: Sequence[int]) -> tuple[int, ...]:
    """`count` of `candidates`, which are places in `Box.gpus` in order of preference, all of them in `idle`.

    The nearest to each other; then those whose links to what stays idle are weakest; then the first.
    """
    if len(candidates) == count or not scores:
        return tuple(candidates[:count])
    if count == 1:
        return (min(candidates, key=lambda one: _cut((one,), scores, idle)),)
    sets = (
        combinations(candidates, count)
        if comb(len(candidates), count) <= _SETS_MAX
        else {_grown(seed, candidates, count, scores): None for seed in candidates}
    )
    return max(sets, key=lambda some: (_within(some, scores), [-part for part in _cut(some, scores, idle)]))


def _within(some: Sequence[int], scores: Scores) -> int:
    return sum(scores[a][b] for a, b in combinations(some, 2))


def _cut(some: Sequence[int], scores: Scores, idle: Sequence[int]) -> list[int]:
    """How much is lost to the GPUs that stay idle: the strongest link that is cut, then all of them."""
    cut = [scores[a][b] for a in some for b in idle if b not in some]
    return [max(cut, default=0), sum(cut)]


def _grown(seed: int, candidates: Sequence[int], count: int, scores: Scores) -> tuple[int, ...]:
    """A set around `seed`: the GPU with the strongest links to those in it is added, again and again."""
    chosen = [seed]
    gain = {other: scores[seed][other] for other in candidates if other != seed}
    while len(chosen) < count:
        best = max(gain, key=gain.__getitem__)
        del gain[best]
        chosen.append(best)
        row = scores[best]
        for other in gain:
            gain[other] += row[other]
    return tuple(sorted(chosen, key=candidates.index))


def impossible(gpus: int, slots: int, box: Box) -> str | None:
    """Why a job of this size can never start on `box`; None when it can."""
    if gpus > len(box.gpus):
        have = f"this box has {_count(len(box.gpus), 'GPU')}" if box.gpus else "this box has no GPU that mlbox can see"
        advice = f"ask for {len(box.gpus)} or fewer" if box.gpus else "submit it with gpus=0 to run it on the CPU"
        return f"the job asks {_count(gpus, 'GPU')}; {have}: {advice}"
    if slots > box.slots:
        return f"the job asks {_count(slots, 'CPU')}; this box gives jobs {box.slots}: ask for {box.slots} or fewer"
    return None


def impossible_share(gpu_mem_mib: int, box: Box) -> str | None:
    """Why no GPU of `box` can ever give a job this much memory; None when one can, or nobody knows."""
    if not box.gpus:
        return "the job asks a share of a GPU; this box has no GPU that mlbox can see"
    sizes = [gpu.memory_mib for gpu in box.gpus]
    largest = max((size for size in sizes if size is not None), default=None)
    if None in sizes or largest is None or gpu_mem_mib <= largest:
        return None
    return f"the job asks {gpu_mem_mib} MiB of one GPU; the largest here has {largest}: ask for {largest} or less"


def view(states: Sequence[tuple[str, int, str | None]], slots: int, slots_used: int) -> Box:
    """A Box from (uuid, index, why busy) of each GPU."""
    ordered = sorted(states, key=lambda state: state[1])
    return Box(
        gpus=tuple(GpuView(uuid=uuid, index=index, busy=busy) for uuid, index, busy in ordered),
        slots=slots,
        slots_free=max(0, slots - slots_used),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
