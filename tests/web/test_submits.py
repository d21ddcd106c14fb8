import asyncio
import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlbox.web import submits
from tests.web.harness import Box, eventually

SCRIPT = "#!/bin/sh\n#MLBOX name=from-script time_limit=2h\n#SBATCH --cpus-per-task=2\necho $1 ran\n"


def archive(form: str = "tar.gz") -> bytes:
    packed = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(packed, "w") as bundle:
            bundle.writestr("main.sh", "echo from the archive\n")
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as bundle:
            entry = tarfile.TarInfo("main.sh")
            entry.size = 22
            bundle.addfile(entry, io.BytesIO(b"echo from the archive\n"))
    return packed.getvalue()


async def made(box: Box, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/api/jobs/{job['id']}"
    return (await box.http.get(answer.headers["location"])).json()


async def test_a_form(box: Box) -> None:
    job = await made(
        box, await box.http.post("/api/jobs", data={"command": "echo a=b&c", "cpus": "1", "time_limit": "90m"})
    )
    assert (job["command"], job["cpus"], job["time_limit_s"]) == ("echo a=b&c", 1, 5400)


async def test_json(box: Box) -> None:
    job = await made(box, await box.http.post("/api/jobs", json={"command": "true", "mem": "2G", "env": {"A": "1"}}))
    assert (job["mem_mib"], job["env"], job["state"]) == (2048, {"A": "1"}, job["state"])


async def test_a_script_as_the_body_with_the_content_type_that_curl_gives_it(box: Box) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    job = await made(box, await box.http.post("/api/jobs?cpus=1", content=SCRIPT.encode(), headers=form))
    assert job["script"] == SCRIPT
    assert (job["name"], job["time_limit_s"], job["cpus"]) == ("from-script", 7200, 1)  # the query wins


async def test_a_script_under_other_names(box: Box) -> None:
    for kind in ("text/plain", "text/x-shellscript", "application/octet-stream", ""):
        answer = await box.http.post(
            "/api/jobs", content=SCRIPT.encode(), headers={"Content-Type": kind} if kind else {}
        )
        assert (await made(box, answer))["script"] == SCRIPT


@pytest.mark.parametrize("form", ["tar.gz", "zip"])
async def test_files(box: Box, form: str) -> None:
    files = {"script": ("train.sh", "#!/bin/sh\n. ./main.sh\n"), "code": (f"src.{form}", archive(form))}
    job = await made(box, await box.http.post("/api/jobs", files=files, data={"name": "packed", "env": ["A=1", "B=2"]}))
    assert (job["code"], job["name"], job["env"]) == (form, "packed", {"A": "1", "B": "2"})
    await box.wait(job["id"])
    assert (await box.http.get(f"/api/jobs/{job['id']}/log")).text == "from the archive\n"
    assert list(box.folders.incoming.iterdir()) == []


async def test_a_shell_gets_the_id(box: Box) -> None:
    answer = await box.http.post("/api/jobs", data={"command": "true"}, headers={"Accept": "text/plain"})
    assert (answer.status_code, answer.text) == (201, "1\n")


async def test_a_repeated_submit_is_one_job(box: Box) -> None:
    headers = {"Idempotency-Key": "abc"}
    first = await box.http.post("/api/jobs", json={"command": "echo 1"}, headers=headers)
    second = await box.http.post("/api/jobs", json={"command": "echo 1"}, headers=headers)
    assert first.json()["id"] == second.json()["id"]
    assert second.status_code == 201
    files = {"code": ("a.zip", archive("zip"))}
    third = await box.http.post("/api/jobs", data={"command": "true"}, files=files, headers=headers)
    assert third.json()["id"] == first.json()["id"]
    assert list(box.folders.incoming.iterdir()) == []
    for bad in ("", "x" * 256, "a\tb"):
        answer = await box.http.post("/api/jobs", json={"command": "true"}, headers={"Idempotency-Key": bad})
        assert answer.status_code == 400


async def test_all_bad_fields_are_named_at_once_with_what_they_should_be(box: Box) -> None:
    answer = await box.http.post("/api/jobs", json={"command": "true", "gpu": 1, "cpus": 0, "priority": "high"})
    assert answer.status_code == 400
    problem = answer.json()
    assert {error["field"] for error in problem["errors"]} == {"gpu", "cpus", "priority"}
    assert "did you mean 'gpus'" in problem["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


async def test_lists_come_as_many_fields_or_with_commas(box: Box) -> None:
    for data in ({"notify": ["a@b", "c@d"]}, {"notify": "a@b,c@d", "notify_on": ["begin", "end"]}):
        await made(box, await box.http.post("/api/jobs", data={"command": "true", **data}))
    answer = await box.http.post("/api/jobs", data={"command": "true", "notify": ["a@b", "nobody"]})
    assert "got 'nobody'" in answer.json()["detail"]


def together(script: str, request: dict[str, object], *, with_code: bool = False) -> dict[str, object]:
    script = f"#!/bin/sh\n#MLBOX {script}\ntrue\n"
    found = submits.together({"script": script, **request}, {}, with_code=with_code)
    del found["script"]
    return found


@pytest.mark.parametrize(
    ("script", "request_fields", "meant"),
    [
        ("gpus=2", {"gpu_mem": "1G"}, {"gpu_mem": "1G"}),
        ("gpus=2 launch=torchrun", {"gpu_mem": "1G"}, {"gpu_mem": "1G"}),
        ("gpus=2 launch=torchrun", {"gpus": "0"}, {"gpus": "0"}),
        ("gpus=2 launch=torchrun", {"gpus": 1}, {"gpus": 1, "launch": "torchrun"}),
        ("gpu_mem=1G", {"gpus": "2"}, {"gpus": "2"}),
        ("gpu_mem=1G", {"gpus": 0}, {"gpus": 0}),
        ("gpu_mem=1G", {"gpus": None}, {"gpus": None, "gpu_mem": "1G"}),
        ("gpu_mem=1G", {"gpu_mem": None}, {"gpu_mem": None}),
        ("array=0-9%2", {"matrix": {"a": [1]}}, {"matrix": {"a": [1]}}),
        ("matrix='{}' at_once=2", {"array": "0-9"}, {"array": "0-9"}),
        ("array=0-9%2", {"at_once": 3}, {"array": "0-9%2", "at_once": 3}),
        ("hold=true priority=-5", {"hold": False}, {"hold": False, "priority": "-5"}),
    ],
)
def test_the_request_beats_what_stands_against_it_in_the_script(
    script: str, request_fields: dict[str, object], meant: dict[str, object]
) -> None:
    assert together(script, request_fields) == meant


def test_code_that_is_sent_along_beats_the_folder_of_the_script() -> None:
    assert together("workdir=/data", {}, with_code=True) == {}
    assert together("workdir=/data", {}) == {"workdir": "/data"}


async def test_fields_of_one_request_that_exclude_each_other_are_refused(box: Box) -> None:
    answer = await box.http.post("/api/jobs", json={"command": "true", "gpus": 1, "gpu_mem": "1G"})
    assert answer.status_code == 400
    assert [error["field"] for error in answer.json()["errors"]] == ["gpu_mem"]


async def test_what_can_never_be_done_here_is_another_answer(box: Box) -> None:
    assert (await box.http.post("/api/jobs", json={"command": "true", "cpus": 60_000})).status_code == 422
    assert (await box.http.post("/api/jobs", json={"command": "true", "gpus": 1000})).status_code == 422


DEEP = b"[" * 10_000 + b"]" * 10_000


HOSTILE_JSON = [
    DEEP,
    b'{"command":' + DEEP + b"}",
    b'{"command":"true","gpus":' + b"9" * 5000 + b"}",
    b'{"command":"true","gpus":18446744073709551616}',
    b'{"command":"true","time_limit":1e999}',
    b'{"command":"true","time_limit":NaN}',
    b'{"command":"true","time_limit":-Infinity}',
    b'{"command":"\\ud800"}',
    b'{"\\udfff":1}',
    b'{"command":"a","command":"b"}',
    b'{"env":{"A":"1","A":"2"},"command":"true"}',
    b'{"command":"a\\u0000b"}',
    b'{"command":"\xff"}',
    b"\xef\xbb\xbf{}",
    b'{"command":"true",}',
    b"{",
    b"[]",
    b"null",
    b'"command"',
    b"1",
    b'{"command":true}',
    b'{"command":["true"]}',
    b'{"command":""}',
    b'{"script":"#!/bin/sh\\n#MLBOX =x\\n"}',
    b'{"command":"true","script":"#!/bin/sh\\ntrue"}',
    b'{"command":"true","code":"x"}',
    b'{"command":"true","name":"<script>alert(1)</script>"}',
    b'{"command":"true","name":"../../etc"}',
    b'{"command":"true","depends_on":[0]}',
    b'{"command":"true","depends_on":"afterok:1?afterok:2"}',
    b'{"command":"true","depends_on":' + DEEP[:31] + b"1" + DEEP[-31:] + b"}",
    b'{"command":"true","array":"0-999999999999"}',
    b'{"command":"true","array":"1-10:0"}',
    b'{"command":"true","array":"' + b"9" * 5000 + b'"}',
    b'{"command":"true","matrix":{"a":' + DEEP + b"}}",
    json.dumps({"command": "true", "matrix": '{"a":' + DEEP.decode() + "}"}).encode(),
    json.dumps({"command": "true", "matrix": "{" * 1_000_000}).encode(),
    json.dumps({"command": "true", "matrix": '{"a":["\\ud800"]}'}).encode(),
    json.dumps({"command": "true", "matrix": {f"v{number}": [1, 2] for number in range(64)}}).encode(),
    b'{"command":"true","notify":["a@b\\r\\nBcc: x"]}',
    b'{"command":"true","notify":' + b"[" + b'"a@b",' * 100_000 + b'"a@b"]}',
    b'{"command":"true","depends_on":' + b"[" + b"1," * 1_000_000 + b"1]}",
    b'{"command":"true","output":"%y"}',
    b'{"command":"true","signal":"USR1@' + b"9" * 5000 + b'","time_limit":"1h"}',
    b'{"command":"true","not_before":"' + b"9" * 5000 + b':00"}',
    json.dumps({"command": "true", **{f"field{number}": 1 for number in range(5000)}}).encode(),
]


async def test_hostile_json_is_malformed_and_nothing_worse(box: Box, subtests: pytest.Subtests) -> None:
    for body in HOSTILE_JSON:
        with subtests.test(body=body[:60]):
            answer = await box.http.post("/api/jobs", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, answer.text[:300]
            assert len(answer.content) < 20_000


HOSTILE_FORMS = [
    b"command=%zz%ff", b"command", b"command=a&command=b", b"&&&", b"command=\xff", b"a=1&" * 2000, b"=x",
    b"#!/bin/shecho", b"python train.py\n", b"code=x&command=true",
]  # fmt: skip
HOSTILE_QUERIES = ["?gpus=%ff", "?gpus", "?gpus=1&gpus=2", "?nonsense=1", "?code=x", "?=", "?gpus=1;drop"]


async def test_hostile_forms_and_queries_are_malformed_and_nothing_worse(box: Box, subtests: pytest.Subtests) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in HOSTILE_FORMS:
        with subtests.test(body=body[:60]):
            answer = await box.http.post("/api/jobs", content=body, headers=headers)
            assert answer.status_code == 400, answer.text
    for query in HOSTILE_QUERIES:
        with subtests.test(query=query):
            answer = await box.http.post(f"/api/jobs{query}", json={"command": "true"})
            assert answer.status_code == 400, answer.text


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}


HOSTILE_MULTIPART: list[tuple[dict[str, str], bytes]] = [
    ({"Content-Type": "multipart/form-data"}, b"--b--\r\n"),
    ({"Content-Type": "multipart/form-data; boundary=" + "x" * 5000}, b""),
    (BOUNDARY, b""),
    (BOUNDARY, b"nonsense"),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="command"\r\n\r\ntrue'),
    (BOUNDARY, b"--b\r\n\r\ntrue\r\n--b--\r\n"),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\ntrue\r\n--b--\r\n'),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="command"\r\n\r\n\xff\r\n--b--\r\n'),
    (BOUNDARY, b"--b\r\nContent-Disposition: " + b"x" * 100_000 + b"\r\n\r\ntrue\r\n--b--\r\n"),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="code"\r\n\r\ntext\r\n--b--\r\n'),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="code"; filename="a"\r\n\r\nnot an archive\r\n--b--\r\n'),
    (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="code"; filename="a"\r\n\r\n\r\n--b--\r\n'),
]


async def test_hostile_multipart_is_malformed_and_leaves_nothing(box: Box, subtests: pytest.Subtests) -> None:
    for headers, body in HOSTILE_MULTIPART:
        with subtests.test(body=body[:80]):
            answer = await box.http.post("/api/jobs", content=body, headers=headers)
            assert answer.status_code == 400, answer.text
            assert list(box.folders.incoming.iterdir()) == []


async def test_a_body_of_another_kind_is_told_so(box: Box) -> None:
    answer = await box.http.post("/api/jobs", content=b"\x89PNG", headers={"Content-Type": "image/png"})
    assert answer.status_code == 415


async def test_too_large_a_body_is_refused_before_and_while_it_comes(box: Box) -> None:
    big = b"x" * (9 << 20)
    announced = await box.http.post("/api/jobs", files={"code": ("a.zip", big)}, data={"command": "true"})
    assert announced.status_code == 413

    async def dripping(size: int, head: bytes) -> Any:
        yield head
        for _ in range(size >> 20):
            yield b"x" * (1 << 20)

    part = b'--b\r\nContent-Disposition: form-data; name="code"; filename="a"\r\n\r\nPK\x03\x04'
    chunked = await box.http.post("/api/jobs", content=dripping(9 << 20, part), headers=BOUNDARY)
    assert chunked.status_code == 413
    field = b'--b\r\nContent-Disposition: form-data; name="command"\r\n\r\n'
    assert (await box.http.post("/api/jobs", content=dripping(6 << 20, field), headers=BOUNDARY)).status_code == 413
    headers = {"Content-Type": "application/json"}
    assert (
        await box.http.post("/api/jobs", content=dripping(6 << 20, b'{"command":"'), headers=headers)
    ).status_code == 413
    assert list(box.folders.incoming.iterdir()) == []
    assert (await box.http.get("/healthz")).status_code == 200


async def test_an_upload_that_breaks_off_leaves_nothing(box: Box, tmp_path: Path) -> None:
    _, write = await asyncio.open_unix_connection(str(box.state / "mlbox.sock"))
    part = b'--b\r\nContent-Disposition: form-data; name="code"; filename="a"\r\n\r\nPK\x03\x04' + b"x" * 2_000_000
    head = b"POST /api/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    write.write(head + b"Content-Length: 5000000\r\n\r\n" + part)
    await write.drain()

    async def staged() -> bool:
        return any(box.folders.incoming.iterdir())

    async def gone() -> bool:
        return not any(box.folders.incoming.iterdir())

    await eventually("the upload has begun", staged)
    write.close()
    await eventually("nothing of it is left", gone)
    assert (await box.http.get("/api/jobs")).json()["jobs"] == []


async def test_an_archive_that_would_not_be_unpacked_is_refused_when_it_is_sent(box: Box) -> None:
    hostile = io.BytesIO()
    with tarfile.open(fileobj=hostile, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    answer = await box.http.post(
        "/api/jobs", data={"command": "true"}, files={"code": ("c.tar.gz", hostile.getvalue())}
    )
    assert answer.status_code == 400
    assert [error["field"] for error in answer.json()["errors"]] == ["code"]
    assert "../outside" in answer.json()["detail"]
