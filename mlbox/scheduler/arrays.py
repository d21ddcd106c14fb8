"""Arrays as users write them: `0-99%8` (sbatch(1), --array), or a matrix of variables. Pure."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

from mlbox.jobs import ArraySpec, Element
from mlbox.scheduler.values import ENV_NAME, Bad, integer, json_object, shown, text

ELEMENTS_MAX = 10_000
INDEX_MAX = 1_000_000_000
_TEXT_MAX = 128 * 1024
"""Enough for 10,000 indices of 10 digits."""
_NAMES_MAX = 64
_VALUE_MAX = 64 * 1024
_RANGE = re.compile(r"\s*(\d{1,10})(?:-(\d{1,10})(?::(\d{1,10}))?)?\s*")
_CAP = re.compile(r"(.*)%\s*(\d{1,10})\s*", re.DOTALL)

at_once = integer(1, INDEX_MAX)
"""A parser of how many elements may run at one time."""


def array(value: object) -> ArraySpec:
    """Indices and ranges with steps, separated by commas, and behind `%` how many may run at once."""
    if not isinstance(value, str):
        raise Bad(f"wants text such as '0-99%8' or '1,3,5-9:2', got {shown(value)}")
    written = text(_TEXT_MAX)(value)
    cap: int | None = None
    if "%" in written:
        match = _CAP.fullmatch(written)
        if match is None or "%" in match[1]:
            raise Bad(f"wants how many may run at once behind one %, as in '0-99%8', got {shown(value)}")
        written, cap = match[1], at_once(match[2])
    indices: dict[int, None] = {}
    for part in written.split(","):
        found = _range(part)
        if len(indices) + len(found) > ELEMENTS_MAX:
            raise Bad(f"has more than {ELEMENTS_MAX} elements, which is the limit of an array")
        twice = next((index for index in found if index in indices), None)
        if twice is not None:
            raise Bad(f"names the index {twice} twice")
        indices.update(dict.fromkeys(found))
    return ArraySpec(elements=tuple(Element(index=index) for index in indices), at_once=cap)


def matrix(value: object) -> tuple[Element, ...]:
    """Every combination of the values of some variables, the last variable changing fastest."""
    if isinstance(value, str):
        value = json_object(value)
    variables: Mapping[object, object] = cast("Mapping[object, object]", value) if isinstance(value, Mapping) else {}
    if not variables:
        got = shown(cast("object", value))
        raise Bad(f'wants an object of lists such as {{"lr": [0.1, 0.01], "seed": [1, 2]}}, got {got}')
    if len(variables) > _NAMES_MAX:
        raise Bad(f"has {len(variables)} variables; at most {_NAMES_MAX} may vary")
    columns = {_variable(name): items for name, items in variables.items()}
    lists = {name: _list(name, items) for name, items in columns.items()}
    size = math.prod(len(items) for items in lists.values())
    if size > ELEMENTS_MAX:
        counts = " x ".join(str(len(items)) for items in lists.values())
        raise Bad(f"makes {counts if len(counts) < 100 else 'far'} elements, more than {ELEMENTS_MAX}")
    axes = [[_value(name, item) for item in items] for name, items in lists.items()]
    rows = itertools.product(*axes)
    return tuple(Element(index=number, env=dict(zip(lists, row, strict=True))) for number, row in enumerate(rows))


def _range(part: str) -> Sequence[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise Bad(f"wants indices and ranges such as 1,3,5-9:2, got {shown(part)}")
    low = int(match[1])
    high = low if match[2] is None else int(match[2])
    step = 1 if match[3] is None else int(match[3])
    if max(low, high) > INDEX_MAX:
        raise Bad(f"has an index above {INDEX_MAX}: {shown(part)}")
    if high < low:
        raise Bad(f"has a range that ends before it begins: {shown(part)}")
    if step == 0:
        raise Bad(f"has a range with a step of 0: {shown(part)}")
    return range(low, high + 1, step)


def _variable(name: object) -> str:
    if not isinstance(name, str) or ENV_NAME.fullmatch(name) is None:
        raise Bad(f"{shown(name)} cannot be a variable's name")
    if name.startswith("MLBOX_"):
        raise Bad(f"{name} is mlbox's own: variables that begin with MLBOX_ are set by mlbox")
    return name


def _list(name: str, items: object) -> list[object]:
    if not isinstance(items, list):
        raise Bad(f"{name} wants a list of values, got {shown(items)}")
    if not items:
        raise Bad(f"{name} has no values: the matrix would be empty")
    return cast("list[object]", items)


def _value(name: str, item: object) -> str:
    """A value as a variable holds it: text as it is, anything else as JSON writes it."""
    if isinstance(item, bool) or (isinstance(item, int) and -(2**63) <= item < 2**64):
        return json.dumps(item)
    if isinstance(item, float) and math.isfinite(item):
        return json.dumps(item)
    if not isinstance(item, str):
        raise Bad(f"{name} wants text, numbers, true or false, got {shown(item)}")
    try:
        return text(_VALUE_MAX, empty=True)(item)
    except Bad as error:
        raise Bad(f"{name} {error}") from None
