"""The directives of a script are read as sbatch(1) reads them."""

import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.errors import Invalid
from mlbox.jobs import Dependency, JobSpec, Launcher, WarnSignal
from mlbox.scheduler.directives import OPTIONS, read
from mlbox.scheduler.submission import FIELDS, Defaults, parse


def fields(*lines: str) -> dict[str, object]:
    return read("#!/bin/bash\n" + "\n".join(lines) + "\n")


def errors(*lines: str) -> dict[str, str]:
    with pytest.raises(Invalid) as refusal:
        fields(*lines)
    assert str(refusal.value).isprintable()
    return {error.field: error.message for error in refusal.value.errors}


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("#MLBOX gpus=1 time_limit=2h", {"gpus": "1", "time_limit": "2h"}),
        ("#MLBOX", {}),
        ("#MLBOX name='two words' # a comment", {"name": "two words"}),
        ("#MLBOX env=A=1 env='B=x y'", {"env": ["A=1", "B=x y"]}),
        ("#SBATCH --gpus=2", {"gpus": "2"}),
        ("#SBATCH --gpus 2", {"gpus": "2"}),
        ("#SBATCH -G 2", {"gpus": "2"}),
        ("#SBATCH -G2", {"gpus": "2"}),
        ("#SBATCH --gpus=a100:2", {"gpus": "2"}),
        ("#SBATCH --gres=gpu:2", {"gpus": "2"}),
        ("#SBATCH --gres=gpu", {"gpus": "1"}),
        ("#SBATCH --gres=gpu:a100", {"gpus": "1"}),
        ("#SBATCH --gres=gpu:a100:4", {"gpus": "4"}),
        ("#SBATCH --gres=gpu:1g.5gb:4", {"gpus": "4"}),
        ("#SBATCH --time=30", {"time_limit": "30m"}),
        ("#SBATCH -t 1-12:00:00", {"time_limit": "1-12:00:00"}),
        ("#SBATCH -J name --mem=20G", {"name": "name", "mem": "20G"}),
        ("#SBATCH -Jname", {"name": "name"}),
        ("#SBATCH --job-name='a b'", {"name": "a b"}),
        (r"#SBATCH --job-name=a\ b", {"name": "a b"}),
        ("#SBATCH --job-name=a#b", {"name": "a"}),
        (r"#SBATCH --job-name=a\#b", {"name": "a#b"}),
        ("#SBATCH --job-name='a#b'", {"name": "a#b"}),
        ("#SBATCH -c 8 -D /data", {"cpus": "8", "workdir": "/data"}),
        ("#SBATCH --begin=2027-01-15T08:00:00", {"not_before": "2027-01-15T08:00:00"}),
        ("#SBATCH --requeue -H", {"requeue": True, "hold": True}),
        ("#SBATCH --hold --no-requeue", {"hold": True, "requeue": False}),
        ("#SBATCH --gpus=1 --gpus=2", {"gpus": "2"}),
        ("#SBATCH --gpus-per-node=h100:4", {"gpus": "4"}),
        ("#SBATCH --time=UNLIMITED", {}),
        ("#SBATCH --time=1:00:00 -t0", {}),
        ("#SBATCH --mem=0", {}),
        ("#SBATCH --output=out/%x-%j.log --error out/%j.err", {"output": "out/%x-%j.log", "error": "out/%j.err"}),
        ("#SBATCH -o a -e b", {"output": "a", "error": "b"}),
        ("#SBATCH --array=0-99%8", {"array": "0-99%8"}),
        ("#SBATCH -a 1,3", {"array": "1,3"}),
        ("#SBATCH --dependency=afterok:12:13,afterany:14", {"depends_on": "afterok:12_*:13_*,afterany:14_*"}),
        ("#SBATCH -d 12", {"depends_on": "12_*"}),
        ("#SBATCH --dependency=afterok:12_*", {"depends_on": "afterok:12_*"}),
        ("#SBATCH --mail-user=ann@example.org", {"notify": "ann@example.org"}),
        ("#SBATCH --mail-type=END,fail,TIME_LIMIT", {"notify_on": ["end", "fail", "time_limit"]}),
        ("#SBATCH --mail-type=BEGIN,REQUEUE", {"notify_on": ["begin", "requeue"]}),
        ("#SBATCH --mail-type=ALL", {"notify_on": ["all"]}),
        ("#SBATCH --mail-type=NONE,END", {"notify_on": ["none"]}),
        ("#SBATCH --signal=B:USR1@120", {"signal": "B:USR1@120"}),
        ("#SBATCH --nice", {"priority": -100}),
        ("#SBATCH --nice=20 --hold", {"priority": -20, "hold": True}),
        ("#SBATCH --nice=100000", {"priority": -100}),
        ("#SBATCH --nice=-5", {"priority": 5}),
        ("#SBATCH --nice=-9999", {"priority": 100}),
        ("#SBATCH --begin=now+1hour", {"not_before": "now+1hour"}),
        ("#SBATCH -b 16:00", {"not_before": "16:00"}),
        ("#SBATCH --comment='for the paper' --nodes=1 -N1 -N 1-1 --ntasks=1 -n 1 --ntasks-per-node=1", {}),
        ("#SBATCH --export=ALL", {}),
        ("#SBATCH --export=NONE", {}),
        ("#SBATCH --export=ALL,A=1,B=x=y", {"env": ["A=1", "B=x=y"]}),
        ("#MLBOX gpu_mem=20G preemptible=yes at_once=2", {"gpu_mem": "20G", "preemptible": "yes", "at_once": "2"}),
        ("""#MLBOX matrix='{"lr": [0.1, 0.2]}'""", {"matrix": '{"lr": [0.1, 0.2]}'}),
        ("#SBATCH\t--gpus=1\r", {"gpus": "1"}),
        ("#SBATCHX --nonsense", {}),
        ("##SBATCH --gpus=1", {}),
        ("# SBATCH --gpus=1", {}),
        (" #SBATCH --gpus=1", {}),
        ("#mlbox gpus=1", {}),
    ],
)
def test_a_line_means_what_sbatch_would_make_of_it(line: str, meant: dict[str, object]) -> None:
    assert fields(line) == meant


def test_only_lines_before_the_first_command_count() -> None:
    assert fields("", "  # a comment", "#MLBOX gpus=1", "echo", "#MLBOX gpus=2") == {"gpus": "1"}
    assert fields("echo \\", "#MLBOX gpus=2") == {}
    assert fields("# a page\x0c#MLBOX gpus=2", "# a line\u2028#MLBOX gpus=2") == {}
    assert read("") == read("#!/bin/sh") == {}


def test_variables_of_several_lines_add_up_and_other_fields_are_replaced() -> None:
    assert fields("#MLBOX env=A=1 gpus=1", "#MLBOX env=B=2 gpus=2") == {"env": ["A=1", "B=2"], "gpus": "2"}


def test_every_bad_line_is_named_by_its_number() -> None:
    found = errors("#MLBOX gpus", "#MLBOX gpus=1", "#SBATCH --ntask=2", "#SBATCH --gpus", "#MLBOX name='open")
    assert found.keys() == {"script:2", "script:4", "script:5", "script:6"}
    assert found["script:2"] == "'gpus': write key=value"
    assert "'--ntask=2' is not understood; did you mean --ntasks?" in found["script:4"]
    assert found["script:5"] == "#SBATCH --gpus has no value"
    assert "no closing quotation" in found["script:6"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("#MLBOX command=x", "cannot be set from within a script"),
        ("#MLBOX script=x", "cannot be set from within a script"),
        ("#MLBOX =x", "write key=value"),
        ("#SBATCH --cpu-per-task=2", "did you mean --cpus-per-task?"),
        ("#SBATCH time=5", "is not understood"),
        ("#SBATCH hold", "is not understood"),
        ("#SBATCH --requeue=yes", "is not understood"),
        ("#SBATCH --gres=gpu:2,license:1", "only gpu[:type][:count]"),
        ("#SBATCH --gres=fpga:1", "only gpu[:type][:count]"),
        ("#SBATCH --gpus=a100:1,v100:1", "only [type:]count"),
        ("#SBATCH --gpus=two", "only [type:]count"),
        ("#SBATCH --nodes=2", "only 1 can be asked for: this is one box"),
        ("#SBATCH -N2-4", "only 1 can be asked for"),
        ("#SBATCH -n 8", "mlbox starts one task"),
        ("#SBATCH --ntasks-per-node=4", "launch=torchrun"),
        ("#SBATCH --mail-type=END,ARRAY_TASKS", "'ARRAY_TASKS': known here: NONE"),
        ("#SBATCH --mail-type=,", "known here"),
        ("#SBATCH --nice=very", "wants a whole number"),
        ("#SBATCH --nice 5", "'5' is not understood"),
        ("#SBATCH --export=PATH", "write NAME=value"),
        ("#SBATCH --export=ALL,=1", "write NAME=value"),
        ("#SBATCH --partition=gpu", "there is one queue here"),
        ("#SBATCH -p gpu", "there is one queue here"),
        ("#SBATCH --account=lab", "project=NAME"),
        ("#SBATCH --mem-per-cpu=2G", "the memory of the whole job"),
        ("#SBATCH --tres-bind=x", "is not understood"),
        ("#SBATCH --time=", "has no value"),
        ("#SBATCH -J", "has no value"),
    ],
)
def test_what_is_not_understood_is_refused(line: str, says: str) -> None:
    (message,) = errors(line).values()
    assert says in message


def test_a_bad_value_of_a_directive_is_named_by_its_field() -> None:
    with pytest.raises(Invalid) as refusal:
        parse({"script": "x", **fields("#MLBOX gpus=many nam=x")}, Defaults(), now=0.0)
    assert {error.field for error in refusal.value.errors} == {"gpus", "nam"}


@pytest.mark.parametrize(
    ("dependency", "says"),
    [
        ("afterok:1?afterok:2", "knows no 'or'"),
        ("singleton", "does not know jobs by their name"),
        ("after:12+5", "not for its start"),
        ("aftercorr:12", "use afterok:12_*"),
        ("afterok:12_3", "by its own id"),
        ("afterok:12+30", "without minutes after it"),
        ("afternever:12", "wants 12, afterok:12"),
    ],
)
def test_a_dependency_that_mlbox_does_not_have_is_refused_with_the_reason(dependency: str, says: str) -> None:
    script = {"script": "x", **fields(f"#SBATCH --dependency={dependency}")}
    with pytest.raises(Invalid) as refusal:
        parse(script, Defaults(), now=0.0)
    (error,) = refusal.value.errors
    assert error.field == "depends_on"
    assert says in error.message


def test_what_a_whole_header_asks_for_is_a_job() -> None:
    header = fields(
        "#SBATCH --job-name=train --gres=gpu:a100:2 --cpus-per-task=8 --mem=64G --time=1-00:00:00",
        "#SBATCH --array=0-9%2 --dependency=afterok:3 --requeue --hold --nice=10 --comment='x y'",
        "#SBATCH --output=logs/%A_%a.out --error=logs/%A_%a.err --signal=B:TERM@300 --begin=now+1hour",
        "#SBATCH --mail-user=ann@example.org --mail-type=ALL --chdir=/data --export=A=1 -N1 -n1",
        "#MLBOX project=vision retries=2 launch=torchrun preemptible=true env=B=2 grace_s=60 model=digits",
    )
    found = parse({"script": "x", **header}, Defaults(), now=1000.0)
    assert found.spec == JobSpec(
        script="x",
        workdir="/data",
        name="train",
        project="vision",
        env={"A": "1", "B": "2"},
        gpus=2,
        cpus=8,
        mem_mib=65536,
        time_limit_s=86400.0,
        grace_s=60.0,
        warn_signal=WarnSignal(number=15, before_s=300.0, main_only=True),
        priority=-10,
        preemptible=True,
        depends_on=(Dependency(job_id=3, whole_array=True),),
        retries=2,
        requeue=True,
        launch=Launcher.TORCHRUN,
        model="digits",
        hold=True,
        not_before=4600.0,
        output="logs/%A_%a.out",
        error="logs/%A_%a.err",
        notify=("ann@example.org",),
        notify_on=("begin", "end", "fail", "requeue", "time_limit"),
    )
    assert found.array is not None
    assert (len(found.array.elements), found.array.at_once) == (10, 2)


def test_every_field_and_option_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "submitting.md").read_text()
    assert [name for name in (*FIELDS, *OPTIONS) if f"`{name}`" not in text] == []


def test_a_huge_header_is_refused_at_once() -> None:
    began = time.monotonic()
    for script in ("#MLBOX " + "a" * (1 << 20), "#MLBOX gpus=1\n" * 80_000, "#SBATCH --x\n" * 80_000):
        with pytest.raises(Invalid) as refusal:
            read(script)
        assert len(str(refusal.value)) < 20_000
    assert time.monotonic() - began < 2


PIECES = [
    "#MLBOX",
    "#SBATCH",
    "gpus=1",
    "--gpus",
    "-t",
    "--nice",
    "--export=",
    "-N",
    "--mem",
    "--mail-type=",
    "-d",
    "12",
    " ",
    "\t",
    "\n",
    "'",
    '"',
    "\\",
    "#",
    "=",
    ":",
    "1",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=20))
def test_any_script_is_read_or_refused(pieces: list[str]) -> None:
    answer: object
    try:
        answer = read("".join(pieces))
    except Invalid as refusal:
        answer = refusal
    if isinstance(answer, Invalid):
        assert answer.errors
        assert all(error.message.isprintable() and len(error.message) < 300 for error in answer.errors)
    else:
        assert isinstance(answer, dict)
        with suppress(Invalid):
            parse({"script": "x", **answer}, Defaults(), now=0.0)
