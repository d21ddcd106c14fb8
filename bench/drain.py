"""How fast a long queue of jobs that do nothing is worked off over four slots: `python -m bench.drain`.

mlbox is the real daemon: each job is committed before it is answered, has a shim, a log, a record and accounting. With
100 and with 50,000 others waiting, 1,000 jobs that rank before them are drained. Beside it, where their programs are
installed: task-spooler (`tsp`, Debian's task-spooler: in memory, unsupervised) and Slurm (a cluster of one node with
four CPUs that answers `sbatch`; see https://slurm.schedmd.com/high_throughput.html).

`turn` is how long a slot takes for one job and the way to the next: slots / rate. Read ratios only.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.scheduler import Server, daemon, record

SLOTS = 4
ELEMENTS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """Jobs a second; milliseconds, medians, NaN where the rival does not tell."""

    rate: float
    to_start: float = float("nan")
    end_to_next: float = float("nan")
    cpu_per_job: float = float("nan")


def by_mlbox(folder: Path, jobs: int, waiting: int) -> Drained:
    """The daemon with `waiting` jobs in line behind those that are measured."""
    state = folder / f"mlbox-{waiting}"
    server = daemon(state, f"scheduler.cpu_slots={SLOTS}")
    try:
        to_start = mlbox_to_start(state, server, 20)
        blockers = [submitted(server, command="sleep 3600", priority=100) for _ in range(SLOTS)]
        for first in range(0, waiting, ELEMENTS_MAX):
            submitted(server, command="true", array=f"0-{min(ELEMENTS_MAX, waiting - first) - 1}")
        measured = [submitted(server, command="true", priority=50) for _ in range(jobs)]
        cpu = cpu_s(server)
        for job_id in blockers:
            server.http.post(f"/api/jobs/{job_id}/cancel")
        server.http.get(f"/api/jobs/{measured[-1]}/wait?timeout=600", timeout=620)
        cpu = cpu_s(server) - cpu
        with sqlite3.connect(f"file:{state}/mlbox.db?mode=ro", uri=True) as database:
            spans = database.execute(
                "SELECT started_at, ended_at FROM attempts WHERE job_id BETWEEN ? AND ? AND ended_at IS NOT NULL",
                (measured[0], measured[-1]),
            ).fetchall()
        database.close()
    finally:
        server.stop()
        end_shims(state)
    starts, ends = sorted(start for start, _ in spans), sorted(end for _, end in spans)
    gaps = [1000 * (start - end) for end, start in zip(ends, starts[SLOTS:], strict=False)]
    return Drained(
        rate=len(ends) / (ends[-1] - starts[0]),
        to_start=to_start,
        end_to_next=statistics.median(gaps),
        cpu_per_job=1000 * cpu / jobs,
    )


def cpu_s(server: Server) -> float:
    """CPU seconds of the daemon, its helpers, and all of their children that have ended."""
    daemon = psutil.Process(server.process.pid)
    spent = 0.0
    for process in (daemon, *daemon.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a shim that has just ended is in its parent's account
            spent += sum(process.cpu_times()[:4])
    return spent


def submitted(server: Server, **fields: object) -> int:
    response = server.http.post("/api/jobs", json=fields)
    response.raise_for_status()
    return response.json()["id"]


def mlbox_to_start(state: Path, server: Server, jobs: int) -> float:
    """Milliseconds from the submit to the process's start on an idle box."""
    taken: list[float] = []
    for _ in range(jobs):
        asked = time.time()
        job_id = submitted(server, command="true", priority=100)
        server.http.get(f"/api/jobs/{job_id}/wait?timeout=60")
        taken.append(1000 * (record(state, job_id, "started")["started_at"] - asked))
    return statistics.median(taken)


def end_shims(state: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        if str(state) in " ".join(process.info["cmdline"] or []):
            process.send_signal(signal.SIGKILL)


def by_tsp(folder: Path, jobs: int, waiting: int) -> Drained:
    """task-spooler keeps every job in a list, so the others wait behind the measured ones."""
    environment = {
        **os.environ,
        "TS_SOCKET": str(folder / f"tsp-socket-{waiting}"),
        "TS_MAXFINISHED": "10",
        "TS_SLOTS": "1",
    }

    def tsp(*words: str) -> str:
        done = subprocess.run(["tsp", *words], env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        taken: list[float] = []
        for turn in range(20):
            stamp = folder / f"tsp-{waiting}-{turn}"
            asked = time.time()
            tsp("-n", "sh", "-c", f"date +%s.%N > {stamp}")
            while not stamp.exists() or not stamp.read_text().endswith("\n"):
                time.sleep(0.001)
            taken.append(1000 * (float(stamp.read_text()) - asked))
        blocker = len(taken)  # it counts jobs from 0, and tells no number with -n
        tsp("-n", "sleep", "3600")
        for _ in range(jobs + waiting):
            tsp("-n", "true")
        tsp("-S", str(SLOTS))
        began = time.perf_counter()
        os.kill(int(tsp("-p", str(blocker))), signal.SIGTERM)
        tsp("-w", str(blocker + jobs))
        rate = jobs / (time.perf_counter() - began)
    finally:
        tsp("-K")
    return Drained(rate=rate, to_start=statistics.median(taken))


def by_slurm(folder: Path, jobs: int, waiting: int) -> Drained:
    """Jobs of one CPU; the others wait behind them, as an array, which counts as many jobs."""
    script = folder / "noop.sh"
    script.write_text("#!/bin/sh\n#SBATCH -o /dev/null\n#SBATCH -n 1\ntrue\n")

    def sbatch(*words: str) -> str:
        done = subprocess.run(["sbatch", "--parsable", *words, str(script)], check=True, capture_output=True, text=True)
        return done.stdout.strip().split(";")[0]

    measured = [sbatch("--hold", "--priority=1000") for _ in range(jobs)]
    for first in range(0, waiting, 1000):
        sbatch("--hold", f"--array=0-{min(1000, waiting - first) - 1}")
    began = time.perf_counter()
    subprocess.run(["scontrol", "release", ",".join(measured)], check=True)
    asked = ["squeue", "-h", "-o", "%i", "-j", ",".join(measured)]
    while subprocess.run(asked, check=False, capture_output=True).stdout:
        time.sleep(0.2)
    rate = jobs / (time.perf_counter() - began)
    subprocess.run(["scancel", "-u", str(os.getuid())], check=True)
    return Drained(rate=rate)


RIVALS: dict[str, tuple[str, Callable[[Path, int, int], Drained]]] = {
    "task-spooler": ("tsp", by_tsp),
    "Slurm": ("sbatch", by_slurm),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs that are drained")
    parser.add_argument("--waiting", type=int, nargs="*", default=[100, 50_000], help="others that wait behind them")
    parser.add_argument("--rival-waiting", type=int, default=100, help="the same for the rivals (-1: leave them out)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mlbox-drain-"))
    try:
        figures = [(f"mlbox, {n:,} waiting", by_mlbox(folder, options.jobs, n)) for n in options.waiting]
        if options.rival_waiting >= 0:
            for name, (program, measure) in RIVALS.items():
                if shutil.which(program):
                    what = f"{name}, {options.rival_waiting:,} waiting"
                    figures.append((what, measure(folder, options.jobs, options.rival_waiting)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first = figures[0][1]
    print("| | jobs/s | x mlbox | turn, ms | job end to next start, ms | submit to start, idle, ms | CPU, ms a job |")
    print("|---|---|---|---|---|---|---|")
    for name, one in figures:
        print(
            f"| {name} | {one.rate:.1f} | {one.rate / first.rate:.2f} | {1000 * SLOTS / one.rate:.1f} "
            f"| {one.end_to_next:.1f} | {one.to_start:.1f} | {one.cpu_per_job:.1f} |"
        )
    print("promised: 100 jobs/s or more, 30 ms, 40 ms; all within 1.5 times from 100 to 50,000 waiting")


if __name__ == "__main__":
    main()
