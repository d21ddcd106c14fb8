"""Looks at the model folder, and tells when it is worth another look."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import watchfiles

from mlbox.errors import Invalid
from mlbox.serving import repository
from mlbox.serving.server import model_config
from mlbox.serving.server.files import Fingerprint, fingerprint, read_config
from mlbox.serving.server.model_config import VersionPolicy

log = logging.getLogger(__name__)

_DEBOUNCE_MS = 200
_STEP_MS = 20
_AGAIN_S = 5.0
"""How long to wait before watching again where that failed: no inotify watches left, or the folder is gone."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one model's folder held. `policy` is None where its config.pbtxt cannot be read: loading says why."""

    policy: VersionPolicy | None
    versions: Mapping[int, Fingerprint]


def look(models: Path) -> tuple[Mapping[str, Look], Mapping[str, str]]:
    """What the model folder holds now: by name, and what is passed over with the reason. Blocking. Raises OSError."""
    found = repository.scan(models)
    return {name: _look_at(models, name, numbers) for name, numbers in found.models.items()}, found.ignored


def _look_at(models: Path, name: str, numbers: frozenset[int]) -> Look:
    versions: dict[int, Fingerprint] = {}
    for number in numbers:
        try:
            versions[number] = fingerprint(models, name, number)
        except OSError:
            continue  # gone since it was listed
    try:
        text = read_config(models, name)
        policy = VersionPolicy() if text is None else model_config.read(text, name).version_policy
    except (Invalid, OSError):
        policy = None
    return Look(policy, versions)


async def watch(models: Path, changed: Callable[[], None]) -> None:
    """Call `changed` soon after anything below `models` changed, for ever."""
    warned = False
    while True:
        try:
            changes = watchfiles.awatch(  # pyright: ignore[reportUnknownMemberType]  # trio's types, not installed
                models, watch_filter=None, debounce=_DEBOUNCE_MS, step=_STEP_MS
            )
            async for _ in changes:
                changed()
        except (OSError, RuntimeError) as error:  # watchfiles raises either
            if not warned:
                log.warning("the model folder cannot be watched (%s): it is looked at every few seconds", error)
            warned = True
        await asyncio.sleep(_AGAIN_S)
