"""The command line: `mlbox serve` runs the daemon, everything else is a thin client of its HTTP API."""

import argparse
import http.client
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from mlbox import __version__, config

EXIT_USAGE = 2
EXIT_UNREACHABLE = 69
"""EX_UNAVAILABLE in sysexits.h: there is no daemon to ask."""
EXIT_HUNG_UP = 141
"""128 + SIGPIPE: whoever read our output is gone, as with `mlbox log 12 | head`."""
_CHUNK = 64 << 10
_WAIT_S = 60
"""How long one request waits for the end of a job, and how long `wait` bears with a daemon that is restarting."""
_ASK_AGAIN_S = 1.0


class _Refused(Exception):
    """The daemon refused; the text is its own."""


class _Busy(OSError):
    """The daemon is there, but cannot answer now."""


class _HungUp(Exception):
    """Nobody reads our output any more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except config.BadConfig as error:
        print(f"mlbox: {error}", file=sys.stderr)
        return config.EXIT_CONFIG
    except _Refused as error:
        print(f"mlbox: {error}", file=sys.stderr)
        return 1
    except _HungUp:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return EXIT_HUNG_UP
    except (OSError, http.client.HTTPException) as error:
        print(f"mlbox: no answer from {_where(options)}: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlbox", description="Job queue and inference server for one GPU box.")
    parser.add_argument("--version", action="version", version=f"mlbox {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", _serve, "Run the daemon.")
    check = command("check-config", _check_config, "Check a configuration and show what it means.")
    for sub in (serve, check):
        sub.add_argument("--config", type=Path, help="TOML file")
        sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    for flag, key in _SERVE_FLAGS.items():
        serve.add_argument(flag, dest=key, metavar=flag[2:].upper())

    submit = command("submit", _submit, "Queue a job: mlbox submit [options] -- command.")
    for field in ("name", "project", "gpus", "cpus", "mem", "time-limit", "priority", "retries", "model", "workdir"):
        submit.add_argument(f"--{field}")
    submit.add_argument("--env", action="append", metavar="NAME=VALUE")
    submit.add_argument("--requeue", action="store_const", const="true", help="again after a crash of the box")
    submit.add_argument("--hold", action="store_const", const="true", help="wait for a release")
    submit.add_argument("--wait", action="store_true", help="wait for the end; exit with the job's own status")
    submit.add_argument("command", nargs=argparse.PARSER, help="the command line; all that follows it is its own")

    listed = command("ls", _list, "List jobs: mlbox ls [state].")
    listed.add_argument("wanted", nargs="?", help="only jobs in this state, such as queued or running")
    for name, run, text in (
        ("show", _show, "Show a job."),
        ("wait", _wait, "Wait for a job to end; exit with its own status."),
        ("cancel", _act, "Cancel a job."),
        ("retry", _act, "Submit an ended job again."),
        ("hold", _act, "Keep a waiting job from starting."),
        ("release", _act, "Let a held job start."),
    ):
        sub = command(name, run, text)
        sub.add_argument("job", type=int)
        sub.set_defaults(verb=name)
    log = command("log", _log, "Print a job's log.")
    log.add_argument("job", type=int)
    log.add_argument("-f", "--follow", action="store_true", help="go on until the job ends")
    log.add_argument("--tail", type=int, help="only the last lines")
    command("gpus", _plain("/api/gpus"), "Show the GPUs.")
    command("models", _plain("/api/models"), "Show the models.")
    token = command("token", _token, "Make a token; it is shown once.")
    token.add_argument("name")
    token.add_argument("--scope", action="append", help="read, submit, infer, deploy or admin; may be repeated")
    token.add_argument("--expires", help="such as 90d")
    command("login", _login, "Print an address that logs a browser in, once.")
    for sub in commands.choices.values():
        if sub not in (serve, check):
            sub.add_argument("--state", help="the daemon's state folder (default: that of your own daemon)")
            sub.add_argument("--json", action="store_true", help="answer as JSON")
    return parser


_SERVE_FLAGS = {
    "--state": "state",
    "--listen": "server.listen",
    "--socket": "server.socket",
    "--models": "serving.models",
    "--infer-http": "serving.http",
}


def _serve(options: argparse.Namespace) -> int:
    overrides = [f"{key}={json.dumps(value)}" for key in _SERVE_FLAGS.values() if (value := getattr(options, key))]
    settings = config.load(options.config, [*options.overrides, *overrides])
    from mlbox import daemon  # half a second of imports that the client commands do without

    return daemon.serve(settings)


def _check_config(options: argparse.Namespace) -> int:
    settings = config.load(options.config, options.overrides)
    print(
        f"good: state in {settings.state_folder}, models in {settings.models_folder}, API on {settings.server.listen}"
    )
    return 0


def _submit(options: argparse.Namespace) -> int:
    words: list[str] = options.command
    if words[0] == "--":
        words = words[1:]
    fields: dict[str, Any] = {"command": words[0] if len(words) == 1 else shlex.join(words)}
    for field in (
        "name", "project", "gpus", "cpus", "mem", "time_limit", "priority", "retries", "model", "requeue", "hold"
    ):  # fmt: skip
        if (value := getattr(options, field)) is not None:
            fields[field] = value
    if options.env:
        fields["env"] = options.env
    if options.workdir:
        fields["workdir"] = str(Path(options.workdir).absolute())
    job = _ask(options, "POST", "/api/jobs", fields)
    if not options.wait:
        return _answer(options, job, str(job["id"]))
    options.job = job["id"]
    return _wait(options, bear_s=_WAIT_S)


def _list(options: argparse.Namespace) -> int:
    query = {"state": options.wanted} if options.wanted else {}
    return _print(options, "/api/jobs?" + urlencode(query))


def _show(options: argparse.Namespace) -> int:
    return _print(options, f"/api/jobs/{options.job}")


def _plain(path: str) -> Callable[[argparse.Namespace], int]:
    return lambda options: _print(options, path)


def _wait(options: argparse.Namespace, bear_s: float = 0.0) -> int:
    """The job's own status. Jobs survive a restart of the daemon, and so does waiting for one.

    `bear_s`: how long a daemon may be away before it has answered once.
    """
    patience_until = time.monotonic() + bear_s
    while True:
        try:
            job = _ask(options, "GET", f"/api/jobs/{options.job}/wait?timeout={_WAIT_S}")
        except (OSError, http.client.HTTPException):
            if time.monotonic() >= patience_until:
                raise
            time.sleep(_ASK_AGAIN_S)
            continue
        if job["ended_at"]:
            break
        patience_until = time.monotonic() + _WAIT_S
    _answer(options, job, f"job {job['id']} {job['state']}: {job['cause']}")
    if job["state"] == "succeeded":
        return 0
    return 128 + job["signal"] if job["signal"] else job["exit_code"] or 1


def _act(options: argparse.Namespace) -> int:
    job = _ask(options, "POST", f"/api/jobs/{options.job}/{options.verb}")
    return _answer(options, job, f"job {job['id']}: {job['state']}")


def _log(options: argparse.Namespace) -> int:
    query = {"follow": "1"} if options.follow else {}
    if options.tail is not None:
        query["tail"] = str(options.tail)
    with _connection(options) as connection:
        response = _send(connection, "GET", f"/api/jobs/{options.job}/log?{urlencode(query)}", None, "text/plain")
        while chunk := response.read1(_CHUNK):
            _write(chunk)
    return 0


def _token(options: argparse.Namespace) -> int:
    fields = {"name": options.name, "scopes": options.scope or ["read", "submit", "infer"], "expires": options.expires}
    made = _ask(options, "POST", "/api/tokens", {key: value for key, value in fields.items() if value is not None})
    return _answer(options, made, made["token"])


def _login(options: argparse.Namespace) -> int:
    made = _ask(options, "POST", "/api/login-codes")
    return _answer(options, made, made["url"])


# Talking to the daemon


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("mlbox")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(os.fspath(self._path))


class _Connection:
    """An HTTP connection to the daemon, closed at the end of a `with`."""

    def __init__(self, connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
        self.http = connection
        self.headers = headers

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()


def _where(options: argparse.Namespace) -> str:
    url = os.environ.get("MLBOX_URL")
    return url if url and not options.state else str(_socket_path(options))


def _socket_path(options: argparse.Namespace) -> Path:
    """Where the daemon of that state folder says that it listens, else where it does if nothing says otherwise."""
    settings = config.load(None, [f"state={json.dumps(options.state)}"] if options.state else [])
    try:
        return Path(json.loads((settings.state_folder / "endpoints.json").read_bytes())["socket"])
    except (OSError, ValueError, LookupError, TypeError):
        return settings.socket_path


def _connection(options: argparse.Namespace) -> _Connection:
    """To `--state`'s socket, else to MLBOX_URL with MLBOX_TOKEN, else to one's own daemon's socket."""
    url = os.environ.get("MLBOX_URL")
    if options.state or not url:
        return _Connection(_UnixConnection(_socket_path(options)), {})
    token = os.environ.get("MLBOX_TOKEN", "")
    if not (token.isascii() and token.isprintable()):
        raise _Refused("MLBOX_TOKEN holds what no token does: copy it once more")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _Refused(_bad_url(url)) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _Refused(_bad_url(url))
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return _Connection(kind(parts.hostname, port), {"Authorization": f"Bearer {token}"} if token else {})


def _bad_url(url: str) -> str:
    return f"MLBOX_URL is {url!r}: it must look like http://HOST:8470"


def _send(
    connection: _Connection, method: str, path: str, fields: dict[str, Any] | None, accept: str
) -> http.client.HTTPResponse:
    headers = {"Accept": accept, **connection.headers}
    body = None
    if fields is not None:
        body, headers["Content-Type"] = json.dumps(fields), "application/json"
    connection.http.request(method, path, body, headers)
    response = connection.http.getresponse()
    if response.status >= 400:
        problem = _problem(response.read(), response.status)
        raise _Busy(problem) if response.status == 503 else _Refused(problem)
    return response


def _problem(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip() or f"the daemon answered {status}"


def _ask(options: argparse.Namespace, method: str, path: str, fields: dict[str, Any] | None = None) -> Any:
    with _connection(options) as connection:
        return json.loads(_send(connection, method, path, fields, "application/json").read())


def _print(options: argparse.Namespace, path: str) -> int:
    """Print an answer as the daemon writes it for people, or as JSON."""
    with _connection(options) as connection:
        kind = "application/json" if options.json else "text/plain"
        _write(_send(connection, "GET", path, None, kind).read())
    return 0


def _answer(options: argparse.Namespace, answer: Any, text: str) -> int:
    """Print `answer` as JSON where that is wanted, else `text`."""
    _write((json.dumps(answer, indent=2) if options.json else text).encode() + b"\n")
    return 0


def _write(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise _HungUp from None
