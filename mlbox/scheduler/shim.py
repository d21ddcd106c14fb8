"""The supervisor of one attempt: starts the job, keeps its log, ends whatever it leaves, records how it ended.

Run as `python -I -S -E shim.py ATTEMPT_FOLDER` by whoever the job belongs to, or copied from a process that is ready
to be one (`template`). It imports nothing of mlbox, holds
`lock` for as long as it lives, and outlives the daemon. In order:

1. take `lock`; refuse if it is taken or an earlier shim got as far as `started.json`;
2. fork the job, which unpacks its code, enters its folder and waits;
3. write `started.json`, then let the job exec: if the shim dies before that, user code never runs;
4. pump the job's output into the log until the main process ends, or is stopped: at its time limit, on SIGTERM
   (TERM, then KILL after the grace period) or on SIGUSR1 (KILL at once);
5. end what is left of the process tree, and only then write `exit.json`.

A job of several ranks has a main process for each; the first that fails ends them all. A process that was begun
outside mlbox (`adopt`) is only watched and stopped, by a `Watcher`. `executors/base.py` documents the files.
One thread, one `poll`, no polling by time.
"""

# pathlib and contextlib are not imported: every start of a job would pay for them.
# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH110, PTH112, PTH116, PTH118, PTH123, PTH208, SIM105, S606

import _ctypes
import errno
import fcntl
import gc
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
OOM_WINDOW_BYTES = 1 << 16
"""How much of the end of a failed job's log is searched for what follows: a traceback and the noise after it."""
GPU_OUT_OF_MEMORY = (
    b"CUDA out of memory",  # PyTorch
    b"torch.cuda.OutOfMemoryError",
    b"torch.OutOfMemoryError",
    b"CUDA_ERROR_OUT_OF_MEMORY",  # the driver's API: CuPy, JAX, Numba
    b"cudaErrorMemoryAllocation",  # the runtime's
    b"RESOURCE_EXHAUSTED: Out of memory",  # XLA
)
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
SYS_CLONE3 = 435
CLONE_PARENT = 1 << 15
CLONE_INTO_CGROUP = 1 << 33
AS_TEMPLATE = "--template"
READY = b"\0"
LONGEST_POLL_MS = 3_600_000
"""poll(2) takes no more than 2**31 ms; waking each hour costs nothing."""


class Launch:
    """What `launch.json` or the template's message says: paths, arguments and variables are the kernel's bytes."""

    def __init__(self, values: "Mapping[str, Any]") -> None:
        self.handle = str(values["handle"])
        self.name = f"{self.handle}.{values['key']}"
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
        self.cpu_affinity: list[int] = values["cpu_affinity"]
        self.output = None if values["output"] is None else _bytes(values["output"])
        self.error = None if values["error"] is None else _bytes(values["error"])
        self.append = bool(values["append"])
        self.warn_signal: tuple[int, float, bool] | None = values["warn_signal"]
        self.ranks: int | None = values["ranks"]
        self.adopt: tuple[int, int] | None = values["adopt"]
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
        for pid, ticks, _ in _descendants(os.getpid()):
            if (pid, ticks) not in self._told:
                self._told.add((pid, ticks))
                _signal_process(pid, ticks, signal.SIGTERM, signal.SIGCONT)

    def kill(self) -> None:
        """KILL every process that is there now. What a fork got away in time becomes a child of ours in the end."""
        if self.cgroup:
            _put(f"{self.cgroup}/cgroup.kill", "1")
        for pid, ticks, _ in _descendants(os.getpid()):
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


class Copy:
    """A file of the user's that gets what the job prints as well. One that takes no more is let go, never the job."""

    def __init__(self, file: int) -> None:
        self._file = file

    def write(self, data: memoryview) -> None:
        try:
            while data and self._file >= 0:
                data = data[os.write(self._file, data) :]
        except OSError:
            os.close(self._file)
            self._file = -1


class Supervisor:
    """One attempt, from the fork of the job to its `exit.json`."""

    def __init__(self, launch: Launch, wakeup: int, umask: int) -> None:
        self._launch = launch
        self._umask = umask
        self._wakeup = wakeup
        self._log = Log(launch.log_head_bytes, launch.log_tail_bytes)
        self._tree = Tree(_make_cgroup(launch))
        self._buffer = memoryview(bytearray(PIPE_BYTES))
        self._copies: dict[int, Copy] = {}
        self._ranks: dict[int, int] = {}
        """The pids of the main processes that run, and the rank of each."""
        self._failed_rank: int | None = None
        self._ready = 0
        self._started_at: float | None = None
        self._status: int | None = None
        self._trouble = b""
        self._stopped: str | None = None
        self._max_rss_kib = 0
        self._cpu_s = 0.0
        # CLOCK_MONOTONIC: steps of the wall clock do not matter, and a suspended box does not use up a job's time.
        self._start_at = self._warn_at = self._limit_at = self._kill_at = float("inf")
        self._kill_pause = KILL_AGAIN_S

    def run(self) -> None:
        try:
            self._fork()
        except OSError as error:
            self._trouble = f"could not fork: {error.strerror}".encode()
            self._kill_at = 0.0
        if self._ranks:
            self._supervise()
            self._drain()
        self._record()

    def _fork(self) -> None:
        launch = self._launch
        self._news, news = os.pipe()
        go, self._go = os.pipe()
        self._out, out = os.pipe()
        self._err, err = self._out, out
        if launch.error not in (None, launch.output):
            self._err, err = os.pipe()
        _widen(out)
        for end in (self._out, self._err, self._news):
            os.set_blocking(end, False)
        # Blocked over the fork: a signal must not reach the shim's handlers, and its wakeup pipe, in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            for rank in range(launch.ranks or 1):
                pid = self._tree.fork()
                if pid == 0:
                    os.close(self._go)
                    _become_job(launch, rank, self._umask, (out, err), news, go)
                self._ranks[pid] = rank
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            for end in {out, err, news, go}:
                os.close(end)
        self._pid = min(self._ranks, key=self._ranks.__getitem__)

    def _supervise(self) -> None:
        """Until the main process has ended and nothing of its tree is left."""
        poll = select.poll()
        for end in (self._wakeup, self._out, self._err, self._news):
            poll.register(end, select.POLLIN)
        while True:
            wait_s = min(self._start_at, self._warn_at, self._limit_at, self._kill_at) - time.monotonic()
            for end, _ in poll.poll(min(max(0.0, wait_s) * 1000, LONGEST_POLL_MS)):
                if end == self._wakeup:
                    self._hear()
                elif not (self._listen() if end == self._news else self._pump(end)):
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

    def _pump(self, end: int) -> bool:
        """Move what the job wrote into the log, and its copy; False at the end of its output."""
        try:
            count = os.readv(end, [self._buffer])
        except BlockingIOError:
            return True
        self._log.write(self._buffer[:count])
        if end in self._copies:
            self._copies[end].write(self._buffer[:count])
        return count > 0

    def _listen(self) -> bool:
        """Hear from the forked children: READY, then what went wrong; the end (False) when they have become the job."""
        try:
            news = os.read(self._news, 65536)
        except BlockingIOError:
            return True
        self._ready += news.count(READY)
        if READY in news and self._ready == (self._launch.ranks or 1):
            self._start_at = 0.0
        self._trouble += news.replace(READY, b"")
        return news != b""

    def _on_time(self, childless: bool) -> None:
        now = time.monotonic()
        if now >= self._start_at:
            self._start(now)
        if now >= self._warn_at:
            self._warn()
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
        """Open the copies, write `started.json` and let the job exec. A full disk delays it."""
        self._start_at = float("inf")
        if self._stopped is not None or self._status is not None:
            return
        try:
            self._open_copies()
        except Trouble as trouble:
            self._trouble += str(trouble).encode(errors="replace")
            os.close(self._go)  # who waits for the word goes
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
            if self._launch.warn_signal is not None:
                self._warn_at = self._limit_at - self._launch.warn_signal[1]
        try:
            os.write(self._go, READY * len(self._ranks))
        except OSError:
            pass  # the child was killed; its status says so

    def _open_copies(self) -> None:
        """Open the files that get a copy of the output, once. Raises Trouble."""
        launch = self._launch
        for end, path in ((self._out, launch.output), (self._err, launch.error)):
            if path is not None and end not in self._copies:
                os.umask(self._umask)
                try:
                    self._copies[end] = Copy(_open_copy(os.path.join(launch.cwd, path), launch.append))
                finally:
                    os.umask(0o077)

    def _warn(self) -> None:
        """Send the signal that says how near the time limit is."""
        self._warn_at = float("inf")
        if self._launch.warn_signal is None or self._stopped is not None or self._status is not None:
            return
        number, _, main_only = self._launch.warn_signal
        for pid, ticks, _ in _descendants(os.getpid()):
            if not main_only or pid in self._ranks:
                _signal_process(pid, ticks, number)

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
            if pid in self._ranks:
                main_ended = self._end_rank(self._ranks.pop(pid), status) or main_ended
        if main_ended:
            self._tree.terminate()
            if self._stopped is None:
                grace_s = self._launch.grace_s
                self._kill_at = time.monotonic() + (grace_s if self._ranks else min(grace_s, LEFTOVER_GRACE_S))
        return False

    def _end_rank(self, rank: int, status: int) -> bool:
        """Take note of how a main process ended; True when that ends the job: one failed, or the last is gone."""
        if self._status is not None or (status == 0 and self._ranks):
            return False
        self._status = status
        self._limit_at = float("inf")
        if status and self._stopped is None and (self._launch.ranks or 1) > 1:
            self._failed_rank = rank
        return True

    def _drain(self) -> None:
        """Take what the job left in the pipes. The log's may still be held open by a stranger who got it passed."""
        while self._listen():
            pass
        for end in {self._out, self._err}:
            poll = select.poll()
            poll.register(end, select.POLLIN)
            enough = self._log.bytes + fcntl.fcntl(end, fcntl.F_GETPIPE_SZ)
            while self._log.bytes < enough and poll.poll(0) and self._pump(end):
                pass

    def _record(self) -> None:
        values = self._ending()
        if self._tree.cgroup:
            _remove_cgroup(self._tree.cgroup)
        _finish(self._log, values)

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
        failed = error is None and code != 0
        return {
            "exit_code": code if error is None and code is not None and code >= 0 else None,
            "signal": -code if error is None and code is not None and code < 0 else None,
            "rank": self._failed_rank if failed else None,
            "error": error,
            "stopped": self._stopped,
            "out_of_memory": out_of_memory,
            "gpu_out_of_memory": failed and _says_gpu_out_of_memory(_end_of_log()),
            "started_at": self._started_at,
            "ended_at": time.time(),
            "cpu_seconds": round(cpu_s, 6),
            "max_rss_mib": round(max_rss_mib, 3),
            "log_bytes": self._log.bytes,
            "log_dropped_bytes": self._log.bytes - self._log.kept,
        }


class Watcher:
    """A process that was begun outside mlbox, from when it was taken in to its `exit.json`. It is not our child.

    Each process that is to end is held by a pidfd, so that no other is ever signalled in its place.
    """

    def __init__(self, launch: Launch, process: "tuple[int, int]", wakeup: int) -> None:
        self._launch = launch
        self._pid, self._ticks = process
        self._wakeup = wakeup
        self._held: dict[int, tuple[int, int]] = {}
        """A pidfd, and the pid and start time, of each process whose end is waited for."""
        self._poll = select.poll()
        self._poll.register(wakeup, select.POLLIN)
        self._stopped: str | None = None
        self._signal: int | None = None
        self._limit_at = self._kill_at = float("inf")
        self._kill_pause = KILL_AGAIN_S

    def run(self) -> None:
        log = Log(0, 0)
        earlier = self._earlier()
        self._hold(self._pid, self._ticks)
        error = None
        if not self._held and earlier is None:
            error = f"process {self._pid} was gone before it could be watched"
        started_at = None if error else earlier or time.time()
        if self._held:
            self._start(started_at)
            self._watch()
        ended_well = error is None and self._signal is None
        values: dict[str, str | float | None] = {
            "exit_code": 0 if ended_well else None,
            "signal": self._signal,
            "error": error,
            "stopped": self._stopped,
            "adopted": True,
            "started_at": started_at,
            "ended_at": time.time(),
            "cpu_seconds": 0.0,
            "max_rss_mib": 0.0,
            "log_bytes": 0,
        }
        _finish(log, values)

    def _earlier(self) -> float | None:
        """Since when an earlier shim, that died, watched it."""
        try:
            return float(_read_json("started.json")["started_at"])
        except (OSError, ValueError, LookupError, TypeError, StopIteration):
            return None

    def _start(self, started_at: float | None) -> None:
        values: dict[str, str | float | None] = {
            "shim_pid": os.getpid(),
            "pid": self._pid,
            "boot_id": self._launch.boot_id,
            "started_at": started_at,
            "start_ticks": self._ticks,
            "cgroup": None,
            "adopted": True,
        }
        while True:
            try:
                _write_json("started.json", values)
                break
            except OSError:
                if self._poll.poll(1000):  # stopped, or ended: that goes before a full disk
                    break
        if self._launch.time_limit_s is not None and started_at is not None:
            self._limit_at = time.monotonic() + max(0.0, started_at + self._launch.time_limit_s - time.time())

    def _watch(self) -> None:
        """Until it has ended, and all that it had begun where it was stopped."""
        while self._held:
            wait_s = min(self._limit_at, self._kill_at) - time.monotonic()
            for end, _ in self._poll.poll(min(max(0.0, wait_s) * 1000, LONGEST_POLL_MS)):
                if end == self._wakeup:
                    self._hear()
                else:
                    self._poll.unregister(end)
                    del self._held[end]
                    os.close(end)
            now = time.monotonic()
            if now >= self._limit_at:
                self._stop("time_limit")
            if now >= self._kill_at:
                self._send(signal.SIGKILL)
                self._kill_at = now + self._kill_pause
                self._kill_pause = min(1.0, 2 * self._kill_pause)

    def _hear(self) -> None:
        for number in os.read(self._wakeup, 4096):
            if number in (signal.SIGTERM, signal.SIGUSR1):
                self._stop("cancel")
            if number == signal.SIGUSR1:
                self._kill_at = 0.0

    def _stop(self, reason: str) -> None:
        if self._stopped is None and self._held:
            self._stopped = reason
            self._limit_at = float("inf")
            self._send(signal.SIGTERM, signal.SIGCONT)
            self._kill_at = time.monotonic() + self._launch.grace_s

    def _send(self, *numbers: int) -> None:
        """Signal all that is held, and hold and signal all that it has begun."""
        self._signal = numbers[0]
        for pid, ticks, _ in _descendants(*(pid for pid, _ in self._held.values())):
            self._hold(pid, ticks)
        for process in self._held:
            for number in numbers:
                try:
                    signal.pidfd_send_signal(process, number)
                except OSError:
                    pass  # gone, or not ours to signal

    def _hold(self, pid: int, ticks: int) -> None:
        if (pid, ticks) not in self._held.values():
            process = _open_process(pid, ticks)
            if process is not None:
                self._held[process] = (pid, ticks)
                self._poll.register(process, select.POLLIN)


def main(folder: str, message: bytes | None = None) -> int:
    """Be the shim of the attempt in `folder`, as `message` says, or `launch.json` where there is none."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    umask = os.umask(0o077)
    wakeup = _catch_signals()
    try:
        os.setsid()
    except PermissionError:
        pass  # already leads its session
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.chdir(folder)
    if not _take_lock() or os.path.exists("exit.json"):
        return REFUSED
    began = os.path.exists("started.json")
    try:
        launch = Launch(_read_json("launch.json") if message is None else _json(message.decode()))
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        if began:
            return REFUSED
        sys.exit(f"launch.json is not one: {error!r}")
    _call("prctl", PR_SET_NAME, launch.handle.replace("-job", "", 1).encode()[:15] + b"\0", 0, 0, 0)  # as ps shows it
    if launch.adopt is not None:
        Watcher(launch, launch.adopt, wakeup).run()
    elif began:
        return REFUSED
    else:
        Supervisor(launch, wakeup, umask).run()
    return 0


def _finish(log: Log, values: "Mapping[str, str | float | None]") -> None:
    """Write `exit.json`, however long the disk is full; only a deleted folder ends the effort."""
    if os.path.exists("shim.log") and os.stat("shim.log").st_size == 0:
        _unlink("shim.log")  # where the executor lets us complain
    while True:
        try:
            log.finish()
            _write_json("exit.json", {**values, "log_dropped_bytes": log.bytes - log.kept})
            return _unlink("launch.json")  # nobody launches this attempt again; the user's variables may be secret
        except FileNotFoundError:
            return None
        except OSError:
            time.sleep(1.0)


def _open_copy(path: bytes, append: bool) -> int:
    """A file to copy output into. Waits for nobody, such as the reader of a FIFO. Raises Trouble."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(path, flags if append else flags | os.O_TRUNC, 0o666)
    except OSError as error:
        raise Trouble(f"cannot write its output to {_text(path)}: {error.strerror}") from error


def _says_gpu_out_of_memory(output: bytes) -> bool:
    return any(text in output for text in GPU_OUT_OF_MEMORY)


def _end_of_log() -> bytes:
    """The last OOM_WINDOW_BYTES that were kept. The job may have put anything there: never waits, follows no link."""
    found = b""
    names = sorted(name for name in os.listdir(".") if name == "log" or name.startswith("log."))
    for name in reversed(names):
        wanted = OOM_WINDOW_BYTES - len(found)
        if wanted <= 0:
            break
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            found = os.pread(file, wanted, max(0, os.fstat(file).st_size - wanted)) + found
        except OSError:
            pass
        finally:
            os.close(file)
    return found


def template() -> int:
    """Be ready to be a shim, and be copied for each launch: starting Python anew costs 10 ms of a core.

    Standard input is a socket. For each launch that comes (JSON, ended by a NUL byte) the answer is the pid of its
    shim, or a negative errno, on a line. The shims are children of our parent, as if it had started them itself, and
    outlive us. Ends with the socket.

    No file is made and removed on the way: ext4 looks at each inode that was freed in the last seconds before it gives
    one away (`recently_deleted`), which was a third of what a short job costs.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    gc.freeze()  # a collection in a shim would write to, and so copy, all that it shares with us
    waiting = b""
    while data := os.read(0, 65536):
        *launches, waiting = (waiting + data).split(b"\0")
        for launch in launches:
            os.write(0, b"%d\n" % _copied(launch))
    return 0


def _copied(launch: bytes) -> int:
    """Copy this process into a shim that runs `launch`; its pid, or a negative errno."""
    try:
        pid = _clone3(CLONE_PARENT, 0, 0)
    except OSError as error:
        return -(error.errno or errno.EAGAIN)
    if pid:
        return pid
    status = 1
    folder = ""
    try:
        folder = _json(launch.decode())["folder"]
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(null, 2)
        status = main(folder, launch)
    except BaseException as error:  # this process must not go on as a second template
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        os.dup2(os.open(os.path.join(folder, "shim.log"), flags, 0o600), 2)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
    finally:
        os._exit(status)


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


def _become_job(launch: Launch, rank: int, umask: int, output: "tuple[int, int]", news: int, go: int) -> "NoReturn":
    """In the forked child: prepare, say READY, wait for the word, exec. Every other descriptor closes on exec.

    The lock's copy stays open until then, so that nobody launches the attempt again beside a child that unpacks.
    Rank 0 unpacks for all; the others enter the folder when the word has come.
    """
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        os.umask(umask)
        for source, target in zip((os.open(os.devnull, os.O_RDONLY), *output), (0, 1, 2), strict=True):
            os.dup2(source, target)
        _settle_on(launch.cpu_affinity)
        if rank == 0:
            if launch.code is not None:
                _unpack(launch.code, launch.cwd)
            _enter(launch.cwd)
        os.write(news, READY)
        if os.read(go, 1):
            if rank:
                _enter(launch.cwd)
            _exec(launch.argv, launch.env if launch.ranks is None else launch.env | _rank(rank))
    except Trouble as trouble:
        os.write(news, str(trouble).encode(errors="replace"))
    except BaseException as error:  # whatever it is: this process must not go on as a second shim
        os.write(news, f"{type(error).__name__}: {error}".encode(errors="replace"))
    finally:
        os._exit(127)


def _rank(rank: int) -> dict[bytes, bytes]:
    """By what one of several processes knows which it is: torchrun's variables and srun's."""
    names = (b"RANK", b"LOCAL_RANK", b"ROLE_RANK", b"SLURM_PROCID", b"SLURM_LOCALID")
    return dict.fromkeys(names, str(rank).encode())


def _settle_on(cores: list[int]) -> None:
    """Stay near the job's GPUs. A hint: cores may be gone, or not ours to use."""
    try:
        if cores:
            os.sched_setaffinity(0, cores)
    except (OSError, ValueError, OverflowError):
        pass


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
        return _clone3(CLONE_INTO_CGROUP, signal.SIGCHLD, folder)
    finally:
        os.close(folder)


def _clone3(flags: int, exit_signal: int, cgroup: int) -> int:
    """clone3(2), like fork(2) beside the flags: the child's pid, and 0 in the child. Raises OSError."""
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    # set_tid_size, cgroup
    fields = (flags, 0, 0, 0, exit_signal, 0, 0, 0, 0, 0, cgroup)
    clone_args = b"".join(field.to_bytes(8, sys.byteorder) for field in fields)
    return _call("syscall", SYS_CLONE3, clone_args, len(clone_args))


def _remove_cgroup(path: str) -> None:
    """Remove an empty cgroup and those that the job made below it."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            pass  # an empty cgroup costs a few KiB of kernel memory until the next boot


def _descendants(*ancestors: int) -> "Iterator[tuple[int, int, int]]":
    """Pid, start time in clock ticks, and parent of everything below some processes (proc_pid_stat(5))."""
    children: dict[int, list[tuple[int, int, int]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            children.setdefault(int(fields[1]), []).append((int(name), int(fields[19]), int(fields[1])))
    parents = list(ancestors)
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
        return {pid for pid, _, parent in _descendants(os.getpid()) if parent == os.getpid()}


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
    process = _open_process(pid, ticks)
    if process is None:
        return
    try:
        for number in numbers:
            signal.pidfd_send_signal(process, number)
    except OSError:
        pass  # gone, or not ours to signal (setuid)
    finally:
        os.close(process)


def _open_process(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that began at `ticks`; None when it is gone, whoever has its pid by now."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return None
    if _ticks(pid) == ticks:
        return process
    os.close(process)
    return None


def _read_json(name: str) -> "dict[str, Any]":
    with open(name, encoding="utf-8") as file:
        return _json(file.read())


def _json(text: str) -> "dict[str, Any]":
    return make_scanner(_Json)(text, 0)[0]  # pyright: ignore[reportArgumentType]  # duck-typed


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
    sys.exit(template() if sys.argv[-1] == AS_TEMPLATE else main(sys.argv[-1]))
