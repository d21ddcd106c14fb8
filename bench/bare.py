"""The floor for durable submits: the least that Starlette and SQLite (synchronous=FULL) can do for `POST /api/jobs`.

One INSERT of the request's text, committed before the answer; no identity, no checks, no queue. One thread writes, one
transaction a request: `python -m bench.bare FOLDER`.
"""

import asyncio
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

folder = Path(sys.argv[1])
writer = ThreadPoolExecutor(1)


def connect() -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, command TEXT, name TEXT)")
    return connection


database = writer.submit(connect).result()


def insert(command: str, name: str) -> int | None:
    return database.execute("INSERT INTO jobs (command, name) VALUES (?, ?)", (command, name)).lastrowid


async def submit(request: Request) -> Response:
    job = await request.json()
    job_id = await asyncio.get_running_loop().run_in_executor(writer, insert, job["command"], job["name"])
    return JSONResponse({"id": job_id, **job}, 201)


async def ready(_: Request) -> Response:
    return Response()


app = Starlette(routes=[Route("/api/jobs", submit, methods=["POST"]), Route("/readyz", ready)])

if __name__ == "__main__":
    uvicorn.run(app, uds=str(folder / "bare.sock"), log_level="error", access_log=False)
