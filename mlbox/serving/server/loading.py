"""From a version's files to something that answers: copy, check, load, warm up. In threads, never in the loop's."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlbox.errors import Invalid
from mlbox.serving.repository import MODEL_FILE
from mlbox.serving.server import model_config, sessions
from mlbox.serving.server.files import Fingerprint, read_config
from mlbox.serving.server.instances import Instances
from mlbox.serving.server.model_config import ModelConfig
from mlbox.serving.server.models import Served
from mlbox.serving.server.sessions import LoadFailed, Session, SessionSettings
from mlbox.serving.server.signature import Signature
from mlbox.serving.server.store import Entry, Store, Unsettled

_LOADS_AT_ONCE = 2
"""So that a small model does not wait for a large one; more would fight for the same disk and memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How what is loaded answers: runs at once of a CPU model, and the longest queue of any."""

    instances: int = 1
    queue_max: int = 1000


@dataclass(frozen=True, slots=True)
class _Loaded:
    entry: Entry
    config: ModelConfig
    session: Session
    signature: Signature


class Loader:
    """Loads versions from `models` by way of `store`."""

    def __init__(self, models: Path, store: Store, session: SessionSettings, serve: ServeSettings) -> None:
        self._models = models
        self._store = store
        self._session = session
        self._serve = serve
        self._threads = ThreadPoolExecutor(_LOADS_AT_ONCE, thread_name_prefix="load")

    async def load(self, name: str, number: int, expected: Fingerprint, current: Served | None) -> Served:
        """The content that `expected` stands for, ready to answer.

        It is `current` where the files hold what that was loaded from already. Raises LoadFailed with the reason for
        people, or Unsettled when the files are not at rest.
        """
        work = partial(self._load, name, number, expected, current)
        loaded = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        if isinstance(loaded, Served):
            return loaded
        return Served(
            number=number,
            signature=loaded.signature,
            config=loaded.config,
            instances=Instances(
                loaded.session,
                name,
                count=loaded.config.instances or (self._serve.instances if loaded.session.device == "cpu" else 1),
                queue_max=self._serve.queue_max,
            ),
            entry=loaded.entry,
            store=self._store,
        )

    def _load(self, name: str, number: int, expected: Fingerprint, current: Served | None) -> _Loaded | Served:
        if expected.problem is None and not expected.has(MODEL_FILE):
            raise LoadFailed(f"{MODEL_FILE} is missing in {name}/{number}")
        try:
            text = read_config(self._models, name)
            config = ModelConfig() if text is None else model_config.read(text, name)
            with ExitStack() as undo:
                entry = self._store.take(self._models, name, number, expected)
                undo.callback(self._store.release, entry)
                if current is not None and current.entry == entry and current.config == config:
                    return current  # touched, not changed
                loaded = self._load_entry(name, config, entry)
                undo.pop_all()
                return loaded
        except Invalid as error:
            raise LoadFailed(str(error)) from error
        except OSError as error:
            raise Unsettled(f"they could not be read: {error}") from error

    def _load_entry(self, name: str, config: ModelConfig, entry: Entry) -> _Loaded:
        with self._store.loading(entry):
            session = sessions.load(entry.path / MODEL_FILE, self._session, gpu=config.gpu or self._session.gpu)
        return _Loaded(entry, config, session, model_config.signature(config, name, session.inputs, session.outputs))
