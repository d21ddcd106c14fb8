"""Which GPUs a job gets: near ones together, no pair broken without need, and what can never be is said."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.placement import (
    LEVEL_SCORES,
    Box,
    GpuView,
    Reservation,
    Scores,
    choose,
    impossible,
    impossible_share,
    pair_score,
    score_matrix,
    view,
)

PAIRS = score_matrix(8, {(a, b): pair_score("SYS", 4 * (a // 2 == b // 2)) for a, b in combinations(range(8), 2)})
"""Eight GPUs in NVLink pairs 0-1, 2-3, 4-5, 6-7."""
ISLANDS = score_matrix(
    16, {(a, b): pair_score("NODE", 12) if a // 4 == b // 4 else 10 for a, b in combinations(range(16), 2)}
)
"""Sixteen GPUs in islands of four."""


@st.composite
def matrices(draw: st.DrawFn) -> Scores:
    count = draw(st.integers(1, 8))
    links = {pair: draw(st.sampled_from([10, 20, 110, 410])) for pair in combinations(range(count), 2)}
    return score_matrix(count, links)


def within(some: tuple[int, ...], scores: Scores) -> int:
    return sum(scores[a][b] for a, b in combinations(some, 2))


def cut(some: tuple[int, ...], scores: Scores, idle: list[int]) -> tuple[int, int]:
    lost = [scores[a][b] for a in some for b in idle if b not in some]
    return max(lost, default=0), sum(lost)


@given(matrices(), st.data())
def test_the_nearest_gpus_are_chosen_and_of_those_what_breaks_least(scores: Scores, data: st.DataObject) -> None:
    idle = data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, unique=True))
    candidates = data.draw(st.lists(st.sampled_from(idle), min_size=1, unique=True))
    count = data.draw(st.integers(1, len(candidates)))
    chosen = choose(candidates, count, scores, idle)
    assert len(set(chosen)) == count
    assert set(chosen) <= set(candidates)
    every = list(combinations(candidates, count))
    nearest = max(within(some, scores) for some in every)
    assert within(chosen, scores) == nearest
    best = [some for some in every if within(some, scores) == nearest]
    assert cut(chosen, scores, idle) == min(cut(some, scores, idle) for some in best)


@pytest.mark.parametrize("free", [(0, 1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5), (0, 3, 4, 6, 7), (1, 2, 6, 7)])
def test_two_gpus_are_a_whole_pair_where_one_is_free(free: tuple[int, ...]) -> None:
    first, second = choose(free, 2, PAIRS, free)
    assert first // 2 == second // 2


@pytest.mark.parametrize(("free", "odd"), [((0, 1, 2), 2), ((1, 2, 3), 1), ((0, 1, 4, 5, 7), 7), ((3, 4, 5, 6, 7), 3)])
def test_a_single_gpu_is_the_odd_one_out(free: tuple[int, ...], odd: int) -> None:
    assert choose(free, 1, PAIRS, free) == (odd,)


def test_three_gpus_are_a_pair_and_the_odd_one_out() -> None:
    assert set(choose((0, 1, 2, 3, 5), 3, PAIRS, (0, 1, 2, 3, 5))) in ({0, 1, 5}, {2, 3, 5})


def test_without_links_the_first_candidates_are_taken() -> None:
    assert choose((3, 1, 2), 2, (), (1, 2, 3)) == (3, 1)


@given(st.sets(st.integers(0, 15), min_size=4))
def test_beyond_what_can_be_tried_one_by_one_a_whole_island_is_found_where_one_is_free(free: set[int]) -> None:
    idle = sorted(free)
    chosen = choose(idle, 4, ISLANDS, idle)
    assert len(set(chosen)) == 4
    assert set(chosen) <= free
    if any(set(range(first, first + 4)) <= free for first in (0, 4, 8, 12)):
        assert len({one // 4 for one in chosen}) == 1


def test_the_more_links_the_nearer_and_links_beat_any_way_through_the_board() -> None:
    ways = sorted(LEVEL_SCORES, key=LEVEL_SCORES.__getitem__)
    assert ways == ["SYS", "NODE", "PHB", "PXB", "PIX", "PSB"]
    assert pair_score("SYS", 1) > pair_score("PSB", 0)
    assert pair_score("SYS", 2) > pair_score("PSB", 1)
    assert pair_score(None, 0) == pair_score("unheard of", 0) == 0


def test_a_matrix_is_square_the_same_both_ways_and_nothing_to_itself() -> None:
    scores = score_matrix(3, {(0, 2): 7, (1, 2): 5})
    assert scores == ((0, 0, 7), (0, 0, 5), (7, 5, 0))


def box(*busy: str | None, slots: int = 4, used: int = 0) -> Box:
    return view([(f"GPU-{index}", index, why) for index, why in enumerate(busy)], slots, used)


def sized(*sizes: int | None) -> Box:
    gpus = tuple(
        GpuView(uuid=f"GPU-{index}", index=index, busy=None, memory_mib=size) for index, size in enumerate(sizes)
    )
    return Box(gpus=gpus, slots=1, slots_free=1)


def test_what_can_never_start_is_said_with_what_to_ask_for() -> None:
    assert impossible(2, 0, box(None, "leased by job 9")) is None
    assert impossible(0, 4, box(slots=4)) is None
    assert impossible(9, 0, box(None, None)) == "the job asks 9 GPUs; this box has 2 GPUs: ask for 2 or fewer"
    assert impossible(2, 0, box(None)) == "the job asks 2 GPUs; this box has 1 GPU: ask for 1 or fewer"
    assert "gpus=0" in str(impossible(1, 0, box()))
    assert impossible(0, 5, box(slots=4)) == "the job asks 5 CPUs; this box gives jobs 4: ask for 4 or fewer"


def test_a_share_that_no_gpu_has_is_refused_unless_a_size_is_unknown() -> None:
    assert impossible_share(24_000, sized(16_000, 24_000)) is None
    assert impossible_share(24_001, sized(16_000, 24_000)) == (
        "the job asks 24001 MiB of one GPU; the largest here has 24000: ask for 24000 or less"
    )
    assert impossible_share(24_001, sized(16_000, None)) is None, "memory shown as N/A is not zero"
    assert "no GPU" in str(impossible_share(1, sized()))


def test_more_work_than_there_are_slots_leaves_none_free() -> None:
    assert box(slots=2, used=5).slots_free == 0


def test_gpus_stand_in_the_order_of_their_index_and_shared_ones_cannot_be_had_whole() -> None:
    seen = view([("GPU-b", 1, None), ("GPU-a", 0, "leased by job 9")], 1, 0)
    assert [gpu.uuid for gpu in seen.gpus] == ["GPU-a", "GPU-b"]
    assert [gpu.uuid for gpu in seen.free_gpus] == ["GPU-b"]
    shared = GpuView(uuid="GPU-c", index=2, busy=None, shared_free_mib=5)
    assert Box(gpus=(shared,), slots=1, slots_free=1).free_gpus == ()


def test_a_window_admits_those_for_whom_it_is_kept_and_nobody_when_for_nobody() -> None:
    def kept(*, user: str | None = None, project: str | None = None) -> Reservation:
        return Reservation(
            id=1, name="x", gpu_uuids=("GPU-0",), starts_at=0, ends_at=1, for_user=user, for_project=project
        )

    assert kept(user="bob").admits("bob", "default")
    assert not kept(user="bob").admits("ann", "bob")
    assert kept(project="vision").admits("ann", "vision")
    assert not kept(project="vision").admits("vision", "default")
    assert not kept().admits("bob", "default")
