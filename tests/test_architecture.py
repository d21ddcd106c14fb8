"""ARCHITECTURE.md shows the state machine as it is: the diagram is made from the table."""

from pathlib import Path

from mlbox.jobs import ENDED, TRANSITIONS

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def state_diagram() -> str:
    """The states of a job as a Mermaid diagram."""
    moves = [f"    {old} --> {new}" for old, nexts in TRANSITIONS.items() for new in TRANSITIONS if new in nexts]
    ends = [f"    {state} --> [*]" for state in TRANSITIONS if state in ENDED]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> queued", *moves, *ends, "```"])


def test_the_state_diagram_is_not_stale() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    shown = text.partition("<!-- states -->")[2].partition("<!-- /states -->")[0]
    assert shown.strip() == state_diagram(), f"write this between the two marks:\n{state_diagram()}"
