import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

from mlbox.identity import Identity
from mlbox.jobs import Job
from mlbox.scheduler.gpus import GpuState
from mlbox.scheduler.service import FewerGpus, Pending
from mlbox.scheduler.timeline import Bar, Lane, Timeline
from mlbox.serving.client import ServedVersion
from mlbox.web import words
from tests.nvml.standin import FakeGpu, StandIn
from tests.web import standins
from tests.web.harness import Box, eventually, running_box

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}\u202e\u2028\x1b[31m"
SIZE_MAX = 100_000


class Elements(HTMLParser):
    """What a browser would make of a page: the elements, their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


TAGS = {
    "a", "article", "b", "body", "button", "code", "col", "colgroup", "dd", "div", "dl", "dt", "fieldset", "footer",
    "form", "h1", "h2", "h3", "head", "header", "html", "input", "label", "legend", "li", "line", "link", "main",
    "meta", "nav", "p", "path", "pre", "rect", "script", "section", "small", "span", "svg", "table", "tbody", "td",
    "text", "th", "thead", "time", "title", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {
    "action", "aria-current", "aria-hidden", "aria-label", "aria-labelledby", "aria-pressed", "autocapitalize",
    "autocomplete", "autofocus", "charset", "checked", "class", "colspan", "content", "d", "data-act", "data-ago",
    "data-attempt", "data-ended", "data-hour", "data-job", "data-parts", "data-since", "data-topics", "datetime",
    "download", "dx", "for", "height", "href", "id", "lang", "method", "name", "preserveaspectratio", "rel", "required",
    "role", "rx", "scope", "size", "spellcheck", "src", "tabindex", "title", "type", "value", "viewbox", "width", "x",
    "x1", "x2", "y", "y1", "y2",
}  # fmt: skip


def no_markup_of(page: str) -> None:
    """Fails when something hostile has become an element, an attribute, an address or a script."""
    found = Elements(page)
    assert found.tags <= TAGS
    assert found.attributes.keys() <= ATTRIBUTES
    assert found.attributes.get("src", set()) <= {"/static/live.js", "/static/log.js"}
    for name in ("href", "action"):
        assert all(re.match(r"/(?!/)|#", address) for address in found.attributes.get(name, ()))
    assert not set("\u202e\u2028\x1b") & set(page)


async def page(box: Box, path: str) -> str:
    answer = await box.http.get(path, headers=HTML)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    no_markup_of(answer.text)
    return answer.text


async def test_an_empty_box_says_how_to_begin(box: Box) -> None:
    text = await page(box, "/")
    assert "Nothing runs." in text
    assert f"curl --unix-socket {box.state}/mlbox.sock" in text
    assert "no GPU here that mlbox can see" in text
    assert "No job is like that." in await page(box, "/jobs")


async def test_the_overview_shows_what_runs_waits_ended_and_is_served(box: Box) -> None:
    box.served = [ServedVersion(name="ocr", version=3, state="UNAVAILABLE", reason="weights are missing")]
    done = await box.submit("exit 3", name="broken")
    await box.wait(done["id"])
    runs = await box.submit("sleep 1000", name="training", cpus=2)
    await box.running(runs["id"])
    await box.submit(name="next-one")
    text = await page(box, "/")
    for shown in ("training", "next-one", "it needs 1 CPU slot, none is free of 2", "broken", "ended with exit code 3",
                  "ocr", "weights are missing"):  # fmt: skip
        assert shown in text, shown
    part = await page(box, "/parts/overview")
    assert "<html" not in part
    assert "training" in part
    data = (await box.http.get("/.json")).json()
    assert [job["name"] for job in data["running"]] == ["training"]
    assert [job["name"] for job in data["queue"]] == ["next-one"]
    assert data["models"][0]["versions"][0]["reason"] == "weights are missing"


async def test_a_job_page_tells_the_story_and_the_log(box: Box) -> None:
    job = await box.submit("printf '\\033[31mred\\033[0m 1%%\\r2%%\\nend\\n'; echo x > $MLBOX_OUT/model.bin; exit 3")
    await box.wait(job["id"])
    text = await page(box, f"/jobs/{job['id']}")
    assert re.search(r"Failed after [\d.]+ m?s: ended with exit code 3\.", text)
    assert "2%\nend" in text
    assert "[31m" not in text.partition('id="log"')[2]
    assert 'href="/api/jobs/1/artifacts/model.bin"' in text
    assert 'action="/jobs/1/retry"' in text
    data = (await box.http.get(f"/jobs/{job['id']}.json")).json()
    assert (data["exit_code"], data["artifacts"][0]["path"]) == (3, "model.bin")
    assert "<html" not in await page(box, f"/parts/jobs/{job['id']}")


async def test_buttons_work_without_a_script(box: Box) -> None:
    job = await box.submit("sleep 1000", hold=True)
    path = f"/jobs/{job['id']}"
    assert f'action="{path}/release"' in await page(box, path)
    answer = await box.http.post(f"{path}/release", headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, path)
    await box.running(job["id"])
    assert f'action="{path}/cancel"' in await page(box, path)
    await box.http.post(f"{path}/cancel", headers=HTML)
    await box.wait(job["id"])
    again = await box.http.post(f"{path}/retry", headers=HTML)
    assert again.headers["location"] == "/jobs/2"
    assert (await box.http.post(f"{path}/explode", headers=HTML)).status_code == 404
    conflict = await box.http.post(f"{path}/cancel", headers={"Cookie": "", **HTML})
    assert conflict.status_code in (303, 409)
    assert (await box.http.post("/jobs/99/cancel", headers=HTML)).status_code == 404


async def test_the_list_is_filtered_and_paged(box: Box) -> None:
    for number in range(5):
        await box.submit(name=f"job-{number}", hold=True)
    text = await page(box, "/jobs?limit=2&state=queued")
    assert "job-4" in text
    assert "job-2" not in text
    older = re.search(r'href="(/jobs\?[^"]*before=[^"]*)"', text)
    assert older is not None
    assert "job-2" in await page(box, older[1].replace("&amp;", "&"))
    only = await page(box, "/jobs?name=job-3&user=&project=")  # as a form sends what was not filled in
    assert "job-3" in only
    assert "job-4" not in only
    assert [job["name"] for job in (await box.http.get("/jobs.json?name=job-3")).json()["jobs"]] == ["job-3"]
    bad = await box.http.get("/jobs?state=nope", headers=HTML)
    assert bad.status_code == 400
    assert "is no state" in bad.text


async def test_nothing_that_a_user_writes_becomes_markup(box: Box) -> None:
    command = f'printf %s "$HOSTILE"; touch "$MLBOX_OUT/<img src=x>" "$MLBOX_OUT/a\'b"; # {HOSTILE}'
    job = await box.submit(command, workdir="/nowhere/<script>alert(1)</script>")
    await box.wait(job["id"])
    ran = await box.submit(command, env={"HOSTILE": HOSTILE})
    await box.wait(ran["id"])
    box.served = [ServedVersion(name=HOSTILE, version=1, state=HOSTILE, reason=HOSTILE)]
    one, other = job["id"], ran["id"]
    for path in ("/", "/jobs", f"/jobs/{one}", f"/jobs/{other}", "/parts/overview", f"/parts/jobs/{other}"):
        text = await page(box, path)
        assert len(text) < SIZE_MAX
    assert "&lt;img src=x&gt;" in await page(box, f"/jobs/{ran['id']}")
    hostile = quote(HOSTILE)
    for path in (
        f"/nothing/{hostile}",
        f"/jobs?name={hostile}&state={hostile}",
        f"/login?code={hostile}&next={hostile}",
    ):
        no_markup_of((await box.http.get(path, headers=HTML)).text)
    no_markup_of((await box.tcp.post("/login", data={"secret": HOSTILE, "next": HOSTILE})).text)


async def test_gpus_are_cards_with_what_is_known_of_them(tmp_path: Path) -> None:
    standin = StandIn(tmp_path)
    standin.show(
        FakeGpu(uuid="GPU-a", name="NVIDIA H200", total=143_771, used=1024, util=97, power=612_000, temperature=64),
        FakeGpu(uuid="GPU-b", name="<b>odd</b>", total=None, used=None, util=None, power=None, temperature=None),
    )
    async with running_box(tmp_path, environment=standin.environment()) as box:
        text = await page(box, "/")
        for shown in ("GPU 0", "NVIDIA H200", "140 GiB", "97", "612", "64", "&lt;b&gt;odd&lt;/b&gt;"):
            assert shown in text, shown
        job = await box.submit("sleep 1000", name="on-a-card", gpus=1)
        await box.running(job["id"])
        assert "on-a-card" in await page(box, "/")
        assert "Running on GPU 0." in await page(box, f"/jobs/{job['id']}")
        drained = await box.http.post("/api/gpus/GPU-b/drain", json={"reason": "dust <img src=x>"})
        assert drained.json()["state"] in (GpuState.DRAINED, GpuState.UNKNOWN)
        text = await page(box, "/")
        assert (await box.http.get("/metrics")).text.count("mlbox_gpu_state{") == 12
        assert (
            'mlbox_gpu_power_watts{uuid="GPU-a",index="0",name="NVIDIA H200"} 612\n'
            in (await box.http.get("/metrics")).text
        )

        async def resumed() -> bool:
            answer = await box.http.post("/api/gpus/GPU-b/resume")
            return answer.json()["state"] != GpuState.DRAINED

        await eventually("the GPU is back", resumed)


async def test_the_plan_is_one_picture_of_gpus_and_time(tmp_path: Path) -> None:
    standin = StandIn(tmp_path)
    standin.show(FakeGpu(uuid="GPU-a"))
    async with running_box(tmp_path, environment=standin.environment()) as box:
        assert 'class="plan"' in await page(box, "/")
        plan = standins.lab_plan(1_800_000_000.0)
        hostile = Bar(name=HOSTILE, user=HOSTILE, starts_at=plan.now, ends_at=plan.ends_at, kind="foreign")
        plan = replace(plan, lanes=(*plan.lanes, Lane(gpu_uuid="GPU-9", index=9, label="9", bars=(hostile,))))

        async def planned(who: Identity) -> Timeline:
            return plan

        box.jobs.plan = planned  # type: ignore[method-assign]
        text = await page(box, "/")
        for shown in (
            "5 resnet-sweep",
            "40 jobs",
            "maintenance",
            "python",
            "planned",
            "open end",
            'href="/jobs/10"',
            "now",
        ):
            assert shown in text, shown
        assert len(text) < SIZE_MAX


async def test_a_waiting_job_tells_when_it_will_start_and_what_it_waits_for(box: Box) -> None:
    await box.submit("sleep 1000", cpus=2)
    job = await box.submit(name="next-one")
    pending, now = box.jobs.pending, 1_800_000_000.0

    def estimated(job: Job) -> Pending | None:
        known = pending(job)
        if known is None:
            return None
        return replace(known, estimated_start=now, estimated_start_p90=now + 4800)

    async def fewer_gpus(job: Job) -> FewerGpus:
        return FewerGpus(gpus=1, estimated_start=now - 600)

    box.jobs.pending = estimated  # type: ignore[method-assign]
    box.jobs.fewer_gpus = fewer_gpus  # type: ignore[method-assign]
    hours = [words.hour(now), words.hour(now + 4800)]
    for text in (await page(box, "/"), await page(box, f"/jobs/{job['id']}")):
        shown = " ".join(Elements(text).text.split())
        assert f"about {hours[0]}" in shown
        assert f"by {hours[1]}" in shown
    assert f"With 1 GPU instead of 0 it would start about {words.hour(now - 600)}." in text
    shown = (await box.http.get(f"/api/jobs/{job['id']}")).json()["pending"]["fewer_gpus"]
    assert shown == {"gpus": 1, "estimated_start": "2027-01-15T07:50:00.000Z"}
    row = (await box.http.get("/api/queue")).json()["jobs"][0]["pending"]
    assert row["estimated_start"] == "2027-01-15T08:00:00.000Z"
    assert row["estimated_start_p90"] == "2027-01-15T09:20:00.000Z"
    assert row["fewer_gpus"] is None
    table = (await box.http.get("/api/queue", headers={"Accept": "text/plain"})).text
    assert str(hours[0]) in table


async def test_errors_are_pages_for_browsers_and_problems_for_programs(box: Box) -> None:
    html = await box.http.get("/jobs/999", headers=HTML)
    assert (html.status_code, html.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "there is no job 999" in html.text
    plain = await box.http.get("/api/jobs/999", headers={"Accept": "text/plain"})
    assert plain.text == "there is no job 999 that you may see\n"
    assert (await box.http.get("/jobs/999")).headers["content-type"] == "application/problem+json"
    assert (await box.http.get("/api/jobs/999", headers=HTML)).headers["content-type"] == "application/problem+json"


async def test_static_files_are_asked_for_anew_and_sent_once(box: Box) -> None:
    first = await box.tcp.get("/static/mlbox.css")
    assert first.headers["content-type"].startswith("text/css")
    again = await box.tcp.get("/static/mlbox.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await box.tcp.get("/static/nothing.css")).status_code == 401


def test_no_style_or_script_is_inline_and_nothing_comes_from_elsewhere() -> None:
    folder = Path(__file__).parents[2] / "mlbox" / "web"
    for file in (*folder.glob("templates/*.html"), *folder.glob("static/*")):
        text = file.read_text()
        assert not re.search(r"\bon(click|load|error|change|submit)=", text), file
        assert "style=" not in text, file
        assert "|safe" not in text.replace(" ", ""), file
        assert "innerHTML" not in text, file
        assert not re.search(r"(src|href|url\()=?[\"'(]?https?:", text), file


@pytest.mark.parametrize("path", ["/", "/jobs", "/jobs/1"])
async def test_pages_have_one_heading_labels_and_a_language(box: Box, path: str) -> None:
    await box.submit(hold=True)
    text = await page(box, path)
    assert '<html lang="en">' in text
    assert len(re.findall(r"<h1[ >]", text)) == 1
    assert '<main id="main"' in text
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        assert 'scope="col"' in table
    for box_text in re.findall(r"<label[^>]*>(.*?)</label>", text, re.DOTALL):
        assert re.sub(r"<[^>]+>", "", box_text).strip()
