"""Commands that need no daemon: run one, check its configuration, replay a trace on paper."""

import argparse
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlbox import config
from mlbox.cli import client
from mlbox.errors import Invalid

SERVE_FLAGS = {
    "--state": "state",
    "--listen": "server.listen",
    "--socket": "server.socket",
    "--models": "serving.models",
    "--infer-http": "serving.http",
}


def serve(options: argparse.Namespace) -> int:
    """`mlbox serve`"""
    overrides = [f"{key}={json.dumps(value)}" for key in SERVE_FLAGS.values() if (value := getattr(options, key))]
    settings = config.load(options.config, [*options.overrides, *overrides])
    from mlbox import daemon  # half a second of imports that the client commands do without

    return daemon.serve(settings)


def check_config(options: argparse.Namespace) -> int:
    """`mlbox check-config`"""
    settings = config.load(options.config, options.overrides)
    print(
        f"good: state in {settings.state_folder}, models in {settings.models_folder}, API on {settings.server.listen}"
    )
    return 0


def simulate(options: argparse.Namespace) -> int:
    """`mlbox simulate`: the events one a line as they are found, then the summary, together one JSON document."""
    from mlbox.scheduler import traces  # as heavy as the daemon

    try:
        replay = traces.command(options.trace, options.config, swf=True if options.swf else None)
    except Invalid as error:
        raise client.Refused(str(error)) from error
    _print_replay(replay.events, lambda: replay.summary)
    return 0


def _print_replay(events: Iterable[Mapping[str, Any]], summary: Any) -> None:
    client.write(b'{"events": [')
    before = b"\n"
    for event in events:
        client.write(before + json.dumps(event).encode())
        before = b",\n"
    client.write(b'\n],\n"summary": ' + json.dumps(summary(), indent=2).encode() + b"}\n")
