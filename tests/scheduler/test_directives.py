"""The directives of a script are read as sbatch(1) reads them."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.errors import Invalid
from mlbox.scheduler.directives import read
from mlbox.scheduler.submission import Defaults, parse


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
    assert "'--ntask=2' is not understood; known here: --gpus" in found["script:4"]
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
        ("#SBATCH --time=", "has no value"),
        ("#SBATCH -J", "has no value"),
    ],
)
def test_what_is_not_understood_is_refused(line: str, says: str) -> None:
    (message,) = errors(line).values()
    assert says in message


def test_a_bad_value_of_a_directive_is_named_by_its_field() -> None:
    with pytest.raises(Invalid) as refusal:
        parse({"script": "x", **fields("#MLBOX gpus=many nam=x")}, Defaults())
    assert {error.field for error in refusal.value.errors} == {"gpus", "nam"}


def test_a_huge_header_is_refused_at_once() -> None:
    began = time.monotonic()
    for script in ("#MLBOX " + "a" * (1 << 20), "#MLBOX gpus=1\n" * 80_000, "#SBATCH --x\n" * 80_000):
        with pytest.raises(Invalid) as refusal:
            read(script)
        assert len(str(refusal.value)) < 20_000
    assert time.monotonic() - began < 2


PIECES = ["#MLBOX", "#SBATCH", "gpus=1", "--gpus", "-t", " ", "\t", "\n", "'", '"', "\\", "#", "=", ":", "1"]


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
