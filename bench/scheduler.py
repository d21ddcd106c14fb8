"""The scheduler's floors, each beside the floor measured in the same run: `python -m bench.scheduler`.

Submits per second against a bare Starlette + SQLite (synchronous=FULL) insert; submit to process start; job end to next
start; all again with 50,000 finished and 10,000 waiting jobs; memory and CPU of the idle daemon; a job that logs 50,000
lines a second with 50 followers. Every figure is printed with the ratio that the project promises.
"""

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
BODY = json.dumps({"command": "true", "hold": True, "name": "bench"}).encode()


class Server:
    """A server process on a Unix socket, asked by raw keep-alive connections."""

    def __init__(self, command: list[str], socket: Path, headers: str = "") -> None:
        self.socket, self.headers = socket, headers
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.http = httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://mlbox", timeout=60)
        until = time.monotonic() + 30
        while True:
            try:
                if self.http.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if time.monotonic() > until or self.process.poll() is not None:
                raise SystemExit(f"{command} did not start")
            time.sleep(0.05)

    def stop(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait()

    async def posts_per_second(self, clients: int, seconds: float) -> float:
        """How many `POST /api/jobs` are answered with 201 in a second by `clients` connections."""
        request = (
            f"POST /api/jobs HTTP/1.1\r\nHost: mlbox\r\nContent-Type: application/json\r\n{self.headers}"
            f"Content-Length: {len(BODY)}\r\n\r\n"
        ).encode() + BODY
        until = time.perf_counter() + seconds

        async def one() -> int:
            reader, writer = await asyncio.open_unix_connection(str(self.socket))
            answered = 0
            while time.perf_counter() < until:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                if b" 201 " not in head[:16]:
                    raise SystemExit(f"a submit was refused: {head!r}")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                answered += 1
            writer.close()
            return answered

        began = time.perf_counter()
        answers = await asyncio.gather(*(one() for _ in range(clients)))
        return sum(answers) / (time.perf_counter() - began)


def daemon(state: Path, *settings: str) -> Server:
    arguments = [part for setting in ("serving.enabled=false", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "mlbox", "serve", "--state", str(state), "--listen", "127.0.0.1:0", *arguments]
    return Server(command, state / "mlbox.sock")


def submits(folder: Path, seconds: float) -> dict[str, float]:
    """Durable submits a second with 8 clients, in turns with the bare floor; medians of three."""
    floor: list[float] = []
    ours: list[float] = []
    for turn in range(3):
        bare = folder / f"bare{turn}"
        bare.mkdir()
        server = Server([sys.executable, "-m", "bench.bare", str(bare)], bare / "bare.sock")
        floor.append(asyncio.run(server.posts_per_second(8, seconds)))
        server.stop()
        server = daemon(folder / f"submit{turn}")
        ours.append(asyncio.run(server.posts_per_second(8, seconds)))
        server.stop()
    return {"floor": statistics.median(floor), "ours": statistics.median(ours)}


def history(state: Path, finished: int, waiting: int, slots: int) -> None:
    """Fill a state folder that a daemon made with finished jobs, and waiting ones that ask for every slot."""
    with sqlite3.connect(state / "mlbox.db") as database:
        insert = (
            "INSERT INTO jobs (user, uid, name, project, command, env, gpus, cpus, grace_s, priority, retries, requeue,"
            " hold, state, submitted_at) VALUES ('bench', ?, 'old', 'default', 'true', '{}', 0, ?, 30, 0, 0, 0, 0,"
            " 'queued', 0)"
        )
        database.executemany(insert, [(os.getuid(), 1)] * finished)
        for state_name, ended in (("starting", "NULL"), ("running", "NULL"), ("succeeded", "1")):
            database.execute(f"UPDATE jobs SET state = '{state_name}', attempt = 1, ended_at = {ended} WHERE cpus = 1")
        database.executemany(insert, [(os.getuid(), slots)] * waiting)
    database.close()


def latencies(state: Path, server: Server, jobs: int) -> dict[str, float]:
    """Milliseconds, medians: from submit to start on a free slot, and from a job's end to the next one's start."""
    to_start: list[float] = []
    for _ in range(jobs):
        asked = time.time()
        job = server.http.post("/api/jobs", json={"command": "true", "priority": 100}).json()
        server.http.get(f"/api/jobs/{job['id']}/wait?timeout=60")
        to_start.append(record(state, job["id"], "started")["started_at"] - asked)
    queue = [
        server.http.post("/api/jobs", json={"command": "sleep 0.05", "priority": 100}).json()["id"] for _ in range(jobs)
    ]
    server.http.get(f"/api/jobs/{queue[-1]}/wait?timeout=300")
    between = [
        record(state, after, "started")["started_at"] - record(state, before, "exit")["ended_at"]
        for before, after in pairwise(queue[2:])
    ]
    return {"to_start": 1000 * statistics.median(to_start), "between": 1000 * statistics.median(between)}


def record(state: Path, job_id: int, name: str) -> dict[str, Any]:
    return json.loads((state / "jobs" / str(job_id) / "attempt-1" / f"{name}.json").read_text())


def idle(server: Server, seconds: float) -> dict[str, float]:
    """Memory (MiB, daemon and gpu monitor) and CPU (percent of a core) of a daemon that nobody asks anything."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(seconds)
    after = sum(sum(process.cpu_times()[:2]) for process in processes)
    return {
        "rss": sum(process.memory_info().rss for process in processes) / 2**20,
        "pss": sum(process.memory_full_info().pss for process in processes) / 2**20,
        "cpu": 100 * (after - before) / seconds,
    }


def drained(state: Path, server: Server, slots: int, jobs: int) -> dict[str, float]:
    """No-op jobs a second, from the moment when the slots are free; beside it a shell's loop that starts the same.

    The floor records nothing and starts one after the other: what a job costs at the very least.
    """
    began = time.monotonic()
    for _ in range(200):
        subprocess.run(["/bin/bash", "-c", "true"], check=True)
    floor = 200 / (time.monotonic() - began)
    gate = state.parent / "go"
    wait = {"command": f"while [ ! -e {gate} ]; do sleep 0.02; done", "cpus": slots}
    server.http.post("/api/jobs", json=wait)
    queue = [server.http.post("/api/jobs", json={"command": "true"}).json()["id"] for _ in range(jobs)]
    opened = time.time()
    gate.touch()
    for job_id in queue[-slots:]:
        server.http.get(f"/api/jobs/{job_id}/wait?timeout=600")
    ended = max(record(state, job_id, "exit")["ended_at"] for job_id in queue[-slots:])
    return {"rate": jobs / (ended - opened), "floor": floor}


def shim_memory(state: Path, server: Server) -> float:
    """Resident MiB of one shim with a running job."""
    job = server.http.post("/api/jobs", json={"command": "sleep 60", "priority": 100}).json()
    while not (state / "jobs" / str(job["id"]) / "attempt-1" / "started.json").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    memory = psutil.Process(record(state, job["id"], "started")["shim_pid"]).memory_info().rss / 2**20
    server.http.post(f"/api/jobs/{job['id']}/cancel")
    server.http.get(f"/api/jobs/{job['id']}/wait?timeout=60")
    return memory


LOGGER = """
import sys, time
began = time.monotonic()
line = b"x" * 71
for tenth in range(int(sys.argv[1]) * 10):
    sys.stdout.buffer.write(b"".join(b"%08d%s\\n" % (tenth * 5000 + n, line) for n in range(5000)))
    sys.stdout.buffer.flush()
    time.sleep(max(0, began + (tenth + 1) / 10 - time.monotonic()))
print(f"took {time.monotonic() - began:.3f}")
"""


async def follow(socket: Path, job_id: int) -> str:
    """Follow a log to its end; returns the SHA-256 of what came."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    writer.write(f"GET /api/jobs/{job_id}/log?follow=1 HTTP/1.1\r\nHost: mlbox\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    received = hashlib.sha256()
    while size := int(await reader.readline(), 16):  # chunked transfer coding, RFC 9112 section 7.1
        received.update(await reader.readexactly(size))
        await reader.readexactly(2)
    writer.close()
    return received.hexdigest()


def followed_log(state: Path, server: Server, seconds: int, followers: int) -> dict[str, float]:
    """A job that writes 50,000 lines a second: how long it takes alone, and with followers."""
    script = state.parent / "logger.py"
    script.write_text(LOGGER)
    took: dict[int, float] = {}
    complete = 0
    for count in (0, followers):
        job = server.http.post("/api/jobs", json={"command": f"{sys.executable} {script} {seconds}", "priority": 100})
        job_id = job.json()["id"]

        async def all_follow(job_id: int = job_id, count: int = count) -> list[str]:
            return await asyncio.gather(*(follow(server.socket, job_id) for _ in range(count)))

        received = asyncio.run(all_follow())
        server.http.get(f"/api/jobs/{job_id}/wait?timeout=120")
        log = (state / "jobs" / str(job_id) / "attempt-1" / "log").read_bytes()
        if log.count(b"\n") != seconds * 50_000 + 1:
            raise SystemExit("the log itself is not complete")
        took[count] = float(log.rsplit(b"\n", 2)[1].split()[1])
        complete = received.count(hashlib.sha256(log).hexdigest())
    return {"alone": took[0], "followed": took[followers], "complete": complete}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each throughput measurement")
    parser.add_argument("--jobs", type=int, default=30, help="of each latency measurement")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mlbox-bench-"))
    try:
        report(folder, options.seconds, options.jobs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(folder: Path, seconds: float, jobs: int) -> None:
    rate = submits(folder, seconds)
    line("durable submits/s, 8 clients", f"{rate['ours']:.0f}", f"bare floor {rate['floor']:.0f}")
    line("  ratio", f"{rate['ours'] / rate['floor']:.2f}", "promised >= 0.60")

    slots = 2
    state = folder / "latency"
    server = daemon(state, f"scheduler.cpu_slots={slots}")
    still = idle(server, 20)
    line("idle daemon + gpu monitor, RSS MiB", f"{still['rss']:.0f}", f"promised < 100 (PSS {still['pss']:.0f})")
    line("  CPU, % of a core", f"{still['cpu']:.2f}", "promised < 1")
    long_job = server.http.post("/api/jobs", json={"command": "sleep 3600", "priority": 100}).json()["id"]
    quiet = latencies(state, server, jobs)
    line("submit to process start, ms", f"{quiet['to_start']:.1f}", "promised < 50")
    line("job end to next start, ms", f"{quiet['between']:.1f}", "promised < 40")
    line("shim, RSS MiB", f"{shim_memory(state, server):.1f}", "promised < 12")
    log = followed_log(state, server, 10, 50)
    line("50,000 lines/s, s for 10 s of log: alone", f"{log['alone']:.2f}", "")
    line("  with 50 followers", f"{log['followed']:.2f}", f"x{log['followed'] / log['alone']:.3f}, promised <= 1.05")
    line("  followers that got every byte", f"{log['complete']:.0f}", "of 50")
    server.stop()

    state = folder / "drain"
    server = daemon(state, "scheduler.cpu_slots=4")
    no_ops = drained(state, server, 4, 1000)
    beside = f"x{no_ops['rate'] / no_ops['floor']:.2f} of a loop of `bash -c true` ({no_ops['floor']:.0f}/s)"
    line("no-op jobs/s over 4 slots", f"{no_ops['rate']:.0f}", f"{beside}, promised >= 100/s")
    server.stop()

    state = folder / "latency"
    history(state, 50_000, 10_000, slots)
    server = daemon(state, f"scheduler.cpu_slots={slots}")
    rate_full = statistics.median(asyncio.run(server.posts_per_second(8, seconds)) for _ in range(3))
    full = latencies(state, server, jobs)
    line("with 50,000 finished and 10,000 waiting: submits/s", f"{rate_full:.0f}", f"x{rate['ours'] / rate_full:.2f}")
    for name, key in (("submit to start", "to_start"), ("end to next start", "between")):
        line(f"  {name}, ms", f"{full[key]:.1f}", f"x{full[key] / quiet[key]:.2f}, promised <= 1.5")
    server.http.post(f"/api/jobs/{long_job}/cancel")
    server.http.get(f"/api/jobs/{long_job}/wait?timeout=60")
    server.stop()
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if str(folder) in " ".join([*(process.info["cmdline"] or []), process.info["cwd"] or ""]):
            process.send_signal(signal.SIGKILL)


def line(name: str, value: str, beside: str) -> None:
    print(f"{name:<58} {value:>10}   {beside}", flush=True)


if __name__ == "__main__":
    main()
