"""The shim as a program of its own: what the job gets, what is recorded, and what no crash may break."""

import fcntl
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mlbox.scheduler import shim
from mlbox.scheduler.executors import processes
from mlbox.scheduler.executors.base import Liveness, Stopped
from tests.scheduler.attempts import runs, wait_until


def run_shim(folder: Path) -> subprocess.CompletedProcess[bytes]:
    """Run the shim as its file's first lines say."""
    command = [sys.executable, "-I", "-S", "-E", shim.__file__, str(folder)]
    return subprocess.run(command, capture_output=True, timeout=20)


class TestTheEnd:
    def test_an_exit_code_is_recorded(self, attempt):
        ended = attempt.run("/bin/sh", "-c", "exit 7")
        assert (ended.exit_code, ended.signal, ended.error, ended.stopped) == (7, None, None, None)
        assert not ended.out_of_memory
        assert ended.started_at is not None
        assert ended.started_at <= ended.ended_at

    def test_a_signal_is_recorded(self, attempt):
        ended = attempt.run("/bin/sh", "-c", "kill -SEGV $$")
        assert (ended.exit_code, ended.signal, ended.error) == (None, signal.SIGSEGV, None)

    def test_use_of_processor_and_memory_is_recorded(self, attempt):
        program = "import time\nx = bytearray(60 << 20)\nwhile time.process_time() < 0.4: pass"
        ended = attempt.python(program).wait_end()
        assert 0.4 <= ended.cpu_seconds < 2.0
        assert 60 <= ended.max_rss_mib < 120

    def test_a_grandchild_counts_too(self, attempt):
        ended = attempt.shell(f"{sys.executable} -S -c 'x = bytearray(60 << 20)' & wait").wait_end()
        assert ended.max_rss_mib >= 60

    def test_nothing_but_the_record_and_the_log_is_left(self, attempt):
        attempt.run("/bin/true")
        names = {path.name for path in attempt.folder.iterdir()}
        assert names == {"lock", "log", "started.json", "exit.json", "work"}
        cgroup = attempt.observe().started.cgroup
        assert cgroup is None or not Path(cgroup).exists()


class TestCouldNotStart:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("no-such-program-anywhere", "x"), "no program no-such-program-anywhere in PATH"),
            (("./missing",), "cannot run ./missing: No such file"),
            (("./not-executable",), "not executable"),
            (("./bad-interpreter",), "interpreter in its first line"),
            (("./no-interpreter",), "neither a binary"),
            (("./",), "cannot run ./"),
        ],
    )
    def test_a_program_that_cannot_run_is_an_error_in_words(self, attempt, argv, words):
        attempt.work.mkdir()
        for name, text, mode in (
            ("not-executable", "#!/bin/sh\n", 0o644),
            ("bad-interpreter", "#!/no/such/interpreter\n", 0o755),
            ("no-interpreter", "echo hi\n", 0o755),
        ):
            (attempt.work / name).write_text(text)
            (attempt.work / name).chmod(mode)
        ended = attempt.run(*argv)
        assert words in ended.error
        assert (ended.exit_code, ended.signal, ended.log_bytes) == (None, None, 0)

    def test_a_missing_folder_is_an_error_in_words(self, attempt):
        ended = attempt.run("/bin/true", cwd=attempt.folder / "nowhere")
        assert "nowhere: No such file" in ended.error
        assert not (attempt.folder / "started.json").exists()

    def test_too_large_an_environment_is_an_error(self, attempt):
        ended = attempt.run("/bin/true", env={"BIG": "x" * (4 << 20)})
        assert "Argument list too long" in ended.error


class TestWhatTheJobGets:
    def test_its_environment_is_exactly_as_given(self, attempt):
        env = {"A": "1", "UMLAUT": "ä€", "EMPTY": "", "LINES": "a\nb"}
        attempt.run("/usr/bin/env", "-0", env=env)
        entries = attempt.log().decode().rstrip("\0").split("\0")
        assert dict(entry.split("=", 1) for entry in entries) == {
            "PATH": os.environ["PATH"],
            "MLBOX_ATTEMPT_KEY": attempt.key,
            **env,
        }

    def test_it_has_no_descriptor_but_three(self, attempt):
        leaked = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(leaked, True)
        try:
            attempt.run("/bin/ls", "-l", "/proc/self/fd")
        finally:
            os.close(leaked)
        links = {
            int(a.split()[-1]): b for a, _, b in (x.partition(" -> ") for x in attempt.log().decode().split("\n")) if b
        }
        assert links.pop(3).startswith("/proc/")  # of ls itself
        assert links[0] == "/dev/null"
        assert links[1] == links[2]
        assert links[1].startswith("pipe:")
        assert set(links) == {0, 1, 2}

    def test_its_signals_are_as_in_a_fresh_login(self, attempt):
        attempt.run("/bin/cat", "/proc/self/status")
        lines = dict(line.split(":\t", 1) for line in attempt.log().decode().splitlines())
        masks = {name: int(lines[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")}
        of_the_c_library = 1 << 31 | 1 << 32  # signals 32 and 33, which no program can set
        assert masks["SigBlk"] == masks["SigCgt"] == masks["SigIgn"] & ~of_the_c_library == 0

    def test_it_leads_its_own_session_and_keeps_our_umask(self, attempt):
        before = os.umask(0o027)
        try:
            attempt.python("import os; print(os.getpid() == os.getsid(0) == os.getpgid(0)); open('f', 'w')").wait_end()
        finally:
            os.umask(before)
        assert attempt.log() == b"True\n"
        assert (attempt.work / "f").stat().st_mode & 0o777 == 0o640

    def test_its_secrets_are_in_no_command_line_and_no_readable_file(self, attempt):
        attempt.shell("echo on > begun; sleep 60", env={"MLBOX_TOKEN": "mlbx_secret"})
        attempt.wait_for("begun")
        shim_pid = attempt.observe().started.shim_pid
        assert b"mlbx_secret" not in Path(f"/proc/{shim_pid}/cmdline").read_bytes()
        assert b"mlbx_secret" not in Path(f"/proc/{shim_pid}/environ").read_bytes()
        for path in attempt.folder.iterdir():
            assert path.is_dir() or not path.stat().st_mode & 0o077

    def test_a_program_is_found_in_its_own_path(self, attempt):
        tools = attempt.folder / "tools"
        tools.mkdir()
        (tools / "tool").write_text("#!/bin/sh\necho mine\n")
        (tools / "tool").chmod(0o755)
        attempt.run("tool", env={"PATH": f"/nowhere:{tools}:/bin"})
        assert attempt.log() == b"mine\n"

    def test_it_runs_in_its_cgroup_where_there_is_one(self, attempt):
        attempt.run("/bin/cat", "/proc/self/cgroup")
        cgroup = attempt.observe().started.cgroup
        if cgroup is not None:
            own = next(x for x in attempt.log().decode().splitlines() if x.startswith("0::"))
            assert Path(own.removeprefix("0::")).name == Path(cgroup).name == f"mlbox-job-12-1.{attempt.key}"


class TestStopping:
    def test_cancel_terminates_the_whole_tree(self, attempt):
        hearer = "(trap 'echo heard > heard; exit' TERM; echo on > begun; while :; do sleep 0.05; done)"
        attempt.shell(f"sleep 61 & sleep 62 & {hearer} & wait")
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.signal) == (Stopped.CANCEL, signal.SIGTERM)
        assert attempt.wait_for("heard") == "heard\n"
        assert not attempt.processes()

    def test_a_job_may_end_well_after_cancel(self, attempt):
        attempt.shell("trap 'echo saved; exit 0' TERM; echo on > begun; while :; do sleep 0.01; done")
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.exit_code) == (Stopped.CANCEL, 0)
        assert b"saved\n" in attempt.log()  # beside what the shell says of its own children

    def test_who_came_too_late_for_the_first_term_gets_one_when_the_main_process_ends(self, attempt):
        program = """
import os, signal, time
def leave(*_):
    if os.posix_spawn("/bin/sleep", ["sleep", "60"], {}): os._exit(0)
signal.signal(signal.SIGTERM, leave)
open("begun", "w").write("on")
while True: time.sleep(0.01)
"""
        attempt.python(program)
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        assert attempt.wait_end().exit_code == 0

    def test_nobody_gets_a_second_term(self, attempt):
        patient = "trap 'echo heard >> heard; sleep 0.3; exit 0' TERM; echo on > begun; while :; do sleep 0.01; done"
        attempt.shell(f"({patient}) & wait")
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        attempt.wait_end()
        assert (attempt.work / "heard").read_text() == "heard\n"

    def test_whoever_ignores_term_is_killed_after_the_grace_period(self, attempt):
        attempt.shell("trap '' TERM; echo on > begun; while :; do sleep 0.05; done", grace_s=0.3)
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        stopped_at = time.time()
        ended = attempt.wait_end()
        assert (ended.stopped, ended.signal) == (Stopped.CANCEL, signal.SIGKILL)
        assert 0.25 <= ended.ended_at - stopped_at < 3

    def test_kill_does_not_wait_for_the_grace_period(self, attempt):
        attempt.shell("trap '' TERM; echo on > begun; while :; do sleep 0.05; done", grace_s=600)
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        attempt.executor.stop(attempt.folder, kill=True)
        assert attempt.wait_end().signal == signal.SIGKILL

    def test_the_time_limit_ends_the_job(self, attempt):
        ended = attempt.run("/bin/sleep", "60", time_limit_s=0.3)
        assert (ended.stopped, ended.signal) == (Stopped.TIME_LIMIT, signal.SIGTERM)
        assert 0.3 <= ended.ended_at - ended.started_at < 3

    def test_a_stopped_process_ends_too(self, attempt):
        attempt.shell("sleep 60 & kill -STOP $!; echo on > begun; kill -STOP $$")
        attempt.wait_for("begun")
        attempt.executor.stop(attempt.folder)
        assert attempt.wait_end().signal == signal.SIGTERM

    def test_a_daemon_that_the_job_made_ends_with_it(self, attempt):
        program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        deaf = "trap '' TERM HUP; echo $$ > hidden; while :; do sleep 0.05; done"
        os.execve("/bin/sh", ["sh", "-c", deaf], {"PATH": "/bin"})
    os._exit(0)
while not os.path.exists("hidden"): time.sleep(0.01)
"""
        ended = attempt.python(program, grace_s=0.2).wait_end()
        assert (ended.exit_code, ended.stopped) == (0, None)
        assert not runs(int(attempt.wait_for("hidden")))

    def test_what_is_left_behind_may_finish_its_work(self, attempt):
        working = "(trap 'echo saved > saved; exit' TERM; echo on > begun; while :; do sleep 0.05; done)"
        command = f"{working} & while [ ! -e begun ]; do sleep 0.01; done"
        assert attempt.shell(command).wait_end().exit_code == 0
        assert (attempt.work / "saved").exists()

    @pytest.mark.parametrize("spread", ["one group", "many sessions"])
    def test_a_fork_bomb_ends(self, attempt, spread):
        program = """
import os, sys, time
for _ in range(60):
    if os.fork() == 0: break
else:
    time.sleep(60)
open(f"bomb-{os.getpid()}", "w").close()
while True:  # as many as before, but each a new process in a moment
    if sys.argv[1] == "many sessions": os.setsid()
    time.sleep(0.02)
    if os.fork(): os._exit(0)
"""
        attempt.python(program, spread, grace_s=0.0)
        wait_until(lambda: len(list(attempt.work.glob("bomb-*"))) == 60)
        attempt.executor.stop(attempt.folder, kill=True)
        attempt.wait_end()
        assert not attempt.processes()

    def test_it_outlives_hangup_interrupt_and_a_reader_that_went(self, attempt):
        attempt.shell("echo on > begun; while [ ! -e go ]; do sleep 0.01; done; exit 5")
        attempt.wait_for("begun")
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGQUIT):
            os.kill(attempt.observe().started.shim_pid, number)
        (attempt.work / "go").touch()
        assert attempt.wait_end().exit_code == 5


class TestLimits:
    """A plain folder stands in for a cgroup that has controllers, which few boxes hand to an ordinary process."""

    @pytest.fixture
    def cgroup(self, attempt, tmp_path, monkeypatch):
        monkeypatch.setattr(attempt.executor, "_cgroup_parent", tmp_path)
        leaf = tmp_path / f"mlbox-job-12-1.{attempt.key}"
        leaf.mkdir()
        return leaf

    def test_they_are_set_where_the_kernel_takes_them(self, attempt, cgroup):
        ended = attempt.run("/bin/true", memory_mib=300, cpus=2)
        assert ended.exit_code == 0
        assert (cgroup / "memory.max").read_text() == str(300 << 20)
        assert (cgroup / "memory.swap.max").read_text() == "0"
        assert (cgroup / "cpu.max").read_text() == "200000 100000"
        assert int((cgroup / "cgroup.procs").read_text()) == attempt.observe().started.pid

    def test_what_the_kernel_counted_is_recorded(self, attempt, cgroup):
        (cgroup / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 2000000\n")
        (cgroup / "memory.peak").write_text(f"{123 << 20}\n")
        (cgroup / "memory.events").write_text("low 0\noom 1\noom_kill 1\noom_group_kill 1\n")
        ended = attempt.run("/bin/sh", "-c", "kill -KILL $$")
        assert (ended.signal, ended.out_of_memory) == (signal.SIGKILL, True)
        assert (ended.cpu_seconds, ended.max_rss_mib) == (2.5, 123)


class TestTheLog:
    def test_every_byte_is_kept_as_written(self, attempt):
        program = "import os\nfor _ in range(200): os.write(1, bytes(range(256))); os.write(2, b'\\r\\r\\0')"
        ended = attempt.python(program).wait_end()
        assert attempt.log() == (bytes(range(256)) + b"\r\r\0") * 200
        assert (ended.log_bytes, ended.log_dropped_bytes) == (len(attempt.log()), 0)

    @pytest.mark.parametrize("tail_bytes", [0, 1, 15, 16, 1000, 100_000])
    @pytest.mark.parametrize("head_bytes", [0, 7, 1000])
    def test_a_log_over_its_cap_keeps_its_head_and_its_newest_bytes(self, attempt, head_bytes, tail_bytes):
        program = "import os\nfor i in range(3000): os.write(1, b'%06d,' % i)"
        ended = attempt.python(program, log_head_bytes=head_bytes, log_tail_bytes=tail_bytes).wait_end()
        wrote = b"".join(b"%06d," % i for i in range(3000))
        assert ended.log_bytes == len(wrote)
        assert attempt.log() == wrote[:head_bytes]
        tail = _segments(attempt)
        kept = sum(map(len, tail.values()))
        assert all(wrote[start:].startswith(data) for start, data in tail.items())
        segment_bytes = max(1, tail_bytes // shim.LOG_SEGMENTS)  # the oldest goes to make room for a new one
        least = (tail_bytes // segment_bytes - 1) * segment_bytes + 1
        assert min(least, len(wrote) - head_bytes) <= kept <= tail_bytes
        assert ended.log_dropped_bytes == len(wrote) - len(attempt.log()) - kept
        assert max(start + len(data) for start, data in {0: attempt.log(), **tail}.items()) == len(wrote)

    def test_one_huge_write_is_cut_like_many_small_ones(self, attempt):
        program = "import sys; sys.stdout.buffer.write(b''.join(b'%07d,' % i for i in range(1 << 18)))"
        ended = attempt.python(program, log_head_bytes=100, log_tail_bytes=320).wait_end()
        wrote = b"".join(b"%07d," % i for i in range(1 << 18))
        tail = _segments(attempt)
        assert ended.log_bytes == len(wrote) == 2 << 20
        assert b"".join(tail.values()) == wrote[-sum(map(len, tail.values())) :]
        assert 300 <= sum(map(len, tail.values())) <= 320

    def test_a_disk_that_takes_no_more_costs_bytes_but_not_the_job(self, attempt):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # inherited by the shim: writing beyond fails
        try:
            program = "import os\nfor i in range(10_000): os.write(1, b'%06d,' % i)\nopen('done', 'w').close()"
            ended = attempt.python(program).wait_end()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        wrote = b"".join(b"%06d," % i for i in range(10_000))
        assert (ended.exit_code, ended.log_bytes) == (0, len(wrote))
        assert (attempt.work / "done").exists()
        assert attempt.log() == wrote[:8192]
        tail = _segments(attempt)
        assert all(wrote[start:].startswith(data) for start, data in tail.items())
        assert ended.log_dropped_bytes == len(wrote) - 8192 - sum(map(len, tail.values())) > 0

    @pytest.mark.skipif(os.getuid() != 0, reason="only root may mount the small disk that this fills")
    def test_a_full_disk_is_survived_and_the_end_is_recorded_when_there_is_room(self, new_attempt):
        attempt = new_attempt()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", attempt.folder], check=True)
        try:
            command = "head -c 3000000 /dev/zero; echo on > /dev/shm/$MLBOX_ATTEMPT_KEY; exit 9"
            attempt.shell(command, cwd="/")
            done = Path("/dev/shm", attempt.key)
            wait_until(done.exists)
            done.unlink()
            wait_until(lambda: not attempt.processes())
            kept = (attempt.folder / "log").stat().st_size
            assert attempt.observe().liveness is Liveness.ALIVE  # it holds on to the result
            (attempt.folder / "work").rmdir()
            (attempt.folder / "log").unlink()
            ended = attempt.wait_end()
            assert (ended.exit_code, ended.log_bytes) == (9, 3_000_000)
            assert ended.log_dropped_bytes == 3_000_000 - kept
        finally:
            subprocess.run(["umount", "-l", attempt.folder], check=True)

    def test_a_job_that_closes_its_output_runs_on(self, attempt):
        ended = attempt.shell("exec >&- 2>&-; sleep 0.1; exit 3").wait_end()
        assert (ended.exit_code, ended.log_bytes) == (3, 0)

    def test_output_of_what_was_left_behind_is_kept(self, attempt):
        attempt.shell(
            "(trap 'echo last words; exit' TERM; echo on > begun; while :; do sleep 0.05; done) & "
            "while [ ! -e begun ]; do sleep 0.01; done; echo main ends"
        ).wait_end()
        assert attempt.log().startswith(b"main ends\n")
        assert attempt.log().endswith(b"last words\n")

    def test_a_stranger_who_holds_the_output_open_does_not_hold_the_end_up(self, attempt):
        program = """
import array, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(chr(0) + sys.argv[1])
s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
s.recv(1)
print("end")
"""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{attempt.key}")
            listener.listen()
            attempt.python(program, attempt.key)
            connection, _ = listener.accept()
            with connection:
                _, given, _, _ = socket.recv_fds(connection, 1, 1)
                connection.send(b"x")
                ended = attempt.wait_end()
                os.close(given[0])
        assert (ended.exit_code, attempt.log()) == (0, b"end\n")

    @pytest.mark.slow
    def test_ten_gigabytes_pass_in_flat_memory(self, attempt):
        size = 10 << 30
        attempt.start("head", "-c", str(size), "/dev/zero", log_head_bytes=1 << 20, log_tail_bytes=4 << 20)
        pid = wait_until(lambda: attempt.observe().started).shim_pid
        peak_kib = 0
        while attempt.observe().liveness is Liveness.ALIVE:
            found = re.search(r"VmHWM:\s+(\d+) kB", _status(pid))
            peak_kib = max(peak_kib, int(found[1]) if found else 0)
            time.sleep(0.05)
        ended = attempt.wait_end()
        assert ended.log_bytes == size
        assert ended.log_dropped_bytes >= size - (5 << 20)
        assert 0 < peak_kib < 12 << 10


class TestExactlyOnce:
    def test_a_second_shim_refuses_while_the_first_lives(self, attempt):
        attempt.shell("echo on > begun; sleep 60")
        attempt.wait_for("begun")
        before = {path.name: path.read_bytes() for path in attempt.folder.iterdir() if path.is_file()}
        assert run_shim(attempt.folder).returncode == shim.REFUSED
        assert {path.name: path.read_bytes() for path in attempt.folder.iterdir() if path.is_file()} == before

    def test_a_second_shim_refuses_when_user_code_has_started(self, attempt):
        attempt.run("/bin/sh", "-c", "echo once >> runs")
        (attempt.folder / "exit.json").unlink()
        assert run_shim(attempt.folder).returncode == shim.REFUSED
        assert (attempt.work / "runs").read_text() == "once\n"

    def test_somebody_who_asks_about_the_lock_does_not_keep_a_shim_away(self, attempt):
        launch = attempt.launch("/bin/true")
        path = attempt.folder / "lock"
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            attempt.executor.start(launch)
            wait_until(lambda: any(path in _open_files(pid) for pid in attempt.shims()))
        assert attempt.wait_end().exit_code == 0

    def test_user_code_sees_that_it_was_recorded_as_started(self, attempt):
        attempt.run("/bin/cat", "../started.json")
        recorded = json.loads(attempt.log())
        assert recorded["pid"] > recorded["shim_pid"] > 0
        assert recorded["boot_id"] == processes.boot_id()

    def test_a_shim_killed_before_it_recorded_the_start_leaves_a_job_that_never_ran(self, attempt):
        in_the_way = attempt.folder / "started.json.tmp"
        in_the_way.mkdir()  # as a full disk would, this keeps the shim from recording the start
        attempt.shell("echo ran > ran")
        child = attempt.wait_prepared()
        assert attempt.observe().liveness is Liveness.ALIVE
        os.kill(processes.find(child).parent, signal.SIGKILL)
        attempt.wait_liveness(Liveness.NOT_STARTED)
        wait_until(lambda: not runs(child))
        in_the_way.rmdir()
        assert not (attempt.work / "ran").exists()
        attempt.shell("echo ran > ran").wait_end()
        assert (attempt.work / "ran").exists()

    def test_a_start_that_cannot_be_recorded_waits_for_better_days(self, attempt):
        in_the_way = attempt.folder / "started.json.tmp"
        in_the_way.mkdir()
        attempt.shell("exit 4")
        attempt.wait_prepared()
        in_the_way.rmdir()
        assert attempt.wait_end().exit_code == 4

    def test_a_job_cancelled_before_its_start_never_runs(self, attempt):
        (attempt.folder / "started.json.tmp").mkdir()
        attempt.shell("echo ran > ran")
        attempt.wait_prepared()
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.started_at) == (Stopped.CANCEL, None)
        assert "before user code ran" in ended.error
        assert not (attempt.work / "ran").exists()

    def test_an_end_that_cannot_be_recorded_waits_for_better_days(self, attempt):
        in_the_way = attempt.folder / "exit.json.tmp"
        in_the_way.mkdir()
        attempt.shell("exit 6").wait_started()
        wait_until(lambda: not attempt.processes())
        assert attempt.observe().liveness is Liveness.ALIVE
        in_the_way.rmdir()
        assert attempt.wait_end().exit_code == 6

    def test_a_deleted_folder_does_not_keep_the_shim(self, attempt):
        attempt.shell("echo on > begun; sleep 60").wait_started()
        attempt.wait_for("begun")
        shim_ended = attempt.executor.end_fd(attempt.folder)
        shutil.rmtree(attempt.folder)
        signal.pidfd_send_signal(shim_ended, signal.SIGTERM)
        assert select.select([shim_ended], [], [], 20)[0]
        os.close(shim_ended)

    def test_a_launch_file_that_is_none_is_no_start(self, attempt):
        (attempt.folder / "launch.json").write_text("{")
        done = run_shim(attempt.folder)
        assert done.returncode not in (0, shim.REFUSED)
        assert b"launch.json" in done.stderr
        assert attempt.observe().liveness is Liveness.NOT_STARTED


def _segments(attempt) -> dict[int, bytes]:
    """The newest part of a log: offset and content of each of its files."""
    return {int(path.name.removeprefix("log.")): path.read_bytes() for path in sorted(attempt.folder.glob("log.*"))}


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _open_files(pid: int) -> set[Path]:
    found: set[Path] = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(FileNotFoundError):
            found.add(link.readlink())
    return found
