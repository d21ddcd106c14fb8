import os
from pathlib import Path

import httpx
import pytest

from mlbox.errors import Conflict, Invalid, MlboxError, NotFound
from mlbox.web import artifacts
from tests.web.harness import Box, eventually

BAD_PATHS = [
    "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a/", ".", "./a", "a/.", "a/..", "\0", "a\0b", "x" * 256,
    "a/" * 40 + "b", "",
]  # fmt: skip
SPELLINGS = [
    "../attempt-1/launch.json", "%2e%2e/attempt-1/launch.json", "%2e%2e%2fattempt-1%2flaunch.json", "..%5cx",
    "%252e%252e/attempt-1/launch.json", "a%00b", "/etc/passwd", "%2fetc%2fpasswd", "....//x", "%c0%ae%c0%ae/x", "%ff",
]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "plots").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "plots" / "loss.csv").write_text("1,2\n")
    (tmp_path / "secret").write_text("not the job's")
    return folder


def read(out: Path, path: str) -> bytes:
    fd, size = artifacts.open_file(out, path)
    with os.fdopen(fd, "rb") as file:
        content = file.read()
    assert len(content) == size
    return content


def test_plain_files_are_listed_and_read(out: Path) -> None:
    assert [(file.path, file.size) for file in artifacts.listing(out)] == [("model.onnx", 7), ("plots/loss.csv", 4)]
    assert read(out, "plots/loss.csv") == b"1,2\n"
    assert artifacts.listing(out / "nothing") == []


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_could_lead_elsewhere_is_refused(out: Path, path: str) -> None:
    with pytest.raises(Invalid):
        artifacts.open_file(out, path)
    upload = out.parent / "upload"
    upload.write_bytes(b"x")
    with pytest.raises(Invalid):
        artifacts.store(out, path, upload)


def test_links_and_what_is_no_file_are_not_there(out: Path) -> None:
    (out / "link").symlink_to(out.parent / "secret")
    (out / "folder-link").symlink_to(out.parent)
    os.mkfifo(out / "fifo")
    (out / "loop").symlink_to("loop")
    for path in ("link", "folder-link/secret", "fifo", "loop", "plots", "model.onnx/x", "nothing", "nothing/x"):
        with pytest.raises(NotFound):
            artifacts.open_file(out, path)
    assert [file.path for file in artifacts.listing(out)] == ["model.onnx", "plots/loss.csv"]


@pytest.mark.parametrize("kind", ["link", "loop", "file", "fifo"])
def test_what_is_in_place_of_the_folder_holds_no_artifacts(out: Path, kind: str) -> None:
    place = out.parent / "other"
    if kind in ("link", "loop"):
        place.symlink_to(out if kind == "link" else place)
    elif kind == "file":
        place.write_text("no folder")
    else:
        os.mkfifo(place)
    assert artifacts.listing(place) == []
    with pytest.raises(NotFound):
        artifacts.open_file(place, "model.onnx")
    upload = out.parent / "upload"
    upload.write_bytes(b"x")
    with pytest.raises(Conflict):
        artifacts.store(place, "model.onnx", upload)
    assert read(out, "model.onnx") == b"weights"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_owner_is_not_the_jobs(out: Path) -> None:
    os.link(out.parent / "secret", out / "hard")
    os.chown(out.parent / "secret", 65534, 65534)
    with pytest.raises(NotFound):
        artifacts.open_file(out, "hard")
    assert "hard" not in [file.path for file in artifacts.listing(out)]


def test_a_stored_file_never_lands_outside(out: Path) -> None:
    (out / "away").symlink_to(out.parent)
    upload = out.parent / "upload"
    for path in ("away/x", "model.onnx/x", "plots"):
        upload.write_bytes(b"x")
        with pytest.raises(MlboxError):
            artifacts.store(out, path, upload)
    upload.write_bytes(b"new")
    artifacts.store(out, "deep/er/file", upload)
    assert read(out, "deep/er/file") == b"new"
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "secret"]


async def test_artifacts_are_downloads_and_never_pages(box: Box) -> None:
    job = await box.submit(
        "printf '<script>alert(1)</script>' > $MLBOX_OUT/a.html; mkdir $MLBOX_OUT/ä; echo 1 > \"$MLBOX_OUT/ä/b c\""
    )
    await box.wait(job["id"])
    base = f"/api/jobs/{job['id']}/artifacts"
    assert [file["path"] for file in (await box.http.get(base)).json()["artifacts"]] == ["a.html", "ä/b c"]
    page = await box.http.get(f"{base}/a.html")
    assert page.content == b"<script>alert(1)</script>"
    assert page.headers["content-type"] == "application/octet-stream"
    assert page.headers["content-disposition"].startswith("attachment")
    assert page.headers["content-security-policy"].startswith("sandbox")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cross-origin-resource-policy"] == "same-origin"
    assert (await box.http.get(f"{base}/ä/b c")).text == "1\n"
    part = await box.http.get(f"{base}/a.html", headers={"Range": "bytes=1-6"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"script", "bytes 1-6/25")
    assert (await box.http.get(f"{base}/a.html", headers={"Range": "bytes=99-"})).status_code == 416
    head = await box.http.head(f"{base}/a.html")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "25", b"")
    assert (await box.http.get(f"{base}/none")).status_code == 404
    assert (await box.http.put(f"{base}/x", content=b"x")).status_code == 403


@pytest.mark.parametrize("way", ["ln -s /etc $MLBOX_OUT", "touch $MLBOX_OUT", "mkfifo $MLBOX_OUT"])
async def test_a_job_that_replaces_its_folder_has_no_artifacts(box: Box, way: str) -> None:
    job = await box.submit(f"rm -rf $MLBOX_OUT; {way}; echo $MLBOX_TOKEN; while [ ! -e go ]; do sleep 0.02; done")
    base = f"/api/jobs/{job['id']}/artifacts"

    async def token() -> str:
        return (await box.http.get(f"/api/jobs/{job['id']}/log")).text.strip()

    headers = {"Authorization": f"Bearer {await eventually('the job has its token', token)}"}
    stored = await box.http.put(f"{base}/x", content=b"x", headers=headers)
    assert stored.status_code == 409, stored.text
    listed = await box.http.get(base)
    assert (listed.status_code, listed.json()["artifacts"]) == (200, [])
    for name in ("x", "hostname"):
        assert (await box.http.get(f"{base}/{name}")).status_code == 404
    assert (await box.tcp.get(f"/jobs/{job['id']}", headers={"Cookie": await box.cookie()})).status_code == 200
    assert (await box.http.post(f"/api/jobs/{job['id']}/cancel")).status_code < 300
    await box.wait(job["id"])


async def test_no_spelling_of_an_address_leads_out_of_the_artifacts(box: Box) -> None:
    job = await box.submit()
    await box.wait(job["id"])
    for spelling in SPELLINGS:
        url = httpx.URL("http://mlbox").copy_with(raw_path=f"/api/jobs/{job['id']}/artifacts/{spelling}".encode())
        answer = await box.http.get(url)
        assert answer.status_code in (400, 404), (spelling, answer.status_code)
