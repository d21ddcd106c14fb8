import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from mlbox.config import Config, ServerConfig
from mlbox.identity import Scope, new_token
from mlbox.web.routes import OPEN, READ, Permission, Rule, open_paths, router
from mlbox.web.throttle import BURST, Throttle
from tests.web.harness import Box, eventually, running_box

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
ROUTES = 59
"""Counted here so that a new route has to be looked at: is its permission the one it should have?"""


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    rule: Rule | None


def calls(rules: tuple[Rule, ...]) -> list[Call]:
    """Every method on every path of the route table, with job 1 and the like in place of the parameters."""
    by_path = {rule.path: rule.path for rule in rules}
    for path in by_path:
        by_path[path] = re.sub(r"\{\w+(:path)?\}", "1", path)
    known = {(rule.method, rule.path): rule for rule in rules}
    known |= {("HEAD", rule.path): rule for rule in rules if rule.method == "GET"}
    return [
        Call(method, concrete, known.get((method, path)))
        for (path, concrete), method in product(by_path.items(), METHODS)
    ]


async def statuses(client: httpx.AsyncClient, wanted: list[Call], headers: dict[str, str]) -> dict[Call, int]:
    found: dict[Call, int] = {}
    for call in wanted:
        async with client.stream(call.method, call.path, headers=headers) as answer:
            found[call] = answer.status_code
    return found


async def test_no_route_answers_without_a_good_credential_but_the_open_ones(box: Box) -> None:
    assert len(box.app.rules) == ROUTES
    expired = await box.token(name="short", scopes=["admin"], expires=1)
    revoked = await box.token(name="gone", scopes=["admin"])
    for token in (await box.http.get("/api/tokens")).json()["tokens"]:
        if token["name"] == "gone":
            await box.http.delete(f"/api/tokens/{token['id']}")
    await asyncio.sleep(1.1)
    bad = {
        "none, but a name": {"X-Forwarded-User": "root", "X-Remote-User": "root"},
        "another scheme": {"Authorization": "Basic cm9vdDpyb290"},
        "well-formed but unknown": {"Authorization": f"Bearer {new_token()}"},
        "expired": {"Authorization": f"Bearer {expired}"},
        "revoked": {"Authorization": f"Bearer {revoked}"},
        "an unknown cookie": {"Cookie": "mlbox_session=abc"},
    }
    opened = open_paths(box.app.rules)
    assert {path for _, path in opened} == {
        "/healthz",
        "/login",
        *(f"/static/{name}" for name in ("ansi.js", "icon.svg", "live.js", "log.js", "mlbox.css")),
    }
    wanted = calls(box.app.rules)
    for name, headers in bad.items():
        for call, status in (await statuses(box.tcp, wanted, headers)).items():
            if (call.method, call.path) in opened:
                assert status in (200, 401, 429), (name, call, status)  # 401, 429: POST /login without a secret
            else:
                assert status in (401, 429), (name, call, status)


async def test_a_route_wants_the_very_scope_that_its_rule_names(box: Box) -> None:
    job = await box.submit()
    await box.wait(job["id"])
    # Two calls would end what the others need: an endless stream, and the token's own revocation.
    left_out = {("GET", "/api/events"), ("DELETE", "/api/tokens/1")}
    wanted = [call for call in calls(box.app.rules) if (call.method, call.path) not in left_out]
    for scope in (Scope.READ, Scope.SUBMIT, Scope.DEPLOY, Scope.INFER):
        token = await box.token(name=scope, scopes=[scope])
        for call, status in (await statuses(box.tcp, wanted, {"Authorization": f"Bearer {token}"})).items():
            assert status < 500, (scope, call, status)
            if call.rule is None:
                assert status == 405, (scope, call, status)
            elif call.rule.permission.scope not in (None, scope):
                assert status == 403, (scope, call, status)
            elif call.rule.permission.scope == scope:
                assert status not in (401, 405), (scope, call, status)


async def test_a_jobs_own_token_reaches_its_job_and_nothing_else(box: Box, tmp_path: Path) -> None:
    other = await box.submit("echo secret")
    await box.wait(other["id"])
    kept = tmp_path / "token"
    job = await box.submit(f"printf %s $MLBOX_TOKEN > {kept}.new; mv {kept}.new {kept}; sleep 1000")

    async def written() -> bool:
        return kept.exists()

    await eventually("the job has written its token down", written)
    headers = {"Authorization": f"Bearer {kept.read_text()}"}
    mine = (await box.tcp.get(f"/api/jobs/{job['id']}", headers=headers)).json()
    assert mine["id"] == job["id"]
    assert (await box.tcp.get("/api/me", headers=headers)).json()["job"] == job["id"]
    assert (
        await box.tcp.put(f"/api/jobs/{job['id']}/artifacts/a/b.txt", content=b"hi", headers=headers)
    ).status_code == 201
    for path in (f"/api/jobs/{other['id']}", f"/api/jobs/{other['id']}/log", f"/api/jobs/{other['id']}/artifacts"):
        assert (await box.tcp.get(path, headers=headers)).status_code == 404
    for call, status in (await statuses(box.tcp, calls(box.app.rules), headers)).items():
        if call.rule is not None and call.rule.permission.scope is not None and not call.rule.permission.job_tokens:
            assert status == 403, (call, status)
    await box.http.post(f"/api/jobs/{job['id']}/cancel")
    await box.wait(job["id"])
    assert (await box.tcp.get("/api/me", headers=headers)).status_code == 401


def test_a_route_without_a_permission_keeps_the_app_from_starting() -> None:
    async def endpoint(request: object) -> object:
        raise AssertionError

    with pytest.raises(ValueError, match="no permission"):
        router([Rule("GET", "/x", None, endpoint)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters"):
        router([Rule("GET", "/static/{name}", OPEN, endpoint)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        router([Rule("GET", "/x", READ, endpoint), Rule("GET", "/x", Permission(None), endpoint)])  # type: ignore[arg-type]


async def test_the_socket_admits_the_owner_only(tmp_path: Path) -> None:
    async with running_box(tmp_path, owner_uid=os.getuid() + 1) as box:
        answer = await box.http.get("/api/me")
        assert answer.status_code == 403
        assert f"you are uid {os.getuid()}" in answer.json()["detail"]
        assert (await box.http.get("/healthz")).status_code == 403


async def test_a_credential_that_is_shown_counts_even_on_the_socket(box: Box) -> None:
    token = await box.token(name="narrow", scopes=["read"])
    headers = {"Authorization": f"Bearer {token}"}
    assert (await box.http.get("/api/me", headers=headers)).json()["scopes"] == ["read"]
    assert (await box.http.post("/api/jobs", json={"command": "true"}, headers=headers)).status_code == 403
    assert (await box.http.get("/api/me", headers={"Authorization": "Bearer wrong"})).status_code == 401


async def test_a_token_in_the_address_is_no_credential(box: Box) -> None:
    token = await box.token(name="t")
    assert (await box.tcp.get("/api/me", params={"token": token})).status_code == 401
    assert (await box.tcp.get("/api/me", params={"access_token": token})).status_code == 401


async def test_a_refusal_says_how_to_sign_in(box: Box) -> None:
    answer = await box.tcp.get("/api/jobs")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/problem+json"
    page = await box.tcp.get("/jobs?state=failed", headers={"Accept": "text/html,*/*;q=0.8"})
    assert page.status_code == 401
    assert 'action="/login"' in page.text
    assert 'value="/jobs?state=failed"' in page.text


# Host


@pytest_asyncio.fixture
async def raw(box: Box) -> AsyncGenerator["Raw"]:
    yield Raw(box)


class Raw:
    """Requests written byte by byte."""

    def __init__(self, box: Box) -> None:
        self.host, _, port = box.address.partition(":")
        self.port = int(port)

    async def status(self, head: str) -> int:
        read, write = await asyncio.open_connection(self.host, self.port)
        write.write((head.replace("\n", "\r\n") + "\r\n\r\n").encode("latin-1"))
        line = await asyncio.wait_for(read.readline(), 10)
        write.close()
        return int(line.split()[1])


HOSTS = [
    ("localhost", 200),
    ("LOCALHOST:8470", 200),
    ("127.0.0.1", 200),
    ("127.0.0.1:1", 200),
    ("[::ffff:127.0.0.1]:80", 200),
    ("evil.example", 421),
    ("localhost.", 421),
    ("localhost.evil.example", 421),
    ("127.0.0.2", 421),
    ("127.1", 421),
    ("[::1]", 421),
    ("mlbox", 421),
    ("", 400),
    ("local host", 400),
    ("localhost:99999", 400),
    ("localhost:x", 400),
    ("user@localhost", 400),
    ("localhost/x", 400),
    ("localhost, evil.example", 400),
    ("[::1", 400),
]


async def test_the_host_has_to_be_ours(raw: Raw, subtests: pytest.Subtests) -> None:
    for host, status in HOSTS:
        with subtests.test(host=host):
            assert await raw.status(f"GET /healthz HTTP/1.1\nHost: {host}") == status


async def test_a_request_names_one_host(raw: Raw) -> None:
    assert await raw.status("GET /healthz HTTP/1.1") == 400
    assert await raw.status("GET /healthz HTTP/1.0") == 400
    assert await raw.status("GET /healthz HTTP/1.1\nHost: localhost\nHost: localhost") == 400
    assert await raw.status("GET /healthz HTTP/1.1\nHost: localhost\nHost: evil.example") == 400


TARGETS = [
    "http://evil.example/api/jobs", "//evil.example/healthz", "@evil/healthz", "/healthz/", "/healthz/../api/jobs",
    "/%68ealthz/", "/static/../api/jobs", "/static/mlbox.css/", "/STATIC/mlbox.css", "/login/", "/healthz%2f..%2fa",
    "*",
]  # fmt: skip


async def test_no_way_of_writing_a_path_opens_it(raw: Raw, subtests: pytest.Subtests) -> None:
    for target in TARGETS:
        with subtests.test(target=target):
            assert await raw.status(f"GET {target} HTTP/1.1\nHost: localhost") in (400, 401)


async def test_names_of_the_configuration_are_ours_too(tmp_path: Path) -> None:
    async with running_box(tmp_path, Config(server=ServerConfig(hosts=("GPUbox.lan",)))) as box:
        assert (await box.tcp.get("/healthz", headers={"Host": "gpubox.lan:8470"})).status_code == 200
        assert (await box.tcp.get("/healthz", headers={"Host": "other.lan"})).status_code == 421


# Browsers


async def test_a_browser_signs_in_by_a_code_once(box: Box) -> None:
    made = (await box.http.post("/api/login-codes")).json()
    assert made["url"] == f"http://{box.address}/login?code={made['code']}"
    form = await box.tcp.get(made["url"], headers={"Accept": "text/html"})
    assert form.status_code == 200
    assert made["code"] in form.text
    answer = await box.tcp.post("/login", data={"secret": made["code"].lower(), "next": "/jobs/1"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/1")
    cookie = answer.headers["set-cookie"]
    assert {part.strip().lower() for part in cookie.split(";")[1:]} >= {"httponly", "samesite=strict", "path=/"}
    assert (await box.tcp.get("/api/me")).json()["credential"] == "session:1"
    again = await box.tcp.post("/login", data={"secret": made["code"]})
    assert again.status_code == 401
    assert (await box.tcp.post("/logout", headers={"Origin": f"http://{box.address}"})).status_code == 303
    assert (await box.tcp.get("/api/me")).status_code == 401


async def test_a_session_opened_by_a_token_can_no_more_than_the_token_and_ends_with_it(box: Box) -> None:
    token = await box.token(name="narrow", scopes=["read"], expires="1h")
    answer = await box.tcp.post("/login", data={"secret": token})
    assert answer.status_code == 303
    assert (
        "max-age=3599" in answer.headers["set-cookie"].lower() or "max-age=3600" in answer.headers["set-cookie"].lower()
    )
    me = (await box.tcp.get("/api/me")).json()
    assert (me["scopes"], me["credential"]) == (["read"], "token:1/session:1")
    own = {"Origin": f"http://{box.address}"}
    assert (await box.tcp.post("/api/tokens", json={"name": "more"}, headers=own)).status_code == 403
    assert (await box.tcp.post("/api/login-codes", headers=own)).status_code == 403
    await box.http.delete("/api/tokens/1")
    assert (await box.tcp.get("/api/me")).status_code == 401


async def test_after_signing_in_one_never_lands_on_another_site(box: Box) -> None:
    for target in (
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\\\evil",
        "javascript:alert(1)",
        "/a b",
        "/ä",
    ):
        code = (await box.http.post("/api/login-codes")).json()["code"]
        answer = await box.tcp.post("/login", data={"secret": code, "next": target})
        assert answer.headers["location"] == "/", target


OWN = "own"


ORIGINS: list[tuple[str, dict[str, str], bool]] = [
    ("POST", {"Sec-Fetch-Site": "same-origin"}, True),
    ("POST", {"Origin": OWN}, True),
    ("POST", {}, False),
    ("POST", {"Sec-Fetch-Site": "none"}, False),
    ("POST", {"Sec-Fetch-Site": "same-site", "Origin": OWN}, False),
    ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
    ("POST", {"Origin": "null"}, False),
    ("POST", {"Origin": "http://127.0.0.1:1"}, False),
    ("POST", {"Origin": "http://evil.example"}, False),
    ("POST", {"Referer": OWN}, False),
    ("DELETE", {}, False),
    ("DELETE", {"Sec-Fetch-Site": "cross-site"}, False),
    ("PATCH", {"Origin": "http://evil.example"}, False),
    ("PUT", {"Sec-Fetch-Site": "same-site"}, False),
    ("GET", {}, True),
    ("GET", {"Sec-Fetch-Site": "none"}, True),
    ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),
    ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, False),
    ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, False),
    ("EVENTS", {"Sec-Fetch-Site": "same-origin"}, True),
    ("EVENTS", {"Referer": OWN}, True),
    ("EVENTS", {}, False),
    ("EVENTS", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
    ("EVENTS", {"Referer": "http://evil.example/"}, False),
    ("EVENTS", {"Origin": "http://evil.example", "Referer": OWN}, False),
]


async def test_a_cookie_is_good_for_our_own_pages_only(box: Box, subtests: pytest.Subtests) -> None:
    own, cookie = f"http://{box.address}", await box.cookie()
    for method, headers, good in ORIGINS:
        sent = {
            name: own + ("/" if name == "Referer" else "") if value is OWN else value for name, value in headers.items()
        }
        sent["Cookie"] = cookie
        path = {"POST": "/api/jobs/1/cancel", "EVENTS": "/api/events"}.get(method, "/api/jobs/1")
        if method == "EVENTS":
            sent["Accept"] = "text/event-stream"
        with subtests.test(method=method, headers=headers):
            async with box.tcp.stream("GET" if method == "EVENTS" else method, path, headers=sent) as answer:
                assert (answer.status_code != 403) is good, answer.status_code


async def test_another_site_cannot_sign_a_browser_in(box: Box) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        code = (await box.http.post("/api/login-codes")).json()["code"]
        assert (await box.tcp.post("/login", data={"secret": code}, headers=headers)).status_code == 403


async def test_failed_attempts_are_slowed_down_and_good_ones_are_not(box: Box) -> None:
    token = await box.token(name="good")
    bad = [(await box.tcp.get("/api/me", headers={"Authorization": f"Bearer {number}"})) for number in range(BURST + 5)]
    assert [answer.status_code for answer in bad] == [401] * BURST + [429] * 5
    assert int(bad[-1].headers["retry-after"]) >= 1
    assert (await box.tcp.post("/login", data={"secret": "wrong"})).status_code == 429
    assert (await box.tcp.get("/api/me", headers={"Authorization": f"Bearer {token}"})).status_code == 200


def test_the_throttle_forgets_rather_than_grows_and_counts_an_ipv6_network_as_one() -> None:
    throttle = Throttle(burst=2, per_s=1, addresses_max=100)
    for number in range(10_000):
        throttle.failed(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 0.0)
    assert len(throttle._buckets) == 100
    assert [throttle.failed(f"2001:db8::{host:x}", 0.0) for host in range(1, 4)] == [None, None, 1.0]
    assert throttle.failed("2001:db8:0:1::1", 0.0) is None
    assert throttle.failed("::ffff:192.0.2.1", 0.0) is None
    assert throttle.failed("2001:db8::9", 5.0) is None


async def test_every_answer_carries_the_security_headers(box: Box) -> None:
    for path in ("/", "/api/jobs", "/nowhere", "/login", "/static/mlbox.css", "/healthz"):
        for client in (box.http, box.tcp):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "same-origin"
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
            assert "access-control-allow-origin" not in headers


async def test_a_websocket_meets_the_same_gate(box: Box) -> None:
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    host = (b"host", b"localhost")
    scope = {
        "type": "websocket",
        "path": "/api/events",
        "server": ("127.0.0.1", 1),
        "scheme": "ws",
        "query_string": b"",
    }
    await box.app({**scope, "headers": [host]}, receive, send)  # type: ignore[arg-type]
    token = await box.token(name="t")
    good = (b"authorization", f"Bearer {token}".encode())
    await box.app({**scope, "headers": [host, good]}, receive, send)  # type: ignore[arg-type]
    await box.app({**scope, "headers": [(b"host", b"evil.example"), good]}, receive, send)  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"] * 3


async def test_finding_out_who_asks_takes_microseconds(box: Box) -> None:
    token = await box.token(name="t")
    began = time.perf_counter()
    for _ in range(1000):
        assert await box.credentials.of_token(token)
    assert (time.perf_counter() - began) / 1000 < 100e-6
