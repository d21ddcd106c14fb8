"""The inference server's process: options, composition, stop. Its supervisor hands it the listening sockets."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop

from mlbox.errors import MlboxError
from mlbox.serving.server.access import Access
from mlbox.serving.server.answers import error_body
from mlbox.serving.server.dataplane import DataPlane
from mlbox.serving.server.lifecycle import Lifecycle
from mlbox.serving.server.loading import Loader, ServeSettings
from mlbox.serving.server.models import Models
from mlbox.serving.server.routes import Routes, RouteSettings
from mlbox.serving.server.sessions import SessionSettings
from mlbox.serving.server.store import Store
from mlbox.transport import Config, Server

log = logging.getLogger(__name__)

_STUBBORN_S = 3.0
"""How long the process waits at its end for threads that onnxruntime may hold on to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or the end of the parent; returns the exit status."""
    options = _parser().parse_args(arguments)
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "  # the daemon's form, into whose log this goes
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"{stamp}%(levelname)s inference: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    os.dup2(sys.stderr.fileno(), 1)  # libraries print to stdout, which nobody reads
    os.umask(0o077)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options))
    except (MlboxError, OSError) as error:
        log.error("the inference server cannot run: %s", error)
        return 1
    log.info("stopped")
    return 0


async def _serve(options: argparse.Namespace) -> None:
    sockets = [socket.socket(fileno=fd) for fd in options.fd]
    options.models.mkdir(parents=True, exist_ok=True)
    access = Access(options.access)
    models = Models()
    lifecycle = Lifecycle(options.models, models, _loader(options), settle_s=options.settle)
    routes = Routes(
        models,
        DataPlane(models, run_timeout_s=options.run_timeout),
        lifecycle,
        RouteSettings(name=options.name, body_max=options.body_max, load_timeout_s=options.load_timeout),
    )
    server = Server(Config(routes.app(access), drain_s=options.drain, error_body=error_body))

    # After a restart, a request waits for its model in the socket's backlog rather than hear that there is none.
    loaded = asyncio.create_task(lifecycle.until_ready(), name="first models")

    def stop(why: str) -> None:
        log.info("stopping: %s", why)
        routes.stopping = True
        loaded.cancel()
        server.stop()

    _stop_with(stop, options.parent_fd)
    log.info("models in %s, listening on %s", options.models, ", ".join(str(each.getsockname()) for each in sockets))
    try:
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(access.watch(), name="access"),
                group.create_task(lifecycle.watch(), name="watch"),
                group.create_task(lifecycle.run(), name="lifecycle"),
            ]
            await asyncio.wait({loaded})
            await server.serve(sockets)
            for task in background:
                task.cancel()
    finally:
        _end_soon()


def _loader(options: argparse.Namespace) -> Loader:
    cores = len(os.sched_getaffinity(0))
    settings = SessionSettings(
        gpu=options.gpu,
        # Half the cores for one inference, so that a second one finds the other half.
        threads=options.threads or max(1, cores // 2),
        gpu_mem_limit=options.gpu_mem_limit or None,
        load_timeout_s=options.load_timeout,
        warm_up_timeout_s=options.warm_up_timeout,
    )
    serve = ServeSettings(instances=min(2, cores), queue_max=options.queue_max)
    return Loader(options.models, Store(options.store), settings, serve)


def _end_soon() -> None:
    """Make sure of the end: event loop and interpreter would wait for a thread that onnxruntime never gives back."""
    stubborn = threading.Timer(_STUBBORN_S, os._exit, (1,))
    stubborn.daemon = True
    stubborn.start()


def _stop_with(stop: Callable[[str], None], parent_fd: int | None) -> None:
    """Call `stop` on SIGTERM, on SIGINT, and when the other end of the pipe `parent_fd` is closed."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    if parent_fd is None:
        return
    os.set_blocking(parent_fd, False)

    def read() -> None:
        if os.read(parent_fd, 4096) == b"":
            loop.remove_reader(parent_fd)
            stop("the parent is gone")

    loop.add_reader(parent_fd, read)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlbox.serving.server", description=__doc__)
    add = parser.add_argument
    add("--fd", type=int, action="append", required=True, help="an inherited listening socket; may be repeated")
    add("--models", type=Path, required=True, help="the model folder, in Triton's layout")
    add("--store", type=Path, required=True, help="a folder of its own for the private copies")
    add("--access", type=Path, required=True, help="JSON file with the digests of the tokens in force")
    add("--parent-fd", type=int, help="an inherited pipe: stop when its other end is closed")
    add("--name", default="mlbox", help="the server's name in GET /v2")
    add("--gpu", choices=("prefer", "require", "never"), default="prefer")
    add("--gpu-mem-limit", type=int, default=0, help="bytes of each model's arena on the GPU; 0: no limit")
    add("--threads", type=int, default=0, help="threads of one CPU inference; 0: half the cores")
    add("--settle", type=float, default=0.5, help="seconds for which files must be quiet before they are loaded")
    add("--body-max", type=int, default=256 << 20, help="bytes of the largest request, decompressed")
    add("--queue-max", type=int, default=1000, help="requests that may wait for one version")
    add("--run-timeout", type=float, default=60.0, help="seconds after which an inference is ended")
    add("--load-timeout", type=float, default=300.0, help="seconds after which loading a model is given up")
    add("--warm-up-timeout", type=float, default=30.0, help="seconds for the first run of a model")
    add("--drain", type=float, default=10.0, help="seconds for which a stop waits for open requests")
    return parser
