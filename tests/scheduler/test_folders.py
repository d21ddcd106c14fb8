"""Files of jobs: what was acknowledged lies there for good, what was not is forgotten, and all of it can be removed."""

import os
from pathlib import Path

import pytest

from mlbox.errors import Conflict
from mlbox.jobs import Job, JobSpec, JobState
from mlbox.scheduler.folders import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(tmp_path / "state")
    made.prepare()
    return made


def job(number: int, code: str | None = "tar.gz") -> Job:
    spec = JobSpec(command="x", name="n", code=code)
    return Job(id=number, spec=spec, user="ann", uid=1000, state=JobState.QUEUED, submitted_at=0.0)


def upload(folders: Folders, content: bytes = b"archive") -> Path:
    path = folders.incoming / "upload-1"
    path.write_bytes(content)
    return path


def test_uploads_that_an_earlier_daemon_did_not_finish_are_forgotten(folders: Folders) -> None:
    upload(folders)
    (folders.incoming / "folder").mkdir()
    (folders.incoming / "folder" / "file").touch()
    (folders.incoming / "link").symlink_to(folders.state)
    folders.prepare()
    assert list(folders.incoming.iterdir()) == []
    assert folders.state.is_dir()


def test_only_the_owner_may_look_into_the_folders(folders: Folders) -> None:
    for folder in (folders.state, folders.jobs, folders.incoming):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_code_is_kept_where_the_job_looks_for_it(folders: Folders) -> None:
    folders.job(12).mkdir()
    (folders.job(12) / "left from a submit that was never acknowledged").touch()
    staged = upload(folders)
    folders.keep_code(12, "tar.gz", staged)
    found = folders.code(job(12))
    assert found is not None
    assert found.read_bytes() == b"archive"
    assert list(folders.job(12).iterdir()) == [found]
    assert not staged.exists()
    assert folders.code(job(12, code=None)) is None


def test_a_retry_has_the_code_of_the_first_submit_also_when_that_is_removed(folders: Folders) -> None:
    folders.keep_code(12, "tar.gz", upload(folders))
    copy = folders.copy_code(job(12))
    assert copy is not None
    assert copy.parent == folders.incoming
    folders.keep_code(13, "tar.gz", copy)
    folders.remove(12)
    found = folders.code(job(13))
    assert found is not None
    assert found.read_bytes() == b"archive"
    assert folders.copy_code(job(14, code=None)) is None
    with pytest.raises(FileNotFoundError):
        folders.copy_code(job(12))


def test_folders_of_ids_that_never_became_a_job_are_forgotten(folders: Folders) -> None:
    for name in ("1", "7", "8", "900", "notes", "x8"):
        (folders.jobs / name).mkdir()
    folders.forget_unknown(7)
    assert {path.name for path in folders.jobs.iterdir()} == {"1", "7", "notes", "x8"}


def test_removing_a_job_removes_all_it_left_and_nothing_else(folders: Folders, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").touch()
    work = folders.attempt(12, 1) / "work"
    work.mkdir(parents=True)
    (work / "link").symlink_to(outside)
    (work / "dangling").symlink_to("nowhere")
    os.mkfifo(work / "pipe")
    folders.out(13).mkdir(parents=True)
    folders.remove(12)
    folders.remove(12)
    assert not folders.job(12).exists()
    assert folders.job(13).exists()
    assert (outside / "file").exists()
    assert outside.stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() == 0, reason="root is never refused")
def test_what_a_job_made_read_only_is_removed_too(folders: Folders) -> None:
    cache = folders.attempt(12, 1) / "work" / "cache" / "module"
    cache.mkdir(parents=True)
    (cache / "file").touch()
    for folder in (cache, cache.parent):
        folder.chmod(0o500)
    hidden = folders.attempt(12, 1) / "hidden"
    hidden.mkdir()
    (hidden / "file").touch()
    hidden.chmod(0)
    folders.remove(12)
    assert not folders.job(12).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root is never refused")
def test_what_somebody_else_owns_is_named(folders: Folders) -> None:
    folders.out(12).mkdir(parents=True)
    folders.jobs.chmod(0o500)
    try:
        with pytest.raises(Conflict, match=r"job 12 left files that mlbox may not remove .*12.*by hand"):
            folders.remove(12)
    finally:
        folders.jobs.chmod(0o700)
