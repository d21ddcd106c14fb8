import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.errors import Unauthenticated
from mlbox.scheduler.logs import Chunk, LogFile
from mlbox.web import log_lines
from mlbox.web.live import log_events
from mlbox.web.problems import NoSuchRange
from mlbox.web.ranges import byte_range
from tests.web.harness import Box, eventually

EVENTS = {"Accept": "text/event-stream"}


@asynccontextmanager
async def stream(box: Box, path: str, **options: Any) -> AsyncGenerator[httpx.Response]:
    async with asyncio.timeout(30), box.http.stream("GET", path, **options) as answer:
        yield answer


async def events(answer: httpx.Response) -> AsyncGenerator[tuple[str, int | None, Any]]:
    """(kind, id, data) of each event."""
    kind, position, data = "message", None, ""
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if not line:
            if data:
                yield kind, position, json.loads(data)
            kind, position, data = "message", None, ""
        elif name == "event":
            kind = value
        elif name == "id":
            position = int(value)
        elif name == "data":
            data += value


@pytest.mark.parametrize("way", ["mkdir log", "ln -s /etc/passwd log", "mkfifo log", "ln -s log log"])
async def test_what_a_job_puts_in_place_of_its_log_is_an_empty_log(box: Box, way: str) -> None:
    job = await box.submit(f"echo gone; cd $(dirname $MLBOX_OUT)/attempt-1; rm log; {way}")
    await box.wait(job["id"])
    path = f"/api/jobs/{job['id']}/log"
    for address in (path, f"{path}?tail=10", f"{path}?follow=1"):
        log = await box.http.get(address)
        assert (log.status_code, log.text) == (200, ""), address
    lines = await box.http.get(f"{path}/lines")
    assert (lines.status_code, lines.json()["lines"], lines.json()["size"]) == (200, [], 0)
    page = await box.tcp.get(f"/jobs/{job['id']}", headers={"Cookie": await box.cookie()})
    assert page.status_code == 200


async def test_a_log_is_read_from_any_byte(box: Box) -> None:
    job = await box.submit("printf 'one\\ntwo\\nthree\\n'")
    await box.wait(job["id"])
    path = f"/api/jobs/{job['id']}/log"
    whole = await box.http.get(path)
    assert (whole.text, whole.headers["x-log-offset"]) == ("one\ntwo\nthree\n", "0")
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert (await box.http.get(f"{path}?offset=4")).text == "two\nthree\n"
    tail = await box.http.get(f"{path}?tail=1")
    assert (tail.text, tail.headers["x-log-offset"]) == ("three\n", "8")
    assert (await box.http.get(f"{path}?offset=14")).text == ""
    assert (await box.http.get(f"{path}?tail=0")).text == ""
    assert (await box.http.get(f"{path}?offset=15")).status_code == 416
    assert (await box.http.get(f"{path}?attempt=2")).status_code == 404
    for bad in ("offset=-1", "offset=x", "follow=maybe", "attempt=0", "lines=3"):
        assert (await box.http.get(f"{path}?{bad}")).status_code == 400, bad
    head = await box.http.head(path)
    assert (head.status_code, head.content) == (200, b"")


async def test_ranges_of_a_log(box: Box) -> None:
    job = await box.submit("printf 0123456789")
    await box.wait(job["id"])
    path = f"/api/jobs/{job['id']}/log"
    for asked, text, told in (
        ("bytes=2-4", "234", "bytes 2-4/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-3", "789", "bytes 7-9/10"),
        ("bytes=0-99", "0123456789", "bytes 0-9/10"),
    ):
        answer = await box.http.get(path, headers={"Range": asked})
        assert (answer.status_code, answer.text, answer.headers["content-range"]) == (206, text, told)
    beyond = await box.http.get(path, headers={"Range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */10")
    for odd in ("bytes=4-2", "bytes=0-1,3-4", "lines=1-2", "bytes=-", "x", "bytes=" + "9" * 30 + "-"):
        assert (await box.http.get(path, headers={"Range": odd})).status_code == 200


@given(st.text(alphabet="bytes=-0123456789, ", max_size=20), st.integers(0, 100))
def test_any_range_is_within_the_bytes_there_are(header: str, size: int) -> None:
    with suppress(NoSuchRange):
        span = byte_range(header, size)
        assert span is None or 0 <= span[0] < span[1] <= size


async def test_following_begins_before_the_job_and_ends_with_it(box: Box) -> None:
    job = await box.submit(
        "echo begin; read line < $GATE; echo $line", env={"GATE": str(box.state / "gate")}, hold=True
    )
    gate = box.state / "gate"
    os.mkfifo(gate)
    async with stream(box, f"/api/jobs/{job['id']}/log?follow=1") as answer:
        pieces = answer.aiter_text()
        await box.http.post(f"/api/jobs/{job['id']}/release")
        assert await anext(pieces) == "begin\n"
        await asyncio.to_thread(gate.write_text, "end\n")
        assert "".join([piece async for piece in pieces]) == "end\n"


async def test_following_goes_on_through_the_attempts_of_a_job(box: Box) -> None:
    job = await box.submit("echo try $MLBOX_ATTEMPT; [ $MLBOX_ATTEMPT = 3 ]", retries=2)
    async with stream(box, f"/api/jobs/{job['id']}/log?follow=1") as answer:
        assert await answer.aread() == b"try 1\ntry 2\ntry 3\n"
    async with stream(box, f"/api/jobs/{job['id']}/log?follow=1&attempt=2") as answer:
        assert await answer.aread() == b"try 2\n"


async def test_a_stream_of_events_is_resumed_at_the_very_byte(box: Box) -> None:
    text = "α🦊 line\n" * 50 + "a" * 200_000 + "\n☃ last"
    source = box.state / "text"
    source.write_text(text)
    job = await box.submit(f"cat {source}")
    await box.wait(job["id"])
    path = f"/api/jobs/{job['id']}/log"
    async with stream(box, path, headers=EVENTS) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = [event async for event in events(answer)]
    assert found[-1][0] == "end"
    assert found[-1][2] == {"state": "succeeded", "attempt": 1, "ended": True}
    logs = [(position, data) for kind, position, data in found if kind == "log"]
    assert "".join(data for _, data in logs) == text
    for number, (position, _) in enumerate(logs):
        async with stream(box, path, headers={**EVENTS, "Last-Event-ID": str(position)}) as answer:
            rest = [data async for kind, _, data in events(answer) if kind == "log"]
        assert "".join(rest) == "".join(data for _, data in logs[number + 1 :])
    async with stream(box, path, headers={**EVENTS, "Last-Event-ID": "999999999"}) as answer:
        assert answer.status_code == 416


@given(st.binary(max_size=300), st.lists(st.integers(1, 20), max_size=60))
def test_events_hold_every_byte_once_however_the_log_is_cut(data: bytes, cuts: list[int]) -> None:
    async def run(start: int) -> list[tuple[int, str]]:
        async def chunks() -> AsyncGenerator[Chunk]:
            at = start
            for cut in [*cuts, 1000]:
                if at < len(data):
                    yield Chunk(at, data[at : at + cut])
                    at += cut

        found: list[tuple[int, str]] = []
        async for piece in log_events(chunks(), start):
            fields = dict(line.split(b": ", 1) for line in piece.strip().split(b"\n"))
            found.append((int(fields[b"id"]), json.loads(fields[b"data"])))
        return found

    whole = asyncio.run(run(0))
    assert "".join(text for _, text in whole) == data.decode(errors="replace")
    for number, (position, _) in enumerate(whole):
        rest = asyncio.run(run(position))
        assert "".join(text for _, text in rest) == "".join(text for _, text in whole[number + 1 :])


async def test_events_tell_of_dropped_bytes() -> None:
    async def chunks() -> AsyncGenerator[Chunk]:
        yield Chunk(0, b"head \xf0\x9f")
        yield Chunk(1000, b"tail")

    text = [json.loads(piece.split(b"data: ")[1]) async for piece in log_events(chunks(), 0)]
    assert text[0] == "head "
    assert text[1].startswith("\ufffd\n[mlbox: 993 bytes of log dropped")
    assert text[1].endswith("]\ntail")


async def test_a_revoked_token_ends_its_streams(box: Box) -> None:
    job = await box.submit(hold=True)
    token = await box.token(name="t")
    path = f"/api/jobs/{job['id']}/log?follow=1"
    async with box.tcp.stream("GET", path, headers={"Authorization": f"Bearer {token}"}) as answer:
        assert answer.status_code == 200
        await box.http.delete("/api/tokens/1")
        async with asyncio.timeout(5):
            assert await answer.aread() == b""
    assert len(box.app._streams) == 0


async def test_a_token_that_was_revoked_a_moment_ago_opens_no_stream(box: Box) -> None:
    token = await box.token(name="t")
    known = await box.credentials.of_token(token)
    assert known is not None
    await box.http.delete("/api/tokens/1")
    with pytest.raises(Unauthenticated), box.app._streams.seat(known.identity, asyncio.timeout(None)):
        pass


async def test_an_expiring_token_ends_its_streams(box: Box) -> None:
    token = await box.token(name="t", expires=1)
    async with box.tcp.stream("GET", "/api/events", headers={"Authorization": f"Bearer {token}"}) as answer:
        async with asyncio.timeout(5):
            assert b"hello" in await answer.aread()


async def test_streams_are_capped_and_submits_are_not(box: Box) -> None:
    job = await box.submit(hold=True)
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(box.state / "mlbox.sock"), limits=limits), base_url="http://mlbox"
    ) as client:
        open_ones = [client.build_request("GET", f"/api/jobs/{job['id']}/log?follow=1") for _ in range(10)]
        answers = [await client.send(request, stream=True) for request in open_ones]
        assert [answer.status_code for answer in answers] == [200] * 10
        refused = await client.get("/api/events")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        assert (await client.post("/api/jobs", json={"command": "true"})).status_code == 201
        assert (await client.get("/healthz")).status_code == 200
        for answer in answers:
            await answer.aclose()

    async def all_gone() -> bool:
        return len(box.app._streams) == 0

    await eventually("the seats of clients that went are free", all_gone)


async def test_events_tell_what_changed(box: Box) -> None:
    job = await box.submit(hold=True)
    async with stream(box, f"/api/events?topics=queue,job:{job['id']}") as answer:
        told = events(answer)
        assert (await anext(told))[0] == "hello"
        await box.http.post(f"/api/jobs/{job['id']}/cancel")
        kind, _, data = await anext(told)
        assert (kind, data) == ("change", {"topics": [f"job:{job['id']}", "queue"]})
    for bad in ("nope", "job:", "job:x", "job:-1", ",".join(["queue"] * 101), "gpus,,nope"):
        assert (await box.http.get("/api/events", params={"topics": bad})).status_code == 400, bad
    assert (await box.http.get("/api/events?topics=job:999")).status_code == 404


# Windows on lines


def written(folder: Path, text: str) -> LogFile:
    folder.mkdir(exist_ok=True)
    (folder / "log").write_text(text)
    return LogFile(folder)


def test_a_window_shows_whole_lines_wherever_it_is_put(tmp_path: Path) -> None:
    log = written(tmp_path, "".join(f"line {number}\n" for number in range(1000)))
    first = log_lines.window(log, 0, 3)
    assert [line.text for line in first.lines] == ["line 0", "line 1", "line 2"]
    on = log_lines.window(log, first.lines[-1].next, 2)
    assert [line.text for line in on.lines] == ["line 3", "line 4"]
    assert log_lines.window(log, on.lines[0].offset + 3, 1).lines == on.lines[:1]
    assert [line.text for line in log_lines.around(log, on.lines[0].offset, 5).lines] == [
        f"line {n}" for n in range(1, 6)
    ]
    end = log_lines.window(log, first.size, 5)
    assert [line.text for line in end.lines] == []


@given(st.text(alphabet="ab\n", max_size=200), st.integers(0, 250), st.integers(1, 10))
def test_windows_agree_with_splitting_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, at: int, count: int
) -> None:
    log = written(tmp_path_factory.mktemp("log"), text)
    lines, offset = [], 0
    for line in text.split("\n"):
        lines.append((offset, line))
        offset += len(line) + 1
    if lines[-1][1] == "":
        lines.pop()
    wanted = [pair for pair in lines if pair[0] + len(pair[1]) >= min(at, len(text))][:count]
    assert [(line.offset, line.text) for line in log_lines.window(log, at, count).lines] == wanted


@given(st.text(alphabet="ab\n", max_size=300), st.text(alphabet="ab", min_size=1, max_size=3), st.integers(0, 300))
def test_finding_agrees_with_finding_in_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, wanted: str, start: int
) -> None:
    log = written(tmp_path_factory.mktemp("log"), text)
    start = min(start, len(text))
    on = log_lines.find(log, wanted.encode(), start, 3, back=False)
    assert (on.match if on.match is not None else -1) == text.find(wanted, start)
    back = log_lines.find(log, wanted.encode(), start, 3, back=True)
    assert (back.match if back.match is not None else -1) == text.rfind(wanted, 0, start)


async def test_lines_over_http(box: Box) -> None:
    job = await box.submit("seq 1 5000")
    await box.wait(job["id"])
    path = f"/api/jobs/{job['id']}/log/lines"
    found = (await box.http.get(path, params={"q": "4321", "count": 3})).json()
    assert [line["text"] for line in found["lines"]] == ["4320", "4321", "4322"]
    back = (await box.http.get(path, params={"q": "4999", "dir": "back", "from": found["size"], "count": 1})).json()
    assert [line["text"] for line in back["lines"]] == ["4999"]
    assert (await box.http.get(path, params={"q": "nowhere"})).json()["match"] is None
    assert len((await box.http.get(path)).json()["lines"]) == 200
    for bad in ("count=0", "count=2001", "dir=up", "q=" + "x" * 1001, "from=-1"):
        assert (await box.http.get(f"{path}?{bad}")).status_code == 400
