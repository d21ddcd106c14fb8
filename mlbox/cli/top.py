"""`mlbox top`: the box on one screen, drawn anew every two seconds and whenever the daemon says that it changed."""

import argparse
import http.client
import os
import select
import shutil
import sys
import termios
import threading
import tty
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlbox.cli import client

_EVERY_S = 2.0
_LISTEN_AGAIN_S = 2.0
_SHOWN = 200
"""Jobs asked for: more than any screen has lines."""
_HOME, _TO_LINE_END, _TO_END = "\x1b[H", "\x1b[K", "\x1b[J"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
"""The terminal's other screen, without a cursor, and back (xterm's control sequences)."""
_BAR = 10
_UNCUT = 10_000
"""Columns where no screen ends: what is piped is for another program, or a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The daemon's answers about one moment."""

    gpus: Any
    running: Sequence[Any]
    waiting: Sequence[Any]


def top(options: argparse.Namespace) -> int:
    """`mlbox top`: live in a terminal; where the output goes elsewhere, once."""
    if options.json:
        seen = _look(options)
        return client.answer(options, {**seen.gpus, "running": seen.running, "queue": seen.waiting}, "")
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        width = _UNCUT
        client.write("".join(line + "\n" for line in lines(_look(options), width, colour=False)).encode())
        return 0
    seen = _look(options)  # a daemon that is not there is told on the screen that stays
    with _screen(), _hints(options) as changed:
        while True:
            _draw(seen)
            ready, _, _ = select.select([sys.stdin, changed], [], [], _EVERY_S)
            if sys.stdin in ready and os.read(sys.stdin.fileno(), 64)[:1].lower() in (b"q", b"\x03", b"\x1b", b""):
                return 0
            if changed in ready:
                os.read(changed, 4096)
            try:
                seen = _look(options)
            except (OSError, http.client.HTTPException) as error:
                _draw(seen, trouble=f"no answer: {error}")


def lines(seen: Seen, width: int, height: int = 10_000, *, colour: bool) -> list[str]:
    """What `top` shows, each line at most `width` wide and not more than `height` of them. Pure."""
    paint = _paint if colour else _bare
    gpus = [_gpu_line(gpu, seen.running) for gpu in seen.gpus["gpus"]]
    slots = seen.gpus["cpu_slots"]
    head = f"{slots['total'] - slots['free']} of {slots['total']} CPU slots in use"
    if not gpus:
        head = f"{seen.gpus['message']}; {head}"
    shown = [*gpus, _Line(head, dim=True), _Line("")]
    shown += _section("RUNNING", [_running_line(job, seen.gpus["gpus"]) for job in seen.running], "nothing runs")
    left = height - len(shown) - 3
    rows = [_waiting_line(job) for job in seen.waiting]
    more = len(rows) - max(left, 1)
    if more > 0:
        rows = [*rows[: max(left - 1, 1)], _Line(f"  and {more + 1} more", dim=True)]
    shown += [_Line(""), *_section("QUEUE", rows, "nobody waits")]
    return [line.fitted(width, paint) for line in shown[:height]]


Paint = Callable[[str, str], str]
_COLOURS = {"leased": "34", "free": "32", "foreign": "33", "draining": "33", "drained": "90", "unknown": "31"}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: `start` as wide as its columns are, `rest` cut where the screen ends."""

    start: str
    rest: str = ""
    state: str | None = None
    dim: bool = False
    bold: bool = False

    def fitted(self, width: int, paint: Paint) -> str:
        text = _cut(self.start + self.rest, width)
        if self.state is not None:
            coloured = paint(self.state, _COLOURS.get(self.state, "0"))
            return text.replace(self.state, coloured, 1)
        return paint(text, "90") if self.dim and text else paint(text, "1") if self.bold else text


def _section(title: str, rows: Sequence[_Line], empty: str) -> list[_Line]:
    return [_Line(title, bold=True), *(rows or [_Line(f"  {empty}", dim=True)])]


def _gpu_line(gpu: Any, running: Sequence[Any]) -> _Line:
    total, used = gpu["memory_mib"], gpu["used_mib"]
    filled = round(_BAR * (used or 0) / total) if total else 0
    load = "  –" if gpu["utilization"] is None else f"{gpu['utilization']:3d}"
    memory = f"{_gib(used)}/{_gib(total)} GiB"
    holders = [f"{job['id']} {job['name']} ({job['user']})" for job in running if gpu["uuid"] in job["gpu_uuids"]]
    why = ", ".join(holders) or ("" if gpu["state"] == "free" else gpu["why"] or "")
    start = f"GPU {gpu['label']:<3} {load} %  {'█' * filled}{'░' * (_BAR - filled)} {memory:>14}  {gpu['state']:<9} "
    return _Line(start, _plain(why), state=gpu["state"])


def _running_line(job: Any, gpus: Sequence[Any]) -> _Line:
    index = {gpu["uuid"]: gpu["label"] for gpu in gpus}
    on = "GPU " + ",".join(index.get(uuid, "?") for uuid in job["gpu_uuids"]) if job["gpu_uuids"] else "CPU"
    limit = f" of {_span(job['time_limit_s'])}" if job["time_limit_s"] else ""
    ran = _span(_since(job["started_at"])) if job["started_at"] else job["state"]
    command = job["command"] or "a script"
    return _Line(
        f"{job['id']:>7}  {_column(job['name'], 20)} {_column(job['user'], 10)} {on:<10} {ran + limit:<16} ",
        _plain(command),
    )


def _waiting_line(job: Any) -> _Line:
    pending: dict[str, Any] = job["pending"] or {}
    place = pending.get("position") or "–"
    start = pending.get("estimated_start")
    when = f"~{_clock(start)}" if start else ""
    gpus = job["gpus"]
    asks = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "part GPU" if job.get("gpu_mem_mib") else "CPU"
    return _Line(
        f"{place:>7}  {job['id']:>6}  {_column(job['name'], 20)} {_column(job['user'], 10)} {asks:<8} {when:<7} ",
        _plain(pending.get("why") or "it is about to start"),
    )


# The terminal


def _draw(seen: Seen, trouble: str | None = None) -> None:
    width, height = shutil.get_terminal_size((100, 30))
    head = f"mlbox  {datetime.now().astimezone():%H:%M:%S}  q leaves"
    first = _paint(_cut(trouble or head, width), "31" if trouble else "90")
    shown = [first, *lines(seen, width, height - 2, colour=True)]
    client.write((_HOME + "".join(f"{line}{_TO_LINE_END}\r\n" for line in shown) + _TO_END).encode())


@contextmanager
def _screen() -> Generator[None]:
    """The terminal's other screen and its keys one by one; put back as it was at the end."""
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    try:
        tty.setcbreak(keys)
        client.write(_ENTER.encode())
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSADRAIN, before)
        client.write(_LEAVE.encode())


@contextmanager
def _hints(options: argparse.Namespace) -> Generator[int]:
    """A descriptor that can be read when the daemon said that something changed. Hints only: nothing rests on them."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            try:
                with client.connection(options) as daemon:
                    events = daemon.send("GET", "/api/events?topics=gpus,queue", accept="text/event-stream")
                    while line := events.readline():
                        if done.is_set():
                            return
                        if line.startswith(b"event: change"):
                            os.write(write, b"x")
            except (OSError, http.client.HTTPException, client.Refused):
                pass
            done.wait(_LISTEN_AGAIN_S)

    threading.Thread(target=listen, name="hints", daemon=True).start()
    try:
        yield read
    finally:
        done.set()  # the thread sleeps in its read until the process ends; the pipe has to outlive it


def _look(options: argparse.Namespace) -> Seen:
    return Seen(
        gpus=client.ask(options, "GET", "/api/gpus"),
        running=client.ask(options, "GET", f"/api/jobs?state=running,starting&limit={_SHOWN}")["jobs"],
        waiting=client.ask(options, "GET", f"/api/queue?limit={_SHOWN}")["jobs"],
    )


# Words


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m"


def _bare(text: str, colour: str) -> str:
    del colour
    return text


def _plain(text: str) -> str:
    """What others wrote, unable to move the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _cut(text: str, width: int) -> str:
    return text.rstrip() if len(text.rstrip()) <= width else text[: max(width - 1, 0)] + "…"


def _column(text: str, width: int) -> str:
    return _cut(_plain(text), width).ljust(width)


def _gib(mib: int | None) -> str:
    return "?" if mib is None else f"{mib / 1024:.0f}" if mib >= 102_400 or mib % 1024 == 0 else f"{mib / 1024:.1f}"


def _since(moment: str) -> float:
    return max(0.0, datetime.now().astimezone().timestamp() - datetime.fromisoformat(moment).timestamp())


def _clock(moment: str) -> str:
    """In this machine's time: the hour today, the day on others."""
    then = datetime.fromisoformat(moment).astimezone()
    today = then.date() == datetime.now().astimezone().date()
    return f"{then:%H:%M}" if today else f"{then:%a %H:%M}"


def _span(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}h{minutes:02}" if hours else f"{minutes}m{int(seconds) % 60:02}s"
