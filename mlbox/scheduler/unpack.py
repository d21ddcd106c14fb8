"""Unpacks what users upload, tar (plain, gzip, bzip2, xz) or zip, and trusts nothing in it.

Only plain files and folders come out, only below the target, no more and no larger than `Limits` says. Everything
is read as a stream: memory does not grow with the archive. Standard library only, because the shim loads this file
by itself, as the job's user.
"""

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, Protocol

_CHUNK = 1 << 16
_HEAD = 6
"""Bytes that tell every kind of archive but a plain tar; xz needs the most (the .xz file format, 2.1.1.1)."""


class BadArchive(ValueError):
    """The archive is damaged, of no known kind, or holds what may not be unpacked; the text says which and where."""


class Limits(NamedTuple):
    """How much an archive may hold. Folders that its names imply count as entries, too."""

    entries: int = 20_000
    total_bytes: int = 4 << 30
    ratio: int = 200
    """Bytes out for one byte in, judged after the first MiB. Code reaches 10, a log of one line 100."""
    depth: int = 32
    name_bytes: int = 255
    """NAME_MAX of every Linux file system."""
    path_bytes: int = 2048
    """Leaves room in PATH_MAX (4096) for where the job's folder is."""


DEFAULT_LIMITS = Limits()
_MEASURED_FROM = 1 << 20
_TAR_HEADER_BYTES = 1 << 20
"""What a tar entry's header may take with all extensions; the standard library holds it in memory."""
_ZIP_READ_BYTES = 4 << 20
"""What the standard library may read of a zip at once. The largest is the directory: 90,000 of the shortest names."""
_XZ_MEMORY_BYTES = 96 << 20
"""`xz -9` needs 65 MiB to decompress; a hostile file may ask for 4 GiB."""
_ZIP_FROM_UNIX = 3
_ZIP_HEADER_BYTES = 30
_ZIP_ENCRYPTED = 1
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
)
"""What the standard library raises for one archive or another that is no archive."""


class _Entry(NamedTuple):
    name: str
    folder: bool
    executable: bool
    chunks: Iterator[bytes]


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(archive: Path, target: Path, limits: Limits = DEFAULT_LIMITS) -> None:
    """Unpack `archive` so that `target` is there whole, or on any failure not at all.

    `target` must be missing or an empty folder, its parent must exist. Files are new, owned by this user, readable
    as the umask says, executable if they were; nothing else of their modes is kept. Raises BadArchive, OSError.
    """
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: unpack into a new folder")
    draft = target.with_name(f".{target.name}.unpacking")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        with archive.open("rb") as file:
            for entry in _entries(file, limits):
                _write(draft / entry.name, entry)
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check(archive: BinaryIO | Path, limits: Limits = DEFAULT_LIMITS) -> None:
    """Read `archive` to its end as `unpack` would, without writing. Raises BadArchive, OSError.

    A file is read from its beginning and left wherever that ends.
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            return check(file, limits)
    for entry in _entries(archive, limits):
        for _ in entry.chunks:
            pass
    return None


def _write(path: Path, entry: _Entry) -> None:
    # No link can be in the way: the draft is ours alone, and links are never unpacked.
    if entry.folder:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o777 if entry.executable else 0o666), "wb") as file:
        file.writelines(entry.chunks)


def _entries(file: BinaryIO, limits: Limits) -> Iterator[_Entry]:
    """Everything to unpack, under clean and unique names. Take an entry's chunks before the next entry."""
    names = _Names(limits)
    with _telling_damage():
        file.seek(0)
        head = file.read(_HEAD)
        file.seek(0)
        found = _zip(file, limits) if head.startswith(b"PK") else _tar(_opened(file, head), file, limits)
        for entry in found:
            name = names.add(entry.name, entry.folder)
            if name:
                yield entry._replace(name=name)
            for _ in entry.chunks:
                pass


class _Names:
    """The names seen so far in one archive, each a file or a folder."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries = 0
        self._folder: dict[str, bool] = {}

    def add(self, name: str, folder: bool) -> str:
        """The name without needless parts; empty for the archive's own top folder. Raises BadArchive."""
        limits = self._limits
        shown = repr(name if len(name) < 100 else name[:100] + "...")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        sizes = [len(os.fsencode(part)) for part in parts]
        if name.startswith("/") or "\0" in name or ".." in parts or not (parts or folder):
            raise BadArchive(f"{shown} is not a plain name below the archive's top: use relative names without '..'")
        if len(parts) > limits.depth:
            raise BadArchive(f"{shown} is {len(parts)} folders deep; {limits.depth} are allowed")
        if max(sizes, default=0) > limits.name_bytes or sum(sizes) + len(sizes) > limits.path_bytes:
            raise BadArchive(
                f"the name {shown} is too long: {limits.name_bytes} bytes are allowed for each of its parts, "
                f"{limits.path_bytes} for all"
            )
        for depth in range(1, len(parts)):
            if not self._folder.setdefault("/".join(parts[:depth]), True):
                raise BadArchive(f"{shown} is in the archive below a file of that name")
        path = "/".join(parts)
        if not (folder and self._folder.setdefault(path, True)):
            if path in self._folder:
                raise BadArchive(f"{shown} is in the archive twice")
            self._folder[path] = False
        self._entries += 1
        if max(self._entries, len(self._folder)) > limits.entries:
            raise BadArchive(f"more than {limits.entries} files and folders: leave data and environments out")
        return path


class _Meter:
    """Counts what comes out of an archive against what went in."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes = 0

    def add(self, count: int, compressed_bytes: int) -> None:
        """`count` more bytes came out, of `compressed_bytes` in all. Raises BadArchive."""
        self._bytes += count
        if self._bytes > self._limits.total_bytes:
            raise BadArchive(f"it unpacks to more than {self._limits.total_bytes} bytes")
        if self._bytes > max(_MEASURED_FROM, compressed_bytes * self._limits.ratio):
            raise BadArchive(
                f"it unpacks to more than {self._limits.ratio} times its size, as archives made to fill disks do"
            )


def _opened(file: BinaryIO, head: bytes) -> _Readable:
    """The plain tar stream in `file`."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if head.startswith(b"\xfd7zXZ\0"):
        return _Xz(file)
    return file


class _Xz:
    """What is in an .xz file, decompressed in bounded memory (lzma.LZMAFile has no bound)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)

    def read(self, size: int, /) -> bytes:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._next_stream()
                if not data:
                    return b""
            elif self._decoder.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("the compressed data ends too early")
            plain = self._decoder.decompress(data, size)
            if plain:
                return plain

    def _next_stream(self) -> bytes:
        """The first bytes of the next stream: a file may hold several, with zeros between (xz format, 2.2)."""
        data = self._decoder.unused_data.lstrip(b"\0")
        while not data:
            block = self._file.read(_CHUNK)
            if not block:
                return b""
            data = block.lstrip(b"\0")
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        return data


class _TarStream(io.BufferedIOBase):
    """A tar stream that is measured while the standard library reads it."""

    def __init__(self, stream: _Readable, file: BinaryIO, limits: Limits) -> None:
        self._stream = stream
        self._file = file
        self._meter = _Meter(limits)
        self.header_bytes_left = _TAR_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(_CHUNK if size is None or size < 0 else size)
        self._meter.add(len(data), self._file.tell())
        self.header_bytes_left -= len(data)
        if self.header_bytes_left < 0:
            raise BadArchive(f"a header is larger than {_TAR_HEADER_BYTES} bytes")
        return data


def _tar(stream: _Readable, file: BinaryIO, limits: Limits) -> Iterator[_Entry]:
    source = _TarStream(stream, file, limits)
    with tarfile.open(fileobj=source, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
        while True:
            source.header_bytes_left = _TAR_HEADER_BYTES
            info = tar.next()
            if info is None:
                break
            source.header_bytes_left = limits.total_bytes
            if info.issparse() or not (info.isreg() or info.isdir()):
                raise BadArchive(f"{info.name!r} is {_kind(info)}: only plain files and folders are unpacked")
            yield _Entry(info.name, info.isdir(), bool(info.mode & stat.S_IXUSR), _chunks(tar.extractfile(info)))
        while rest := tar.fileobj.read(_CHUNK):
            if rest.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
                raise BadArchive("the archive is damaged: there is something after its end")


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"a link to {info.linkname!r}"
    if info.isfifo():
        return "a named pipe"
    return "a device" if info.isdev() else "a sparse or special file"


def _zip(file: BinaryIO, limits: Limits) -> Iterator[_Entry]:
    meter = _Meter(limits)
    compressed_bytes = 0
    with zipfile.ZipFile(_BoundedReads(file)) as opened:
        infos = opened.infolist()
        if len(infos) > limits.entries:
            raise BadArchive(f"it holds {len(infos)} files and folders; {limits.entries} are allowed")
        _refuse_overlaps(infos, opened.start_dir)
        for info in infos:
            mode = info.external_attr >> 16 if info.create_system == _ZIP_FROM_UNIX else 0
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise BadArchive(f"{info.filename!r} is a link or a special file: only plain files are unpacked")
            if info.flag_bits & _ZIP_ENCRYPTED:
                raise BadArchive(f"{info.filename!r} is encrypted: make the zip without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadArchive(
                    f"{info.filename!r} is compressed in a rare way: use deflate, which every zip program has"
                )
            compressed_bytes += info.compress_size
            folder = info.is_dir() or stat.S_ISDIR(mode)
            with opened.open(info) as stream:
                chunks = _measured(_chunks(stream), meter, compressed_bytes)
                yield _Entry(info.orig_filename, folder, bool(mode & stat.S_IXUSR), chunks)


class _BoundedReads(io.BufferedIOBase):
    """A seekable file of which nobody reads much at once: zipfile reads a directory of any size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        unbounded = size is None or size < 0
        data = self._file.read(_ZIP_READ_BYTES + 1 if unbounded else min(size or 0, _ZIP_READ_BYTES + 1))
        if len(data) > _ZIP_READ_BYTES:
            raise BadArchive(f"its directory is larger than {_ZIP_READ_BYTES} bytes")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _refuse_overlaps(infos: list[zipfile.ZipInfo], directory: int) -> None:
    """Entries that share bytes make small zips unpack to anything (D. Fifield, A better zip bomb, 2019)."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise BadArchive(f"{info.filename!r} shares bytes with another entry")
        end = info.header_offset + _ZIP_HEADER_BYTES + info.compress_size
    if end > directory:
        raise BadArchive("the archive is damaged: its entries reach into its directory")


def _chunks(stream: IO[bytes] | None) -> Iterator[bytes]:
    with _telling_damage():
        while stream is not None and (data := stream.read(_CHUNK)):
            yield data


def _measured(chunks: Iterator[bytes], meter: _Meter, compressed_bytes: int) -> Iterator[bytes]:
    for chunk in chunks:
        meter.add(len(chunk), compressed_bytes)
        yield chunk


@contextmanager
def _telling_damage() -> Generator[None]:
    """Whatever the standard library says about a damaged archive, as BadArchive."""
    try:
        yield
    except BadArchive:
        raise
    except _DAMAGE as error:
        raise BadArchive(f"the archive is damaged, or neither tar nor zip: {error}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's trouble; gzip and bz2 raise OSError without a number for theirs
            raise
        raise BadArchive(f"the archive is damaged: {error}") from error
