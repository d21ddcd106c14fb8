"""Which trouble takes a GPU out of service."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.scheduler.gpu_faults import Verdict, judge, suspect
from mlbox.scheduler.gpu_state import Gpu, Xid

GPU = Gpu(uuid="GPU-c", index=2, name="NVIDIA H200", bus_id="00000000:17:00.0", processes=())


def with_xids(*xids: int, at: float = 100.0) -> Gpu:
    return replace(GPU, xids=tuple(Xid(xid=xid, at=at + n) for n, xid in enumerate(xids)))


def test_a_sound_gpu_has_no_verdict():
    assert judge(GPU) is None
    assert judge(replace(GPU, recovery_action=0, ecc_uncorrected=0, remap_failed=False)) is None


@pytest.mark.parametrize("xid", [46, 48, 62, 64, 74, 79, 95, 119, 120, 140, 149])
def test_an_xid_of_broken_hardware_drains_and_says_what_to_do(xid):
    verdict = judge(with_xids(xid))
    assert verdict is not None
    assert verdict.drain
    assert verdict.sentence.startswith(f"its driver reported XID {xid} (")
    assert verdict.sentence.endswith(("nvidia-smi --gpu-reset)", "reboot the box"))


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 63, 68, 69, 92, 94, 109, 154])
def test_an_xid_of_an_application_or_a_mere_report_costs_nobody_a_gpu(xid):
    assert judge(with_xids(xid)) is None


def test_an_xid_that_nobody_knows_is_spoken_of_and_drains_nothing():
    assert judge(with_xids(13, 888)) == Verdict(
        drain=False, sentence="its driver reported XID 888, which mlbox does not know"
    )


def test_the_first_of_several_grave_errors_is_named():
    verdict = judge(with_xids(45, 79, 119))
    assert verdict == Verdict(drain=True, sentence="its driver reported XID 79 (it fell off the bus): reboot the box")


def test_an_xid_from_before_the_gpu_was_resumed_counts_no_more():
    assert judge(with_xids(79, at=100), since=101) is None
    assert judge(with_xids(79, at=100), since=100) is not None


@pytest.mark.parametrize(
    ("gpu", "sentence"),
    [
        (replace(GPU, recovery_action=1), "its driver says: reset it (nvidia-smi --gpu-reset)"),
        (replace(GPU, recovery_action=2), "its driver says: reboot the box"),
        (replace(GPU, recovery_action=99), "its driver says: recovery action 99"),
        (
            replace(GPU, error_code=15, error="x"),
            "NVML cannot reach it (GPU is lost): it fell off the bus, so reboot the box",
        ),
        (
            replace(GPU, error_code=16, error="x"),
            "NVML says that it must be reset (nvidia-smi --gpu-reset) before it works again",
        ),
        (replace(GPU, remap_failed=True), "a bad row of its memory could not be replaced: it needs repair"),
    ],
)
def test_what_the_driver_says_about_now_drains_whatever_happened_before(gpu, sentence):
    assert judge(gpu, since=1e12) == Verdict(drain=True, sentence=sentence)


def test_the_recovery_action_comes_first_then_error_codes_then_xids():
    gpu = replace(with_xids(48), recovery_action=2, error_code=15, remap_failed=True)
    sentences = [
        judge(gpu),
        judge(replace(gpu, recovery_action=0)),
        judge(replace(gpu, recovery_action=None, error_code=None)),
        judge(replace(gpu, recovery_action=None, error_code=None, remap_failed=None)),
    ]
    starts = (
        "its driver says: reboot the box (after XID 48, double-bit memory error)",
        "NVML cannot reach it",
        "a bad row",
        "its driver reported XID 48",
    )
    for verdict, start in zip(sentences, starts, strict=True):
        assert verdict is not None
        assert verdict.sentence.startswith(start)


def test_another_nvml_error_may_pass():
    assert judge(replace(GPU, error="Unknown Error (NVML error 999)", error_code=999)) is None


def test_uncorrected_errors_alone_are_told_and_drain_nothing():
    assert judge(replace(GPU, ecc_uncorrected=2)) == Verdict(
        drain=False, sentence="2 memory errors could not be corrected since its driver was loaded"
    )


def test_three_jobs_of_two_users_within_an_hour_make_a_gpu_suspect():
    faults = [(1000.0, 1, 12), (2000.0, 2, 13), (4000.0, 1, 15)]
    assert suspect(faults, 4000.0) == "3 jobs of 2 users failed on it within an hour (jobs 12, 13 and 15)"
    assert suspect(faults, 4601.0) is None, "the first is more than an hour old"


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [(1.0, 1, 12), (2.0, 1, 13), (3.0, 1, 14), (4.0, 1, 15)],
        [(1.0, 1, 12), (2.0, 2, 13)],
        [(1.0, 1, 12), (2.0, 1, 12), (3.0, 2, 13)],
    ],
    ids=["none", "one user", "two jobs", "one job twice"],
)
def test_fewer_make_none(faults):
    assert suspect(faults, 10.0) is None


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 3), st.integers(1, 5)), max_size=12), st.floats(0, 1e4))
def test_the_order_of_failures_does_not_matter(faults, now):
    assert suspect(faults, now) == suspect(faults[::-1], now)
