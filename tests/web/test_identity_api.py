import asyncio
import sqlite3
import time

import httpx

from mlbox.database import Database
from mlbox.identity import Scope
from mlbox.web.credentials import Credentials
from tests.web.harness import Box

BAD_TOKENS: list[dict[str, object]] = [
    {"name": "a b"}, {"name": ""}, {"name": 5}, {"scopes": ["root"]}, {"scopes": []}, {"scopes": 5}, {"scopes": [[]]},
    {"expires": "yesterday"}, {"expires": -5}, {"expires": 0}, {"expires": "2001-01-01T00:00:00Z"}, {"expires": []},
    {"expires": "99999d"}, {"expires": 1e300}, {"role": "admin"},
]  # fmt: skip


async def test_a_token_is_shown_once_and_kept_as_a_digest_only(box: Box) -> None:
    answer = await box.http.post("/api/tokens", json={"name": "laptop", "scopes": ["read", "submit"], "expires": "2h"})
    made = answer.json()
    assert answer.headers["location"] == "/api/tokens/1"
    secret = made.pop("token")
    assert made["last4"] == secret[-4:]
    assert sorted(made["scopes"]) == ["read", "submit"]
    listed = (await box.http.get("/api/tokens")).json()["tokens"]
    assert listed == [made] == [(await box.http.get("/api/tokens/1")).json()]
    await box.http.post("/api/login-codes")
    dump = b"".join(path.read_bytes() for path in box.state.glob("mlbox.db*"))
    assert secret.encode() not in dump
    assert secret[5:40].encode() not in dump
    me = (await box.tcp.get("/api/me", headers={"Authorization": f"bearer {secret}"})).json()
    assert (me["scopes"], me["credential"]) == (["read", "submit"], "token:1")
    assert (await box.http.get("/api/tokens/1")).json()["last_used_at"] is not None


async def test_tokens_as_a_shell_makes_them(box: Box) -> None:
    form = {"name": "ci", "scopes": "read,infer", "expires": "never"}
    answer = await box.http.post("/api/tokens", data=form, headers={"Accept": "text/plain"})
    assert answer.text.startswith("mlbx_")
    token = (await box.http.get("/api/tokens/1")).json()
    assert (sorted(token["scopes"]), token["expires_at"]) == (["infer", "read"], None)
    assert "ci" in (await box.http.get("/api/tokens", headers={"Accept": "text/plain"})).text


async def test_bad_tokens_are_refused(box: Box) -> None:
    for fields in BAD_TOKENS:
        answer = await box.http.post("/api/tokens", json=fields)
        assert answer.status_code == 400, fields
    assert (await box.http.get("/api/tokens")).json()["tokens"] == []
    assert (await box.http.delete("/api/tokens/1")).status_code == 404


async def test_a_narrowed_token_cannot_make_itself_another(box: Box) -> None:
    narrow = {"Authorization": f"Bearer {await box.token(name='narrow', scopes=['read', 'submit'])}"}
    assert (await box.tcp.post("/api/tokens", json={"name": "x"}, headers=narrow)).status_code == 403
    assert (await box.tcp.post("/api/login-codes", headers=narrow)).status_code == 403
    await box.token(name="other")
    assert (await box.tcp.delete("/api/tokens/2", headers=narrow)).status_code == 403
    assert (await box.tcp.delete("/api/tokens/1", headers=narrow)).status_code == 200
    assert (await box.tcp.get("/api/me", headers=narrow)).status_code == 401


async def test_an_admin_token_may_do_all_and_its_sessions_end_with_it(box: Box) -> None:
    admin = {"Authorization": f"Bearer {await box.token(name='root', scopes=['admin'])}"}
    assert (
        await box.tcp.post("/api/tokens", json={"name": "x", "scopes": ["admin"]}, headers=admin)
    ).status_code == 201
    code = (await box.tcp.post("/api/login-codes", headers=admin)).json()["code"]
    unused = (await box.tcp.post("/api/login-codes", headers=admin)).json()["code"]
    assert (await box.tcp.post("/login", data={"secret": code})).status_code == 303
    assert (await box.tcp.get("/api/me")).json()["credential"] == "token:1/session:1"
    await box.http.delete("/api/tokens/1")
    assert (await box.tcp.get("/api/me")).status_code == 401
    assert (await box.tcp.post("/login", data={"secret": unused})).status_code == 401


async def test_a_repeated_request_for_a_secret_answers_with_the_first(box: Box) -> None:
    headers = {"Idempotency-Key": "k"}
    first, second = [await box.http.post("/api/tokens", json={"name": "a"}, headers=headers) for _ in range(2)]
    assert first.json() == second.json()
    assert (await box.http.post("/api/tokens", json={"name": "b"}, headers=headers)).status_code == 409
    codes = [(await box.http.post("/api/login-codes", headers=headers)).json()["code"] for _ in range(2)]
    assert codes[0] == codes[1]
    shell = {**headers, "Accept": "text/plain"}
    assert (await box.http.post("/api/tokens", json={"name": "a"}, headers=shell)).text == first.json()["token"] + "\n"
    both = await asyncio.gather(*(box.http.post("/api/tokens", headers={"Idempotency-Key": "j"}) for _ in range(5)))
    assert len({answer.json().get("token") for answer in both if answer.status_code == 201}) == 1
    assert len((await box.http.get("/api/tokens")).json()["tokens"]) == 2


async def test_credentials_survive_a_restart_and_what_ended_stays_ended(box: Box) -> None:
    now = time.time()
    clock = [now]
    kept = await box.token(name="kept", scopes=["infer"])
    revoked = await box.token(name="revoked")
    await box.http.delete("/api/tokens/2")
    cookie = (await box.cookie()).partition("=")[2]
    await box.credentials.of_token(kept)

    async def nobody(sha256: str) -> None:
        return None

    database = await Database.open(box.state / "copy.db")
    with sqlite3.connect(box.state / "mlbox.db") as source, sqlite3.connect(box.state / "second.db") as target:
        source.backup(target)
    await database.close()
    database = await Database.open(box.state / "second.db")
    try:
        again = Credentials(database, job_of_token=nobody, now=lambda: clock[0])
        await again.load()
        known = await again.of_token(kept)
        assert known is not None
        assert known.identity.scopes == {Scope.INFER}
        assert await again.of_token(revoked) is None
        assert again.of_session(cookie) is not None
        assert [access["scopes"] for access in again.infer_access()] == [["infer"]]
        clock[0] = now + 13 * 3600
        assert again.of_session(cookie) is None
        clock[0] = now + 91 * 86_400
        assert await again.of_token(kept) is None
        assert again.infer_access() == []
    finally:
        await database.close()


async def test_the_inference_server_is_told_of_every_change(box: Box) -> None:
    told: list[list[str]] = []
    box.credentials.on_change = lambda: told.append([access["sha256"] for access in box.credentials.infer_access()])
    await box.token(name="a", scopes=["infer"])
    await box.token(name="b", scopes=["read"])
    await box.http.delete("/api/tokens/1")
    assert [len(access) for access in told] == [1, 1, 0]


async def test_login_codes_are_few_and_short_lived(box: Box) -> None:
    codes = [(await box.http.post("/api/login-codes")).json()["code"] for _ in range(12)]
    async with httpx.AsyncClient(base_url=f"http://{box.address}") as browser:
        statuses = [(await browser.post("/login", data={"secret": code})).status_code for code in codes]
    assert statuses == [401, 401] + [303] * 10


async def test_a_weaker_credential_is_not_shown_what_a_stronger_one_was_given(box: Box) -> None:
    weak = (await box.http.post("/api/tokens", json={"name": "weak", "scopes": ["read"]})).json()["token"]
    for path, body in (("/api/tokens", {"name": "strong", "scopes": ["admin"]}), ("/api/login-codes", {})):
        headers = {"Idempotency-Key": "guessed"}
        first = await box.http.post(path, json=body, headers=headers)
        assert first.status_code == 201
        assert (await box.http.post(path, json=body, headers=headers)).json() == first.json()
        replay = await box.tcp.post(path, json=body, headers={**headers, "Authorization": f"Bearer {weak}"})
        assert replay.status_code == 403
