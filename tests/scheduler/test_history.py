"""Learned run times: quantiles of the nearest kin that has enough of them, and never a promise above a limit."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.scheduler.history import History, kind_of

times = st.lists(st.floats(1, 1e6), min_size=3, max_size=50)
parts = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])


def learned(*seconds: float, user: str = "ann", project: str = "p", kind: str = "train.py") -> History:
    history = History()
    for one in seconds:
        history.add(user, project, kind, one)
    return history


@given(times, parts)
def test_a_quantile_is_a_run_time_that_enough_of_them_do_not_exceed(seconds: list[float], part: float) -> None:
    found = learned(*seconds).quantile("ann", "p", "train.py", part)
    assert found in seconds
    assert sum(one <= found for one in seconds) >= part * len(seconds)
    assert sum(one < found for one in seconds) <= part * len(seconds), "and no larger than needed"


@given(times, parts, st.floats(0, 2e6))
def test_a_job_that_ran_a_while_is_compared_with_those_that_ran_longer(
    seconds: list[float], part: float, ran_s: float
) -> None:
    found = learned(*seconds).quantile("ann", "p", "train.py", part, ran_s=ran_s)
    assert found is not None
    longer = [one for one in seconds if one > ran_s]
    assert found in longer if longer else found == 1.5 * ran_s
    assert found >= ran_s


@given(times, parts, st.floats(1, 1e6), st.floats(0, 1e6))
def test_no_estimate_is_above_the_limit(seconds: list[float], part: float, limit_s: float, ran_s: float) -> None:
    found = learned(*seconds).quantile("ann", "p", "train.py", part, limit_s=limit_s, ran_s=ran_s)
    assert found is not None
    assert found <= max(limit_s, ran_s)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 50).map(float), min_size=150, max_size=260), parts)
def test_only_the_newest_count(seconds: list[float], part: float) -> None:
    newest = list(deque(seconds, maxlen=200))
    at = ("ann", "p", "train.py", part)
    assert learned(*seconds).quantile(*at) == learned(*newest).quantile(*at)


def test_the_nearest_kin_that_knows_enough_answers() -> None:
    history = learned(1, 1, 1)
    for user, project, kind, seconds in (
        ("ann", "p", "eval.py", 2.0), ("ann", "q", "x", 3.0), ("bob", "p", "other.py", 4.0), ("cid", "r", "y", 5.0),
    ):  # fmt: skip
        for _ in range(20):
            history.add(user, project, kind, seconds)

    def median(*kin: str) -> float | None:
        return history.quantile(*kin, 0.5)

    assert median("ann", "p", "train.py") == 1, "the same program of this user in this project"
    assert median("ann", "p", "new.py") == 2, "everything of this user in this project"
    assert median("dee", "p", "other.py") == 4, "the same program of anybody"
    assert median("ann", "new", "new.py") == 2, "everything of this user"
    assert median("dee", "new", "new.py") == 3, "everything on the box"


def test_two_run_times_say_nothing_yet() -> None:
    assert learned(5, 5).quantile("ann", "p", "train.py", 0.5) is None
    assert learned(5, 5).quantile("ann", "p", "train.py", 0.5, limit_s=60) == 60
    assert learned(5, 5, 5).quantile("ann", "p", "train.py", 0.5, limit_s=60) == 5


def test_a_copy_learns_no_more() -> None:
    history = learned(5, 5, 5)
    twin = history.copy()
    for _ in range(9):
        history.add("ann", "p", "train.py", 9.0)
    assert twin.quantile("ann", "p", "train.py", 0.5) == 5
    assert history.quantile("ann", "p", "train.py", 0.5) == 9


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("python train.py --lr 0.1", "python train.py"),
        ("python -u train.py --lr 0.1", "python train.py"),
        ("CUDA_VISIBLE_DEVICES=0 OMP_NUM_THREADS=1 python train.py", "python train.py"),
        ("./run.sh", "./run.sh"),
        ("sleep 10", "sleep"),
        ("sleep 1.5\npython x.py", "sleep"),
        ("echo 'unclosed", "echo 'unclosed"),
        ("", "name"),
        ("   ", "name"),
        ("-x", "name"),
        (None, "name"),
        ("a" * 500, "a" * 80),
    ],
)
def test_a_kind_is_the_program_without_options_and_values(command: str | None, kind: str) -> None:
    assert kind_of(command, "name") == kind


@given(st.text(max_size=100))
def test_every_command_has_a_kind(command: str) -> None:
    assert kind_of(command, "name")
