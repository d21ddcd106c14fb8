"""The protocol over a real connection: every route, byte by byte where it matters, and what is not quite HTTP."""

import gzip
import http.client
import json
import random
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from mlbox.errors import TooLarge
from mlbox.serving.server import bodies
from tests.serving.process import InferenceServer, eventually
from tests.serving.test_protocol import MALFORMED

ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}


class TestServer:
    def test_metadata(self, shared: InferenceServer) -> None:
        told = shared.get("/v2").json
        assert told["name"] == "mlbox"
        assert {"binary_tensor_data", "statistics", "model_repository"} <= set(told["extensions"])

    @pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
    def test_health_bodies_carry_both_words(self, shared: InferenceServer, path: str) -> None:
        reply = shared.get(path)
        assert (reply.status, reply.json) == (200, {"live": True, "ready": True})

    def test_query_strings_are_ignored(self, shared: InferenceServer) -> None:
        assert shared.get("/v2/health/live?test_1=1&test_2=2").status == 200

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 404), ("GET", "/v2/", 404), ("GET", "/v1", 404), ("GET", "/v2/models", 404),
            ("GET", "/v2/models/adder/nonsense", 404), ("GET", "/v2/models/a%2Fb", 404), ("POST", "/v2", 405),
            ("DELETE", "/v2/models/adder", 405), ("GET", "/v2/models/adder/infer", 405),
            ("PUT", "/v2/repository/index", 405), ("GET", "/v2/repository/models/adder/load", 405),
        ],
    )  # fmt: skip
    def test_wrong_paths_and_methods(self, shared: InferenceServer, method: str, path: str, status: int) -> None:
        reply = shared.ask(method, path)
        assert reply.status == status
        assert reply.error
        assert reply.headers["content-type"] == "application/json"


class TestModels:
    def test_metadata_includes_the_batch_dimension(self, shared: InferenceServer) -> None:
        assert shared.get("/v2/models/simple").json == {
            "name": "simple",
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": name, "datatype": "INT32", "shape": [-1, 16]} for name in ("INPUT0", "INPUT1")],
            "outputs": [{"name": name, "datatype": "INT32", "shape": [-1, 16]} for name in ("OUTPUT0", "OUTPUT1")],
            "parameters": {"device": "cpu"},
        }

    def test_config_leaves_it_out(self, shared: InferenceServer) -> None:
        config = shared.get("/v2/models/simple/config").json
        assert config["max_batch_size"] == 8
        assert config["input"][0] == {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16]}
        assert config["parameters"]["device"] == {"string_value": "cpu"}

    @pytest.mark.parametrize("rest", ["", "/ready", "/config", "/stats", "/infer"])
    def test_an_unknown_model_or_version(self, shared: InferenceServer, rest: str) -> None:
        ask = shared.post if rest == "/infer" else shared.get
        reply = ask(f"/v2/models/none{rest}")
        assert (reply.status, reply.error) == (404, "Request for unknown model: 'none' is not found")
        for version in ("2", "0", "01", "v1", "1.0", "9" * 30, "%2e%2e"):
            reply = ask(f"/v2/models/adder/versions/{version}{rest}")
            assert reply.status == 404
            assert reply.error.startswith("Request for unknown model: 'adder' version")

    @pytest.mark.parametrize("name", ["%00", "%ff", "%F0%9F%98%80", "..", "a%20b", "x" * 3000, "<script>", "%0d%0aX:1"])
    def test_strange_names_are_unknown_models(self, shared: InferenceServer, name: str) -> None:
        assert shared.get(f"/v2/models/{name}").status == 404

    def test_the_index_lists_what_is_ready(self, shared: InferenceServer) -> None:
        for reply in (shared.get("/v2/repository/index"), shared.post("/v2/repository/index", {"ready": True})):
            rows = {row["name"]: row for row in reply.json}
            assert rows["adder"] == {"name": "adder", "version": "1", "state": "READY", "reason": "", "device": "cpu"}

    @pytest.mark.parametrize("body", [b'{"ready":1}', b'{"ready":"yes"}', b"[]", b"1", b"{", b"\xff", b"[" * 250_000])
    def test_an_index_that_asks_nonsense(self, shared: InferenceServer, body: bytes) -> None:
        assert shared.post("/v2/repository/index", body).status == 400

    def test_statistics_count_elements_and_runs(self, shared: InferenceServer) -> None:
        def stats() -> dict[str, Any]:
            return shared.get("/v2/models/simple/versions/1/stats").json["model_stats"][0]

        before = stats()
        zeros = {"datatype": "INT32", "shape": [3, 16], "data": [0] * 48}
        body = {"inputs": [{"name": name} | zeros for name in ("INPUT0", "INPUT1")]}
        assert shared.post("/v2/models/simple/infer", body).status == 200
        assert shared.post("/v2/models/simple/infer", {"inputs": []}).status == 400
        after = stats()
        assert after["inference_count"] - before["inference_count"] == 3
        assert after["execution_count"] - before["execution_count"] == 1
        for kind in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            assert after["inference_stats"][kind]["count"] - before["inference_stats"][kind]["count"] == 1
        assert after["inference_stats"]["fail"]["count"] - before["inference_stats"]["fail"]["count"] == 1
        assert after["last_inference"] > before["last_inference"]
        assert 3 in {batch["batch_size"] for batch in after["batch_stats"]}
        names = [row["name"] for row in shared.get("/v2/models/stats").json["model_stats"]]
        assert "simple" in names
        assert names == sorted(names)


class TestInference:
    def test_json(self, shared: InferenceServer) -> None:
        reply = shared.post("/v2/models/adder/versions/1/infer", ROW | {"id": "é7"})
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert "inference-header-content-length" not in reply.headers
        assert reply.json == {
            "model_name": "adder",
            "model_version": "1",
            "id": "é7",
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [6.0, 7.0, 8.0, 9.0]}],
        }

    def test_binary_both_ways_byte_by_byte(self, shared: InferenceServer) -> None:
        text = json.dumps(
            {
                "inputs": [
                    {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}},
                ],
                "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
            }
        ).encode()
        headers = {"inference-header-content-length": str(len(text)), "content-type": "application/octet-stream"}
        reply = shared.post("/v2/models/adder/infer", text + struct.pack("<4f", 1, 2, 3, 4), headers)
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/octet-stream"
        length = int(reply.headers["inference-header-content-length"])
        told = json.loads(reply.body[:length])
        assert told["outputs"] == [
            {"name": "y", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}
        ]
        assert struct.unpack("<4f", reply.body[length:]) == (6, 7, 8, 9)

    def test_raw_bytes(self, shared: InferenceServer) -> None:
        body = np.arange(8, dtype=np.float32).tobytes()
        reply = shared.post("/v2/models/identity_FP32/infer", body, {"Inference-Header-Content-Length": "0"})
        assert reply.status == 200
        assert reply.body[int(reply.headers["inference-header-content-length"]) :] == body
        reply = shared.post("/v2/models/one_string/infer", b"427", {"Inference-Header-Content-Length": "0"})
        assert reply.body[int(reply.headers["inference-header-content-length"]) + 4 :] == b"427"

    def test_chunked_bodies(self, shared: InferenceServer) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=10)
        parts = iter([json.dumps(ROW).encode()[:20], b"", json.dumps(ROW).encode()[20:]])
        connection.request("POST", "/v2/models/adder/infer", parts, shared.authorization, encode_chunked=True)
        assert connection.getresponse().status == 200
        connection.close()

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
    def test_numbers_that_are_none(self, shared: InferenceServer, value: str) -> None:
        body = json.dumps(ROW).replace("[1, 2, 3, 4]", f"[{value}, 2, 3, 4]").encode()
        reply = shared.post("/v2/models/adder/infer", body)
        assert f'"data":[{value},7.0,8.0,9.0]'.encode() in reply.body

    def test_empty_tensors(self, shared: InferenceServer) -> None:
        reply = shared.infer("adder", {"x": ("FP32", [0, 4], [])})
        assert reply.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [0, 4], "data": []}]

    def test_any_rank_where_the_model_leaves_it_open(self, shared: InferenceServer) -> None:
        for shape in ([], [1], [1, 1, 1]):
            assert shared.infer("any_rank", {"x": ("FP32", shape, [7])}).json["outputs"][0]["shape"] == shape

    def test_classes(self, shared: InferenceServer) -> None:
        wish = [{"name": "y", "parameters": {"classification": 2}}]
        output = shared.post("/v2/models/adder/infer", ROW | {"outputs": wish}).json["outputs"][0]
        assert output == {"name": "y", "datatype": "BYTES", "shape": [1, 2], "data": ["9.000000:3", "8.000000:2"]}

    def test_a_config_limits_the_batch_and_nothing_else_does(self, shared: InferenceServer) -> None:
        nine = ("INT32", [9, 16], [0] * 144)
        reply = shared.infer("simple", {"INPUT0": nine, "INPUT1": nine})
        assert reply.status == 400
        assert "batch-size must be <= 8" in reply.error
        assert shared.infer("adder", {"x": ("FP32", [100, 4], [0.0] * 400)}).status == 200

    def test_answers_keep_to_the_order_that_was_asked_for(self, shared: InferenceServer) -> None:
        one = ("INT32", [1, 16], [1] * 16)
        reply = shared.infer(
            "simple", {"INPUT1": one, "INPUT0": one}, outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]
        )
        assert [(output["name"], output["data"][0]) for output in reply.json["outputs"]] == [
            ("OUTPUT1", 0),
            ("OUTPUT0", 2),
        ]

    @pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
    def test_malformed_bodies_are_400(self, shared: InferenceServer, body: bytes) -> None:
        reply = shared.post("/v2/models/identity_FP32/infer", body)
        assert reply.status == 400
        assert reply.error
        assert len(reply.error) <= 2000

    @pytest.mark.parametrize("length", ["-1", "abc", "99999999999", "1e2", "5, 5"])
    def test_header_lengths_that_are_none(self, shared: InferenceServer, length: str) -> None:
        reply = shared.post("/v2/models/adder/infer", ROW, {"Inference-Header-Content-Length": length})
        assert reply.status == 400

    def test_what_onnxruntime_refuses_is_the_clients_fault(self, shared: InferenceServer) -> None:
        reply = shared.infer("table", {"i": ("INT64", [1], [99])})
        assert reply.status == 400
        assert "out of data bounds" in reply.error

    def test_a_run_that_takes_too_long_is_ended_and_holds_up_nobody(self, shared: InferenceServer) -> None:
        forever = {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [2**62])}
        replies: list[Any] = []
        clients = [threading.Thread(target=lambda: replies.append(shared.infer("repeat", forever))) for _ in range(6)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            began = time.monotonic()
            assert shared.post("/v2/models/adder/infer", ROW).status == 200
            assert time.monotonic() - began < 1.0
        assert [reply.status for reply in replies] == [503] * 6
        assert all(int(reply.headers["retry-after"]) > 0 for reply in replies)
        assert shared.infer("repeat", forever | {"n": ("INT64", [1], [3])}).json["outputs"][0]["data"] == [3.0] * 4

    def test_a_client_may_be_less_patient_than_the_server(self, shared: InferenceServer) -> None:
        began = time.monotonic()
        reply = shared.infer(
            "repeat",
            {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [2**62])},
            parameters={"timeout": 200_000},
        )
        assert reply.status == 503
        assert time.monotonic() - began < 1.5

    def test_a_client_that_leaves_ends_its_run(self, shared: InferenceServer) -> None:
        body = json.dumps(
            {
                "inputs": [
                    {"name": "x", "datatype": "FP32", "shape": [4], "data": [0] * 4},
                    {"name": "n", "datatype": "INT64", "shape": [1], "data": [2**62]},
                ]
            }
        ).encode()
        head = f"POST /v2/models/repeat/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        head += f"Authorization: Bearer {shared.token}\r\n\r\n"
        for _ in range(8):
            with socket.create_connection(("127.0.0.1", shared.port)) as client:
                client.sendall(head.encode() + body)
                client.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    client.recv(1)
        began = time.monotonic()
        assert shared.infer("repeat", {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [1])}).status == 200
        assert time.monotonic() - began < 1.5  # the eight would have held both threads for eight seconds


class TestBodies:
    @pytest.mark.parametrize(
        ("encoding", "pack"),
        [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress), ("identity", bytes)],
    )
    def test_compressed_requests(self, shared: InferenceServer, encoding: str, pack: Any) -> None:
        reply = shared.post("/v2/models/adder/infer", pack(json.dumps(ROW).encode()), {"Content-Encoding": encoding})
        assert reply.json["outputs"][0]["data"] == [6.0, 7.0, 8.0, 9.0]

    def test_a_body_of_nothing_but_members_is_refused_at_once(self, shared: InferenceServer) -> None:
        began = time.monotonic()
        reply = shared.post("/v2/models/adder/infer", gzip.compress(b"") * 40_000, {"Content-Encoding": "gzip"})
        assert reply.status == 400
        assert "members" in reply.error
        assert time.monotonic() - began < 5  # a minute, where each member copies the rest

    def test_several_gzip_members_are_one_body(self, shared: InferenceServer) -> None:
        text = json.dumps(ROW).encode()
        body = gzip.compress(text[:30]) + gzip.compress(text[30:])
        assert shared.post("/v2/models/adder/infer", body, {"Content-Encoding": "gzip"}).status == 200

    @pytest.mark.parametrize(
        ("accepted", "used", "unpack"),
        [
            ("gzip", "gzip", gzip.decompress),
            ("deflate", "deflate", zlib.decompress),
            ("deflate;q=0.5, gzip;q=0.1", "deflate", zlib.decompress),
            ("br, gzip;q=0, *", None, bytes),
            ("identity", None, bytes),
        ],
    )
    def test_compressed_answers(self, shared: InferenceServer, accepted: str, used: str | None, unpack: Any) -> None:
        wish = ROW | {"parameters": {"binary_data_output": True}}
        reply = shared.post("/v2/models/adder/infer", wish, {"Accept-Encoding": accepted})
        assert reply.headers.get("content-encoding") == used
        body = unpack(reply.body)
        length = int(reply.headers["inference-header-content-length"])
        assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}
        assert struct.unpack("<4f", body[length:]) == (6, 7, 8, 9)

    def test_errors_are_not_compressed(self, shared: InferenceServer) -> None:
        reply = shared.post("/v2/models/adder/infer", b"{", {"Accept-Encoding": "gzip"})
        assert "content-encoding" not in reply.headers
        assert reply.error

    def test_an_unknown_encoding_is_told_with_the_known_ones(self, shared: InferenceServer) -> None:
        reply = shared.post("/v2/models/adder/infer", ROW, {"Content-Encoding": "br"})
        assert reply.status == 501
        assert reply.headers["accept-encoding"] == "gzip, deflate"
        assert "Unsupported compression type" in reply.error

    @pytest.mark.parametrize(
        "body",
        [b"", b"garbage", gzip.compress(b"{}")[:-4], zlib.compress(b"{}"), gzip.compress(b"{}") + b"x"],
        ids=["nothing", "garbage", "cut off", "the other format", "more behind it"],
    )
    def test_damaged_compression_is_400(self, shared: InferenceServer, body: bytes) -> None:
        assert shared.post("/v2/models/adder/infer", body, {"Content-Encoding": "gzip"}).status == 400

    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            ("identity", b" " * 1_000_001),
            ("gzip", gzip.compress(bytes(50_000_000))),
            ("gzip", gzip.compress(bytes(600_000)) * 2),
            ("deflate", zlib.compress(bytes(50_000_000))),
        ],
        ids=["plain", "gzip bomb", "two members", "deflate bomb"],
    )
    def test_too_large_is_413_also_decompressed(self, shared: InferenceServer, encoding: str, body: bytes) -> None:
        reply = shared.post("/v2/models/adder/infer", body, {"Content-Encoding": encoding})
        assert reply.status == 413
        assert "1000000 bytes" in reply.error

    @pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
    def test_a_bomb_is_not_unpacked(self, encoding: str, pack: Any) -> None:
        bomb = pack(bytes(100_000_000))
        tracemalloc.start()
        try:
            with pytest.raises(TooLarge):
                bodies.decompress(bomb, encoding, 1_000_000)
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()

    def test_a_chunked_body_is_counted_as_it_comes(self, shared: InferenceServer) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=10)
        chunks = (b" " * 100_000 for _ in range(12))
        connection.request("POST", "/v2/models/adder/infer", chunks, shared.authorization, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()

    def test_a_large_json_request_is_answered(self, shared: InferenceServer) -> None:
        count = 100_000
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [count], "data": [0.5] * count}]}
        assert shared.post("/v2/models/identity_FP32/infer", body).json["outputs"][0]["data"] == [0.5] * count


class TestNeverA500:
    def test_random_bytes_in_every_place(self, shared: InferenceServer) -> None:
        chance = random.Random(11)
        whole = json.dumps(ROW | {"outputs": [{"name": "y"}], "parameters": {"a": 1}, "id": "x"}).encode()
        assert shared.process is not None
        connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=10)
        seen = set()
        for _ in range(400):
            body = bytearray(whole)
            for _ in range(chance.randrange(1, 6)):
                body[chance.randrange(len(body))] = chance.randrange(256)
            headers = dict(shared.authorization)
            if chance.random() < 0.3:
                headers["Inference-Header-Content-Length"] = str(chance.randrange(len(body) + 3))
            if chance.random() < 0.1:
                headers["Content-Encoding"] = chance.choice(["gzip", "deflate"])
            connection.request("POST", "/v2/models/adder/infer", bytes(body), headers)
            response = connection.getresponse()
            response.read()
            seen.add(response.status)
        connection.close()
        assert seen <= {200, 400}
        assert 400 in seen

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v2/models/adder/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
            b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: x\r\nA\0: b\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
        ids=[
            "tls", "version", "negative length", "two lengths", "nul", "long url", "http2", "connect",
            "no path", "not ascii",
        ],
    )  # fmt: skip
    def test_what_is_not_http_is_refused_in_json(self, shared: InferenceServer, garbage: bytes) -> None:
        with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as client:
            client.sendall(garbage)
            answer = b""
            while data := client.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))
        assert json.loads(body)["error"]

    def test_the_server_is_the_same_process_as_before(self, shared: InferenceServer) -> None:
        assert shared.process is not None
        assert shared.process.poll() is None
        assert "Traceback" not in shared.log.read_text()
        eventually("it answers", lambda: shared.post("/v2/models/adder/infer", ROW).status == 200)
