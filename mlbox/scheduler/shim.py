"""The supervisor of one attempt: starts the job, keeps its log, ends whatever it leaves, records how it ended.

Run as `python -I -S -E shim.py ATTEMPT_FOLDER` by whoever the job belongs to. It imports nothing of mlbox, holds
`lock` for as long as it lives, and outlives the daemon. In order:

1. take `lock`; refuse if it is taken or an earlier shim got as far as `started.json`;
2. fork the job, which unpacks its code, enters its folder and waits;
3. write `started.json`, then let the job exec: if the shim dies before that, user code never runs;
4. pump the job's output into the log until the main process ends, or is stopped: at its time limit, on SIGTERM
   (TERM, then KILL after the grace period) or on SIGUSR1 (KILL at once);
5. end what is left of the process tree, and only then write `exit.json`.

`executors/base.py` documents the files. One thread, one `poll`, no polling by time.
"""

# pathlib and contextlib are not imported: every start of a job would pay for them.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH110, PTH112, PTH116, PTH118, PTH123, PTH208, SIM105, S606

import _ctypes
import errno
import fcntl
import os
import select
import sys
import time
from _json import encode_basestring_ascii, make_scanner

# `signal`, `json` and `ctypes` wrap the C modules used here, with enum, re and functools. Together they cost 9 ms of
# a start that takes 8 ms without them (3.11 and 3.13), and every job would pay.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator, Mapping
    from typing import Any, NoReturn
else:
    import _signal as signal

REFUSED = 3
"""Exit status of a shim that found the lock taken or the attempt already started."""
LEFTOVER_GRACE_S = 5.0
"""What a finished main process leaves behind has at most this long to end after TERM."""
LOCK_PATIENCE_S = 0.2
"""A daemon that asks whether the lock is held takes it for microseconds; a shim keeps it for good."""
PIPE_BYTES = 1 << 20
"""How far the job runs ahead while the disk stalls; the most that fs.pipe-max-size allows by default."""
LOG_SEGMENTS = 16
"""The newest part of a log is kept in this many files; the oldest goes when the cap is reached."""
RETRY_S = 0.1
"""How long a log that could not be written is left alone."""
KILL_AGAIN_S = 0.02
"""First pause before killing again what outlived a KILL; it doubles."""
KILL_ROUNDS = 1000
"""How often in a row new children are killed before signals and output are looked at again."""
PR_SET_CHILD_SUBREAPER = 36
SYS_CLONE3 = 435
CLONE_INTO_CGROUP = 1 << 33
READY = b"\0"
LONGEST_POLL_MS = 3_600_000
"""poll(2) takes no more than 2**31 ms; waking each hour costs nothing."""


class Launch:
    """`launch.json`: paths, arguments and variables are the bytes that the kernel gets."""

    def __init__(self, values: "Mapping[str, Any]") -> None:
        self.name = f"{values['handle']}.{values['key']}"
        self.argv = [_bytes(argument) for argument in values["argv"]]
        self.cwd = _bytes(values["cwd"])
        self.env = {_bytes(name): _bytes(value) for name, value in values["env"].items()}
        self.code = None if values["code"] is None else _bytes(values["code"])
        self.log_head_bytes = int(values["log_head_bytes"])
        self.log_tail_bytes = int(values["log_tail_bytes"])
        self.time_limit_s: float | None = values["time_limit_s"]
        self.grace_s = float(values["grace_s"])
        self.memory_mib: int | None = values["memory_mib"]
        self.cpus: int | None = values["cpus"]
        self.boot_id = str(values["boot_id"])
        self.cgroup_parent: str | None = values["cgroup_parent"]


class Log:
    """Keeps what the job writes: its first bytes in `log`, its newest in files `log.<offset of their first byte>`.

    A name says where in the log a file begins (`log` at 0), so whatever was dropped, by the cap or by a disk that
    would not take it, is a gap between files. Writing never waits and never raises.
    """

    def __init__(self, head_bytes: int, tail_bytes: int) -> None:
        self.bytes = 0
        """All bytes the job wrote."""
        self.kept = 0
        self._tail_bytes = tail_bytes
        self._segment_bytes = max(1, tail_bytes // LOG_SEGMENTS)
        self._segments: list[tuple[str, int]] = []
        self._gap = False
        self._retry_at = 0.0
        self._file = -1
        self._room = 0
        if self._open("log"):
            self._room = head_bytes

    def write(self, data: memoryview) -> None:
        while data:
            if not self._room:
                surplus = max(0, len(data) - self._tail_bytes)
                self._drop(surplus)
                data = data[surplus:]
                if not data or not self._next_segment():
                    self._drop(len(data))
                    return
            try:
                written = os.write(self._file, data[: self._room])
            except OSError:
                self._close()
                self._retry_at = time.monotonic() + RETRY_S
                continue
            self._keep(written)
            data = data[written:]

    def finish(self) -> None:
        """Mark the end with an empty file if the last bytes were dropped. Raises OSError."""
        self._close()
        if self._gap:
            os.close(os.open(_segment(self.bytes), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._gap = False

    def _keep(self, count: int) -> None:
        self._gap = False
        self._room -= count
        self.bytes += count
        self.kept += count
        if self._segments:
            name, size = self._segments[-1]
            self._segments[-1] = (name, size + count)

    def _drop(self, count: int) -> None:
        self._gap = self._gap or count > 0
        self.bytes += count

    def _next_segment(self) -> bool:
        self._close()
        if time.monotonic() < self._retry_at:
            return False
        while self._segments and sum(s for _, s in self._segments) + self._segment_bytes > self._tail_bytes:
            name, size = self._segments.pop(0)
            self.kept -= size
            _unlink(name)
        name = _segment(self.bytes)
        if not self._open(name):
            return False
        self._segments.append((name, 0))
        self._room = self._segment_bytes
        return True

    def _open(self, name: str) -> bool:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = os.open(name, flags, 0o600)
        except OSError:
            self._retry_at = time.monotonic() + RETRY_S
            return False
        return True

    def _close(self) -> None:
        self._room = 0
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        if self._segments and not self._segments[-1][1]:
            _unlink(self._segments.pop()[0])


class Tree:
    """All processes of the job: the shim's descendants, and its cgroup where it has one.

    The shim is their subreaper: as long as it has no child, no descendant lives.
    """

    def __init__(self, cgroup: str | None) -> None:
        self.cgroup = cgroup
        self._told: set[tuple[int, int]] = set()
        self._killed: set[int] = set()

    def fork(self) -> int:
        """Fork a child into the cgroup: its pid, and 0 in the child. Raises OSError.

        Moving a process into a cgroup waits for an RCU grace period of the whole kernel (19 ms), being born there
        does not. Raw clone3(2) instead of fork(2) is fine for a process with one thread that is soon to exec.
        """
        if self.cgroup is None:
            return os.fork()
        try:
            pid = _fork_into(self.cgroup)
        except OSError:  # a kernel or a seccomp filter without clone3
            pid = os.fork()
            if pid and not _put(f"{self.cgroup}/cgroup.procs", str(pid)):
                _remove_cgroup(self.cgroup)
                self.cgroup = None
        return pid

    def terminate(self) -> None:
        """TERM to every process that has not had one, and CONT, so that a stopped one hears it too.

        Once only: to many programs a second TERM means that they shall not finish what they are saving.
        """
        for pid, ticks, _ in _descendants():
            if (pid, ticks) not in self._told:
                self._told.add((pid, ticks))
                _signal_process(pid, ticks, signal.SIGTERM, signal.SIGCONT)

    def kill(self) -> None:
        """KILL every process that is there now. What a fork got away in time becomes a child of ours in the end."""
        if self.cgroup:
            _put(f"{self.cgroup}/cgroup.kill", "1")
        for pid, ticks, _ in _descendants():
            _signal_process(pid, ticks, signal.SIGKILL)

    def kill_children(self) -> bool:
        """KILL the shim's own children, each with its process group; False when there are no new ones.

        The way to end a fork bomb: its orphans are our children at once, nobody can get a child's pid until we have
        reaped it, and killing a group is atomic against fork(2). A group that one of them is in has no strangers
        in it, because the job began a session of its own.
        """
        children = _children()
        new = children - self._killed
        for pid in new:
            try:
                group = os.getpgid(pid)
                os.kill(pid, signal.SIGKILL)
                if group != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)
            except OSError:
                pass  # it has become another user's (setuid)
        self._killed = children
        return bool(new)

    def populated(self) -> bool:
        """Whether anything lives in the cgroup (it may hold processes that are nobody's descendants)."""
        return self.cgroup is not None and "populated 1" in _get(f"{self.cgroup}/cgroup.events")


class Supervisor:
    """One attempt, from the fork of the job to its `exit.json`."""

    def __init__(self, launch: Launch, wakeup: int, umask: int) -> None:
        self._launch = launch
        self._umask = umask
        self._wakeup = wakeup
        self._log = Log(launch.log_head_bytes, launch.log_tail_bytes)
        self._tree = Tree(_make_cgroup(launch))
        self._buffer = memoryview(bytearray(PIPE_BYTES))
        self._started_at: float | None = None
        self._status: int | None = None
        self._trouble = b""
        self._stopped: str | None = None
        self._max_rss_kib = 0
        self._cpu_s = 0.0
        # CLOCK_MONOTONIC: steps of the wall clock do not matter, and a suspended box does not use up a job's time.
        self._start_at = self._limit_at = self._kill_at = float("inf")
        self._kill_pause = KILL_AGAIN_S

    def run(self) -> None:
        try:
            self._fork()
        except OSError as error:
            self._trouble = f"could not fork: {error.strerror}".encode()
        else:
            self._supervise()
            self._drain()
        self._record()

    def _fork(self) -> None:
        self._out, out = os.pipe()
        self._news, news = os.pipe()
        go, self._go = os.pipe()
        _widen(out)
        for end in (self._out, self._news):
            os.set_blocking(end, False)
        # Blocked over the fork: a signal must not reach the shim's handlers, and its wakeup pipe, in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self._pid = self._tree.fork()
        if self._pid == 0:
            os.close(self._go)
            _become_job(self._launch, self._umask, out, news, go)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for end in (out, news, go):
            os.close(end)

    def _supervise(self) -> None:
        """Until the main process has ended and nothing of its tree is left."""
        poll = select.poll()
        for end in (self._wakeup, self._out, self._news):
            poll.register(end, select.POLLIN)
        while True:
            wait_s = min(self._start_at, self._limit_at, self._kill_at) - time.monotonic()
            for end, _ in poll.poll(min(max(0.0, wait_s) * 1000, LONGEST_POLL_MS)):
                if end == self._wakeup:
                    self._hear()
                elif not (self._pump() if end == self._out else self._listen()):
                    poll.unregister(end)
            childless = self._reap()
            if childless and not self._tree.populated():
                return
            self._on_time(childless)

    def _hear(self) -> None:
        """Act on signals; the wakeup pipe carries their numbers."""
        for number in os.read(self._wakeup, 4096):
            if number == signal.SIGTERM:
                self._stop("cancel")
            elif number == signal.SIGUSR1:
                self._stop("cancel")
                self._kill_at = 0.0

    def _pump(self) -> bool:
        """Move what the job wrote into the log; False at the end of its output."""
        try:
            count = os.readv(self._out, [self._buffer])
        except BlockingIOError:
            return True
        self._log.write(self._buffer[:count])
        return count > 0

    def _listen(self) -> bool:
        """Hear from the forked child: READY, then what went wrong; the end (False) when it has become the job."""
        try:
            news = os.read(self._news, 65536)
        except BlockingIOError:
            return True
        if news.startswith(READY):
            self._start_at = 0.0
            self._trouble += news[1:]
        else:
            self._trouble += news
        return news != b""

    def _on_time(self, childless: bool) -> None:
        now = time.monotonic()
        if now >= self._start_at:
            self._start(now)
        if now >= self._limit_at:
            self._stop("time_limit")
        if now >= self._kill_at or childless:
            self._kill()

    def _kill(self) -> None:
        """KILL all that is left, and again in a moment what outlives that: the kernel may hold it."""
        self._tree.kill()
        for _ in range(KILL_ROUNDS):
            if not self._tree.kill_children():
                break
            self._kill_pause = KILL_AGAIN_S
            if self._reap():
                break
        self._kill_at = time.monotonic() + self._kill_pause
        self._kill_pause = min(1.0, 2 * self._kill_pause)

    def _start(self, now: float) -> None:
        """Write `started.json` and let the job exec. A full disk delays it."""
        self._start_at = float("inf")
        if self._stopped is not None or self._status is not None:
            return
        started_at = time.time()
        try:
            _write_json(
                "started.json",
                {
                    "shim_pid": os.getpid(),
                    "pid": self._pid,
                    "boot_id": self._launch.boot_id,
                    "started_at": started_at,
                    "start_ticks": _ticks(self._pid),
                    "cgroup": self._tree.cgroup,
                },
            )
        except OSError:
            self._start_at = now + 1.0
            return
        self._started_at = started_at
        if self._launch.time_limit_s is not None:
            self._limit_at = now + self._launch.time_limit_s
        try:
            os.write(self._go, READY)
        except OSError:
            pass  # the child was killed; its status says so

    def _stop(self, reason: str) -> None:
        if self._stopped is None and self._status is None:
            self._stopped = reason
            self._limit_at = float("inf")
            self._tree.terminate()
            self._kill_at = time.monotonic() + self._launch.grace_s

    def _reap(self) -> bool:
        """Collect every child that ended; True when none is left."""
        main_ended = False
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                break
            self._max_rss_kib = max(self._max_rss_kib, usage.ru_maxrss)
            self._cpu_s += usage.ru_utime + usage.ru_stime
            if pid == self._pid:
                main_ended = True
                self._status = status
                self._limit_at = float("inf")
        if main_ended:
            self._tree.terminate()
            if self._stopped is None:
                self._kill_at = time.monotonic() + min(self._launch.grace_s, LEFTOVER_GRACE_S)
        return False

    def _drain(self) -> None:
        """Take what the job left in the pipes. The log's may still be held open by a stranger who got it passed."""
        while self._listen():
            pass
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        end = self._log.bytes + fcntl.fcntl(self._out, fcntl.F_GETPIPE_SZ)
        while self._log.bytes < end and poll.poll(0) and self._pump():
            pass

    def _record(self) -> None:
        """Write `exit.json`, however long the disk is full; only a deleted folder ends the effort."""
        values = self._ending()
        if self._tree.cgroup:
            _remove_cgroup(self._tree.cgroup)
        if os.path.exists("shim.log") and os.stat("shim.log").st_size == 0:
            _unlink("shim.log")  # where the executor lets us complain
        while True:
            try:
                self._log.finish()
                _write_json("exit.json", values)
                return _unlink("launch.json")  # nobody launches this attempt again; the user's variables may be secret
            except FileNotFoundError:
                return None
            except OSError:
                time.sleep(1.0)

    def _ending(self) -> "dict[str, str | float | None]":
        code = None if self._status is None else os.waitstatus_to_exitcode(self._status)
        error = self._trouble.decode(errors="replace") or None
        if error is None and self._started_at is None:
            error = "it was stopped before user code ran"
            if self._stopped is None:
                error = f"the process that was to become the job ended early (status {code})"
        cpu_s = self._cpu_s
        max_rss_mib = self._max_rss_kib / 1024
        out_of_memory = False
        if self._tree.cgroup:
            cpu_s = int(_field(f"{self._tree.cgroup}/cpu.stat", "usage_usec") or cpu_s * 1e6) / 1e6
            max_rss_mib = int(_get(f"{self._tree.cgroup}/memory.peak") or max_rss_mib * 2**20) / 2**20
            out_of_memory = int(_field(f"{self._tree.cgroup}/memory.events", "oom_kill") or 0) > 0
        return {
            "exit_code": code if error is None and code is not None and code >= 0 else None,
            "signal": -code if error is None and code is not None and code < 0 else None,
            "error": error,
            "stopped": self._stopped,
            "out_of_memory": out_of_memory,
            "started_at": self._started_at,
            "ended_at": time.time(),
            "cpu_seconds": round(cpu_s, 6),
            "max_rss_mib": round(max_rss_mib, 3),
            "log_bytes": self._log.bytes,
            "log_dropped_bytes": self._log.bytes - self._log.kept,
        }


def main(folder: str) -> int:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    umask = os.umask(0o077)
    wakeup = _catch_signals()
    try:
        os.setsid()
    except PermissionError:
        pass  # already leads its session
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.chdir(folder)
    if not _take_lock() or os.path.exists("started.json") or os.path.exists("exit.json"):
        return REFUSED
    try:
        launch = Launch(_read_json("launch.json"))
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        sys.exit(f"launch.json is not one: {error!r}")
    Supervisor(launch, wakeup, umask).run()
    return 0


def _call(function: str, *arguments: int | bytes) -> int:
    """Call a function of the C library that returns -1 on failure; bytes are passed by address. Raises OSError."""
    libc = _ctypes.dlopen(None, 0)  # pyright: ignore[reportArgumentType]  # NULL: what is loaded already
    result = _ctypes.call_function(_ctypes.dlsym(libc, function), arguments)
    if result == -1:
        raise OSError(f"{function}{arguments} failed")
    return result


def _catch_signals() -> int:
    """Have signals write their numbers into a pipe; returns its reading end."""
    wakeup, end = os.pipe()
    for number in (wakeup, end):
        os.set_blocking(number, False)
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, _ignore)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return wakeup


def _ignore(*_: object) -> None:
    """A handler that does nothing: only a caught signal is written into the wakeup pipe."""


def _take_lock() -> bool:
    """Take the attempt's lock for the life of this process and write into it who holds it. Raises OSError."""
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    patience_until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > patience_until:
                return False
            time.sleep(0.005)
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()} {_ticks(os.getpid())}\n".encode())
    return True


def _become_job(launch: Launch, umask: int, out: int, news: int, go: int) -> "NoReturn":
    """In the forked child: prepare, say READY, wait for the word, exec. Every other descriptor closes on exec.

    The lock's copy stays open until then, so that nobody launches the attempt again beside a child that unpacks.
    """
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        os.umask(umask)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        if launch.code is not None:
            _unpack(launch.code, launch.cwd)
        _enter(launch.cwd)
        os.write(news, READY)
        if os.read(go, 1):
            _exec(launch.argv, launch.env)
    except Trouble as trouble:
        os.write(news, str(trouble).encode(errors="replace"))
    except BaseException as error:  # whatever it is: this process must not go on as a second shim
        os.write(news, f"{type(error).__name__}: {error}".encode(errors="replace"))
    finally:
        os._exit(127)


class Trouble(Exception):
    """Why the child cannot become the job, in words for the job's owner."""


def _unpack(archive: bytes, target: bytes) -> None:
    """Unpack the job's code into its folder, unless an earlier attempt of the job has worked in there.

    `unpacking` is left in the attempt's folder beforehand: what an earlier launch of this very attempt unpacked,
    perhaps in part or before a power cut, no user code has touched; it is replaced.
    """
    from importlib.util import module_from_spec, spec_from_file_location  # only jobs with an archive pay for these
    from pathlib import Path
    from shutil import rmtree

    def stop(*_: object) -> None:
        raise Trouble("stopped while its code was being unpacked")

    spec = spec_from_file_location("unpack", Path(main.__code__.co_filename).with_name("unpack.py"))
    if spec is None or spec.loader is None:
        raise Trouble("mlbox is not installed whole: unpack.py is missing")
    unpack = module_from_spec(spec)
    spec.loader.exec_module(unpack)
    folder = Path(os.fsdecode(target))
    signal.signal(signal.SIGTERM, stop)
    try:
        if os.path.exists("unpacking"):
            rmtree(folder, ignore_errors=True)
        elif folder.is_dir() and any(folder.iterdir()):
            return
        _write_json("unpacking", {})
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpack.unpack(Path(os.fsdecode(archive)), folder)
    except ValueError as error:
        raise Trouble(f"the code archive was refused: {error}") from error
    except OSError as error:
        raise Trouble(f"cannot unpack the code into {folder}: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _enter(folder: bytes) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise Trouble(f"cannot enter the folder {_text(folder)}: {error.strerror}") from error


def _exec(argv: list[bytes], env: dict[bytes, bytes]) -> None:
    """Become the job. The program is looked up in the job's own PATH. Raises Trouble, else does not return."""
    program = argv[0]
    if b"/" not in program:
        folders = env.get(b"PATH", os.defpath.encode())
        found = [path for f in folders.split(b":") if os.access(path := os.path.join(f, program), os.X_OK)]
        program = next((path for path in found if not os.path.isdir(path)), b"")
        if not program:
            raise Trouble(f"no program {_text(argv[0])} in PATH ({_text(folders)})")
    try:
        os.execve(program, argv, env)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.ENOENT and os.path.exists(program):
            why = "the interpreter in its first line (#!) does not exist"
        elif error.errno == errno.ENOEXEC:
            why = "it is neither a binary for this machine nor a script with #! in its first line"
        elif error.errno == errno.EACCES and not os.access(program, os.X_OK):
            why = "it is not executable (chmod +x)"
        raise Trouble(f"cannot run {_text(program)}: {why}") from error


def _widen(pipe: int) -> None:
    size = PIPE_BYTES
    while size > 65536:
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, size)
            return
        except OSError:  # EPERM: over fs.pipe-max-size, or this user's pipes hold all that they may
            size //= 4


def _make_cgroup(launch: Launch) -> str | None:
    """A cgroup v2 leaf for the job, with its limits where their controllers are on; None where that may not be."""
    if launch.cgroup_parent is None:
        return None
    path = f"{launch.cgroup_parent}/{launch.name}"
    try:
        os.mkdir(path)
    except FileExistsError:
        pass  # of an earlier launch of this attempt
    except OSError:
        return None
    if launch.memory_mib is not None:
        _put(f"{path}/memory.max", str(launch.memory_mib << 20))
        _put(f"{path}/memory.swap.max", "0")
        _put(f"{path}/memory.oom.group", "1")
    if launch.cpus is not None:
        _put(f"{path}/cpu.max", f"{launch.cpus * 100_000} 100000")
    return path


def _fork_into(cgroup: str) -> int:
    """clone3(2) with CLONE_INTO_CGROUP: the child is born in the cgroup. Otherwise like os.fork."""
    folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
        # set_tid_size, cgroup
        fields = (CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, folder)
        clone_args = b"".join(field.to_bytes(8, sys.byteorder) for field in fields)
        return _call("syscall", SYS_CLONE3, clone_args, len(clone_args))
    finally:
        os.close(folder)


def _remove_cgroup(path: str) -> None:
    """Remove an empty cgroup and those that the job made below it."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            pass  # an empty cgroup costs a few KiB of kernel memory until the next boot


def _descendants() -> "Iterator[tuple[int, int, int]]":
    """Pid, start time in clock ticks, and parent of everything below this process (proc_pid_stat(5))."""
    children: dict[int, list[tuple[int, int, int]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append((int(name), int(fields[19]), int(fields[1])))
    parents = [os.getpid()]
    while parents:
        for process in children.get(parents.pop(), ()):
            parents.append(process[0])
            yield process


def _children() -> set[int]:
    """The pids of this process's children."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", "rb", buffering=0) as file:
            return set(map(int, file.read().split()))
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return {pid for pid, _, parent in _descendants() if parent == os.getpid()}


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third (state) on; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return file.read(4096).rpartition(b")")[2].split()
    except OSError:
        return []


def _ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _signal_process(pid: int, ticks: int, *numbers: int) -> None:
    """Signal the process that began at `ticks`, never another that has got its pid."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if _ticks(pid) == ticks:
            for number in numbers:
                signal.pidfd_send_signal(process, number)
    except OSError:
        pass  # gone, or not ours to signal (setuid)
    finally:
        os.close(process)


def _read_json(name: str) -> "dict[str, Any]":
    with open(name, encoding="utf-8") as file:
        return make_scanner(_Json)(file.read(), 0)[0]  # pyright: ignore[reportArgumentType]  # duck-typed


class _Json:
    """What the C scanner asks of a decoder."""

    strict = True
    object_hook = object_pairs_hook = array_hook = parse_constant = None
    parse_float = float
    parse_int = int


def _write_json(name: str, values: "Mapping[str, str | float | None]") -> None:
    """Write a flat object so that it is there whole, or not at all, after any crash or power cut. Raises OSError."""
    members = ", ".join(f'"{key}": {_literal(value)}' for key, value in values.items())
    data = f"{{{members}}}\n".encode()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    file = os.open(f"{name}.tmp", flags, 0o600)
    try:
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)
    os.rename(f"{name}.tmp", name)
    folder = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _literal(value: str | float | None) -> str:
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _put(path: str, text: str) -> bool:
    """Write a cgroup's file; False where that may not be."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError:
        return False
    return True


def _get(path: str) -> str:
    """A cgroup's file, stripped; empty where there is none."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> str | None:
    """One value of a cgroup's file of `name value` lines."""
    return dict(line.split(None, 1) for line in _get(path).splitlines()).get(name)


def _segment(offset: int) -> str:
    return f"log.{offset:020d}"


def _unlink(name: str) -> None:
    try:
        os.unlink(name)
    except OSError:
        pass


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main(sys.argv[-1]))
