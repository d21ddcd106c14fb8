"""Talking to the daemon: where it is, one request, and what became of it."""

import argparse
import http.client
import json
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

from mlbox import config

TEXT = "text/plain"
JSON = "application/json"


class Refused(Exception):
    """The daemon refused; the text is its own."""


class Busy(OSError):
    """The daemon is there, but cannot answer now."""


class HungUp(Exception):
    """Nobody reads our output any more."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("mlbox")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(self._path))


class Connection:
    """An HTTP connection to the daemon, closed at the end of a `with`."""

    def __init__(self, connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
        self.http = connection
        self.headers = headers

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def send(
        self, method: str, path: str, body: str | bytes | IO[bytes] | None = None, *, kind: str = JSON, accept: str
    ) -> http.client.HTTPResponse:
        """One request. Raises Refused with the daemon's own words, and Busy where it may be asked again."""
        headers = {"Accept": accept, **self.headers}
        if body is not None:
            headers["Content-Type"] = kind
        if body is not None and not isinstance(body, (str, bytes)):
            headers["Content-Length"] = str(os.fstat(body.fileno()).st_size)
        self.http.request(method, path, body, headers)
        response = self.http.getresponse()
        if response.status >= 400:
            problem = _problem(response.read(), response.status)
            raise Busy(problem) if response.status == 503 else Refused(problem)
        return response


def connection(options: argparse.Namespace) -> Connection:
    """To `--state`'s socket, else to MLBOX_URL with MLBOX_TOKEN, else to one's own daemon's socket."""
    url = os.environ.get("MLBOX_URL")
    if options.state or not url:
        return Connection(_UnixConnection(_socket_path(options)), {})
    token = os.environ.get("MLBOX_TOKEN", "")
    if not (token.isascii() and token.isprintable()):
        raise Refused("MLBOX_TOKEN holds what no token does: copy it once more")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Refused(_bad_url(url)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(_bad_url(url))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return Connection(kind(parts.hostname, port), {"Authorization": f"Bearer {token}"} if token else {})


def where(options: argparse.Namespace) -> str:
    """Where the daemon is looked for, in words."""
    url = os.environ.get("MLBOX_URL")
    return url if url and not options.state else str(_socket_path(options))


def ask(options: argparse.Namespace, method: str, path: str, fields: object | None = None) -> Any:
    """One request with JSON both ways."""
    body = None if fields is None else json.dumps(fields)
    with connection(options) as daemon:
        return json.loads(daemon.send(method, path, body, accept=JSON).read())


def show(options: argparse.Namespace, path: str) -> int:
    """Print an answer as the daemon writes it for people, or as JSON."""
    with connection(options) as daemon:
        write(daemon.send("GET", path, accept=JSON if options.json else TEXT).read())
    return 0


def answer(options: argparse.Namespace, value: object, text: str) -> int:
    """Print `value` as JSON where that is wanted, else `text`."""
    write((json.dumps(value, indent=2) if options.json else text).encode() + b"\n")
    return 0


def answers(options: argparse.Namespace, values: list[Any], texts: Iterable[str]) -> int:
    """As `answer` for what one may be told to do many times: one value alone, several as a list."""
    return answer(options, values[0] if len(values) == 1 else values, "\n".join(texts))


def write(data: bytes) -> None:
    """To stdout, at once. Raises HungUp."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise HungUp from None


def _socket_path(options: argparse.Namespace) -> Path:
    """Where the daemon of that state folder says that it listens, else where it does if nothing says otherwise."""
    settings = config.load(None, [f"state={json.dumps(options.state)}"] if options.state else [])
    try:
        return Path(json.loads((settings.state_folder / "endpoints.json").read_bytes())["socket"])
    except (OSError, ValueError, LookupError, TypeError):
        return settings.socket_path


def _bad_url(url: str) -> str:
    return f"MLBOX_URL is {url!r}: it must look like http://HOST:8470"


def _problem(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip() or f"the daemon answered {status}"
