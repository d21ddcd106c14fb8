"""Archives, honest and hostile: what is unpacked, what is refused, and that a failure leaves nothing."""

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlbox.scheduler.unpack import BadArchive, Limits, check, unpack

pytestmark = pytest.mark.slow

FILES = {"run.sh": b"#!/bin/sh\n", "src/a.py": b"print(1)\n" * 300, "src/deep/er/b": b"", "ä ö": bytes(range(256))}
SMALL = Limits(entries=10, total_bytes=3 << 20, ratio=20, depth=4, name_bytes=20, path_bytes=60)


def tar(*members: tarfile.TarInfo | str, content: bytes = b"", form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as opened:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(*members: zipfile.ZipInfo | str, content: bytes = b"", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for member in members:
            opened.writestr(member, content)
    return buffer.getvalue()


def unix_entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def tar_of_files() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mode = len(content), 0o4755 if name == "run.sh" else 0o600
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of_files() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in FILES.items():
            mode = 0o4755 if name == "run.sh" else 0o600
            opened.writestr(unix_entry(name, stat.S_IFREG | mode), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


FORMS: dict[str, Callable[[], bytes]] = {
    "tar": tar_of_files,
    "tar.gz": lambda: gzip.compress(tar_of_files()),
    "tar.bz2": lambda: bz2.compress(tar_of_files()),
    "tar.xz": lambda: lzma.compress(tar_of_files(), preset=9),
    "tar.xz of several streams": lambda: b"".join(
        lzma.compress(tar_of_files()[start : start + 4096]) + b"\0" * 8 for start in range(0, 20480, 4096)
    ),
    "zip": zip_of_files,
}


def save(folder: Path, data: bytes) -> Path:
    path = folder / "archive"
    path.write_bytes(data)
    return path


class TestHonestArchives:
    @pytest.mark.parametrize("form", FORMS)
    def test_files_come_out_as_they_went_in(self, tmp_path, form):
        archive = save(tmp_path, FORMS[form]())
        check(archive)
        check(io.BytesIO(archive.read_bytes()))
        unpack(archive, tmp_path / "out")
        out = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert {name: path.read_bytes() for name, path in out.items()} == FILES
        assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "out"]

    @pytest.mark.parametrize("form", ["tar", "zip"])
    def test_of_modes_only_execution_is_kept(self, tmp_path, form):
        before = os.umask(0o022)
        try:
            unpack(save(tmp_path, FORMS[form]()), tmp_path / "out")
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
        assert modes == {"run.sh": 0o755, "a.py": 0o644, "b": 0o644, "ä ö": 0o644}

    @pytest.mark.parametrize("data", [tar("d/", special("e", tarfile.DIRTYPE), "e/f"), zipped("d/", "e/", "e/f")])
    def test_folders_come_out_too(self, tmp_path, data):
        unpack(save(tmp_path, data), tmp_path / "out")
        assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == ["d", "e", "e/f"]

    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_every_tar_dialect_is_read(self, tmp_path, form):
        long = "/".join(["x" * 50] * 3)
        unpack(save(tmp_path, tar("a", long, content=b"c", form=form)), tmp_path / "out")
        assert (tmp_path / "out" / long).read_bytes() == b"c"

    def test_an_empty_archive_is_an_empty_folder(self, tmp_path):
        for number, data in enumerate((tar(), zipped())):
            unpack(save(tmp_path, data), tmp_path / f"out{number}")
            assert list((tmp_path / f"out{number}").iterdir()) == []

    def test_an_empty_folder_is_filled_and_a_full_one_refused(self, tmp_path):
        (tmp_path / "out").mkdir()
        archive = save(tmp_path, tar("a"))
        unpack(archive, tmp_path / "out")
        with pytest.raises(FileExistsError, match="not empty"):
            unpack(archive, tmp_path / "out")

    def test_what_a_killed_unpack_left_is_no_obstacle(self, tmp_path):
        (tmp_path / ".out.unpacking").mkdir()
        (tmp_path / ".out.unpacking" / "a").write_text("half")
        unpack(save(tmp_path, tar("a", content=b"whole")), tmp_path / "out")
        assert (tmp_path / "out" / "a").read_bytes() == b"whole"
        assert not (tmp_path / ".out.unpacking").exists()


def overlapping_zip() -> bytes:
    """Two directory entries for the same bytes."""
    data = bytearray(zipped("a", content=b"x" * 1000))
    end = data.rindex(b"PK\5\6")
    directory = data.index(b"PK\1\2")
    entry = data[directory:end]
    entries, size = struct.unpack_from("<HI", data, end + 10)
    struct.pack_into("<HHI", data, end + 8, entries + 1, entries + 1, size * 2)
    return bytes(data[:end] + entry + data[end:])


def encrypted_zip() -> bytes:
    data = bytearray(zipped("a", content=b"x"))
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def huge_pax_header() -> bytes:
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * (8 << 20)}
    return tar(info)


def xz_with_huge_window() -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 512 << 20}]
    return lzma.compress(tar("a"), filters=filters)


def negative_size() -> bytes:
    data = bytearray(tar("a", "b", content=b"x" * 600, form=tarfile.GNU_FORMAT))
    data[124:136] = b"\xff" * 11 + b"\x00"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute": (tar("/etc/passwd"), "'/etc/passwd' is not a plain name"),
    "absolute in a zip": (zipped("/etc/passwd"), "not a plain name"),
    "upwards": (tar("../x"), "not a plain name"),
    "upwards inside": (tar("a/../../x"), "not a plain name"),
    "upwards in a zip": (zipped("a/../../x"), "not a plain name"),
    "nul in a zip": (zipped("a").replace(b"a", b"\0"), "damaged|not a plain name"),
    "a file without a name": (tar("."), "not a plain name"),
    "symbolic link": (tar(special("a", tarfile.SYMTYPE, "/etc")), "'a' is a link to '/etc'"),
    "hard link": (tar(special("a", tarfile.LNKTYPE, "../b")), "'a' is a link"),
    "named pipe": (tar(special("a", tarfile.FIFOTYPE)), "named pipe"),
    "device": (tar(special("a", tarfile.CHRTYPE)), "device"),
    "block device": (tar(special("a", tarfile.BLKTYPE)), "device"),
    "link in a zip": (zipped(unix_entry("a", stat.S_IFLNK | 0o777)), "link or a special file"),
    "pipe in a zip": (zipped(unix_entry("a", stat.S_IFIFO | 0o777)), "link or a special file"),
    "through a file": (tar("a", "a/b"), "below a file"),
    "a file and a folder": (tar("a/b", "a"), "twice"),
    "twice": (tar("a", "./a"), "twice"),
    "twice in a zip": (zipped("a", "b").replace(b"b", b"a"), "twice"),
    "long name": (tar("x" * 21), "too long"),
    "long path": (tar("/".join(["x" * 19] * 4)), "too long"),
    "deep": (tar("/".join("abcde")), "5 folders deep; 4 are allowed"),
    "many": (tar(*(f"f{n}" for n in range(11))), "more than 10"),
    "many in a zip": (zipped(*(f"f{n}" for n in range(11))), "11 files"),
    "many folders that names imply": (tar(*(f"{n}/a/b" for n in range(4))), "more than 10"),
    "large": (tar("a", "b", content=b"x" * (2 << 20)), "more than 3145728 bytes"),
    "large in a zip": (zipped("a", "b", content=random.randbytes(2 << 20)), "more than 3145728 bytes"),
    "gzip bomb": (gzip.compress(tar("a", content=bytes(2 << 20))), "more than 20 times its size"),
    "bzip2 bomb": (bz2.compress(tar("a", content=bytes(2 << 20))), "more than 20 times its size"),
    "xz bomb": (lzma.compress(tar("a", content=bytes(2 << 20))), "more than 20 times its size"),
    "zip bomb": (zipped("a", content=bytes(2 << 20)), "more than 20 times its size"),
    "bomb behind the end": (gzip.compress(tar("a") + bytes(2 << 20)), "more than 20 times its size"),
    "overlapping zip": (overlapping_zip(), "shares bytes|[Oo]verlap"),
    "encrypted zip": (encrypted_zip(), "encrypted"),
    "zip with a rare method": (zipped("a", content=b"x", method=zipfile.ZIP_LZMA), "rare way"),
    "header of megabytes": (huge_pax_header(), "header is larger"),
    "window of half a GiB": (xz_with_huge_window(), "damaged"),
    "negative size": (negative_size(), "damaged"),
    "empty": (b"", "damaged"),
    "text": (b"#!/bin/sh\necho hello\n" * 100, "damaged"),
    "truncated tar": (tar("a", content=b"x" * 5000)[:3000], "damaged"),
    "truncated gzip": (gzip.compress(tar("a", content=random.randbytes(5000)))[:3000], "damaged"),
    "truncated xz": (lzma.compress(tar("a", content=random.randbytes(5000)))[:3000], "damaged"),
    "truncated zip": (zipped("a", content=random.randbytes(5000))[:3000], "damaged"),
    "wrong checksum in a zip": (
        zipped("a", content=b"abc", method=zipfile.ZIP_STORED).replace(b"abc", b"abd"),
        "damaged",
    ),
    "header damaged midway": (tar("a") + b"x" * 512 + tar("b"), "damaged"),
}


class TestHostileArchives:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_it_is_refused_and_leaves_nothing(self, tmp_path, kind):
        data, words = HOSTILE[kind]
        archive = save(tmp_path, data)
        with pytest.raises(BadArchive, match=words):
            check(archive, SMALL)
        with pytest.raises(BadArchive, match=words):
            unpack(archive, tmp_path / "out", SMALL)
        assert [path.name for path in tmp_path.iterdir()] == ["archive"]

    def test_a_zip_directory_of_megabytes_does_not_fill_memory(self, tmp_path):
        archive = save(tmp_path, zipped(*(f"{n:04}-{'x' * 1000}" for n in range(5000))))
        tracemalloc.start()
        try:
            with pytest.raises(BadArchive, match="directory is larger"):
                check(archive)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()

    def test_memory_stays_flat(self, tmp_path):
        archive = save(tmp_path, gzip.compress(tar("a", content=random.randbytes(32 << 20)), 1))
        tracemalloc.start()
        try:
            check(archive)
            unpack(archive, tmp_path / "out")
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    def test_a_disk_error_is_no_fault_of_the_archive(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            unpack(save(tmp_path, tar("a")), tmp_path / "no" / "where")

    @given(data=st.data(), form=st.sampled_from(sorted(FORMS)))
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_damage_is_always_told_as_such(self, tmp_path, data, form):
        archive = bytearray(FORMS[form]())
        for _ in range(data.draw(st.integers(1, 8))):
            archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del archive[data.draw(st.integers(0, len(archive) - 1)) :]
        self.refused_or_unpacked_below(tmp_path, bytes(archive))

    @given(
        name=st.text(st.sampled_from("ab./\\\0\n*~ä\udcff"), max_size=12),
        kind=st.sampled_from(
            [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE]
        ),
    )
    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example(name="a/..", kind=tarfile.DIRTYPE)
    def test_no_name_leads_outside(self, tmp_path, name, kind):
        self.refused_or_unpacked_below(tmp_path, tar(special(name, kind, "/etc"), form=tarfile.GNU_FORMAT))

    @given(data=st.binary(max_size=2000))
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @example(data=b"PK\5\6" + bytes(18))
    @example(data=zlib.compress(b"x"))
    def test_noise_is_refused(self, tmp_path, data):
        self.refused_or_unpacked_below(tmp_path, data)

    def refused_or_unpacked_below(self, folder: Path, data: bytes) -> None:
        archive, out = save(folder, data), folder / "out"
        try:
            unpack(archive, out)
        except BadArchive:
            with pytest.raises(BadArchive):
                check(archive)
            assert not out.exists()
        else:
            check(archive)
            for path in sorted(out.rglob("*"), reverse=True):
                assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR)
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
        assert [path.name for path in folder.iterdir()] == ["archive"]
