"""The model folder's layout: names, numbers, and what is passed over."""

from pathlib import Path

import pytest

from mlbox.errors import Invalid
from mlbox.serving import repository


@pytest.mark.parametrize("name", ["a", "digits", "A.b-c_9", "-x", "x" * 64, "1"])
def test_names_that_are_models(name: str) -> None:
    assert repository.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a b", "a/b", "a@b", "x" * 65, "é", "a\n", "stats", "a\0", "../x"]
)
def test_names_that_cannot_be_models(name: str) -> None:
    with pytest.raises(Invalid, match="no model can be called"):
        repository.check_name(name)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), ("2147483647", 2**31 - 1), ("2147483648", None), ("0", None), ("01", None), ("-1", None),
        ("1.0", None), ("v1", None), ("", None), ("١", None), ("1\n", None), ("9" * 40, None),
    ],
)  # fmt: skip
def test_version_numbers(text: str, number: int | None) -> None:
    assert repository.version_number(text) == number


def test_what_a_folder_holds(tmp_path: Path) -> None:
    for path in ("m/1", "m/3", "m/003", "m/.4", "m/notes", "empty", "bad name/1", ".hidden/1", "stats/1"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "m" / "5").write_text("a file")
    (tmp_path / "m" / "7").symlink_to(tmp_path / "m" / "1")
    (tmp_path / "README").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    found = repository.scan(tmp_path)
    assert found.models == {"m": {1, 3, 7}, "empty": set()}
    assert found.ignored.keys() == {"bad name", "link", "stats"}
    assert "symbolic link" in found.ignored["link"]
    assert repository.next_version(tmp_path / "m") == 8


def test_a_missing_folder_has_no_versions(tmp_path: Path) -> None:
    assert repository.version_numbers(tmp_path / "none") == frozenset()
    assert repository.next_version(tmp_path / "none") == 1
    with pytest.raises(FileNotFoundError):
        repository.scan(tmp_path / "none")
