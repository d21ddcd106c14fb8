"""The HTTP plumbing under attack and under load: real sockets, real uvicorn, deadlines short enough to wait for."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mlbox.errors import Unavailable
from mlbox.transport import Config, Limits, PeerCredentials, Server, listen_tcp, listen_unix

QUICK = Limits(header_timeout_s=0.4, body_timeout_s=0.4, keep_alive_s=5, header_bytes=2000)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"


async def reply(send: Any, body: bytes, status: int = 200) -> None:
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})


class Echo:
    """Answers with the body it got; `/peer` with who asked, `/early` without reading, `/held` when it is let go."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/peer":
            await reply(send, repr(scope.get("extensions", {}).get("peercred")).encode())
            return
        if scope["path"] == "/early":
            await reply(send, b"early", 413)
            return
        if scope["path"] == "/held":
            await self._held()
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        await reply(send, b"echo:" + body)

    async def _held(self) -> None:
        self.entered.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@pytest.fixture
def app() -> Echo:
    return Echo()


@asynccontextmanager
async def running(listener: socket.socket, app: Echo, limits: Limits = QUICK) -> AsyncIterator[Server]:
    server = Server(Config(app, limits=limits, drain_s=1.0))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield server
    finally:
        server.stop()
        async with asyncio.timeout(10):
            await task


@asynccontextmanager
async def connected(listener: socket.socket) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    name = listener.getsockname()
    if isinstance(name, str):
        reader, writer = await asyncio.open_unix_connection(name)
    else:
        reader, writer = await asyncio.open_connection(*name[:2])
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.fixture
def listener() -> Any:
    made = listen_tcp("127.0.0.1", 0)
    yield made
    made.close()


async def all_of(reader: asyncio.StreamReader, patience_s: float = 5.0) -> bytes:
    """Everything up to the end of the connection."""
    async with asyncio.timeout(patience_s):
        return await reader.read()


async def one_response(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(5.0):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return head + await reader.readexactly(length)


async def pour(writer: asyncio.StreamWriter, size: int) -> None:
    for _ in range(size // 65536):
        writer.write(b"a" * 65536)
        await writer.drain()


class TestWhoAsks:
    async def test_a_unix_socket_tells_pid_uid_and_gid(self, tmp_path: Path, app: Echo) -> None:
        listener = listen_unix(tmp_path / "s")
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"GET /peer HTTP/1.1\r\nHost: x\r\n\r\n")
            told = await one_response(reader)
        expected = PeerCredentials(pid=os.getpid(), uid=os.getuid(), gid=os.getgid())
        assert told.endswith(repr(expected).encode())

    async def test_tcp_tells_nobody(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"GET /peer HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await one_response(reader)).endswith(b"None")


class TestDeadlines:
    async def test_a_silent_connection_is_closed(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, _):
            began = time.monotonic()
            assert b" 408 " in await all_of(reader)
            assert time.monotonic() - began < 2.0

    async def test_a_head_that_drips_is_refused(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\n")
            answer = asyncio.create_task(all_of(reader))
            began = time.monotonic()
            while not answer.done():
                writer.write(b"X-A: b\r\n")
                await asyncio.sleep(0.05)
            assert time.monotonic() - began < 2.0
            assert answer.result().startswith(b"HTTP/1.1 408 ")

    async def test_blank_lines_do_not_keep_a_connection_open(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(GET)
            await one_response(reader)
            answer = asyncio.create_task(all_of(reader))
            began = time.monotonic()
            while not answer.done():
                writer.write(b"\r\n")
                await asyncio.sleep(0.05)
            assert time.monotonic() - began < 2.0

    async def test_a_body_that_stops_is_refused(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
            assert (await all_of(reader)).startswith(b"HTTP/1.1 408 ")

    async def test_a_slow_body_that_goes_on_is_taken(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n")
            for _ in range(8):
                writer.write(b"x")
                await asyncio.sleep(0.1)  # altogether twice the limit of a silence
            assert (await one_response(reader)).endswith(b"echo:xxxxxxxx")

    async def test_a_slow_app_is_not_the_clients_fault(self, listener: socket.socket, app: Echo) -> None:
        body = bytes(8_000_000)  # more than uvicorn and the sockets buffer: the client cannot send on
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"POST /held HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await asyncio.sleep(QUICK.body_timeout_s * 2.5)
            app.go_on.set()
            assert (await one_response(reader)).startswith(b"HTTP/1.1 200 ")

    async def test_each_request_has_a_new_deadline(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            for _ in range(3):
                writer.write(GET)
                assert (await one_response(reader)).endswith(b"echo:")
                await asyncio.sleep(0.3)
            writer.write(b"GET / HT")
            assert (await all_of(reader)).startswith(b"HTTP/1.1 408 ")


class TestLimitsOfTheHead:
    async def test_a_head_that_is_too_large_is_refused(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 3000 + b"\r\n\r\n")
            assert (await all_of(reader)).startswith(b"HTTP/1.1 431 ")

    async def test_a_url_counts(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await all_of(reader)).startswith(b"HTTP/1.1 431 ")

    @pytest.mark.parametrize(
        "endless",
        [
            b"GET / HTTP/1.1\r\nX-Endless: ",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;ext=",
        ],
        ids=["field", "trailer", "chunk-extension"],
    )
    async def test_what_never_ends_is_cut_off(self, listener: socket.socket, endless: bytes, app: Echo) -> None:
        patient = Limits(header_timeout_s=20, body_timeout_s=20, header_bytes=2000)
        async with running(listener, app, patient), connected(listener) as (reader, writer):
            writer.write(endless)
            answer = asyncio.create_task(reader.read())
            with pytest.raises(ConnectionError):
                await pour(writer, 50_000_000)
            await asyncio.wait([answer])
            answer.exception()  # a reset: the client was still writing

    async def test_a_normal_trailer_is_let_through(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
            assert (await one_response(reader)).endswith(b"echo:hi")


class TestOrder:
    async def test_pipelined_requests_are_answered_in_order(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            requests = [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n%02d" % n for n in range(20)]
            writer.write(b"".join(requests))
            answers = [await one_response(reader) for _ in requests]
        assert [answer[-2:] for answer in answers] == [b"%02d" % n for n in range(20)]

    async def test_a_flood_behind_a_slow_request_is_cut_off(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(HELD)
            await app.entered.wait()
            writer.write(GET * 2000)
            app.go_on.set()
            answer = await all_of(reader)
        assert 2 <= answer.count(b"HTTP/1.1 200 ") <= 70

    async def test_garbage_behind_a_slow_request_spoils_nothing(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(HELD)
            await app.entered.wait()
            writer.write(b"\x00\x01\x02 nonsense\r\n\r\n")
            await asyncio.sleep(0.1)
            app.go_on.set()
            answer = await all_of(reader)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1

    async def test_half_a_request_behind_a_slow_one_spoils_nothing(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(HELD + b"GET / HT")
            await asyncio.sleep(QUICK.header_timeout_s * 1.5)
            app.go_on.set()
            answer = await all_of(reader)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1

    async def test_a_malformed_request_is_told_in_own_words(self, listener: socket.socket, app: Echo) -> None:
        server = Server(Config(app, error_body=lambda status, text: (b"application/json", b'{"no":%d}' % status)))
        task = asyncio.create_task(server.serve([listener]))
        async with connected(listener) as (reader, writer):
            writer.write(b"NOT HTTP\r\n\r\n")
            answer = await all_of(reader)
        server.stop()
        await task
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b'{"no":400}')

    async def test_an_early_answer_reaches_a_client_that_still_writes(self, listener: socket.socket, app: Echo) -> None:
        body = bytes(4_000_000)
        async with running(listener, app), connected(listener) as (reader, writer):
            writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            assert (await one_response(reader)).endswith(b"early")
            writer.write(GET)  # the rest was thrown away, the connection is as good as new
            assert (await one_response(reader)).endswith(b"echo:")


class TestStopping:
    async def test_open_requests_are_answered_and_signals_left_alone(self, listener: socket.socket, app: Echo) -> None:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        async with running(listener, app) as server, connected(listener) as (reader, writer):
            assert {number: signal.getsignal(number) for number in before} == before
            writer.write(HELD)
            await app.entered.wait()
            server.stop()
            await asyncio.sleep(0.1)
            app.go_on.set()
            assert (await all_of(reader)).startswith(b"HTTP/1.1 200 ")

    async def test_a_request_that_never_ends_does_not_hold_up_a_stop(self, listener: socket.socket, app: Echo) -> None:
        async with running(listener, app) as server, connected(listener) as (_, writer):
            writer.write(HELD)
            await app.entered.wait()
            server.stop()
            async with asyncio.timeout(5):
                await app.cancelled.wait()

    async def test_the_socket_lives_on_in_whoever_else_holds_it(self, listener: socket.socket, app: Echo) -> None:
        inherited = socket.socket(fileno=os.dup(listener.fileno()))
        async with running(inherited, app):
            pass
        async with connected(listener) as (reader, writer):
            writer.write(GET)  # nobody serves now: it waits in the kernel
            async with running(socket.socket(fileno=os.dup(listener.fileno())), app):
                assert (await one_response(reader)).endswith(b"echo:")


class TestListening:
    def test_a_port_in_use_says_what_to_do(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        with pytest.raises(Unavailable, match=rf"127\.0\.0\.1:{port}.*in use.*choose another port"):
            listen_tcp("127.0.0.1", port)

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "\ud800", "a" * 300])
    def test_a_host_that_is_none_is_named(self, host: str) -> None:
        with pytest.raises(Unavailable, match="is no address"):
            listen_tcp(host, 0)

    def test_an_address_of_another_box_is_told(self) -> None:
        with pytest.raises(Unavailable, match="no such address"):
            listen_tcp("192.0.2.1", 0)

    def test_ipv6_works_where_the_box_has_it(self) -> None:
        if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
            pytest.skip("no IPv6 here")
        listen_tcp("::1", 0).close()

    def test_the_socket_file_of_a_dead_server_is_replaced(self, tmp_path: Path) -> None:
        listen_unix(tmp_path / "s").close()
        assert (tmp_path / "s").is_socket()
        listen_unix(tmp_path / "s", 0o600).close()
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600

    def test_a_living_server_keeps_its_socket(self, tmp_path: Path) -> None:
        alive = listen_unix(tmp_path / "s")
        with pytest.raises(Unavailable, match="another server answers"):
            listen_unix(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
        alive.close()

    def test_a_file_that_is_no_socket_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "s").write_text("precious")
        with pytest.raises(Unavailable, match="no socket"):
            listen_unix(tmp_path / "s")
        assert (tmp_path / "s").read_text() == "precious"

    def test_a_path_that_is_too_long_is_told_with_the_limit(self, tmp_path: Path) -> None:
        with pytest.raises(Unavailable, match="107"):
            listen_unix(tmp_path / ("s" * 120))

    def test_a_missing_folder_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(Unavailable, match="cannot listen"):
            listen_unix(tmp_path / "none" / "s")
