"""The command line: what it asks of the daemon, what it prints, and with which status it ends."""

import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from mlbox.cli import main

pytestmark = pytest.mark.slow

JOB = {"id": 7, "state": "queued", "cause": None, "exit_code": None, "signal": None, "ended_at": None}
Answer = tuple[int, str, bytes]


class StandIn(socketserver.ThreadingUnixStreamServer):
    """A daemon that keeps what it is asked and gives the answers of `answers` in turn, the last one for ever."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[Answer] = [json_answer(JOB)]
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body) if body else None))
        self.server.headers.append(dict(self.headers))
        answers = self.server.answers
        status, kind, content = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer  # noqa: N815

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


def json_answer(value: object, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLBOX_URL", raising=False)
    monkeypatch.delenv("MLBOX_TOKEN", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own"))
    return tmp_path


@pytest.fixture
def daemon(state: Path) -> Iterator[StandIn]:
    with StandIn(state / "mlbox.sock") as stand_in:
        yield stand_in
        stand_in.shutdown()


@pytest.fixture
def run(state: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a client command; answers its exit status and what it wrote to stdout and stderr."""

    def ran(command: str, *arguments: str) -> tuple[int, str, str]:
        status = main([command, "--state", str(state), *arguments])
        return status, *capsys.readouterr()

    return ran


# Submit


def test_submit_sends_what_was_asked_and_prints_the_id(daemon: StandIn, run: Any, tmp_path: Path) -> None:
    arguments = ("--name", "a", "--gpus", "2", "--mem", "20G", "--time-limit", "2h", "--env", "A=1", "--env", "B=2")
    assert run("submit", *arguments, "--requeue", "--workdir", str(tmp_path), "--", "python", "train.py") == (
        0,
        "7\n",
        "",
    )
    fields = {"name": "a", "gpus": "2", "mem": "20G", "time_limit": "2h", "env": ["A=1", "B=2"], "requeue": "true"}
    assert daemon.asked == [("POST", "/api/jobs", {"command": "python train.py", "workdir": str(tmp_path), **fields})]


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["python train.py | tee out"], "python train.py | tee out"),
        (["python", "train.py", "--lr", "3", "--name", "its own"], "python train.py --lr 3 --name 'its own'"),
        (["--", "--odd-program", "-x"], "--odd-program -x"),
        (["sh", "-c", "a; b"], "sh -c 'a; b'"),
        (["env", "--", "x"], "env -- x"),
    ],
)
def test_the_command_line_reaches_the_job_as_it_was_written(
    daemon: StandIn, run: Any, words: list[str], command: str
) -> None:
    assert run("submit", "--gpus", "1", *words)[0] == 0
    assert daemon.asked[0][2] == {"command": command, "gpus": "1"}


def test_a_submit_without_a_command_is_a_wrong_use(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("submit", "--gpus", "1")
    assert exit_.value.code == 2
    assert "command" in capsys.readouterr().err


# Exit statuses


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ({"state": "succeeded", "exit_code": 0}, 0),
        ({"state": "failed", "exit_code": 3}, 3),
        ({"state": "failed", "signal": 9}, 137),
        ({"state": "failed"}, 1),
        ({"state": "cancelled"}, 1),
        ({"state": "cancelled", "exit_code": 0}, 1),
        ({"state": "cancelled", "signal": 15}, 143),
        ({"state": "failed", "exit_code": 0}, 1),
    ],
)
@pytest.mark.parametrize("command", [["wait", "7"], ["submit", "--wait", "--", "true"]])
def test_waiting_ends_with_the_jobs_own_status(
    daemon: StandIn, run: Any, command: list[str], end: dict[str, Any], status: int
) -> None:
    ended = JOB | {"ended_at": "2026-01-01T00:00:00Z", "cause": "because"} | end
    daemon.answers = [json_answer(JOB), json_answer(JOB), json_answer(ended)]
    assert run(*command) == (status, f"job 7 {end['state']}: because\n", "")


def test_waiting_bears_with_a_daemon_that_is_restarting(
    daemon: StandIn, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlbox.cli._ASK_AGAIN_S", 0.01)
    ended = JOB | {"ended_at": "2026-01-01T00:00:00Z", "state": "succeeded", "exit_code": 0}
    stopping = json_answer({"detail": "mlbox is stopping"}, 503)
    daemon.answers = [json_answer(JOB), stopping, stopping, json_answer(ended)]
    assert run("wait", "7")[0] == 0
    assert len(daemon.asked) == 4


def test_nobody_there_is_told_from_a_refusal(state: Path, run: Any) -> None:
    status, _, told = run("ls")
    assert status == 69
    assert told.startswith(f"mlbox: no answer from {state / 'mlbox.sock'}: ")


def test_a_daemon_that_was_never_there_is_not_waited_for(run: Any) -> None:
    assert run("wait", "7")[0] == 69


def test_a_refusal_is_told_in_the_daemons_words(daemon: StandIn, run: Any) -> None:
    daemon.answers = [json_answer({"detail": "there is no job 7 that you may see"}, 404)]
    assert run("show", "7") == (1, "", "mlbox: there is no job 7 that you may see\n")
    daemon.answers = [(502, "text/html", b"")]
    assert run("show", "7") == (1, "", "mlbox: the daemon answered 502\n")


def test_a_bad_configuration_ends_with_78(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = state / "mlbox.toml"
    file.write_text("[scheduler]\ncpu_slot = 3\n")
    for command in ("serve", "check-config"):
        assert main([command, "--config", str(file)]) == 78
        assert f"{file}:2: 'scheduler.cpu_slot' is an unknown key; did you mean 'cpu_slots'?" in capsys.readouterr().err


def test_a_good_configuration_is_shown(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-config", "--set", "server.listen=127.0.0.1:0", "--set", f"state={state}"]) == 0
    assert capsys.readouterr().out == f"good: state in {state}, models in {state}/models, API on 127.0.0.1:0\n"


def test_output_that_nobody_reads_any_more_ends_quietly(daemon: StandIn, state: Path) -> None:
    daemon.answers = [(200, "text/plain", b"x" * (8 << 20))]
    with subprocess.Popen(
        [sys.executable, "-m", "mlbox", "log", "7", "--state", state], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as log:
        assert log.stdout is not None
        assert log.stderr is not None
        assert log.stdout.read(1) == b"x"
        log.stdout.close()
        assert (log.wait(20), log.stderr.read()) == (141, b"")


# Requests


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["ls"], ("GET", "/api/jobs?", None)),
        (["ls", "running"], ("GET", "/api/jobs?state=running", None)),
        (["show", "7"], ("GET", "/api/jobs/7", None)),
        (["cancel", "7"], ("POST", "/api/jobs/7/cancel", None)),
        (["retry", "7"], ("POST", "/api/jobs/7/retry", None)),
        (["hold", "7"], ("POST", "/api/jobs/7/hold", None)),
        (["release", "7"], ("POST", "/api/jobs/7/release", None)),
        (["log", "7", "--tail", "5", "-f"], ("GET", "/api/jobs/7/log?follow=1&tail=5", None)),
        (["gpus"], ("GET", "/api/gpus", None)),
        (["models"], ("GET", "/api/models", None)),
    ],
)
def test_each_command_is_one_request(
    daemon: StandIn, run: Any, command: list[str], asked: tuple[str, str, Any]
) -> None:
    assert run(*command)[0] == 0
    assert daemon.asked == [asked]


def test_a_token_and_a_login_are_printed_bare(daemon: StandIn, run: Any) -> None:
    daemon.answers = [json_answer({"token": "mlbx_x"}), json_answer({"url": "http://127.0.0.1/login?code=x"})]
    assert run("token", "ci", "--scope", "infer", "--expires", "90d") == (0, "mlbx_x\n", "")
    assert run("login") == (0, "http://127.0.0.1/login?code=x\n", "")
    assert daemon.asked[0] == ("POST", "/api/tokens", {"name": "ci", "scopes": ["infer"], "expires": "90d"})


def test_json_is_asked_for_and_printed(daemon: StandIn, run: Any) -> None:
    status, out, _ = run("submit", "--json", "--", "true")
    assert (status, json.loads(out)) == (0, JOB)
    run("ls", "--json")
    assert daemon.headers[-1]["Accept"] == "application/json"
    run("ls")
    assert daemon.headers[-1]["Accept"] == "text/plain"


def test_a_log_is_printed_byte_by_byte_as_it_is(daemon: StandIn, state: Path) -> None:
    content = bytes(range(256)) * 1000
    daemon.answers = [(200, "text/plain", content)]
    log = subprocess.run([sys.executable, "-m", "mlbox", "log", "7", "--state", state], capture_output=True)
    assert (log.returncode, log.stdout) == (0, content)


# Where to


def test_a_daemon_is_found_where_its_state_folder_says(state: Path, run: Any) -> None:
    elsewhere = state / "elsewhere.sock"
    (state / "endpoints.json").write_text(json.dumps({"socket": str(elsewhere)}))
    with StandIn(elsewhere) as stand_in:
        assert run("ls")[0] == 0
        assert len(stand_in.asked) == 1
        stand_in.shutdown()


def test_ones_own_daemon_is_asked_where_nothing_else_is_said(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = state / "own" / "mlbox"
    own.mkdir(parents=True)
    with StandIn(own / "mlbox.sock") as stand_in:
        assert main(["ls"]) == 0
        assert len(stand_in.asked) == 1
        stand_in.shutdown()


@pytest.mark.parametrize(
    "url", ["mlbox:8470", "ftp://box", "http://", "http://box:99999", "http://[box", "http://box:x"]
)
def test_an_address_that_is_none_is_refused(
    state: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLBOX_URL", url)
    assert main(["ls"]) == 1
    assert capsys.readouterr().err == f"mlbox: MLBOX_URL is {url!r}: it must look like http://HOST:8470\n"


@pytest.mark.parametrize("token", ["mlbx_x\n", "mlbx_\u00e9", "mlbx_\u20ac"])
def test_a_token_that_is_none_is_refused(
    state: Path, token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLBOX_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MLBOX_TOKEN", token)
    assert main(["ls"]) == 1
    assert capsys.readouterr().err == "mlbox: MLBOX_TOKEN holds what no token does: copy it once more\n"


def test_a_client_command_loads_nothing_of_the_daemon(daemon: StandIn, state: Path) -> None:
    """Neither web server nor database: it starts in a tenth of the time."""
    program = "import sys; from mlbox.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program, "ls", "--state", state], capture_output=True, text=True)
    assert ran.returncode == 0
    loaded = ran.stderr.split()
    assert "mlbox.cli" in loaded
    assert not {"uvicorn", "starlette", "aiosqlite", "mlbox.daemon", "mlbox.database"} & set(loaded)
