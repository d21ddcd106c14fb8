"""The local executor through its contract: start, watch, stop, adopt, clean up; and that it touches nobody else's."""

import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.base import CouldNotStart, Executor, Liveness, Stopped
from mlbox.scheduler.executors.local import LocalExecutor
from tests.scheduler.attempts import Attempt, runs, wait_until

pytestmark = pytest.mark.slow

HIDER = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve("/bin/sh", ["sh", "-c", "trap '' TERM HUP; echo $$ > hidden; while :; do sleep 0.05; done"], {})
    os._exit(0)
time.sleep(60)
"""
"""A job with a daemon that has left its session and forgotten its environment."""

T = TypeVar("T")


def bound_socket(path: Path) -> None:
    at = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{at}/{path.name}")  # the path itself may be longer than a socket's may be
    os.close(at)


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "loop": lambda path: path.symlink_to(path.name),
    "link to a fifo": lambda path: (os.mkfifo(f"{path}.fifo"), path.symlink_to(f"{path}.fifo")),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": bound_socket,
}
"""What a job can put where the shim's files are."""


def restarted(attempt: Attempt) -> LocalExecutor:
    """The executor of a daemon that knows of the attempt only what its folder says."""
    attempt.executor = LocalExecutor(cgroups=attempt.observe().started.cgroup is not None)
    return attempt.executor


def restarted_without_cgroup(attempt: Attempt) -> LocalExecutor:
    """The executor of a daemon that cannot even read where the attempt's cgroup is."""
    attempt.executor = LocalExecutor(cgroups=False)
    return attempt.executor


def at_once(ask: Callable[[], T]) -> T:
    """What `ask` answers, on a thread of its own that may be left hanging."""
    answers: list[T] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(10)
    assert answers, "no answer: it hangs, or it failed"
    return answers[0]


def readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_it_fulfils_the_contract_of_executors(executor):
    contract: Executor = executor
    assert contract is executor


class TestTheLifeOfAnAttempt:
    def test_it_is_not_started_then_alive_then_ended(self, attempt):
        assert attempt.observe().liveness is Liveness.NOT_STARTED
        attempt.shell("while [ ! -e go ]; do sleep 0.01; done; exit 3")
        assert attempt.observe().liveness is Liveness.ALIVE  # before the shim took its lock, too
        attempt.wait_started()
        observed = attempt.observe()
        assert (observed.liveness, observed.exit, observed.same_boot) == (Liveness.ALIVE, None, True)
        (attempt.work / "go").touch()
        observed = attempt.wait_liveness(Liveness.ENDED)
        assert observed.exit.exit_code == 3
        assert observed.started.pid > 0

    def test_the_end_is_told_by_a_descriptor(self, attempt):
        attempt.shell("while [ ! -e go ]; do sleep 0.01; done")
        end = attempt.executor.end_fd(attempt.folder)
        attempt.wait_started()
        assert not readable(end, 0.05)
        (attempt.work / "go").touch()
        assert readable(end, 20)
        os.close(end)
        assert attempt.observe().liveness is Liveness.ENDED

    def test_no_descriptor_for_what_is_not_alive(self, attempt):
        assert attempt.executor.end_fd(attempt.folder) is None
        attempt.run("/bin/true")
        assert attempt.executor.end_fd(attempt.folder) is None

    def test_an_ended_shim_leaves_no_zombie(self, attempt):
        attempt.run("/bin/true")
        assert processes.find(attempt.observe().started.shim_pid) is None

    def test_a_folder_that_is_not_there_could_not_start(self, attempt):
        launch = attempt.launch("/bin/true")
        attempt.work.rmdir()
        attempt.folder.rmdir()
        with pytest.raises(CouldNotStart, match="mlbox-job-12-1: cannot start a shim"):
            attempt.executor.start(launch)

    def test_a_key_that_is_not_in_the_environment_is_refused(self, attempt):
        with pytest.raises(ValueError, match="MLBOX_ATTEMPT_KEY"):
            attempt.start("/bin/true", env={"MLBOX_ATTEMPT_KEY": "another"})

    def test_starting_twice_runs_user_code_once(self, attempt):
        attempt.shell("echo x >> runs; while [ ! -e go ]; do sleep 0.01; done")
        attempt.shell("echo y >> runs")
        wait_until((attempt.work / "runs").exists)
        restarted(attempt).start(attempt.launch("/bin/sh", "-c", "echo z >> runs"))
        wait_until(lambda: attempt.observe().started and len(attempt.shims()) == 1)
        assert attempt.observe().liveness is Liveness.ALIVE
        (attempt.work / "go").touch()
        attempt.wait_end()
        attempt.start("/bin/sh", "-c", "echo again >> runs")
        attempt.wait_end()
        assert (attempt.work / "runs").read_text() == "x\n"

    def test_two_daemons_that_start_one_attempt_run_it_once(self, attempt, tmp_path):
        other = LocalExecutor()
        launch = attempt.launch("/bin/sh", "-c", "echo x >> runs")
        starts = [threading.Thread(target=x.start, args=(launch,)) for x in (attempt.executor, other)]
        for start in starts:
            start.start()
        for start in starts:
            start.join()
        wait_until(lambda: other.observe(attempt.folder).liveness is Liveness.ENDED)
        attempt.wait_end()
        assert (attempt.work / "runs").read_text() == "x\n"


class TestTheTemplate:
    """Shims are copies of one process; whatever becomes of it, attempts start and go on."""

    def template(self, attempt) -> int:
        return attempt.executor._template.pid

    def test_a_shim_is_our_own_child_and_named_after_its_job(self, attempt):
        attempt.shell("echo on > begun; sleep 60")
        attempt.wait_for("begun")
        shim = attempt.observe().started.shim_pid
        assert processes.find(shim).parent == os.getpid()
        assert processes.find(shim).group == shim
        assert Path(f"/proc/{shim}/comm").read_text() == "mlbox-12-1\n"

    def test_a_shim_started_from_nothing_is_the_same(self, attempt):
        attempt.executor = LocalExecutor(template=False)
        assert attempt.shell("echo hi; exit 3").wait_end().exit_code == 3
        assert attempt.log() == b"hi\n"
        assert attempt.executor._template is None

    @pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP], ids=str)
    def test_one_that_does_not_answer_is_done_without(self, new_attempt, monkeypatch, trouble):
        monkeypatch.setattr("mlbox.scheduler.executors.template._PATIENCE_S", 0.2)
        first, second = new_attempt(), new_attempt()
        first.shell("echo on > begun; while [ ! -e go ]; do sleep 0.01; done")
        first.wait_for("begun")
        template = self.template(first)
        first.executor._template._socket.settimeout(0.2)
        os.kill(template, trouble)
        assert second.shell("exit 4").wait_end().exit_code == 4
        assert processes.find(template) is None
        (first.work / "go").touch()
        assert first.wait_end().exit_code == 0

    def test_there_is_a_new_one_after_a_while(self, new_attempt, monkeypatch):
        monkeypatch.setattr("mlbox.scheduler.executors.local._TEMPLATE_PAUSE_S", 0.0)
        attempts = [new_attempt() for _ in range(3)]
        attempts[0].run("/bin/true")
        before = self.template(attempts[0])
        os.kill(before, signal.SIGKILL)
        attempts[1].run("/bin/true")
        attempts[2].run("/bin/true")
        assert self.template(attempts[2]) != before

    def test_it_ends_with_its_executor(self, attempt):
        attempt.executor = LocalExecutor()
        attempt.run("/bin/true")
        template = self.template(attempt)
        attempt.executor = LocalExecutor(template=False)
        gc.collect()
        assert processes.find(template) is None

    def test_what_a_shim_has_to_complain_about_is_kept(self, attempt):
        launch = attempt.launch("/bin/true")
        (attempt.folder / "lock").mkdir()
        attempt.executor.start(launch)
        wait_until(lambda: attempt.observe().liveness is Liveness.NOT_STARTED)
        assert "IsADirectoryError" in wait_until((attempt.folder / "shim.log").read_text)


class TestAfterARestart:
    def test_a_running_attempt_is_adopted(self, attempt):
        attempt.shell("echo on > begun; while [ ! -e go ]; do sleep 0.01; done; exit 4")
        attempt.wait_for("begun")
        executor = restarted(attempt)
        assert attempt.observe().liveness is Liveness.ALIVE
        end = executor.end_fd(attempt.folder)
        assert not readable(end, 0)
        (attempt.work / "go").touch()
        assert readable(end, 20)
        os.close(end)
        assert attempt.wait_end().exit_code == 4

    def test_an_adopted_attempt_can_be_stopped(self, attempt):
        attempt.shell("echo on > begun; sleep 60")
        attempt.wait_for("begun")
        restarted(attempt).stop(attempt.folder)
        assert attempt.wait_end().stopped is Stopped.CANCEL

    def test_a_job_outlives_the_daemon(self, attempt):
        """A daemon of its own starts the job and is killed with its whole process group."""
        program = f"""
import sys, os, signal
from pathlib import Path
from mlbox.scheduler.executors.base import Launch
from mlbox.scheduler.executors.local import LocalExecutor
LocalExecutor().start(Launch(handle="mlbox-job-12-1", key={attempt.key!r}, folder=Path({str(attempt.folder)!r}),
    argv=("/bin/sh", "-c", "echo on > begun; while [ ! -e go ]; do sleep 0.01; done; exit 8"),
    cwd=Path({str(attempt.work)!r}), env={{"PATH": "/bin", "MLBOX_ATTEMPT_KEY": {attempt.key!r}}}))
while not Path({str(attempt.work / "begun")!r}).exists(): pass
os.killpg(0, signal.SIGKILL)
"""
        attempt.work.mkdir()
        daemon = subprocess.run([sys.executable, "-c", program], process_group=0)
        assert daemon.returncode == -signal.SIGKILL
        assert attempt.observe().liveness is Liveness.ALIVE
        (attempt.work / "go").touch()
        assert attempt.wait_end().exit_code == 8

    def test_another_boot_is_told(self, attempt, tmp_path, monkeypatch):
        attempt.run("/bin/true")
        assert attempt.observe().same_boot
        (tmp_path / "boot_id").write_text("another-boot\n")
        monkeypatch.setenv("MLBOX_BOOT_ID_PATH", str(tmp_path / "boot_id"))
        assert not attempt.observe().same_boot

    def test_a_recycled_pid_is_not_taken_for_the_shim(self, attempt):
        bystander = subprocess.Popen(["/bin/sleep", "60"])
        try:
            lock = attempt.folder / "lock"
            ticks = processes.find(bystander.pid).ticks
            lock.write_text(f"{bystander.pid} {ticks - 1}\n")
            with lock.open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                assert attempt.observe().liveness is Liveness.ALIVE
                assert attempt.executor.end_fd(attempt.folder) is None
                attempt.executor.stop(attempt.folder, kill=True)
            lock.write_text(f"{bystander.pid} {ticks}\n")  # the very process, but it holds no lock
            attempt.executor.stop(attempt.folder, kill=True)
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_a_record_that_no_shim_wrote_counts_as_missing(self, attempt, caplog):
        attempt.run("/bin/true")
        good = json.loads((attempt.folder / "exit.json").read_text())
        for field, forged in (("exit_code", "zero"), ("exit_code", 10**30), ("signal", 0), ("log_bytes", 2**63)):
            (attempt.folder / "exit.json").write_text(json.dumps({**good, field: forged}))
            assert attempt.observe().liveness is Liveness.VANISHED
            assert "exit.json: not a record" in caplog.text
            caplog.clear()

    @pytest.mark.parametrize("name", ["started.json", "exit.json", "lock"])
    @pytest.mark.parametrize("kind", IN_THE_WAY)
    def test_what_a_job_puts_in_place_of_a_record_holds_nobody(self, attempt, name, kind):
        attempt.run("/bin/true")
        restarted(attempt)
        (attempt.folder / name).unlink()
        IN_THE_WAY[kind](attempt.folder / name)
        observed = at_once(attempt.observe)
        assert observed.liveness is (Liveness.VANISHED if name == "exit.json" else Liveness.ENDED)
        assert (observed.started is None, observed.exit is None) == (name == "started.json", name == "exit.json")
        assert at_once(lambda: attempt.executor.end_fd(attempt.folder)) is None
        assert at_once(attempt.processes) == frozenset()
        at_once(lambda: attempt.executor.stop(attempt.folder))

    @pytest.mark.parametrize("kind", IN_THE_WAY)
    def test_an_attempt_whose_records_are_all_replaced_has_vanished(self, attempt, kind):
        """Not "never started": the shim would not run it again."""
        attempt.run("/bin/true")
        for name in ("started.json", "exit.json", "lock"):
            (attempt.folder / name).unlink()
            IN_THE_WAY[kind](attempt.folder / name)
        assert at_once(attempt.observe).liveness is Liveness.VANISHED
        assert at_once(lambda: attempt.executor.kill_remains(attempt.folder, attempt.key)) == frozenset()

    def test_a_running_attempt_that_replaced_its_records_is_alive(self, attempt):
        attempt.shell(
            "while [ ! -e ../started.json ]; do sleep 0.01; done; rm ../started.json;"
            " mkfifo ../started.json ../exit.json; echo on > begun; while [ ! -e go ]; do sleep 0.01; done"
        )
        attempt.wait_for("begun")
        observed = at_once(attempt.observe)
        assert (observed.liveness, observed.started, observed.exit) == (Liveness.ALIVE, None, None)
        assert at_once(lambda: restarted_without_cgroup(attempt).observe(attempt.folder)).liveness is Liveness.ALIVE
        (attempt.work / "go").touch()
        assert attempt.wait_end().exit_code == 0

    @pytest.mark.parametrize("record", [b"[" * 60_000, b'{"x":' * 10_000, b" " * (1 << 20) + b"{}", b"\xff\0", b""])
    def test_a_record_of_any_bytes_is_no_trouble(self, attempt, record):
        attempt.run("/bin/true")
        for name in ("started.json", "exit.json"):
            (attempt.folder / name).write_bytes(record)
        assert attempt.observe().liveness is Liveness.VANISHED

    def test_a_made_up_cgroup_is_let_be(self, attempt, tmp_path):
        attempt.run("/bin/true")
        forged = tmp_path / f"forged.{attempt.key}"
        (forged / "empty").mkdir(parents=True)
        for name in ("cgroup.procs", "cgroup.kill"):
            os.mkfifo(forged / name)
        record = json.loads((attempt.folder / "started.json").read_bytes())
        (attempt.folder / "started.json").write_text(json.dumps(record | {"cgroup": str(forged)}))
        assert at_once(attempt.processes) == frozenset()
        assert at_once(lambda: attempt.executor.kill_remains(attempt.folder, attempt.key)) == frozenset()
        assert (forged / "empty").is_dir()

    def test_a_lock_that_names_no_possible_process_is_no_trouble(self, attempt):
        lock = attempt.folder / "lock"
        for text in ("9" * 30 + " 1\n", "-1 1\n", "0 0\n", "1\n", "x" * (1 << 20)):
            lock.write_text(text)
            with lock.open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                assert attempt.executor.end_fd(attempt.folder) is None


class TestAfterTheShimWasKilled:
    def kill_shim(self, attempt: Attempt) -> None:
        os.kill(attempt.observe().started.shim_pid, signal.SIGKILL)
        attempt.wait_liveness(Liveness.VANISHED)

    def test_all_that_is_left_is_found_and_killed(self, attempt):
        attempt.python(HIDER)
        hidden = int(attempt.wait_for("hidden"))
        try:
            started = attempt.observe().started
            assert {started.pid, hidden} <= attempt.processes()
            self.kill_shim(attempt)
            assert started.pid in attempt.processes()
            attempt.kill_remains()
            assert not runs(started.pid)
            if started.cgroup is not None:  # without one nothing says any more whose the hidden one was
                assert not runs(hidden)
                assert not Path(started.cgroup).exists()
        finally:
            with suppress(ProcessLookupError):
                os.kill(hidden, signal.SIGKILL)

    def test_a_daemon_of_the_job_is_known_by_its_environment(self, attempt):
        attempt.shell("setsid sh -c 'sleep 61 & echo $! > stray; wait' & echo on > begun; sleep 60")
        stray = int(attempt.wait_for("stray"))
        self.kill_shim(attempt)
        os.kill(attempt.observe().started.pid, signal.SIGKILL)
        assert stray in wait_until(attempt.processes)
        attempt.kill_remains()
        assert not runs(stray)

    def test_nobody_else_is_killed(self, new_attempt):
        doomed, other = new_attempt(), new_attempt()
        for attempt in (doomed, other):
            attempt.shell("echo on > begun; sleep 60")
            attempt.wait_for("begun")
        key = f"{doomed.key}0"  # begins like the other's
        bystander = subprocess.Popen(["/bin/sleep", "60"], env={"MLBOX_ATTEMPT_KEY": key, "A": doomed.key})
        try:
            self.kill_shim(doomed)
            doomed.kill_remains()
            assert bystander.poll() is None
            assert other.observe().liveness is Liveness.ALIVE
            assert len(other.processes()) == 2
        finally:
            bystander.kill()
            bystander.wait()

    def test_whoever_is_in_a_group_with_a_stray_is_spared(self, attempt):
        attempt.shell("echo on > begun; sleep 60")
        attempt.wait_for("begun")
        env = {"MLBOX_ATTEMPT_KEY": attempt.key}
        stray = subprocess.Popen(["/bin/sleep", "60"], env=env, process_group=0)
        bystander = subprocess.Popen(["/bin/sleep", "60"], process_group=stray.pid)
        try:
            self.kill_shim(attempt)
            attempt.kill_remains()
            assert stray.wait(20) == -signal.SIGKILL
            assert bystander.poll() is None
        finally:
            for process in (stray, bystander):
                process.kill()
                process.wait()

    def test_a_living_attempt_is_not_killed(self, attempt):
        attempt.shell("echo on > begun; sleep 60")
        attempt.wait_for("begun")
        assert attempt.executor.kill_remains(attempt.folder, attempt.key) == attempt.processes()
        assert attempt.observe().liveness is Liveness.ALIVE

    def test_many_kills_at_random_moments_never_lose_or_repeat_a_job(self, new_attempt):
        """Each row of the recovery table that a killed shim can lead to, and nothing else."""
        seen = {self.kill_at(new_attempt(), step * 0.0004) for step in range(40)}  # over the 10 ms that all takes
        assert Liveness.NOT_STARTED in seen

    def kill_at(self, attempt: Attempt, delay_s: float) -> Liveness:
        attempt.shell("echo x >> runs")
        time.sleep(delay_s)
        end = attempt.executor.end_fd(attempt.folder)
        if end is not None:
            signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)
        liveness = wait_until(lambda: (x := attempt.observe().liveness) is not Liveness.ALIVE and x)
        runs = attempt.work / "runs"
        if liveness is Liveness.NOT_STARTED:
            assert not runs.exists()
            assert attempt.shell("echo x >> runs").wait_end().exit_code == 0
        elif liveness is Liveness.VANISHED:
            attempt.kill_remains()
        else:
            assert attempt.observe().exit.exit_code == 0
        # Empty: it was killed between the open and the write.
        assert not runs.exists() or runs.read_text() in ("", "x\n")
        return liveness


class TestProcesses:
    def test_all_processes_of_a_living_attempt_are_told(self, attempt):
        attempt.shell("sleep 61 & sleep 62 & echo on > begun; wait")
        attempt.wait_for("begun")
        found = wait_until(lambda: len(attempt.processes()) == 3 and attempt.processes())
        assert attempt.observe().started.pid in found
        assert attempt.observe().started.shim_pid not in found
        assert os.getpid() not in found

    def test_none_are_told_of_an_ended_one(self, attempt):
        attempt.run("/bin/true")
        assert attempt.processes() == frozenset()
        assert attempt.executor.kill_remains(attempt.folder, attempt.key) == frozenset()


class TestCode:
    def test_code_is_unpacked_into_the_folder_first(self, attempt, archive):
        ended = attempt.start(
            "./run.sh", code=archive({"run.sh": b"#!/bin/sh\ncat data/x\n", "data/x": b"42"})
        ).wait_end()
        assert (ended.exit_code, attempt.log()) == (0, b"42")

    def test_a_bad_archive_is_an_error_in_words(self, attempt, archive):
        ended = attempt.start("./run.sh", code=archive({"../run.sh": b""})).wait_end()
        assert "code archive was refused: '../run.sh' is not a plain name" in ended.error
        assert list(attempt.work.iterdir()) == []

    def test_a_missing_archive_is_an_error_in_words(self, attempt):
        ended = attempt.start("./run.sh", code=attempt.folder / "none.tar").wait_end()
        assert "none.tar: No such file" in ended.error or "No such file" in ended.error

    def test_what_the_first_launch_left_of_the_code_is_replaced(self, attempt, archive):
        code = archive({"run.sh": b"#!/bin/sh\ncat x\n", "x": b"whole"})
        in_the_way = attempt.folder / "started.json.tmp"
        in_the_way.mkdir()
        attempt.start("./run.sh", code=code)
        wait_until((attempt.work / "x").exists)
        end = attempt.executor.end_fd(attempt.folder)
        signal.pidfd_send_signal(end, signal.SIGKILL)
        os.close(end)
        attempt.wait_liveness(Liveness.NOT_STARTED)
        (attempt.work / "x").write_bytes(b"")  # as a power cut leaves a file that nobody synced
        in_the_way.rmdir()
        attempt.start("./run.sh", code=code).wait_end()
        assert attempt.log() == b"whole"

    def test_what_an_earlier_attempt_worked_on_is_left_alone(self, attempt, archive):
        attempt.work.mkdir()
        (attempt.work / "checkpoint").write_text("epoch 7")
        attempt.start("/bin/cat", "checkpoint", code=archive({"checkpoint": b"none"})).wait_end()
        assert attempt.log() == b"epoch 7"

    def test_a_cancel_while_code_is_unpacked_leaves_nothing_of_it(self, attempt, archive):
        fifo = attempt.folder / "code.tar"
        os.mkfifo(fifo)
        attempt.start("./run.sh", code=fifo)
        wait_until((attempt.folder / ".work.unpacking").exists)
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.started_at) == (Stopped.CANCEL, None)
        assert "unpacked" in ended.error
        assert not (attempt.folder / ".work.unpacking").exists()
