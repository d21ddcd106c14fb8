"""Who gets in: every route with every kind of credential, and how soon a revoked token is out."""

import http.client
import json
import time
from pathlib import Path

import pytest

from mlbox.identity import digest, new_token
from tests.serving import onnx_models
from tests.serving.process import InferenceServer, eventually

READ = [
    ("GET", "/v2"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/m"),
    ("GET", "/v2/models/m/ready"),
    ("GET", "/v2/models/m/config"),
    ("GET", "/v2/models/m/stats"),
    ("POST", "/v2/models/m/infer"),
    ("GET", "/v2/models/m/versions/1"),
    ("GET", "/v2/models/m/versions/1/ready"),
    ("GET", "/v2/models/m/versions/1/config"),
    ("GET", "/v2/models/m/versions/1/stats"),
    ("POST", "/v2/models/m/versions/1/infer"),
    ("GET", "/v2/repository/index"),
    ("POST", "/v2/repository/index"),
]
CONTROL = [("POST", "/v2/repository/models/m/load"), ("POST", "/v2/repository/models/m/unload")]
NOWHERE = [("GET", "/"), ("GET", "/nope"), ("DELETE", "/v2"), ("OPTIONS", "/v2"), ("TRACE", "/v2"), ("GET", "//v2")]


def tokens() -> dict[str, str]:
    return {name: new_token() for name in ("infer", "deploy", "admin", "read", "expired")}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory):
    made = InferenceServer(tmp_path_factory.mktemp("guarded"))
    made.place(onnx_models.adder(1.0), "m")
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def known(guarded: InferenceServer) -> dict[str, str]:
    """One token for each scope, one of them expired."""
    made = tokens()
    listed = [
        {"sha256": digest(token), "scopes": [scope], "expires": expires}
        for scope, token, expires in [
            *((name, made[name], time.time() + 600) for name in ("infer", "deploy", "read")),
            ("admin", made["admin"], None),
            ("admin", made["expired"], time.time() - 1),
            ("admin", guarded.token, None),
        ]
    ]
    new = guarded.access.with_suffix(".new")
    new.write_text(json.dumps({"tokens": listed}))
    new.replace(guarded.access)
    eventually("the new tokens are in force", lambda: status(guarded, "GET", "/v2", f"Bearer {made['infer']}") == 200)
    return made


def status(server: InferenceServer, method: str, path: str, authorization: str) -> int:
    return server.ask(method, path, headers={"Authorization": authorization}).status


class TestEveryRoute:
    @pytest.mark.parametrize(("method", "path"), [*READ, *CONTROL, *NOWHERE])
    @pytest.mark.parametrize("credential", ["none", "wrong", "expired", "basic", "bare", "empty", "malformed", "long"])
    def test_nobody_gets_in_without_a_token(
        self, guarded: InferenceServer, known: dict[str, str], method: str, path: str, credential: str
    ) -> None:
        value = {
            "none": "",
            "wrong": f"Bearer {new_token()}",
            "expired": f"Bearer {known['expired']}",
            "basic": f"Basic {known['admin']}",
            "bare": known["admin"],
            "empty": "Bearer ",
            "malformed": "Bearer \xff\xfe",
            "long": "Bearer " + "a" * 5000,
        }[credential]
        reply = guarded.ask(method, path, headers={"Authorization": value})
        assert reply.status == 401
        if method != "HEAD":
            assert reply.error
        assert reply.headers["www-authenticate"].startswith("Bearer")

    @pytest.mark.parametrize(("method", "path"), READ)
    def test_infer_reads_and_infers(
        self, guarded: InferenceServer, known: dict[str, str], method: str, path: str
    ) -> None:
        expected = 400 if path.endswith("/infer") else 200  # there is no body
        assert status(guarded, method, path, f"Bearer {known['infer']}") == expected
        assert status(guarded, method, path, f"bearer  {known['admin']} ") == expected
        for other in ("deploy", "read"):
            assert status(guarded, method, path, f"Bearer {known[other]}") == 403

    @pytest.mark.parametrize(("method", "path"), CONTROL)
    def test_deploy_loads_and_unloads(
        self, guarded: InferenceServer, known: dict[str, str], method: str, path: str
    ) -> None:
        for other in ("infer", "read"):
            reply = guarded.ask(method, path, headers={"Authorization": f"Bearer {known[other]}"})
            assert reply.status == 403
            assert "'deploy'" in reply.error
        assert status(guarded, method, path, f"Bearer {known['deploy']}") == 200
        assert status(guarded, method, path, f"Bearer {known['admin']}") == 200
        assert guarded.post("/v2/repository/models/m/load").status == 200

    def test_two_credentials_are_none(self, guarded: InferenceServer, known: dict[str, str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
        connection.putrequest("GET", "/v2")
        connection.putheader("Authorization", f"Bearer {known['admin']}")
        connection.putheader("Authorization", f"Bearer {known['admin']}")
        connection.endheaders()
        assert connection.getresponse().status == 401
        connection.close()

    def test_a_token_in_the_address_is_none(self, guarded: InferenceServer, known: dict[str, str]) -> None:
        for query in (f"?token={known['admin']}", f"?access_token={known['admin']}"):
            assert status(guarded, "GET", f"/v2{query}", "") == 401


class TestChanges:
    def test_a_revoked_token_is_out_within_a_second(self, server: InferenceServer) -> None:
        other = new_token()
        server.allow({server.token: ["admin"], other: ["infer"]})
        eventually("the token is in force", lambda: status(server, "GET", "/v2", f"Bearer {other}") == 200)
        for _ in range(3):
            server.allow({server.token: ["admin"]})
            revoked = time.monotonic()
            eventually("it is out", lambda: status(server, "GET", "/v2", f"Bearer {other}") == 401)
            assert time.monotonic() - revoked < 1.0
            server.allow({server.token: ["admin"], other: ["infer"]})
            eventually("it is in again", lambda: status(server, "GET", "/v2", f"Bearer {other}") == 200)

    @pytest.mark.parametrize(
        "content",
        [
            None,
            "",
            "{",
            "[]",
            '{"tokens": 1}',
            '{"tokens": [{"scopes": []}]}',
            '{"tokens": [{"sha256": "a", "scopes": 1}]}',
        ],
    )
    def test_without_a_usable_file_nobody_gets_in(self, server: InferenceServer, content: str | None) -> None:
        good = server.access.read_text()
        if content is None:
            server.access.unlink()
        else:
            server.access.write_text(content)
        eventually("nobody gets in", lambda: server.get("/v2").status == 401)
        assert server.log.read_text().count("nobody may ask anything") == 1
        server.access.write_text(good)
        eventually("who is in it gets in again", lambda: server.get("/v2").status == 200)

    def test_no_token_is_in_the_log_or_the_file(self, server: InferenceServer) -> None:
        server.get("/v2")
        status(server, "GET", "/v2", "Bearer mlbx_secret")
        assert server.token not in server.access.read_text()
        log = Path(server.log).read_text()
        assert server.token not in log
        assert "mlbx_secret" not in log
