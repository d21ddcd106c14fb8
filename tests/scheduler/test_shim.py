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

from mlbox.jobs import WarnSignal
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
            assert path.is_dir() or b"mlbx_secret" not in path.read_bytes()

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


class TestCopiesOfTheOutput:
    """Slurm's --output and --error."""

    def test_both_streams_go_into_one_copy_and_the_log(self, attempt):
        attempt.shell("echo out; echo err >&2", output="copy.txt").wait_end()
        assert sorted((attempt.work / "copy.txt").read_bytes().split()) == [b"err", b"out"]
        assert attempt.log() == (attempt.work / "copy.txt").read_bytes()

    def test_stderr_has_a_copy_of_its_own_and_is_in_the_log_as_well(self, attempt, tmp_path):
        elsewhere = tmp_path / "err.txt"
        ended = attempt.shell("echo out; echo err >&2", output="out.txt", error=str(elsewhere)).wait_end()
        assert (attempt.work / "out.txt").read_bytes() == b"out\n"
        assert elsewhere.read_bytes() == b"err\n"
        assert sorted(attempt.log().split()) == [b"err", b"out"]
        assert ended.log_bytes == 8

    def test_one_file_for_both_is_written_once(self, attempt):
        attempt.shell("echo out; echo err >&2", output="copy", error="copy").wait_end()
        assert sorted((attempt.work / "copy").read_bytes().split()) == [b"err", b"out"]

    def test_a_first_attempt_begins_a_file_anew_and_a_later_one_goes_on(self, new_attempt):
        for append, wanted in ((False, b"new\n"), (True, b"old\nnew\n")):
            attempt = new_attempt()
            attempt.work.mkdir()
            (attempt.work / "copy").write_bytes(b"old\n")
            attempt.shell("echo new", output="copy", append=append).wait_end()
            assert (attempt.work / "copy").read_bytes() == wanted

    def test_a_copy_has_the_users_umask(self, attempt):
        before = os.umask(0o022)
        try:
            attempt.shell("echo x", output="copy").wait_end()
        finally:
            os.umask(before)
        assert (attempt.work / "copy").stat().st_mode & 0o777 == 0o644
        assert (attempt.folder / "exit.json").stat().st_mode & 0o777 == 0o600

    def test_one_that_cannot_be_opened_is_an_error_before_user_code_runs(self, attempt):
        ended = attempt.shell("echo ran > ran", output="no/such/folder/copy", ranks=2).wait_end()
        assert "cannot write its output to" in ended.error
        assert "no/such/folder/copy: No such file" in ended.error
        assert (ended.exit_code, ended.started_at) == (None, None)
        assert not (attempt.work / "ran").exists()

    def test_a_fifo_that_nobody_reads_holds_nobody_up(self, attempt):
        attempt.work.mkdir()
        os.mkfifo(attempt.work / "copy")
        assert "copy" in attempt.shell("true", output="copy").wait_end().error

    def test_one_that_takes_no_more_costs_nothing_but_itself(self, attempt):
        ended = attempt.shell("echo lost; exit 3", output="/dev/full").wait_end()
        assert (ended.exit_code, ended.log_dropped_bytes, attempt.log()) == (3, 0, b"lost\n")


class TestTheWarning:
    def test_it_comes_before_the_time_limit(self, attempt):
        program = "trap 'echo warned; exit 5' USR1; while :; do sleep 0.01; done"
        warning = WarnSignal(number=signal.SIGUSR1, before_s=59.0)
        ended = attempt.shell(program, time_limit_s=60.0, warn_signal=warning).wait_end()
        assert (ended.exit_code, ended.stopped) == (5, None)
        assert b"warned\n" in attempt.log()  # beside what the shell says of its sleep, which heard it too

    @pytest.mark.parametrize("main_only", [True, False])
    def test_it_goes_to_the_main_process_or_to_all(self, attempt, main_only):
        child = "trap 'echo child > child; exit' USR1; echo on > begun; while :; do sleep 0.01; done"
        heard = "-e main" if main_only else "-e main -a -e child"
        main = f"trap 'echo main > main' USR1; while ! [ {heard} ]; do sleep 0.01; done"
        warning = WarnSignal(number=signal.SIGUSR1, before_s=59.0, main_only=main_only)
        attempt.shell(f"({child}) & {main}; exit 0", time_limit_s=60.0, warn_signal=warning).wait_end()
        assert (attempt.work / "main").exists()
        assert (attempt.work / "child").exists() != main_only


class TestRanks:
    def test_each_knows_which_it_is(self, attempt):
        ended = attempt.shell("echo $RANK $LOCAL_RANK $ROLE_RANK $SLURM_PROCID $SLURM_LOCALID", ranks=3).wait_end()
        assert sorted(attempt.log().splitlines()) == [b"0 0 0 0 0", b"1 1 1 1 1", b"2 2 2 2 2"]
        assert (ended.exit_code, ended.rank) == (0, None)

    def test_the_first_that_fails_ends_the_others_and_is_named(self, attempt):
        program = (
            "trap 'echo saved $RANK; exit 0' TERM; echo on > begun-$RANK; "
            "if [ $RANK = 2 ]; then while [ ! -e begun-0 -o ! -e begun-1 ]; do sleep 0.01; done; exit 9; fi; "
            "while :; do sleep 0.01; done"
        )
        ended = attempt.shell(program, ranks=3).wait_end()
        assert (ended.exit_code, ended.rank, ended.stopped) == (9, 2, None)
        assert {b"saved 0", b"saved 1"} <= set(attempt.log().splitlines())
        assert not attempt.processes()

    def test_one_killed_by_a_signal_is_named_and_who_does_not_listen_is_killed(self, attempt):
        program = (
            "trap '' TERM; echo on > begun-$RANK; "
            "[ $RANK = 0 ] && { while [ ! -e begun-1 ]; do sleep 0.01; done; kill -SEGV $$; }; "
            "while :; do sleep 0.05; done"
        )
        ended = attempt.shell(program, ranks=2, grace_s=0.2).wait_end()
        assert (ended.signal, ended.rank) == (signal.SIGSEGV, 0)

    def test_one_that_finishes_early_is_waited_for_by_nobody(self, attempt):
        program = "[ $RANK = 0 ] && { echo on > first; exit 0; }; while [ ! -e first ]; do sleep 0.01; done; sleep 0.1"
        ended = attempt.shell(program, ranks=2).wait_end()
        assert (ended.exit_code, ended.rank) == (0, None)

    def test_a_cancel_ends_all_and_blames_none(self, attempt):
        attempt.shell("echo on > begun-$RANK; sleep 60", ranks=2)
        wait_until(lambda: len(list(attempt.work.glob("begun-*"))) == 2)
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.signal, ended.rank) == (Stopped.CANCEL, signal.SIGTERM, None)

    def test_a_program_that_cannot_run_is_told_once_and_not_blamed_on_a_rank(self, attempt):
        ended = attempt.start("./missing", ranks=2).wait_end()
        assert "cannot run ./missing: No such file" in ended.error
        assert ended.rank is None

    def test_code_is_unpacked_once_for_all(self, attempt, archive):
        code = archive({"run.sh": b"#!/bin/sh\ncat x\n", "x": b"42\n"})
        assert attempt.start("./run.sh", code=code, ranks=3).wait_end().exit_code == 0
        assert attempt.log() == b"42\n" * 3


class TestTheGpusMemory:
    @pytest.mark.parametrize("text", shim.GPU_OUT_OF_MEMORY)
    def test_a_failed_job_that_ran_out_of_it_is_known(self, attempt, text):
        ended = attempt.run("/bin/sh", "-c", f"echo 'E: {text.decode()} (x)' >&2; exit 1")
        assert (ended.exit_code, ended.gpu_out_of_memory) == (1, True)

    def test_only_the_end_of_a_failed_jobs_log_counts(self, attempt, new_attempt):
        says = "echo CUDA out of memory"
        assert not attempt.shell(f"{says}; exit 0").wait_end().gpu_out_of_memory
        assert not new_attempt().shell(f"{says}; head -c 70000 /dev/zero; exit 1").wait_end().gpu_out_of_memory
        spread = new_attempt().shell(
            f"head -c 5000 /dev/zero; {says}; head -c 900 /dev/zero; exit 1", log_head_bytes=1000, log_tail_bytes=16000
        )
        assert spread.wait_end().gpu_out_of_memory

    def test_what_a_job_puts_in_place_of_its_log_holds_nobody(self, attempt):
        ended = attempt.shell("rm ../log; mkfifo ../log ../log.1; exit 1").wait_end()
        assert (ended.exit_code, ended.gpu_out_of_memory) == (1, False)


class TestCores:
    def test_the_job_stays_on_those_it_was_given(self, attempt):
        core = max(os.sched_getaffinity(0))
        attempt.python("import os; print(os.sched_getaffinity(0))", cpu_affinity=(core,)).wait_end()
        assert attempt.log().decode() == f"{{{core}}}\n"

    def test_cores_that_are_not_there_are_no_trouble(self, attempt):
        assert attempt.run("/bin/true", cpu_affinity=(100_000,)).exit_code == 0


class TestAdoption:
    """A process that was begun outside mlbox is watched and stopped; nobody may mistake another for it."""

    @pytest.fixture
    def outside(self, tmp_path):
        """Begins processes, as people do without mlbox, and reaps them as their shell does."""
        begun = []

        def begin(command: str) -> subprocess.Popen[bytes]:
            begun.append(subprocess.Popen(["/bin/sh", "-c", command], cwd=tmp_path, start_new_session=True))
            return begun[-1]

        yield begin
        for process in begun:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def adopt(self, attempt, pid: int, **settings):
        return attempt.start(adopt=(pid, processes.find(pid).ticks), **settings)

    def test_it_is_watched_until_it_ends_by_itself(self, attempt, outside, tmp_path):
        process = outside("while [ ! -e go ]; do sleep 0.01; done; exit 7")
        self.adopt(attempt, process.pid).wait_started()
        started = attempt.observe().started
        assert (started.pid, started.adopted) == (process.pid, True)
        assert attempt.observe().liveness is Liveness.ALIVE
        assert process.pid in attempt.processes()
        (tmp_path / "go").touch()
        ended = attempt.wait_end()
        assert (ended.exit_code, ended.signal, ended.stopped, ended.adopted) == (0, None, None, True)
        assert attempt.log() == b""

    def test_a_stop_ends_it_with_all_that_it_began(self, attempt, outside, tmp_path):
        process = outside("setsid sh -c 'echo $$ > child; sleep 60' & trap 'echo heard > heard; exit' TERM; wait")
        child = int(wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text()))
        self.adopt(attempt, process.pid).wait_started()
        attempt.executor.stop(attempt.folder)
        ended = attempt.wait_end()
        assert (ended.stopped, ended.exit_code, ended.signal) == (Stopped.CANCEL, None, signal.SIGTERM)
        assert (tmp_path / "heard").exists()
        assert not runs(child)

    def test_a_stopped_or_deaf_one_is_killed_after_the_grace_period(self, attempt, outside, tmp_path):
        process = outside("trap '' TERM; echo on > begun; while :; do sleep 0.05; done")
        wait_until((tmp_path / "begun").exists)
        os.kill(process.pid, signal.SIGSTOP)
        self.adopt(attempt, process.pid, grace_s=0.2).wait_started()
        attempt.executor.stop(attempt.folder)
        assert attempt.wait_end().signal == signal.SIGKILL
        assert process.wait(20) == -signal.SIGKILL

    def test_its_time_limit_counts_from_its_adoption(self, attempt, outside):
        process = outside("sleep 60")
        ended = self.adopt(attempt, process.pid, time_limit_s=0.2).wait_end()
        assert (ended.stopped, ended.signal) == (Stopped.TIME_LIMIT, signal.SIGTERM)

    def test_another_process_with_its_pid_is_let_be(self, attempt, outside):
        process = outside("sleep 60")
        ended = attempt.start(adopt=(process.pid, processes.find(process.pid).ticks - 1)).wait_end()
        assert f"process {process.pid} was gone before it could be watched" in ended.error
        assert process.poll() is None

    def test_a_shim_that_died_is_replaced_and_harms_nobody(self, attempt, outside, tmp_path):
        process = outside("while [ ! -e go ]; do sleep 0.01; done")
        self.adopt(attempt, process.pid).wait_started()
        started = attempt.observe().started
        os.kill(started.shim_pid, signal.SIGKILL)
        attempt.wait_liveness(Liveness.NOT_STARTED)
        attempt.kill_remains()
        assert process.poll() is None
        self.adopt(attempt, process.pid)
        wait_until(lambda: attempt.observe().started.shim_pid != started.shim_pid)
        (tmp_path / "go").touch()
        ended = attempt.wait_end()
        assert (ended.exit_code, ended.started_at) == (0, started.started_at)

    def test_one_that_ended_while_nobody_watched_has_ended(self, attempt, outside):
        process = outside("sleep 60")
        self.adopt(attempt, process.pid).wait_started()
        launch = attempt.launch(adopt=(process.pid, attempt.observe().started.start_ticks))
        os.kill(attempt.observe().started.shim_pid, signal.SIGKILL)
        attempt.wait_liveness(Liveness.NOT_STARTED)
        process.kill()
        process.wait()
        attempt.executor.start(launch)
        assert (attempt.wait_end().exit_code, attempt.wait_end().error) == (0, None)


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
        with (attempt.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            attempt.executor.start(launch)
            wait_until(attempt.shims)
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
