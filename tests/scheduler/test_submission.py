"""What a user sends becomes a job exactly as meant, or is refused with every mistake named."""

import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.errors import Invalid
from mlbox.jobs import After, Dependency, JobSpec, Launcher, WarnSignal
from mlbox.scheduler.submission import FIELDS, Defaults, Submission, changes, parse
from mlbox.scheduler.values import INT64_MAX

DEFAULTS = Defaults(grace_s=20.0)
NOW = 1_790_000_000.0
DEPENDS_ON_ALL = Dependency(job_id=12, after=After.ANY, whole_array=True)


def spec(**fields: object) -> JobSpec:
    return parse({"command": "true", **fields}, DEFAULTS, now=NOW).spec


def errors(fields: Mapping[str, object], code: str | None = None) -> dict[str, str]:
    with pytest.raises(Invalid) as refusal:
        parse(fields, DEFAULTS, now=NOW, code=code)
    return {error.field: error.message for error in refusal.value.errors}


GOOD: dict[tuple[str, str], list[tuple[object, object]]] = {
    ("name", "name"): [
        ("a.b_C-9", "a.b_C-9"),
        ("x" * 64, "x" * 64),
    ],
    ("project", "project"): [
        ("vision", "vision"),
    ],
    ("workdir", "workdir"): [
        ("/home/ann/my work", "/home/ann/my work"),
    ],
    ("gpus", "gpus"): [
        (2, 2),
        ("2", 2),
        (2.0, 2),
        (" 0 ", 0),
    ],
    ("cpus", "cpus"): [
        ("8", 8),
    ],
    ("mem", "mem_mib"): [
        ("20G", 20480),
        ("20GB", 20480),
        ("20GiB", 20480),
        ("20Gi", 20480),
        ("1.5g", 1536),
        ("512M", 512),
        ("1T", 1048576),
        ("1025K", 2),
        ("700", 700),
        (700, 700),
        (700.2, 701),
    ],
    ("time_limit", "time_limit_s"): [
        (90, 90.0),
        ("90", 90.0),
        ("90.5", 90.5),
        ("90s", 90.0),
        ("90m", 5400.0),
        ("90min", 5400.0),
        ("2h", 7200.0),
        ("1.5H", 5400.0),
        ("1d 12h", 129600.0),
        ("1d12h30m10s", 131410.0),
        ("1-12:00:00", 129600.0),
        ("1-12:30", 131400.0),
        ("1-12", 129600.0),
        ("12:30:15", 45015.0),
        ("30:15", 1815.0),
    ],
    ("grace_s", "grace_s"): [
        (0, 0.0),
        ("0s", 0.0),
        ("1m", 60.0),
    ],
    ("priority", "priority"): [
        (-100, -100),
        ("+7", 7),
    ],
    ("retries", "retries"): [
        ("3", 3),
    ],
    ("requeue", "requeue"): [
        (True, True),
        ("on", True),
        ("No", False),
        (1, True),
    ],
    ("hold", "hold"): [
        ("0", False),
    ],
    ("model", "model"): [
        ("digits", "digits"),
    ],
    ("not_before", "not_before"): [
        (1800000000, 1800000000.0),
        ("1800000000.5", 1800000000.5),
        ("2027-01-15T08:00:00Z", 1800000000.0),
        ("2027-01-15T09:00:00+01:00", 1800000000.0),
        ("2027-01-15 08:00", 1800000000.0),
    ],
    ("gpu_mem", "gpu_mem_mib"): [
        ("10G", 10240),
        (512, 512),
    ],
    ("preemptible", "preemptible"): [
        ("yes", True),
        (False, False),
    ],
    ("depends_on", "depends_on"): [
        (12, (Dependency(job_id=12),)),
        ("12", (Dependency(job_id=12),)),
        ("afterok:12:13", (Dependency(job_id=12), Dependency(job_id=13))),
        ("afterok:12_*", (Dependency(job_id=12, whole_array=True),)),
        ("12_*", (Dependency(job_id=12, whole_array=True),)),
        (
            [12, "afterany:13", "AFTERNOTOK:14", 12],
            (
                Dependency(job_id=12),
                Dependency(job_id=13, after=After.ANY),
                Dependency(job_id=14, after=After.NOT_OK),
            ),
        ),
        ("afterok:12, afterany:12_*", (Dependency(job_id=12), DEPENDS_ON_ALL)),
        ("1 2\n3", (Dependency(job_id=1), Dependency(job_id=2), Dependency(job_id=3))),
        (["1,2", "3"], (Dependency(job_id=1), Dependency(job_id=2), Dependency(job_id=3))),
        ([], ()),
        (INT64_MAX, (Dependency(job_id=INT64_MAX),)),
        (list(range(1, 1001)), tuple(Dependency(job_id=number) for number in range(1, 1001))),
    ],
    ("output", "output"): [
        ("slurm-%j.out", "slurm-%j.out"),
        ("/tmp/%x/%A_%a-%u-100%%.out", "/tmp/%x/%A_%a-%u-100%%.out"),
        ("logs/%N-%4j.out", "logs/%N-%4j.out"),
        ("ä b", "ä b"),
    ],
    ("error", "error"): [
        ("../errors", "../errors"),
    ],
    ("notify", "notify"): [
        ("ann@example.org", ("ann@example.org",)),
        ("mailto:ann@example.org", ("ann@example.org",)),
        ("a@b, https://chat.example.org/hook?x=1#y,a@b", ("a@b", "https://chat.example.org/hook?x=1#y")),
        (["http://[::1]:8080/x"], ("http://[::1]:8080/x",)),
        ([], ()),
        ([f"a{number}@b" for number in range(16)], tuple(f"a{number}@b" for number in range(16))),
    ],
    ("notify_on", "notify_on"): [
        ("END,begin", ("begin", "end")),
        (["fail", "requeue", "time_limit"], ("fail", "requeue", "time_limit")),
        ("all", ("begin", "end", "fail", "requeue", "time_limit")),
        ("none", ()),
        ([], ()),
    ],
    ("env", "env"): [
        ({"A": "1", "B": 2, "C": 0.5, "D": ""}, {"A": "1", "B": "2", "C": "0.5", "D": ""}),
        ('{"A": "1", "B": 2}', {"A": "1", "B": "2"}),
        ("A=1\r\nB=x=y\n\nC=", {"A": "1", "B": "x=y", "C": ""}),
        (["A=1", "B=two words"], {"A": "1", "B": "two words"}),
        ({}, {}),
    ],
}


@pytest.mark.parametrize(("field", "attribute"), list(GOOD))
def test_a_good_value_is_understood(field: str, attribute: str) -> None:
    for value, meant in GOOD[field, attribute]:
        found = getattr(spec(**{field: value}), attribute)
        assert (found, type(found)) == (meant, type(meant)), value


BAD = [
    ("name", ["", "a b", "ä", "x" * 65, "a/b", 7, True, ["a"], "a\n"]),
    ("project", ["", "../x", 1.5]),
    ("workdir", ["relative", "", "/a\0b", 3, "/" + "x" * 5000, "/\ud800"]),
    ("gpus", [-1, "-1", 1025, "two", 1.5, True, "", [], {}, math.nan, math.inf, 10**400, "9" * 5000, 1e300]),
    ("cpus", [0, "0", 65_537, "1.0"]),
    (
        "mem",
        ["0", 0, "1K", -5, "20 X", "20Q", "10b", "", True, math.nan, math.inf, 10**400, "9" * 400, "1e3"],
    ),
    ("time_limit", [0, "0", -1, "-1", "1:2:3:4", "1-", "-1:00", "1-2-3", "h", "1w", "inf", math.nan, math.inf, True]),
    ("time_limit", [10**400, "9" * 5000, "11 years", "", [], "1:x", 4e8, "1-1:1:1:1"]),
    ("grace_s", [-0.1, 86_401, "forever"]),
    ("priority", [-101, 101, "high", 0.5]),
    ("retries", [-1, 101, "many"]),
    ("requeue", ["maybe", 2, -1, 0.0001, "", [], {}, 10**5000]),
    ("hold", ["held", 1.5]),
    ("model", ["", ".hidden", "stats", "a/b", "..", 3]),
    ("not_before", ["yesterday", -1, "-5", "", "2027-13-01", "99999-01-01", math.nan, math.inf, 10**400, True, 1e12]),
    ("env", ["A", ["A"], [1], {"1A": "x"}, {"": "x"}, {"A B": "x"}, {"MLBOX_TOKEN": "x"}, {"A": None}, {"A": True}]),
    ("env", [{"A": {}}, {"A": "\0"}, {"A": "\ud800"}, {"A": 10**5000}, "{", '{"A": ', "{" * 100_000, 5, True]),
    ("env", [{"A": "x" * (128 * 1024)}, {f"A{i}": "x" * 100_000 for i in range(3)}, '{"A": 1' + "0" * 5000 + "}"]),
    ("gpu_mem", ["0", "lots", True, -1]),
    ("preemptible", ["maybe", 3]),
    ("depends_on", ["", ",", 0, -1, "0", "-12", True, 1.0, 1.5, {}, [[1]], [None], "afterok", "afterok:", "afterok:x"]),
    ("depends_on", ["before:12", ":12", "12:13", "afterok:12:", "12_3", "12_", "*", "_*", "afterok:12+5", "x"]),
    ("depends_on", ["singleton", "after:12", "aftercorr:12", "expand:12", "afterburstbuffer:1", "afterok:1?afterok:2"]),
    ("depends_on", [2**63, 10**5000, "9" * 5000, "9" * 19, [1] * 1001, "1," * 1001, "afterok" + ":1" * 1001, "\ud800"]),
    ("array", [5, [1], "", "1-10:0", "0-999999999999"]),
    ("matrix", [5, [], {}, "{}", "[" * 10_000, "{" * 10_000, {"a": []}]),
    ("output", ["", "a/", "%", "a%y", "%J", "%100j", "a\nb", "a\0b", "x" * 5000, 5, "\ud800", "%\ud800", "%%%"]),
    ("error", ["%s.err", "\x1b[31m"]),
    ("notify", ["", "ann", "a@", "@b", "a@b@c", "a@b c", "ftp://x/y", "http://", "https:///x", "javascript:alert(1)"]),
    (
        "notify",
        [
            "a@b\r\nBcc: x",
            "-oQ/tmp@b",
            "a@-b",
            "a@b-",
            "a@b..c",
            "http://[::1",
            "http://x:99999/",
            "http://ä/",
            "a" * 65 + "@b",
            5,
            [5],
            {},
            [None],
        ],
    ),
    ("notify", [[f"a{number}@b" for number in range(17)], "a@" + "b." * 40_000, "http://" + "x" * 3000, "a@\ud800"]),
    ("notify_on", ["", "never", "end,never", "none,end", [5], 5, ["end"] * 100, [[]], {}]),
    ("command", ["", "  ", "a\0b", "x" * (128 * 1024), 5, [], True]),
]


@pytest.mark.parametrize(("field", "values"), BAD, ids=[f"{field}-{number}" for number, (field, _) in enumerate(BAD)])
def test_a_bad_value_is_refused_by_the_name_of_its_field(field: str, values: list[object]) -> None:
    for value in values:
        found = errors({"command": "true", field: value})
        assert found.keys() == {field}
        assert len(found[field]) < 300
        assert found[field].isprintable()


def test_what_is_left_out_has_the_defaults() -> None:
    assert spec() == JobSpec(command="true", name="true", grace_s=20.0)
    assert spec(name=None, gpus=None) == spec()


def test_a_script_is_a_job_too() -> None:
    found = parse({"script": "#!/bin/sh\necho hi\n"}, DEFAULTS, now=NOW).spec
    assert (found.script, found.command, found.name) == ("#!/bin/sh\necho hi\n", None, "script")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py --lr 0.1", "python-train.py---lr-0.1"),
        ("../run", "run"),
        ("ü", "command"),
        ("x" * 200, "x" * 40),
        ("echo 'a b' | tee log", "echo-a-b-tee-log"),
    ],
)
def test_a_job_without_a_name_is_called_after_its_command(command: str, name: str) -> None:
    assert parse({"command": command}, DEFAULTS, now=NOW).spec.name == name


def test_exactly_one_of_command_and_script_is_wanted() -> None:
    assert errors({}) == {"command": "missing: give a command line, or a script"}
    assert errors({"gpus": 1}).keys() == {"command"}
    assert errors({"command": "a", "script": "b"}) == {"script": "give either a command or a script, not both"}
    assert errors({"command": ""}) == {"command": "is empty"}


def test_code_and_workdir_exclude_each_other() -> None:
    assert parse({"command": "a"}, DEFAULTS, now=NOW, code="tar.gz").spec.code == "tar.gz"
    assert errors({"command": "a", "workdir": "/tmp"}, code="zip").keys() == {"workdir"}
    assert "curl -F code=@" in errors({"command": "a", "code": "zip"})["code"]


def test_a_share_of_a_gpu_excludes_whole_ones() -> None:
    assert errors({"command": "a", "gpus": 1, "gpu_mem": "1G"}).keys() == {"gpu_mem"}
    assert spec(gpus=0, gpu_mem="1G").gpu_mem_mib == 1024
    assert spec(gpu_mem="1G").wants_gpu


def test_a_launcher_wants_whole_gpus() -> None:
    assert spec(launch="torchrun", gpus=2).launch is Launcher.TORCHRUN
    assert spec(launch=" Plain ", gpus="1").launch is Launcher.PLAIN
    for value in ("mpi", "", 1, True, [], "\ud800"):
        assert errors({"command": "a", "gpus": 2, "launch": value}).keys() == {"launch"}
    for fields in ({}, {"gpus": 0}, {"gpu_mem": "1G"}):
        assert "give gpus=1 or more" in errors({"command": "a", "launch": "torchrun", **fields})["launch"]
    assert errors({"command": "a", "launch": "plain", "gpus": "two"}).keys() == {"gpus"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("USR1@120", WarnSignal(number=10, before_s=120)),
        ("b:SIGUSR1@120", WarnSignal(number=10, before_s=120, main_only=True)),
        ("term", WarnSignal(number=15, before_s=60)),
        ("10@30", WarnSignal(number=10, before_s=30)),
        (12, WarnSignal(number=12, before_s=60)),
        ("RTMIN@1", WarnSignal(number=34, before_s=1)),
    ],
)
def test_a_signal_before_the_limit_is_understood(written: object, meant: WarnSignal) -> None:
    assert spec(signal=written, time_limit="1h").warn_signal == meant


def test_a_signal_that_cannot_be_sent_is_refused() -> None:
    refused = ["", "USR3", "USR1@", "USR1@0", "USR1@70000", "USR1@-1", "R:USR1@10", "BR:USR1", "@120", 0, 65, 99, True]
    for value in (
        *refused,
        "0@10",
        "99@10",
        "9" * 5000,
        "USR1@" + "9" * 5000,
        [],
        {},
        1.5,
        "DFL",
        "_DFL",
        "\ud800",
        -1,
    ):
        assert errors({"command": "a", "signal": value, "time_limit": "2d"}).keys() == {"signal"}, value
    assert "give time_limit" in errors({"command": "a", "signal": "USR1"})["signal"]
    assert "60 s before" in errors({"command": "a", "signal": "USR1", "time_limit": 60})["signal"]
    assert errors({"command": "a", "signal": "USR1", "time_limit": "x"}).keys() == {"time_limit"}


def submission(**fields: object) -> Submission:
    return parse({"command": "true", **fields}, DEFAULTS, now=NOW)


def test_an_array_is_a_job_and_its_elements() -> None:
    assert submission().array is None
    found = submission(array="0-9%3", name="many")
    assert found.spec == spec(name="many")
    assert found.array is not None
    assert (len(found.array.elements), found.array.at_once) == (10, 3)
    capped = submission(array="0-9%3", at_once="2").array
    assert capped is not None
    assert capped.at_once == 2


def test_a_matrix_is_an_array_whose_elements_have_variables() -> None:
    for matrix in ({"lr": [0.1, 0.2], "seed": [1, 2]}, '{"lr": [0.1, 0.2], "seed": [1, 2]}'):
        found = submission(matrix=matrix, at_once=2).array
        assert found is not None
        assert found.at_once == 2
        assert [dict(element.env) for element in found.elements][1:3] == [
            {"lr": "0.1", "seed": "2"},
            {"lr": "0.2", "seed": "1"},
        ]


def test_what_an_array_cannot_be_is_refused() -> None:
    assert errors({"command": "a", "array": "1", "matrix": {"a": [1]}}).keys() == {"matrix"}
    assert errors({"command": "a", "at_once": 3}).keys() == {"at_once"}
    for value in (0, -1, "x", 1.5, True, 10**10):
        assert errors({"command": "a", "array": "0-9", "at_once": value}).keys() == {"at_once"}
    many = {"command": "a", "env": {"A": "x" * 30_000}, "array": "0-9999"}
    assert "10000 elements would keep 286 MiB" in errors(many)["array"]


def test_a_job_may_begin_when_sbatch_says_it() -> None:
    assert spec(not_before="now+90minutes").not_before == NOW + 5400
    assert errors({"command": "a", "not_before": "25:00"}).keys() == {"not_before"}


def test_all_mistakes_are_reported_at_once_with_the_nearest_names() -> None:
    found = errors({"comand": "x", "gpu": 1, "mem": "lots", "priority": 200, "zzz": 1, "array": "9-0"})
    assert found.keys() == {"command", "comand", "gpu", "mem", "priority", "zzz", "array"}
    assert found["comand"] == "unknown field; did you mean 'command'?"
    assert found["gpu"] == "unknown field; did you mean 'gpus'?"
    assert all(field in found["zzz"] for field in FIELDS)
    assert found["array"] == "has a range that ends before it begins: '9-0'"


def test_a_flood_of_unknown_fields_is_answered_shortly() -> None:
    with pytest.raises(Invalid) as refusal:
        parse({"command": "a"} | {f"{number}{'x' * 10_000}": 1 for number in range(5000)}, DEFAULTS, now=NOW)
    assert len(refusal.value.errors) <= 40
    assert len(str(refusal.value)) < 20_000


@pytest.mark.parametrize("field", ["a\nb", "\x1b[31m", "x" * 10_000, "\ud800", "", "<script>"])
def test_a_field_of_any_name_does_not_break_the_message(field: str) -> None:
    with pytest.raises(Invalid) as refusal:
        parse({"command": "a", field: 1}, DEFAULTS, now=NOW)
    (error,) = refusal.value.errors
    for text in (str(refusal.value), error.field, error.message):
        assert len(text) < 400
        assert text.isprintable()


def test_a_waiting_jobs_priority_and_time_limit_can_be_changed() -> None:
    assert changes({"priority": "5", "time_limit": "2h"}) == {"priority": 5, "time_limit_s": 7200.0}
    assert changes({"priority": 0}) == {"priority": 0}
    assert changes({"notify": "a@b,c@d"}) == {"notify": ("a@b", "c@d")}
    assert changes({"notify": []}) == {"notify": ()}
    for fields, names in (
        ({}, set()),
        ({"priority": None}, set()),
        ({"priority": 1000, "gpus": 1, "notify": "x y"}, {"priority", "gpus", "notify"}),
    ):
        with pytest.raises(Invalid) as refusal:
            changes(fields)
        assert {error.field for error in refusal.value.errors} == names


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*FIELDS, "code"]) | st.text(st.characters())
written = st.from_regex(r"[0-9a-zA-Z:. +=-]{0,12}", fullmatch=True)


def attempt(fields: Mapping[str, object]) -> JobSpec | Invalid:
    try:
        return parse(fields, DEFAULTS, now=NOW).spec
    except Invalid as refusal:
        return refusal


@given(fields=st.dictionaries(names, json_values | written, max_size=8), with_command=st.booleans())
def test_anything_is_a_job_or_refused_with_short_words(fields: dict[str, object], with_command: bool) -> None:
    if with_command:
        fields["command"] = "true"
        fields.pop("script", None)
    answer = attempt(fields)
    if isinstance(answer, Invalid):
        assert answer.errors
        assert str(answer).isprintable()
        for error in answer.errors:
            assert len(error.message) < 300
            assert error.message.isprintable()
            assert error.field.isprintable()
    else:
        assert (answer.command is None) != (answer.script is None)
        assert 0 <= answer.gpus <= 1024
        assert -100 <= answer.priority <= 100
        assert answer.gpu_mem_mib is None or not answer.gpus
        assert answer.launch is None or answer.gpus
        assert answer.warn_signal is None or answer.time_limit_s is not None
        assert json.dumps(answer.env).encode()


@given(value=st.text() | written, field=st.sampled_from([*set(FIELDS) - {"command", "script"}]))
def test_any_text_is_a_value_or_refused(value: str, field: str) -> None:
    answer = attempt({"command": "true", field: value})
    if isinstance(answer, Invalid):
        assert [error.field for error in answer.errors] == [field]
        assert all(error.message.isprintable() and len(error.message) < 300 for error in answer.errors)
