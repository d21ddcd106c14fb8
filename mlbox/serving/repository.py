"""The model folder in Triton's layout: `<models>/<name>/<version>/model.onnx`. Names, numbers, and what is there.

It knows nothing of what the files hold; daemon and inference server both use it. Every function that looks at a
folder is blocking.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlbox.errors import Invalid

MODEL_FILE = "model.onnx"
CONFIG_FILE = "config.pbtxt"
VERSION_MAX = 2**31 - 1

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[1-9][0-9]{0,9}")
_RESERVED = frozenset({"stats"})
"""`GET /v2/models/stats` is the statistics of all models, so a model of that name could never be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """What a model folder holds: the version numbers of each model, and what was passed over with the reason.

    A model whose folder has no version yet is there with an empty set.
    """

    models: Mapping[str, frozenset[int]] = field(default_factory=dict[str, frozenset[int]])
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])


def name_problem(name: str) -> str | None:
    """Why `name` cannot be a model's name, or None."""
    if name in _RESERVED:
        return f"{name!r} is reserved for the statistics of all models"
    if _NAME.fullmatch(name) is None:
        return "a model's name is 1 to 64 letters, digits, '.', '_' and '-', not beginning with '.'"
    return None


def check_name(name: str) -> str:
    """`name`, when a model may be called so. Raises Invalid."""
    if problem := name_problem(name):
        raise Invalid(f"no model can be called {name[:80]!r}: {problem}")
    return name


def version_number(text: str) -> int | None:
    """The version that a folder's name (or a part of a URL) means: 1, 2, 3 ... without leading zeros; else None."""
    if _NUMBER.fullmatch(text) is None or int(text) > VERSION_MAX:
        return None
    return int(text)


def scan(models: Path) -> Repository:
    """What `models` holds now. Hidden entries and plain files are not looked at. Raises OSError."""
    found: dict[str, frozenset[int]] = {}
    ignored: dict[str, str] = {}
    for entry in sorted(models.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            ignored[entry.name] = "it is a symbolic link: copy the folder here instead"
        elif entry.is_dir():
            if problem := name_problem(entry.name):
                ignored[entry.name] = problem
            else:
                found[entry.name] = version_numbers(entry)
    return Repository(models=found, ignored=ignored)


def version_numbers(folder: Path) -> frozenset[int]:
    """The numbers of the version folders in a model's folder; none where that is missing.

    A link that is called like a version counts: it takes the number, though it is never followed.
    """
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    return frozenset(
        number
        for entry in entries
        if (number := version_number(entry.name)) is not None and (entry.is_symlink() or entry.is_dir())
    )


def next_version(folder: Path) -> int:
    """One more than the highest version in a model's folder. The caller sees to it that nobody else takes it."""
    return max(version_numbers(folder), default=0) + 1
