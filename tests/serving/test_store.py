"""The private copy: what is taken into it, what is never, and what happens while somebody writes."""

import hashlib
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlbox.errors import Invalid, Unavailable
from mlbox.serving.server.files import fingerprint, read_config
from mlbox.serving.server.store import Entry, Store, Unsettled


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write(tmp_path / "models", {"model.onnx": b"weights", "data/w.bin": b"more", ".hidden": b"half"})
    return tmp_path / "models"


def write(models: Path, files: dict[str, bytes], number: int = 1) -> None:
    for name, content in files.items():
        path = models / "m" / str(number) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def take(store: Store, models: Path, number: int = 1) -> Entry:
    return store.take(models, "m", number, fingerprint(models, "m", number))


def holds(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTaking:
    def test_visible_files_are_copied_read_only(self, tmp_path: Path, models: Path) -> None:
        entry = take(Store(tmp_path / "store"), models)
        assert holds(entry.path) == {"model.onnx": b"weights", "data/w.bin": b"more"}
        assert entry.path.name == entry.digest
        assert {path.stat().st_mode & 0o777 for path in entry.path.rglob("*")} == {0o400, 0o500}
        assert entry.path.stat().st_mode & 0o777 == 0o500

    def test_the_copy_stays_what_it_was(self, tmp_path: Path, models: Path) -> None:
        entry = take(Store(tmp_path / "store"), models)
        with (models / "m/1/model.onnx").open("r+b") as file:
            file.write(b"WEIGHTS")
        os.truncate(models / "m/1/data/w.bin", 0)
        assert holds(entry.path) == {"model.onnx": b"weights", "data/w.bin": b"more"}

    def test_the_same_content_is_kept_once_and_until_the_last_release(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        write(models, {"model.onnx": b"weights", "data/w.bin": b"more"}, number=2)
        first, second = take(store, models), take(store, models, 2)
        assert first == second
        store.release(first)
        assert holds(second.path)
        store.release(second)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]

    def test_names_count_as_content(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        write(models, {"model.onnx": b"weights", "data/v.bin": b"more"}, number=2)
        assert take(store, models).digest != take(store, models, 2).digest

    def test_what_an_earlier_process_left_is_removed(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        left = take(store, models)
        os.close(store._lock)  # as the kernel does when a process is killed
        (tmp_path / "store" / ".tmp-half").mkdir()
        fresh = Store(tmp_path / "store")
        assert not left.path.exists()
        assert take(fresh, models) == left

    def test_two_servers_do_not_share_a_store(self, tmp_path: Path) -> None:
        keep = Store(tmp_path / "store")
        with pytest.raises(Unavailable, match="another inference server"):
            Store(tmp_path / "store")
        assert keep

    def test_many_threads_take_and_release(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        write(models, {"model.onnx": b"weights", "data/w.bin": b"more"}, number=2)
        problems: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(40):
                    entry = take(store, models, number)
                    assert (entry.path / "model.onnx").read_bytes() == b"weights"
                    store.release(entry)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(1 + n % 2,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not problems
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


class TestWhileSomebodyWrites:
    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: (folder / "model.onnx").write_bytes(b"WEIGHTS"),
            lambda folder: (folder / "model.onnx").touch(),
            lambda folder: (folder / "new").write_bytes(b""),
            lambda folder: (folder / ".rsync-temp").write_bytes(b"x"),
            lambda folder: (folder / "data/w.bin").unlink(),
            lambda folder: (folder / "data/w.bin").rename(folder / "data/v.bin"),
            lambda folder: (folder.parent / "config.pbtxt").write_text("max_batch_size: 0"),
        ],
        ids=["overwritten", "touched", "added", "hidden", "removed", "renamed", "config"],
    )
    def test_any_change_since_the_look_is_noticed(
        self, tmp_path: Path, models: Path, change: Callable[[Path], None]
    ) -> None:
        store = Store(tmp_path / "store")
        seen = fingerprint(models, "m", 1)
        change(models / "m/1")
        with pytest.raises(Unsettled):
            store.take(models, "m", 1, seen)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]

    def test_a_file_that_is_still_open_for_writing_is_not_taken(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        with (models / "m/1/data/w.bin").open("ab"), pytest.raises(Unsettled, match=r"data/w.bin is still open"):
            take(store, models)
        assert holds(take(store, models).path)

    def test_a_file_that_is_open_for_reading_is_taken(self, tmp_path: Path, models: Path) -> None:
        with (models / "m/1/model.onnx").open("rb"):
            assert holds(take(Store(tmp_path / "store"), models).path)

    def test_a_folder_that_vanishes_is_not_an_error_of_the_model(self, tmp_path: Path, models: Path) -> None:
        seen = fingerprint(models, "m", 1)
        (models / "m").rename(models / "gone")
        with pytest.raises(Unsettled):
            Store(tmp_path / "store").take(models, "m", 1, seen)

    def test_a_full_disk_is_not_an_error_of_the_model(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        (models / "m/1/model.onnx").write_bytes(bytes(100_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))  # fails as a full disk does, in the middle
        try:
            with pytest.raises(Unsettled, match="could not be copied"):
                take(store, models)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


class TestWhatIsNeverTaken:
    @pytest.mark.parametrize(
        ("plant", "why"),
        [
            (lambda v, out: (v / "w").symlink_to(out), "w is a symbolic link"),
            (lambda v, out: (v / "w").hardlink_to(out), r"w has 2 names \(hard links\)"),
            (lambda v, out: os.mkfifo(v / "w"), "not a regular file"),
            (lambda v, out: (v / "d").symlink_to(out.parent), "symbolic link"),
            (lambda v, out: (v / "a/b/c/d/e/f").mkdir(parents=True), "nested deeper"),
        ],
        ids=["symlink", "hard link", "fifo", "linked folder", "deep folders"],
    )
    def test_links_devices_and_depths(
        self, tmp_path: Path, models: Path, plant: Callable[[Path, Path], None], why: str
    ) -> None:
        secret = tmp_path / "secret" / "file"
        secret.parent.mkdir()
        secret.write_bytes(b"secret")
        plant(models / "m/1", secret)
        store = Store(tmp_path / "store")
        with pytest.raises(Invalid, match=why):
            take(store, models)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]

    def test_a_version_or_model_that_is_a_link(self, tmp_path: Path, models: Path) -> None:
        (models / "m/2").symlink_to(models / "m/1")
        with pytest.raises(Invalid, match="symbolic link"):
            take(Store(tmp_path / "store"), models, 2)
        (models / "n").symlink_to(models / "m")
        with pytest.raises(Invalid, match="symbolic link"):
            fingerprint(models, "n", 1)

    def test_a_config_that_is_a_link_huge_or_no_file(self, models: Path) -> None:
        (models / "m/config.pbtxt").symlink_to(models / "m/1/model.onnx")
        with pytest.raises(Invalid, match="symbolic link"):
            read_config(models, "m")
        (models / "m/config.pbtxt").unlink()
        (models / "m/config.pbtxt").write_bytes(b"#" * (1 << 20))
        with pytest.raises(Invalid, match="larger than"):
            read_config(models, "m")
        (models / "m/config.pbtxt").unlink()
        os.mkfifo(models / "m/config.pbtxt")
        with pytest.raises(Invalid, match="not a regular file"):
            read_config(models, "m")
        (models / "m/config.pbtxt").unlink()
        (models / "m/config.pbtxt").write_bytes(b"\xff")
        with pytest.raises(Invalid, match="UTF-8"):
            read_config(models, "m")


class TestSums:
    def sums(self, models: Path, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        (models / "m/1/SHA256SUMS").write_text(f"{digest}  model.onnx\n{'0' * 64} *./SHA256SUMS\n")

    def test_files_that_match_are_taken(self, tmp_path: Path, models: Path) -> None:
        self.sums(models, b"weights")
        assert take(Store(tmp_path / "store"), models)

    def test_a_file_that_is_half_another_is_refused(self, tmp_path: Path, models: Path) -> None:
        self.sums(models, b"weights and more")
        with pytest.raises(Invalid, match=r"model\.onnx is not what SHA256SUMS says"):
            take(Store(tmp_path / "store"), models)

    @pytest.mark.parametrize("line", ["garbage", "0" * 64 + "  missing.bin", "0" * 64 + "  ../../x"])
    def test_sums_of_what_is_not_here_are_refused(self, tmp_path: Path, models: Path, line: str) -> None:
        (models / "m/1/SHA256SUMS").write_text(line)
        with pytest.raises(Invalid, match="SHA256SUMS names what is not here"):
            take(Store(tmp_path / "store"), models)


class TestLoadsThatEndTheProcess:
    def test_content_that_does_it_again_and_again_is_refused_once(self, tmp_path: Path, models: Path) -> None:
        never_left = []
        for _ in range(3):
            store = Store(tmp_path / "store")
            never_left.append(store.loading(take(store, models)))
            never_left[-1].__enter__()
            os.close(store._lock)  # as the kernel does when a process ends
        store = Store(tmp_path / "store")
        entry = take(store, models)
        with pytest.raises(Invalid, match="ended 3 times"), store.loading(entry):
            pass
        with store.loading(entry):
            pass  # asked for again: it gets its chance

    def test_a_load_that_ends_well_or_badly_leaves_no_mark(self, tmp_path: Path, models: Path) -> None:
        store = Store(tmp_path / "store")
        entry = take(store, models)
        for _ in range(5):
            with store.loading(entry):
                pass
            with pytest.raises(ValueError, match="bad"), store.loading(entry):
                raise ValueError("bad")
