"""The command line: what it asks of the daemon, what it prints, and with which status it ends."""

import email
import io
import json
import os
import pty
import re
import socketserver
import subprocess
import sys
import tarfile
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
        form = self.headers.get("Content-Type", "").startswith("multipart/")
        self.server.asked.append((self.command, self.path, body if form else json.loads(body) if body else None))
        self.server.headers.append(dict(self.headers))
        answers = self.server.answers
        status, kind, content = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = _answer  # noqa: N815

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


def test_every_field_of_a_submit_has_its_flag(daemon: StandIn, run: Any) -> None:
    arguments = (
        "--gpu-mem", "20G", "--grace", "60", "--preemptible", "--depends-on", "12", "--depends-on", "afterany:13",
        "--array", "0-9", "--at-once", "2", "--launch", "torchrun", "--not-before", "2027-01-31T18:00:00Z",
        "--notify", "a@b", "--notify-on", "begin", "--signal", "USR1@120", "--output", "out.txt", "--error", "err.txt",
        "--matrix", "lr=0.1,0.2", "--matrix", '{"seed": ["1"]}',
    )  # fmt: skip
    assert run("submit", *arguments, "true")[0] == 0
    assert daemon.asked[0][2] == {
        "command": "true", "gpu_mem": "20G", "grace_s": "60", "preemptible": "true",
        "depends_on": ["12", "afterany:13"], "array": "0-9", "at_once": "2", "launch": "torchrun",
        "not_before": "2027-01-31T18:00:00Z", "notify": ["a@b"], "notify_on": ["begin"], "signal": "USR1@120",
        "output": "out.txt", "error": "err.txt", "matrix": {"lr": ["0.1", "0.2"], "seed": ["1"]},
    }  # fmt: skip


def test_a_script_takes_the_place_of_the_command(daemon: StandIn, run: Any, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("#!/bin/sh\necho hello\n")
    assert run("submit", "--script", str(script), "--gpus", "1")[0] == 0
    assert daemon.asked == [("POST", "/api/jobs", {"script": script.read_text(), "gpus": "1"})]
    with pytest.raises(SystemExit):
        run("submit", "--script", str(script), "--", "true")
    with pytest.raises(SystemExit):
        run("submit", "--script", str(tmp_path / "none"))


def test_code_is_sent_as_an_archive_of_what_is_in_the_folder(daemon: StandIn, run: Any, tmp_path: Path) -> None:
    code = tmp_path / "code"
    (code / "lib").mkdir(parents=True)
    (code / "train.py").write_text("print(1)")
    (code / "lib" / "a.py").touch()
    assert run("submit", "--code", str(code), "--env", "A=1", "--env", "B=2", "--", "python", "train.py")[0] == 0
    kind = daemon.headers[0]["Content-Type"]
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + daemon.asked[0][2])
    parts = [
        (part.get_param("name", header="content-disposition"), part.get_payload(decode=True))
        for part in message.walk()
        if not part.is_multipart()
    ]
    assert [name for name, _ in parts] == ["command", "env", "env", "code"]
    with tarfile.open(fileobj=io.BytesIO(parts[-1][1])) as archive:  # type: ignore[arg-type]  # bytes, as decoded
        assert sorted(archive.getnames()) == ["lib", "lib/a.py", "train.py"]


def test_following_shows_the_log_and_ends_with_the_jobs_own_status(daemon: StandIn, run: Any) -> None:
    ended = JOB | {"ended_at": "2026-01-01T00:00:00Z", "cause": "because", "state": "failed", "exit_code": 3}
    daemon.answers = [json_answer(JOB), (200, "text/plain", b"hello\n"), json_answer(ended)]
    assert run("submit", "--follow", "--", "x") == (3, "hello\njob 7 failed: because\n", "")


def test_waiting_for_an_array_waits_for_each_element(daemon: StandIn, run: Any) -> None:
    first = JOB | {"array": {"id": 7, "index": 0, "size": 2, "at_once": None}}
    end = {"ended_at": "2026-01-01T00:00:00Z", "cause": None}
    daemon.answers = [
        json_answer(first),
        json_answer(JOB | end | {"state": "succeeded"}),
        json_answer(JOB | end | {"id": 8, "state": "failed", "exit_code": 4}),
    ]
    assert run("submit", "--array", "0-1", "--wait", "x")[0] == 4
    assert [path for _, path, _ in daemon.asked[1:]] == ["/api/jobs/7/wait?timeout=60", "/api/jobs/8/wait?timeout=60"]


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
    monkeypatch.setattr("mlbox.cli.jobs.ASK_AGAIN_S", 0.01)
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
        (
            ["ls", "queued", "running", "--user", "a", "--array", "7"],
            ("GET", "/api/jobs?state=queued&state=running&user=a&array=7", None),
        ),
        (["rank", "7"], ("GET", "/api/jobs/7/rank", None)),
        (["clone", "7"], ("POST", "/api/jobs/7/clone", None)),
        (["queue"], ("GET", "/api/queue", None)),
        (["notices"], ("GET", "/api/notices", None)),
        (["plan", "--json"], ("GET", "/api/plan", None)),
        (["usage", "--since", "30d"], ("GET", "/api/usage?since=30d", None)),
        (["reservations"], ("GET", "/api/reservations", None)),
        (["reservations", "--cancel", "3"], ("DELETE", "/api/reservations/3", None)),
    ],
)
def test_each_command_is_one_request(
    daemon: StandIn, run: Any, command: list[str], asked: tuple[str, str, Any]
) -> None:
    assert run(*command)[0] == 0
    assert daemon.asked == [asked]


GPUS = {
    "gpus": [
        {"uuid": f"GPU-{letter}", "index": index, "label": str(index), "state": state, "utilization": 97,
         "memory_mib": 81920, "used_mib": 40960, "why": f"job {index} holds it"}
        for index, (letter, state) in enumerate([("a", "leased"), ("b", "foreign")])
    ],
    "message": "NVML is fine",
    "cpu_slots": {"total": 4, "free": 3},
}  # fmt: skip


def test_several_jobs_elements_and_whole_arrays_are_named_in_one_go(daemon: StandIn, run: Any) -> None:
    daemon.answers = [json_answer(JOB), json_answer({"jobs": [JOB, JOB | {"id": 8}]})]
    assert run("cancel", "7", "7_*") == (0, "job 7: queued\njob 7: queued\njob 8: queued\n", "")
    assert [path for _, path, _ in daemon.asked] == ["/api/jobs/7/cancel", "/api/arrays/7/cancel"]
    daemon.answers = [json_answer({"detail": "job 5 has ended"}, 409), json_answer(JOB)]
    assert run("hold", "5", "7") == (1, "job 7: queued\n", "mlbox: job 5 has ended\n")
    elements = [JOB | {"id": 7 + index, "array": {"id": 7, "index": index * 10}} for index in range(3)]
    daemon.answers = [json_answer({"jobs": elements, "next": None}), json_answer(JOB)]
    assert run("show", "7_20")[0] == 0
    assert daemon.asked[-1][1] == "/api/jobs/9"
    daemon.answers = [json_answer({"jobs": elements, "next": None})]
    assert run("show", "7_5") == (1, "", "mlbox: there is no job 7_5 that you may see\n")
    assert run("show", "7_*")[0] == 1
    with pytest.raises(SystemExit):
        run("show", "seven")


def test_gpus_are_named_by_index_uuid_or_all(daemon: StandIn, run: Any) -> None:
    daemon.answers = [json_answer(GPUS), json_answer(GPUS["gpus"][0]), json_answer(GPUS["gpus"][1])]
    assert run("drain", "all", "--reason", "dust") == (0, "GPU 0: leased\nGPU 1: foreign\n", "")
    assert daemon.asked[1:] == [
        ("POST", "/api/gpus/GPU-a/drain", {"reason": "dust"}),
        ("POST", "/api/gpus/GPU-b/drain", {"reason": "dust"}),
    ]
    daemon.answers = [json_answer(GPUS), json_answer(JOB)]
    assert run("adopt", "GPU-b", "--pid", "42", "--time-limit", "2h") == (0, "7\n", "")
    assert daemon.asked[-1] == ("POST", "/api/gpus/GPU-b/adopt", {"pid": 42, "time_limit": "2h"})
    daemon.answers = [json_answer(GPUS)]
    assert run("resume", "7") == (1, "", "mlbox: there is no GPU 7 here; known: 0 (GPU-a), 1 (GPU-b)\n")


def test_a_reservation_names_its_gpus_and_its_time(daemon: StandIn, run: Any) -> None:
    made = {"id": 3, "starts_at": "2027-01-31T18:00:00Z", "ends_at": "2027-01-31T22:00:00Z"}
    daemon.answers = [json_answer(GPUS), json_answer(made)]
    status, out, _ = run("reserve", "bob", "--gpus", "1", "--from", "2027-01-31T18:00Z", "--for", "4h", "--user", "bob")
    assert (status, out) == (0, "reservation 3: 2027-01-31T18:00:00Z to 2027-01-31T22:00:00Z\n")
    assert daemon.asked[-1][2] == {
        "name": "bob", "gpus": ["GPU-b"], "starts_at": "2027-01-31T18:00Z", "duration": "4h", "for_user": "bob"
    }  # fmt: skip


RUNNING = JOB | {
    "id": 0, "name": "training", "user": "alice", "gpu_uuids": ["GPU-a"], "started_at": "2026-01-01T00:00:00Z",
    "time_limit_s": 7200.0, "command": "python train.py \x1b[2J", "state": "running",
}  # fmt: skip
WAITING = {
    "id": 12, "name": "next-one", "user": "bob", "gpus": 2, "gpu_mem_mib": None,
    "pending": {"why": "it needs 2 GPUs, 1 is free of 2", "position": 1, "estimated_start": "2026-01-01T14:10:00Z"},
}  # fmt: skip


def test_top_is_printed_once_where_nobody_watches(daemon: StandIn, run: Any) -> None:
    daemon.answers = [json_answer(GPUS), json_answer({"jobs": [RUNNING]}), json_answer({"jobs": [WAITING]})]
    status, out, _ = run("top")
    assert status == 0
    for shown in ("GPU 0", "97 %", "40/80 GiB", "0 training (alice)", "job 1 holds it", "1 of 4 CPU slots in use",
                  "python train.py", "next-one", "2 GPUs", "it needs 2 GPUs"):  # fmt: skip
        assert shown in out, shown
    assert "\x1b" not in out
    daemon.answers = [json_answer(GPUS), json_answer({"jobs": []}), json_answer({"jobs": []})]
    assert "nothing runs" in run("top")[1]


def test_top_draws_in_a_terminal_until_q_and_puts_it_back(daemon: StandIn, state: Path) -> None:
    daemon.answers = [json_answer(GPUS), json_answer({"jobs": [RUNNING]}), json_answer({"jobs": []})]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlbox", "top", "--state", state]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE) as top:
        os.close(theirs)
        shown = b""
        while b"training" not in shown or b"\x1b[J" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"q")
        while b"\x1b[?1049l" not in shown:
            shown += os.read(ours, 4096)
        assert top.wait(20) == 0
    os.close(ours)
    assert shown.startswith(b"\x1b[?1049h")


# Completion


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    text = " ".join(f"'{word}'" for word in words)
    program = (
        f". {script}; COMP_WORDS=({text}); COMP_CWORD={len(words) - 1}; _mlbox; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_flags_and_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "mlbox.bash"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "mlbox", "dr") == ["drain"]
    assert completed(script, "mlbox", "submit", "--gpu") == ["--gpus", "--gpu-mem"]
    assert completed(script, "mlbox", "submit", "--launch", "") == ["plain", "torchrun"]
    assert completed(script, "mlbox", "ls", "ru") == ["running"]
    assert completed(script, "mlbox", "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in ("submit", "reservations", "simulate"):
        assert re.search(rf"\b{command}\b", script)


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
