"""What the documents say of the code is so."""

import dataclasses
import json
import re
from pathlib import Path

from mlbox.config import QuotaConfig, SchedulerConfig
from mlbox.scheduler import traces
from mlbox.scheduler.policy import Rules

DOCS = Path(__file__).parent.parent / "docs"


def test_every_key_of_the_scheduler_is_described_with_its_default() -> None:
    text = (DOCS / "scheduling.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)` \| (\S[^|]*) \| ", text.partition("## Configuration")[2], re.MULTILINE))

    for key in dataclasses.fields(SchedulerConfig):
        default = getattr(SchedulerConfig(), key.name)
        if isinstance(default, QuotaConfig):
            assert told.pop(key.name) == "no limits"
            continue
        written = told.pop(key.name)
        if isinstance(default, int | float | str):
            assert json.loads(written) == default, key.name
        else:
            assert json.loads(written) == (list(default) if isinstance(default, tuple) else default), key.name
    assert not told


def test_the_worked_example_comes_out_as_printed() -> None:
    trace, printed = re.findall(r"```json\n(.*?)```", (DOCS / "scheduling.md").read_text(), re.DOTALL)

    report = traces.as_json(traces.replay(traces.loads(trace.encode()), Rules()))

    expected = json.loads(printed)
    assert report["events"] == expected["events"]
    assert {**report["summary"], "by_user": None} == {**expected["summary"], "by_user": None}
