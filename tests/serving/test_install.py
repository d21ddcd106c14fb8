"""What counts as an installed version when its folder holds something else."""

import hashlib
import os
from pathlib import Path

import pytest

from mlbox.serving.install import installed
from mlbox.serving.repository import MODEL_FILE


def test_the_digest_of_an_installed_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / MODEL_FILE).write_bytes(b"weights")
    assert installed(tmp_path, "m", 1) == hashlib.sha256(b"weights").hexdigest()
    assert installed(tmp_path, "m", 2) is None


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_not_installed_and_holds_nobody(tmp_path: Path, kind: str) -> None:
    model = tmp_path / "m" / "1" / MODEL_FILE
    model.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(model)
    elif kind == "link":
        model.symlink_to("/etc/passwd")
    else:
        model.mkdir()
    assert installed(tmp_path, "m", 1) is None
