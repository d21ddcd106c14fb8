"""The pages in a real Chromium: live, resumable, and deaf to what a log or a name would like them to do."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.web.browser import PROGRAM, Page, chromium, doorway
from tests.web.harness import Box

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here")]


@pytest_asyncio.fixture
async def page(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Page]:
    async with chromium(tmp_path_factory.mktemp("profile")) as page:
        await page.look()
        yield page


@pytest_asyncio.fixture
async def url(box: Box) -> AsyncGenerator[str]:
    async with doorway(box.state / "mlbox.sock") as address:
        yield address


def shown(text: str) -> str:
    """Whether the page shows `text`, as a script."""
    return f"document.body.innerText.includes({json.dumps(text)})"


async def test_the_overview_follows_what_happens(box: Box, page: Page, url: str) -> None:
    await page.goto(url)
    await page.until("document.getElementById('pulse').textContent === 'live'")
    job = await box.submit("sleep 1000", name="comes-later")
    await page.until(shown("comes-later"))
    await page.until(shown("running"))
    await box.http.post(f"/api/jobs/{job['id']}/cancel")
    await page.until(shown("cancelled while it ran"))
    assert page.console == []


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def until(gate: Path | str) -> str:
    """A shell command that waits for a file."""
    return f"until [ -e {gate} ]; do sleep 0.05; done"


async def test_a_log_is_live_coloured_and_rewritten_as_a_terminal_would(
    box: Box, page: Page, url: str, gate: Path
) -> None:
    text = r"\033[1;32mgreen\033[0m\n10%%\r50%%\r100%%\n\033]0;title\007\033[2J\033[10;10Hmoved\n"
    job = await box.submit(f"printf '{text}'; {until(gate)}; echo the end")
    await page.goto(f"{url}/jobs/{job['id']}")
    lines = "[...document.querySelectorAll('#log > div')].map((line) => line.textContent)"
    await page.until(f"{lines}.includes('moved')")
    assert (await page.evaluate(lines))[:3] == ["green", "100%", "moved"]
    assert await page.evaluate("document.querySelector('#log span').className") == "a-bold a-f2"
    await asyncio.to_thread(gate.touch)
    await page.until(f"{lines}.includes('the end')")
    await page.until("document.getElementById('log-state').textContent === 'ended'")
    await page.until(shown("Succeeded after"))
    assert page.console == []


async def test_a_log_goes_on_where_it_was_after_a_cut(box: Box, page: Page, url: str, gate: Path) -> None:
    job = await box.submit(f"seq 1 100; {until(gate)}; seq 101 200")
    await page.goto(f"{url}/jobs/{job['id']}")
    await page.until("document.querySelectorAll('#log > div').length >= 100")
    await page.ask(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    for cut in list(box.app._streams._open):
        cut.reschedule(asyncio.get_running_loop().time())
    await page.until("document.getElementById('log-state').textContent === 'reconnecting…'")
    await asyncio.to_thread(gate.touch)
    await box.wait(job["id"])
    await page.ask(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    await page.until("document.getElementById('log-state').textContent === 'ended'", 30)
    lines = await page.evaluate("[...document.querySelectorAll('#log > div')].map((line) => line.textContent.trim())")
    assert [line for line in lines if line] == [str(number) for number in range(1, 201)]


async def test_a_log_can_be_paused_and_goes_on_with_the_next_attempt(
    box: Box, page: Page, url: str, gate: Path
) -> None:
    command = f"echo attempt $MLBOX_ATTEMPT begins; {until(f'{gate}-$MLBOX_ATTEMPT')}; exit 1"
    job = await box.submit(command, retries=1)
    await page.goto(f"{url}/jobs/{job['id']}")
    await page.until(shown("attempt 1 begins"))
    await page.evaluate("document.getElementById('log-pause').click()")
    assert await page.evaluate("document.getElementById('log-pause').getAttribute('aria-pressed')") == "true"
    gate.with_name("gate-1").touch()
    await page.evaluate("document.getElementById('log-pause').click()")
    await page.until(shown("attempt 2 begins"))
    gate.with_name("gate-2").touch()
    await page.until("document.getElementById('log-state').textContent === 'ended'")
    text = await page.evaluate("document.getElementById('log').innerText")
    assert text.count("attempt 1 begins") == 1


async def test_buttons_act_without_leaving_the_page(box: Box, page: Page, url: str) -> None:
    job = await box.submit("sleep 1000")
    await box.running(job["id"])
    await page.goto(f"{url}/jobs/{job['id']}")
    await page.evaluate("window.stayed = true; document.querySelector('form[action$=\"/cancel\"] button').click()")
    await page.until(shown("Cancelled after"))
    assert await page.evaluate("window.stayed") is True
    await page.follow("document.querySelector('form[action$=\"/retry\"] button').click()")
    assert await page.evaluate("location.pathname") == "/jobs/2"


async def test_a_hostile_log_stays_text(box: Box, page: Page, url: str) -> None:
    evil = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    evil += "\u202eabc\u2028\x00\x07\x1b]8;;javascript:alert(1)\x07link\x1b]8;;\x07"
    source = box.state / "evil"
    source.write_text((evil + "\n") * 50)
    job = await box.submit(f"cat {source}", name="evil")
    await box.wait(job["id"])
    await page.goto(f"{url}/jobs/{job['id']}")
    await page.until("document.getElementById('log-state').textContent === 'ended'")
    await page.until("document.querySelectorAll('#log > div').length >= 50")
    assert await page.evaluate("document.querySelectorAll('#log img, #log script, #log a').length") == 0
    assert "owned" not in await page.evaluate("document.title")
    text = await page.evaluate("document.getElementById('log').textContent")
    assert "<img src=x" in text
    assert "\\u202eabc\\u2028\\x00\\x07link" in text
    assert page.console == []


async def test_a_million_rewritten_lines_do_not_stop_the_page(box: Box, page: Page, url: str) -> None:
    job = await box.submit(
        "python3 -c \"import sys; sys.stdout.write('x%\\r' * 1000000 + 'done\\n' + 'y' * 3000000 + '\\n')\""
    )
    await box.wait(job["id"])
    await page.goto(f"{url}/jobs/{job['id']}")
    await page.until("document.getElementById('log-state').textContent === 'ended'", 30)
    assert await page.evaluate("document.querySelectorAll('#log > div').length") < 20


ANSI = """
(async () => {
  const { Ansi } = await import("/static/ansi.js");
  const run = (...pieces) => {
    const lines = [[]];
    const ansi = new Ansi({
      text: (text, classes) => lines.at(-1).push(classes ? `{${classes}}${text}` : text),
      newline: () => lines.push([]),
      restart: () => (lines[lines.length - 1] = []),
    });
    pieces.forEach((piece) => ansi.feed(piece));
    return lines.map((line) => line.join("")).join("|");
  };
  return CASES.map((pieces) => run(...pieces));
})()
"""
CASES = [
    (["plain\ntwo"], "plain|two"),
    (["\x1b[31mred\x1b[0m no"], "{a-f1}red no"),
    (["\x1b[3", "1mred"], "{a-f1}red"),
    (["\x1b", "[1;4;97;41mx"], "{a-bold a-under a-f15 a-b1}x"),
    (["\x1b[38;5;196mx\x1b[48;2;0;0;250my"], "{a-f9}x{a-f9 a-b4}y"),
    (["\x1b[38;5mx", "\x1b[38;9;9my", "\x1b[999mz"], "xyz"),
    (["a\rb\r\nc"], "b|c"),
    (["a\r", "\nb"], "a|b"),
    (["50%\r\x1b[K60%"], "60%"),
    (["\x1b]0;title\x07x\x1b]8;;http://evil\x1b\\link"], "xlink"),
    (["\x1bP dcs ", "still\x1b\\x"], "x"),
    (["\x1b]0;", "a" * 5000, "b"], None),
    (["\x1b(B\x1b=\x1b7a"], "a"),
    (["\x1b[2J\x1b[1;1H\x1b[?25lx"], "x"),
    (["a\x08b\x00"], "a\\x08b\\x00"),
    (["\u202e\u2066x"], "\\u202e\\u2066x"),
    (["\x1b[7mi\x1b[27mn\x1b[2;9md\x1b[22;29me"], "{a-inverse}in{a-dim a-struck}de"),
]


async def test_terminal_sequences_become_classes_of_a_closed_set(page: Page, url: str) -> None:
    await page.goto(url)
    results = await page.evaluate(ANSI.replace("CASES", json.dumps([pieces for pieces, _ in CASES])))
    for (pieces, wanted), result in zip(CASES, results, strict=True):
        if wanted is None:
            assert "\x1b" not in result
        else:
            assert result == wanted, pieces


@pytest.mark.parametrize("width", [1280, 390])
async def test_no_page_is_wider_than_the_screen(box: Box, page: Page, url: str, width: int) -> None:
    job = await box.submit("echo " + "x" * 500, name="n" * 64, project="p" * 64, env={"LONG": "y" * 500})
    await box.wait(job["id"])
    await box.submit("true", cpus=2, name="w" * 64, hold=True)
    await page.look(width=width)
    for path in ("/", "/jobs", f"/jobs/{job['id']}", "/login", "/nothing"):
        await page.goto(url + path)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width, path
