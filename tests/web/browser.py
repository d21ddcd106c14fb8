"""A real Chromium, driven over its debugging pipe (Chrome DevTools Protocol); no driver and no other package needed."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
from collections.abc import AsyncGenerator
from itertools import count
from pathlib import Path
from typing import Any

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Page:
    """One tab."""

    def __init__(self, read: asyncio.StreamReader, write: asyncio.WriteTransport) -> None:
        self._read = read
        self._write = write
        self._ids = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._loaded = asyncio.Event()
        self.console: list[str] = []
        """What scripts logged, threw, or were kept from doing by the content security policy."""

    async def listen(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await self._read.readuntil(b"\0"))[:-1])
                if "id" in message:
                    self._answers.pop(message["id"]).set_result(message)
                elif message["method"] == "Page.loadEventFired":
                    self._loaded.set()
                elif message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
                    self.console.append(json.dumps(message["params"]))

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._write.write(json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(30):
            answer = await self._answers[number]
        assert "error" not in answer, answer
        return answer["result"]

    async def attach(self) -> None:
        target = (await self.ask("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.ask(f"{domain}.enable")

    async def goto(self, url: str) -> None:
        self._loaded.clear()
        await self.ask("Page.navigate", url=url)
        async with asyncio.timeout(30):
            await self._loaded.wait()

    async def follow(self, script: str) -> None:
        """Run `script`, which leads to another page, and wait for that."""
        self._loaded.clear()
        await self.evaluate(script)
        async with asyncio.timeout(30):
            await self._loaded.wait()

    async def look(self, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])

    async def evaluate(self, script: str) -> Any:
        answer = await self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str, patience_s: float = 20) -> Any:
        """The first truthy value of `script`."""
        look = f"const value = ({script}); if (value) done(value); else setTimeout(look, 30);"
        async with asyncio.timeout(patience_s):
            return await self.evaluate(f"new Promise((done) => {{ const look = () => {{ {look} }}; look(); }})")

    async def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode((await self.ask("Page.captureScreenshot", format="png"))["data"])


@contextlib.asynccontextmanager
async def chromium(profile: Path) -> AsyncGenerator[Page]:
    """A page of a browser of its own; `profile` is an empty folder."""
    assert PROGRAM is not None
    loop = asyncio.get_running_loop()
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()

    def place() -> None:  # the browser reads from descriptor 3 and writes to 4
        a, b = os.dup(their_read), os.dup(their_write)
        os.dup2(a, 3)
        os.dup2(b, 4)

    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *_FLAGS,
        f"--user-data-dir={profile}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        preexec_fn=place,
        close_fds=False,
        start_new_session=True,
    )
    os.close(their_read)
    os.close(their_write)
    reader = asyncio.StreamReader(limit=64 << 20)
    read_pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_read, "rb"))
    write_pipe, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(our_write, "wb"))
    page = Page(reader, write_pipe)
    listening = asyncio.create_task(page.listen(), name="browser")
    try:
        await page.attach()
        yield page
    finally:
        with contextlib.suppress(Exception):
            page._session = None
            await page.ask("Browser.close")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), 5)
        if process.returncode is None:
            os.killpg(process.pid, 9)
            await process.wait()
        write_pipe.close()
        read_pipe.close()
        listening.cancel()
        await asyncio.wait((listening,))


@contextlib.asynccontextmanager
async def doorway(socket: Path) -> AsyncGenerator[str]:
    """An address on TCP that leads to a Unix socket: a browser behind it is whoever runs this test."""

    async def pump(read: asyncio.StreamReader, write: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await read.read(65536):
                write.write(data)
                await write.drain()
        write.close()

    async def serve(read: asyncio.StreamReader, write: asyncio.StreamWriter) -> None:
        far_read, far_write = await asyncio.open_unix_connection(str(socket))
        await asyncio.gather(pump(read, far_write), pump(far_read, write))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.close()
