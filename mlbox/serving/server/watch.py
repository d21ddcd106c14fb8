"""Looks at the model folder, and tells when it is worth another look."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import watchfiles

from mlbox.errors import Invalid
from mlbox.serving import repository
from mlbox.serving.server import model_config
from mlbox.serving.server.files import Fingerprint, fingerprint, read_config
from mlbox.serving.server.model_config import VersionPolicy

log = logging.getLogger(__name__)

_DEBOUNCE_MS = 200
_STEP_MS = 50
"""How often watchfiles wakes up to look for events."""
_AGAIN_FIRST_S = 0.2
_AGAIN_LAST_S = 5.0
"""The pauses before watching again where that failed; every one of them doubles."""


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


class Watcher:
    """Tells when something below `models` changed. `run` is a task of its own."""

    def __init__(self, models: Path, changed: Callable[[], None]) -> None:
        self._models = models
        self._changed = changed
        self._renew = asyncio.Event()

    def renew(self) -> None:
        """Watch afresh, for there are new folders.

        A folder that is made and filled at once now and then stays without a watch (watchfiles 1.3: one in fifteen
        times in a test); watches that are all set at one time have no such gap.
        """
        self._renew.set()

    async def run(self) -> None:
        """Call `changed` soon after each change, for ever."""
        pause_s = _AGAIN_FIRST_S
        while True:
            self._renew.clear()
            try:
                changes = watchfiles.awatch(  # pyright: ignore[reportUnknownMemberType]  # trio's types, not installed
                    self._models,
                    watch_filter=None,
                    debounce=_DEBOUNCE_MS,
                    step=_STEP_MS,
                    stop_event=self._renew,
                )
                # Runs when the watches are set, which is the first thing that happens below: nothing falls in between.
                asyncio.get_running_loop().call_soon(self._changed)
                async for _ in changes:
                    pause_s = _AGAIN_FIRST_S
                    self._changed()
            except (OSError, RuntimeError, ExceptionGroup) as error:
                # A file's name that is not UTF-8 ends the watching (watchfiles 1.3), and so does a folder that is gone.
                if pause_s == _AGAIN_FIRST_S:
                    log.warning("watching the model folder failed and is tried again: %s", _cause(error))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_LAST_S)


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        return _cause(cast(BaseExceptionGroup[BaseException], error).exceptions[0])
    return error
