"""What the web needs of the rest of mlbox; the daemon constructs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlbox.config import Config
from mlbox.database import Database
from mlbox.events import Events
from mlbox.scheduler.gpus import GpuInventory
from mlbox.scheduler.logs import LogBoard
from mlbox.scheduler.service import JobService
from mlbox.serving.deployments import Deployments
from mlbox.web.credentials import Credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """The doors of the other rooms.

    `endpoints` tells where mlbox listens (`http`, `socket`, `infer_http`); `ready` is None when everything works, else
    why not; `owner_uid` is the only uid that the Unix socket admits (single-user mode).
    """

    config: Config
    database: Database
    events: Events
    jobs: JobService
    gpus: GpuInventory
    logs: LogBoard
    deployments: Deployments
    credentials: Credentials
    endpoints: Callable[[], Mapping[str, str]]
    ready: Callable[[], str | None]
    owner_uid: int
