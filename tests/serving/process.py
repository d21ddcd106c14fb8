"""A real inference server: a process of its own on a socket that the test holds, asked over HTTP."""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx

from mlbox.identity import new_token
from mlbox.transport import listen_tcp
from tests.serving.onnx_models import save

T = TypeVar("T")
PATIENCE_S = 20.0


def eventually(what: str, probe: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The first truthy answer of `probe`; fails with `what` when none comes."""
    until = time.monotonic() + patience_s
    while not (answer := probe()):
        if time.monotonic() > until:
            raise AssertionError(f"did not happen within {patience_s:g} s: {what}")
        time.sleep(0.02)
    return answer


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


@dataclass
class InferenceServer:
    """One server process on its own folders below `root`. The socket is the test's: it outlives the process."""

    root: Path
    options: tuple[str, ...] = ()
    token: str = field(default_factory=new_token)
    process: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.models = self.root / "models"
        self.store = self.root / "store"
        self.access = self.root / "access.json"
        self.log = self.root / "server.log"
        self.models.mkdir(exist_ok=True)
        self.listener: socket.socket = listen_tcp("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.parent_read, self.parent_write = os.pipe()
        self.allow({self.token: ["admin"]})

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def allow(self, tokens: Mapping[str, list[str]], expires: float | None = None) -> None:
        """Replace the access file, as the daemon does it."""
        listed = [
            {"sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": scopes, "expires": expires}
            for token, scopes in tokens.items()
        ]
        new = self.access.with_suffix(".new")
        new.write_text(json.dumps({"tokens": listed}))
        new.chmod(0o600)
        new.replace(self.access)

    def start(self, *, wait: bool = True) -> "InferenceServer":
        command = [sys.executable, "-m", "mlbox.serving.server", "--fd", str(self.listener.fileno())]
        command += ["--models", str(self.models), "--store", str(self.store), "--access", str(self.access)]
        command += ["--parent-fd", str(self.parent_read), "--gpu", "never", "--settle", "0.15", *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=log, pass_fds=(self.listener.fileno(), self.parent_read)
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        eventually("the server is ready", self.is_ready)

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get("/v2/health/ready").status == 200
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        """End the process, and see to it that nothing went wrong in it that no client noticed."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            finally:
                self.process.kill()
                self.process.wait(20)
        self.listener.close()
        for fd in (self.parent_read, self.parent_write):
            with suppress(OSError):
                os.close(fd)
        if self.log.exists():
            assert "Traceback" not in self.log.read_text(), self.log.read_text()

    # Requests

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, {**self.authorization, **(headers or {})})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, value: Any = None, headers: Mapping[str, str] | None = None) -> Reply:
        body = value if isinstance(value, bytes) else b"" if value is None else json.dumps(value).encode()
        return self.ask("POST", path, body, headers)

    def infer(self, model: str, inputs: Mapping[str, tuple[str, list[int], Any]], **fields: Any) -> Reply:
        listed = [
            {"name": name, "datatype": kind, "shape": shape, "data": data}
            for name, (kind, shape, data) in inputs.items()
        ]
        return self.post(f"/v2/models/{model}/infer", {"inputs": listed, **fields})

    def add(self, model: str, row: list[float] | None = None) -> Reply:
        """Ask an `adder` of width 4."""
        return self.infer(model, {"x": ("FP32", [1, 4], row or [0.0] * 4)})

    # The model folder

    def place(self, made: onnx.ModelProto, name: str, version: int = 1, *, external: str | None = None) -> Path:
        """Put a version into the model folder the right way: written elsewhere, renamed into place."""
        hidden = self.models / f".new-{name}-{version}"
        save(made, hidden, external=external)
        target = self.models / name / str(version)
        target.parent.mkdir(exist_ok=True)
        hidden.rename(target)
        return target / "model.onnx"

    def index(self) -> dict[tuple[str, str | None], dict[str, str]]:
        return {(row["name"], row.get("version")): row for row in self.post("/v2/repository/index").json}

    def is_loaded(self, name: str, version: int = 1) -> bool:
        return self.get(f"/v2/models/{name}/versions/{version}/ready").status == 200

    def wait_loaded(self, name: str, version: int = 1) -> None:
        eventually(f"{name}/{version} is ready", lambda: self.is_loaded(name, version))

    def wait_reason(self, name: str, text: str, version: int = 1) -> dict[str, str]:
        def row() -> dict[str, str] | None:
            found = self.index().get((name, str(version)))
            return found if found and text in found["reason"] else None

        return eventually(f"{name}/{version} has the reason {text!r}", row)
