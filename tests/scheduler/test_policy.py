"""Fair share: usage decays, is never lost and never jumps; ranks follow their formula; quotas count what was used."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.policy import (
    Hours,
    Ledger,
    Quota,
    Rules,
    RunningJob,
    WaitingJob,
    Weights,
    barred,
    charge,
    rank_parts,
    score,
    standing,
)

NOW = 1_800_000_000.0
HOUR_S = 3600.0
WEEK_S = 168 * HOUR_S

seconds = st.floats(0, 100 * WEEK_S)
rates = st.floats(0.01, 16)
half_lives = st.floats(HOUR_S, 100 * WEEK_S)


def running(user: str, started_at: float, *, rate: float = 1.0, gpus: int = 1, project: str = "default") -> RunningJob:
    uuids = tuple(f"GPU-{number}" for number in range(gpus))
    return RunningJob(
        id=1, user=user, priority=0, started_at=started_at, rate=rate, gpu_uuids=uuids, project=project
    )  # fmt: skip


def waiting(user: str = "ann", **asked: object) -> WaitingJob:
    known = {"id": 1, "uid": 1000, "user": user, "priority": 0, "submitted_at": NOW, "gpus": 1, "slots": 0}
    return WaitingJob(**{**known, **asked})  # pyright: ignore[reportArgumentType]  # a row with some columns changed


def test_a_week_on_one_gpu_is_charged_121_gpu_hours_while_it_runs_and_after_it_ended() -> None:
    rules = Rules()
    began = NOW - WEEK_S
    while_it_runs = standing(Ledger(WEEK_S), [running("ann", began)], [], rules, NOW)
    assert while_it_runs.used["ann"] / HOUR_S == pytest.approx(121.2, abs=0.05)
    ledger = Ledger(WEEK_S)
    ledger.add("ann", 1.0, began, NOW)
    assert standing(ledger, [], [], rules, NOW).used["ann"] == pytest.approx(while_it_runs.used["ann"], rel=1e-12)


@given(rates, st.floats(0, WEEK_S), st.floats(0, WEEK_S), st.floats(0, WEEK_S), half_lives)
def test_splitting_an_interval_changes_no_charge(
    rate: float, first: float, second: float, later: float, half_life_s: float
) -> None:
    middle, end = NOW + first, NOW + first + second
    whole = charge(rate, NOW, end, end + later, half_life_s)
    parts = charge(rate, NOW, middle, end + later, half_life_s) + charge(rate, middle, end, end + later, half_life_s)
    assert parts == pytest.approx(whole, rel=1e-6, abs=1e-3)


@given(rates, st.floats(1, WEEK_S), st.floats(0, WEEK_S), half_lives)
def test_a_charge_is_the_integral_of_what_decays(rate: float, length: float, later: float, half_life_s: float) -> None:
    steps = 200
    step = length / steps
    middles = (later + length - (number + 0.5) * step for number in range(steps))
    integral = math.fsum(rate * step * 2 ** (-age / half_life_s) for age in middles)
    assert charge(rate, NOW, NOW + length, NOW + length + later, half_life_s) == pytest.approx(integral, rel=0.02)


@given(rates, seconds, half_lives)
def test_a_charge_is_never_more_than_what_was_used(rate: float, length: float, half_life_s: float) -> None:
    used = charge(rate, NOW, NOW + length, NOW + length, half_life_s)
    assert 0 <= used <= rate * length * (1 + 1e-6) + 1e-3


@given(rates)
def test_what_has_no_length_or_runs_backwards_costs_nothing(rate: float) -> None:
    assert charge(rate, NOW, NOW, NOW, WEEK_S) == 0
    assert charge(rate, NOW, NOW - 86_400, NOW, WEEK_S) == 0, "the clock went back a day"
    assert charge(0, NOW - 86_400, NOW, NOW, WEEK_S) == 0


attempts = st.lists(
    st.tuples(st.sampled_from(["ann", "bob"]), rates, st.floats(0, WEEK_S), st.floats(0, WEEK_S)), max_size=12
)


@given(attempts, st.randoms(use_true_random=False), st.floats(0, WEEK_S))
def test_a_ledger_made_anew_from_the_same_attempts_says_the_same_in_whatever_order(
    attempts: list[tuple[str, float, float, float]], random: "object", down_s: float
) -> None:
    ended = [(user, rate, NOW + began, NOW + began + length) for user, rate, began, length in attempts]
    lived, again = Ledger(WEEK_S), Ledger(WEEK_S)
    for one in sorted(ended, key=lambda one: one[3]):
        lived.add(*one)
    shuffled = list(ended)
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]  # it is random.Random
    for one in shuffled:
        again.add(*one)
    at = NOW + 2 * WEEK_S + down_s
    for user in ("ann", "bob"):
        plain = math.fsum(charge(rate, b, e, at, WEEK_S) for who, rate, b, e in ended if who == user)
        assert lived.used(user, at) == pytest.approx(plain, rel=1e-9, abs=1e-6)
        assert again.used(user, at) == pytest.approx(plain, rel=1e-9, abs=1e-6)
        assert lived.copy().used(user, at) == lived.used(user, at)


@given(rates, st.floats(1, WEEK_S))
def test_the_value_does_not_jump_when_a_job_ends(rate: float, length: float) -> None:
    rules, ledger = Rules(), Ledger(WEEK_S)
    before = standing(ledger, [running("ann", NOW, rate=rate)], [], rules, NOW + length).used["ann"]
    ledger.add("ann", rate, NOW, NOW + length)
    after = standing(ledger, [], [], rules, NOW + length).used["ann"]
    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


def test_a_copy_of_a_ledger_is_its_own() -> None:
    ledger = Ledger(WEEK_S)
    ledger.add("ann", 1.0, NOW - 10, NOW)
    twin = ledger.copy()
    twin.add("ann", 1.0, NOW - 10, NOW)
    assert twin.used("ann", NOW) == pytest.approx(2 * ledger.used("ann", NOW))


def test_the_factor_is_slurms_with_shares_of_those_who_use_the_box_or_wait_for_it() -> None:
    ledger = Ledger(WEEK_S)
    ledger.put("ann", 300.0, NOW)
    ledger.put("bob", 100.0, NOW)
    at = standing(ledger, [], ["cid"], Rules(shares={"ann": 2.0}), NOW)
    assert at.share("ann") == 0.5
    assert at.factor("ann") == pytest.approx(2 ** -(0.75 / 0.5))
    assert at.factor("bob") == pytest.approx(2 ** -(0.25 / 0.25))
    assert at.factor("cid") == 1
    assert at.factor("nobody") == 1
    assert standing(Ledger(WEEK_S), [], [], Rules(), NOW).factor("ann") == 1


def test_somebody_without_a_share_comes_last_once_they_used_anything() -> None:
    ledger = Ledger(WEEK_S)
    ledger.put("guest", 1.0, NOW)
    at = standing(ledger, [], ["ann"], Rules(shares={"guest": 0.0}), NOW)
    assert at.factor("guest") == 0
    assert at.factor("ann") == 1


@given(
    st.integers(-5, 5), st.integers(-5, 5), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e7), st.floats(0, 1e7)
)  # fmt: skip
def test_by_default_priority_beats_fair_share_and_fair_share_beats_age(
    high: int, low: int, factor: float, other: float, waited: float, less: float
) -> None:
    weights = Weights()
    if high > low:
        assert score(high, factor, waited, weights) > score(low, other, less, weights)
    if factor - other > 0.0101:
        assert score(low, factor, waited, weights) > score(low, other, less, weights)
    if waited >= less:
        assert score(low, factor, waited, weights) >= score(low, factor, less, weights)


@given(st.integers(-9, 9), st.floats(0, 1e9), st.floats(0, 1e7), st.floats(0, 30 * 86_400), st.none() | st.integers(1))
def test_the_parts_of_a_rank_add_up(
    priority: int, used: float, others: float, waited: float, place: int | None
) -> None:
    ledger = Ledger(WEEK_S)
    ledger.put("ann", used, NOW)
    ledger.put("bob", others, NOW)
    weights = Weights()
    at = standing(ledger, [], [], Rules(), NOW)
    parts = rank_parts(waiting(priority=priority, submitted_at=NOW - waited), at, weights, NOW, place)
    assert parts.score == pytest.approx(
        weights.priority * parts.priority + weights.fair_share * parts.fair_share + weights.age * parts.age
    )
    assert parts.usage_gpu_hours == used / 3600
    assert parts.share == 0.5
    assert 0 <= parts.usage_share <= 1
    assert 0 <= parts.age <= 1
    assert parts.position == place


def test_without_an_age_limit_nobody_grows_old() -> None:
    weights = Weights(age_max_s=0.0)
    assert score(0, 1.0, 1e9, weights) == score(0, 1.0, 0.0, weights)
    parts = rank_parts(waiting(), standing(Ledger(WEEK_S), [], [], Rules(), NOW), weights, NOW + 9, 1)
    assert parts.age == 0


def test_a_clock_that_went_back_makes_nobody_younger_than_new() -> None:
    assert score(0, 1.0, -86_400, Weights()) == score(0, 1.0, 0.0, Weights())


def test_what_keeps_a_job_from_the_queue_is_said() -> None:
    assert barred(waiting(), NOW) is None
    assert barred(waiting(not_before=NOW), NOW) is None
    assert barred(waiting(hold=True, not_before=NOW + 9), NOW) == "it is held: release it when it may start"
    assert "depends" in str(barred(waiting(depends=True), NOW))
    assert barred(waiting(not_before=NOW + 60), NOW) == "it may not start before 2027-01-15 08:01:00 UTC"


def test_age_counts_from_when_only_the_queue_kept_a_job() -> None:
    assert waiting(eligible_at=NOW + 5).since == NOW + 5
    assert waiting().since == NOW


def hours(quota: Quota, **more: object) -> Hours:
    return Hours(Rules(user_quota=quota, **more))  # pyright: ignore[reportArgumentType]  # quotas by name


def test_hours_are_counted_within_the_window_of_their_quota() -> None:
    known = hours(
        Quota(gpu_hours=10, window_s=10 * HOUR_S), project_quotas={"vision": Quota(gpu_hours=5, window_s=2 * HOUR_S)}
    )
    known.add("ann", "vision", 2, NOW - 12 * HOUR_S, NOW - 9 * HOUR_S)
    known.add("ann", "vision", 1, NOW - 3 * HOUR_S, NOW - 1 * HOUR_S)
    used = known.used([running("bob", NOW - HOUR_S, gpus=4, project="vision")], NOW)
    assert used == {"ann": pytest.approx(2 * 1 + 2), "@vision": pytest.approx(1 + 4), "bob": pytest.approx(4)}


def test_hours_outside_every_window_are_forgotten() -> None:
    known = hours(Quota(gpu_hours=1, window_s=HOUR_S))
    known.add("ann", "default", 1, NOW - 5 * HOUR_S, NOW - 2 * HOUR_S)
    assert known.used([], NOW) == {}
    assert known.used([], NOW - 3 * HOUR_S) == {}, "it was let go of"


def test_nothing_is_counted_where_no_quota_asks() -> None:
    known = hours(Quota(gpus=1))
    known.add("ann", "default", 1, NOW - HOUR_S, NOW)
    assert known.used([running("ann", NOW - HOUR_S)], NOW) == {}


def test_rules_know_the_quota_of_each() -> None:
    rules = Rules(user_quota=Quota(gpus=4), user_quotas={"ann": Quota(gpus=8)}, project_quotas={"x": Quota(gpus=1)})
    assert rules.quota_of_user("ann").gpus == 8
    assert rules.quota_of_user("bob").gpus == 4
    assert rules.quota_of_project("x") == Quota(gpus=1)
    assert rules.quota_of_project("y") is None
    assert rules.has_quotas
    assert not Rules().has_quotas


def test_the_size_of_a_job_is_in_units_of_its_pool() -> None:
    assert waiting(gpus=3).size == 3
    assert waiting(gpus=0, slots=5).size == 5
    assert waiting(gpus=0, gpu_mem_mib=1000).size == 1
    assert waiting(gpus=0, gpu_mem_mib=1000).wants_gpu
    assert not waiting(gpus=0, slots=1).wants_gpu
