"""What is served: the registry of models and their versions, and who still uses what was replaced.

Requests hold on to the content they began with; a replaced content goes when the last of them is answered.
"""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlbox.errors import NotFound, Unavailable
from mlbox.serving.server.instances import Instances
from mlbox.serving.server.model_config import ModelConfig, as_json
from mlbox.serving.server.signature import Signature
from mlbox.serving.server.statistics import Statistics
from mlbox.serving.server.store import Entry, Store


class Served:
    """One loaded content of a version. Used on the event loop's thread."""

    def __init__(
        self,
        *,
        number: int,
        signature: Signature,
        config: ModelConfig,
        instances: Instances,
        entry: Entry,
        store: Store,
    ) -> None:
        self.number = number
        self.signature = signature
        self.config = config
        self.instances = instances
        self.entry = entry
        self._store = store
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def device(self) -> str:
        return self.instances.session.device

    @contextmanager
    def use(self) -> Generator["Served"]:
        """Held while a request is answered: the content stays until then, whatever happens to the model."""
        self._requests += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._idle.set()

    async def retire(self) -> None:
        """Wait for the requests that use it, then free it. No new one may come: it is out of the registry."""
        await self._idle.wait()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.instances.close()
        self._store.release(self.entry)

    def config_json(self) -> dict[str, object]:
        return as_json(self.config, self.signature, instances=self.instances.count, device=self.device)


@dataclass(slots=True)
class Version:
    """One version of a model. `reason` says why it is not ready, or what is wrong with its newest files."""

    number: int
    served: Served | None = None
    loading: bool = False
    reason: str = ""
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def state(self) -> str:
        """In Triton's words."""
        if self.served is not None:
            return "READY"
        return "LOADING" if self.loading else "UNAVAILABLE"


@dataclass(slots=True)
class Model:
    """A model by name. `reason` says what is wrong with it as a whole (no version in its folder)."""

    name: str
    versions: dict[int, Version] = field(default_factory=dict[int, Version])
    reason: str = ""

    def ready(self) -> list[int]:
        """The versions that answer, ascending; the last one answers requests that name none."""
        return sorted(number for number, version in self.versions.items() if version.served is not None)


class Models:
    """The registry. `ignored` are entries of the model folder that cannot be models, with the reason."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self.ignored: dict[str, str] = {}

    def model(self, name: str) -> Model:
        """Raises NotFound in the words that Triton's clients look for."""
        try:
            return self._models[name]
        except KeyError:
            raise NotFound(f"Request for unknown model: '{name}' is not found") from None

    def serving(self, name: str, number: int | None) -> tuple[Version, Served]:
        """Version `number` of a model, or its newest that answers, and what answers for it now.

        Raises NotFound, or Unavailable when it is not ready.
        """
        model = self.model(name)
        number = number or max(model.ready(), default=None)
        if number is None:
            why = [model.reason, *(f"{each.number}: {each.reason}" for each in model.versions.values() if each.reason)]
            raise Unavailable(f"Request for unknown model: '{name}' has no available versions{_because(why)}")
        version = model.versions.get(number)
        if version is None:
            raise NotFound(f"Request for unknown model: '{name}' version {number} is not found")
        if version.served is None:
            because = _because([version.reason])
            raise Unavailable(f"Request for unknown model: '{name}' version {number} is not at ready state{because}")
        return version, version.served

    def known(self, name: str, number: int) -> Version:
        """The entry of a version, made when it is new."""
        model = self._models.setdefault(name, Model(name))
        return model.versions.setdefault(number, Version(number))

    def known_model(self, name: str) -> Model:
        """The entry of a model, made when it is new."""
        return self._models.setdefault(name, Model(name))

    def forget(self, name: str, number: int) -> None:
        """A version whose folder is gone and that is served no more."""
        if name in self._models:
            self._models[name].versions.pop(number, None)

    def forget_model(self, name: str) -> None:
        self._models.pop(name, None)

    def __iter__(self) -> Iterator[Model]:
        return iter([self._models[name] for name in sorted(self._models)])

    def index(self, *, ready_only: bool) -> list[dict[str, str]]:
        """The repository index: a row for each version; for a model without one, and for what was passed over, one."""
        rows: list[dict[str, str]] = []
        for model in self:
            for number in sorted(model.versions):
                version = model.versions[number]
                if version.state == "UNAVAILABLE" and not version.reason:
                    continue  # never asked for: the version policy picks others
                row = {"name": model.name, "version": str(number), "state": version.state, "reason": version.reason}
                rows.append(row if version.served is None else row | {"device": version.served.device})
            if not model.versions:
                rows.append({"name": model.name, "state": "UNAVAILABLE", "reason": model.reason})
        rows += [{"name": name, "state": "UNAVAILABLE", "reason": why} for name, why in sorted(self.ignored.items())]
        return [row for row in rows if not ready_only or row["state"] == "READY"]


def _because(reasons: list[str]) -> str:
    text = "; ".join(filter(None, reasons))
    return f" ({text})" if text else ""
