"""Keeps what is served in step with the model folder.

One pass: look at the folder, note what changed and what has been quiet for long enough, decide, start loads, drop
what is replaced. A pass follows each hint of the watcher, each end of a load, each wish from outside, and a timer that
makes up for lost hints. Used on the event loop's thread.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlbox.errors import Invalid, NotFound, Unavailable
from mlbox.serving.server.files import Fingerprint
from mlbox.serving.server.loading import Loader
from mlbox.serving.server.model_config import VersionPolicy
from mlbox.serving.server.models import Models, Version
from mlbox.serving.server.sessions import LoadFailed
from mlbox.serving.server.store import Unsettled
from mlbox.serving.server.versions import Decision, Standing, decide
from mlbox.serving.server.watch import Look, Watcher, look

log = logging.getLogger(__name__)

_REPAIR_S = 5.0
"""How often the folder is looked at without a hint: network file systems give none."""
_RETRY_S = 2.0
"""When files that were still open, or could not be copied, are tried again."""
_READY_AT_LATEST_S = 10.0
"""Files that never come to rest hold up the server's readiness no longer than this."""


@dataclass(slots=True)
class _Tracked:
    """One version's history: what was seen and since when, what is served, what was refused."""

    version: Version
    seen: Fingerprint | None = None
    since: float = 0.0
    live: Fingerprint | None = None
    refused: Fingerprint | None = None
    not_before: float = 0.0


@dataclass(slots=True)
class _Folder:
    """One model's history. `held`: unloaded on request, until its files change or it is asked for again."""

    name: str
    versions: dict[int, _Tracked]
    policy: VersionPolicy = field(default_factory=VersionPolicy)
    decision: Decision = field(default_factory=Decision)
    present: bool = True
    held: bool = False


class Lifecycle:
    """Loads, replaces and drops versions. `run` and `watch` are tasks of their own."""

    def __init__(self, models_folder: Path, models: Models, loader: Loader, *, settle_s: float) -> None:
        self._models_folder = models_folder
        self._models = models
        self._loader = loader
        self._settle_s = settle_s
        self._folders: dict[str, _Folder] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._watcher = Watcher(models_folder, self._wake.set)
        self._looking = False
        self._blind = False
        self._passes = 0
        self._passed = asyncio.Condition()
        self._began = self._decided_at = time.monotonic()
        self.ready = False
        """Whether the first look is dealt with: everything that could be loaded is."""

    async def watch(self) -> None:
        """Notice changes of the folder, for ever."""
        await self._watcher.run()

    async def run(self) -> None:
        """Follow the folder, for ever."""
        while True:
            self._wake.clear()
            self._looking = True
            wait_s = await self._pass_safely()
            self.ready = self.ready or time.monotonic() > self._began + _READY_AT_LATEST_S
            async with self._passed:
                self._passes += 1
                self._looking = False
                self._passed.notify_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()

    async def until_ready(self) -> None:
        """Return when the first look is dealt with, or has taken too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_READY_AT_LATEST_S), self._passed:
                await self._passed.wait_for(lambda: self.ready)

    async def load(self, name: str, timeout_s: float) -> None:
        """Load what the policy picks, also what was refused before; returns when it is served.

        Raises NotFound, Invalid or Unavailable with `failed to load 'name': why`.
        """
        if folder := self._folders.get(name):
            folder.held = False
            for tracked in folder.versions.values():
                tracked.refused, tracked.not_before = None, 0.0
        # A look that is under way began before this wish.
        wanted = self._passes + (2 if self._looking else 1)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s), self._passed:
                await self._passed.wait_for(lambda: self._passes >= wanted and self._at_rest(name))
        except TimeoutError:
            raise Unavailable(f"failed to load '{name}': its files did not come to rest in {timeout_s:g} s") from None
        folder = self._folders.get(name)
        if folder is None:
            raise NotFound(f"failed to load '{name}': there is no folder of that name among the models")
        model = self._models.model(name)
        for number in folder.decision.refused:
            raise Invalid(f"failed to load '{name}': version {number}: {model.versions[number].reason}")
        if not model.ready():
            raise Invalid(f"failed to load '{name}': {model.reason or 'its version policy picks none of its versions'}")

    def unload(self, name: str) -> None:
        """Serve no version of the model, until it is asked for or its files change. Raises NotFound."""
        self._models.model(name)
        folder = self._folders[name]
        folder.held = True
        for tracked in folder.versions.values():
            self._unload(name, tracked)

    # One pass

    async def _pass_safely(self) -> float:
        """A pass, whose failure ends nothing of what is served."""
        try:
            wait_s = await self._pass()
        except Exception as error:
            # A folder that is gone for a moment (a network file system, a mistake), or one that this program can make
            # nothing of, takes nothing away from anybody. Said once, not every few seconds.
            if not self._blind:
                expected = isinstance(error, OSError)
                log.error("the model folder cannot be read: what is served stays: %s", error, exc_info=not expected)
            self._blind = True
            return _REPAIR_S
        self._blind = False
        return wait_s

    async def _pass(self) -> float:
        """Look, decide, act; returns the seconds until the next look is due. Raises OSError."""
        looks, ignored = await asyncio.to_thread(look, self._models_folder)
        for name in sorted(ignored.keys() - self._models.ignored.keys()):
            log.warning("model folder: %r is passed over: %s", name, ignored[name])
        self._models.ignored = dict(ignored)
        now = self._decided_at = time.monotonic()
        for name in looks.keys() - self._folders.keys():
            self._folders[name] = _Folder(name, {})
        for name, folder in list(self._folders.items()):
            self._see(folder, looks.get(name), now)
            self._act(folder, now)
        self.ready = self.ready or all(map(self._at_rest, self._folders))
        rests = [self._rests_at(each) - now for folder in self._folders.values() for each in folder.versions.values()]
        return max(0.01, min([_REPAIR_S, *(rest for rest in rests if rest > 0)]))

    def _see(self, folder: _Folder, found: Look | None, now: float) -> None:
        """Note what the model's folder holds now, and since when."""
        folder.present = found is not None
        if found is not None and found.policy is not None:
            folder.policy = found.policy
        fingerprints: Mapping[int, Fingerprint] = found.versions if found is not None else {}
        for number in fingerprints.keys() - folder.versions.keys():
            self._watcher.renew()
            folder.versions[number] = _Tracked(self._models.known(folder.name, number))
        for number, tracked in folder.versions.items():
            seen = fingerprints.get(number)
            if seen == tracked.seen:
                continue
            # At the first sight the files' own times tell how long they have been quiet already.
            quiet_s = time.time() - seen.changed_ns / 1e9 if seen is not None and tracked.since == 0.0 else 0.0
            tracked.seen, tracked.since, tracked.not_before = seen, now - max(0.0, quiet_s), 0.0
            folder.held = False

    def _act(self, folder: _Folder, now: float) -> None:
        if not folder.held:
            standings = {number: self._standing(tracked, now) for number, tracked in folder.versions.items()}
            folder.decision = decide(folder.policy, standings)
            for number in folder.decision.drop:
                self._unload(folder.name, folder.versions[number])
            for number in folder.decision.load:
                self._start_load(folder, folder.versions[number])
        for number, tracked in list(folder.versions.items()):
            if tracked.seen is None and tracked.version.state == "UNAVAILABLE":
                del folder.versions[number]
                self._models.forget(folder.name, number)
        if folder.present or folder.versions:
            self._models.known_model(folder.name).reason = (
                "" if folder.versions else "its folder holds no version: a folder called 1, 2, 3 ... with model.onnx"
            )
        else:
            del self._folders[folder.name]
            self._models.forget_model(folder.name)

    def _standing(self, tracked: _Tracked, now: float) -> Standing:
        settled = now >= self._rests_at(tracked)
        return Standing(
            present=tracked.seen is not None or not settled,
            settled=settled,
            live=tracked.version.served is not None,
            current=tracked.live is not None and tracked.live == tracked.seen,
            refused=tracked.refused is not None and tracked.refused == tracked.seen,
        )

    def _rests_at(self, tracked: _Tracked) -> float:
        """From when on a version counts as being at rest, if nothing happens to it; monotonic seconds."""
        return max(tracked.since + self._settle_s, tracked.not_before)

    def _at_rest(self, name: str) -> bool:
        """Whether nothing is under way with this model, as of the last pass."""
        folder = self._folders.get(name)
        if folder is None or folder.held:
            return True
        return not folder.decision.load and all(
            self._decided_at >= self._rests_at(tracked) and not tracked.version.loading
            for tracked in folder.versions.values()
        )

    # Loads and drops

    def _start_load(self, folder: _Folder, tracked: _Tracked) -> None:
        if not tracked.version.loading and tracked.seen is not None:
            tracked.version.loading = True
            self._spawn(self._load(folder, tracked, tracked.seen), f"load {folder.name}/{tracked.version.number}")

    async def _load(self, folder: _Folder, tracked: _Tracked, expected: Fingerprint) -> None:
        version = tracked.version
        label = f"model {folder.name}/{version.number}"
        began = time.monotonic()
        before = version.served
        try:
            served = await self._loader.load(folder.name, version.number, expected, before)
        except Unsettled as error:
            tracked.not_before = time.monotonic() + _RETRY_S
            version.reason = f"waiting for its files: {error}"
        except LoadFailed as error:
            self._refuse(tracked, expected, str(error))
            log.warning("%s: not loaded: %s", label, error)
        except Exception:
            self._refuse(tracked, expected, "the server failed to load it; its log says more")
            log.exception("%s: not loaded", label)
        else:
            if folder.held or (served is before and version.served is not before):
                version.reason = "unloaded"  # while it was loaded, or compared with what was served
                if served is not before:
                    self._spawn(served.retire(), f"free {label}")
                return
            if served is not before:
                self._retire(folder.name, tracked)
                log.info("%s: ready on %s after %.2f s", label, served.device, time.monotonic() - began)
            version.served, tracked.live = served, expected
            version.reason = served.instances.session.note or ""
        finally:
            version.loading = False
            self._wake.set()

    def _refuse(self, tracked: _Tracked, expected: Fingerprint, why: str) -> None:
        tracked.refused = expected
        on = tracked.version.served is not None
        tracked.version.reason = f"its newest files are refused, those before them serve on: {why}" if on else why

    def _unload(self, name: str, tracked: _Tracked) -> None:
        if tracked.version.served is not None:
            log.info("model %s/%d: unloaded", name, tracked.version.number)
        self._retire(name, tracked)
        tracked.version.reason = "unloaded"

    def _retire(self, name: str, tracked: _Tracked) -> None:
        """Serve it no more; what it holds is freed when the last request that uses it is answered."""
        served, tracked.version.served, tracked.live = tracked.version.served, None, None
        if served is not None:
            self._spawn(served.retire(), f"free {name}/{tracked.version.number}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
