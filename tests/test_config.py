"""The configuration: what is written is what counts, and a mistake is named with its line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.config import BadConfig, Config, host_port, load, size_bytes

SAMPLE = """
# mlbox on the lab's box
state = "/var/lib/mlbox"

[server]
listen = "0.0.0.0:8470"
hosts = ["gpu.lab.example"]
header_timeout_s = 5

[scheduler]
cpu_slots = 4
repair_s = 2.5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mlbox.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(BadConfig) as error:
        load(write(folder, text), overrides)
    assert str(error.value).isprintable()
    return str(error.value).replace(str(folder) + "/", "")


def test_what_is_written_counts_and_the_rest_has_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, SAMPLE))
    assert config.state_folder == Path("/var/lib/mlbox")
    assert config.server.listen == "0.0.0.0:8470"
    assert config.server.hosts == ("gpu.lab.example",)
    assert (config.server.header_timeout_s, type(config.server.header_timeout_s)) == (5.0, float)
    assert (config.scheduler.cpu_slots, config.scheduler.repair_s) == (4, 2.5)
    assert config.jobs == Config().jobs
    assert config.socket_path == Path("/var/lib/mlbox/mlbox.sock")
    assert config.models_folder == Path("/var/lib/mlbox/models")


def test_without_a_file_there_are_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load(None) == Config()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert load(None).state_folder == tmp_path / "mlbox"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(None).state_folder == tmp_path / ".local/state/mlbox"
    written = load(None, ["state=~/here", "server.socket=~/s", "serving.models=~/m"])
    assert written.state_folder == tmp_path / "here"
    assert (written.socket_path, written.models_folder) == (tmp_path / "s", tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[serverr]\n", "mlbox.toml:1: 'serverr' is an unknown key; did you mean 'server'?"),
        ("# a\n\n[server]\nlissen = 1\n", "mlbox.toml:4: 'server.lissen' is an unknown key; did you mean 'listen'?"),
        ("server.lissen = 1\n", "mlbox.toml:1: 'server.lissen' is an unknown key; did you mean 'listen'?"),
        ("\nserver = {lissen = 1}\n", "mlbox.toml:2: 'server.lissen' is an unknown key; did you mean 'listen'?"),
        ("[jobs]\nxyz = 1\n", "mlbox.toml:2: 'jobs.xyz' is an unknown key; known here: log_head, log_max"),
        ("[jobs]\n'a\\b' = 1\n", "is an unknown key"),
        ("server = 5\n", "mlbox.toml:1: 'server' is a section: write [server]"),
        ("[[server]]\n", "'server' is a section: write [server]"),
        ("[server.listen]\na = 1", "mlbox.toml:1: 'server.listen' wants a string"),
        ("[server]\nlisten = 8470", "mlbox.toml:2: 'server.listen' wants a string, got 8470"),
        ("[server]\nhosts = 'a'", "mlbox.toml:2: 'server.hosts' wants a list of strings, got 'a'"),
        ("[server]\nhosts = ['a', 1]", "wants a list of strings, got ['a', 1]"),
        ("[scheduler]\ncpu_slots = 1.5", "mlbox.toml:2: 'scheduler.cpu_slots' wants a whole number, got 1.5"),
        ("[scheduler]\ncpu_slots = true", "wants a whole number, got True"),
        ("[scheduler]\nrepair_s = 'x'", "wants a number, got 'x'"),
        ("[serving]\nenabled = 1", "wants true or false, got 1"),
        ("[serving]\nenabled = 2020-01-01", "wants true or false, got datetime.date(2020, 1, 1)"),
        ("[scheduler]\ncpu_slots = -1", "mlbox.toml:2: 'scheduler.cpu_slots' wants 0 to 1000000000000, got -1"),
        ("[scheduler]\nrepair_s = nan", "wants 0 to 1000000000000, got nan"),
        ("[scheduler]\nrepair_s = inf", "wants 0 to 1000000000000, got inf"),
        ("[scheduler]\nrepair_s = 0x" + "f" * 5000, "got a very large number"),
        ("[scheduler]\nrepair_s = 0", "mlbox.toml:2: 'scheduler.repair_s': 0 makes no sense: it wants more than 0"),
        ("[jobs]\nlog_max = 'big'", "mlbox.toml:2: 'jobs.log_max': 'big' is not a size such as 512M or 1G"),
        ("[jobs]\nlog_head = '2G'", "mlbox.toml: 'jobs.log_head' is larger than 'jobs.log_max'"),
        ("[server]\nlisten = '8470'", "mlbox.toml:2: 'server.listen': '8470' is not HOST:PORT"),
        ("[serving]\nhttp = 'a:99999'", "mlbox.toml:2: 'serving.http': 'a:99999' is not HOST:PORT"),
        ("[serving]\ngpu = 'always'", "mlbox.toml:2: 'serving.gpu': 'always' is not one of prefer, require, never"),
        ("state = 'a\\u0000b'".replace("'", '"'), "mlbox.toml:1: 'state': a path cannot hold a NUL character"),
        ("state = '~nobody-of-this-name/x'", "mlbox.toml:1: 'state': '~nobody-of-this-name/x'"),
        ("[server\n", "mlbox.toml: not TOML: "),
        ("a = " + "9" * 5000, "mlbox.toml: not TOML: "),
        ("a = " + "[" * 5000, "mlbox.toml: not TOML: "),
    ],
    ids=range(32),
)
def test_a_mistake_is_named_with_line_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"state = '\xe4'")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(BadConfig, match="cannot be read"):
            load(path)


def test_overrides_win_and_leave_the_rest_of_their_section(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, SAMPLE),
        [
            "scheduler.cpu_slots=8",
            "server.listen=127.0.0.1:0",
            'server.hosts=["a", "b"]',
            "serving.enabled=false",
            "jobs.shell=",
            "state=/tmp/x y",
            "serving.gpu='never'",
            "scheduler.cpu_slots=9",
        ],
    )
    assert (config.scheduler.cpu_slots, config.scheduler.repair_s) == (9, 2.5)
    assert config.server.listen == "127.0.0.1:0"
    assert config.server.hosts == ("a", "b")
    assert config.server.header_timeout_s == 5.0
    assert not config.serving.enabled
    assert (config.jobs.shell, config.state, config.serving.gpu) == ("", "/tmp/x y", "never")


def test_an_override_can_mend_what_the_file_has_wrong_together(tmp_path: Path) -> None:
    assert load(write(tmp_path, "[jobs]\nlog_head = '2G'"), ["jobs.log_max=4G"]).jobs.log_max == "4G"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("scheduler.cpu_slots", "--set scheduler.cpu_slots: write it as section.key=value"),
        ("a..c=1", "write it as section.key=value"),
        ("scheduler.cpu_slot=1", "--set scheduler.cpu_slot=1: 'scheduler.cpu_slot' is an unknown key; did you mean"),
        ("nonsense=1", "'nonsense' is an unknown key"),
        ("scheduler=1", "'scheduler' is a section"),
        ("scheduler.cpu_slots=many", "wants a whole number, got 'many'"),
        ("serving.enabled=maybe", "wants true or false, got 'maybe'"),
        ("scheduler.repair_s=0", "more than 0"),
        ("server.listen=x", "is not HOST:PORT"),
        ("scheduler.cpu_slots=" + "9" * 5000, "wants a whole number"),
    ],
    ids=range(10),
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, says: str) -> None:
    assert says in refusal(tmp_path, SAMPLE, override)


def test_sizes_and_addresses() -> None:
    sizes = {"64M": 64 << 20, "1G": 1 << 30, "1.5k": 1536, "7": 7, "2 TiB": 2 << 40, "1GB": 1 << 30, "0": 0}
    assert {text: size_bytes(text) for text in sizes} == sizes
    for text in ("", "M", "-1", "1X", "1e3", "9" * 400):
        with pytest.raises(ValueError, match="is not a size"):
            size_bytes(text)
    assert host_port("127.0.0.1:8470") == ("127.0.0.1", 8470)
    assert host_port("[::1]:0") == ("::1", 0)
    assert host_port("gpu.lab:65535") == ("gpu.lab", 65535)
    for text in ("", ":80", "a", "a:", "a:b", "a:65536", "::1:80", "[a]:80:", "a b:1", "[::1]"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            host_port(text)


sections = st.sampled_from(["state", "server", "scheduler", "jobs", "serving"])
keys = st.sampled_from(["listen", "hosts", "cpu_slots", "repair_s", "log_max", "gpu", "enabled", "shell"]) | st.text()
values = st.sampled_from(["1", "-1", "0", "1e400", "nan", "0x" + "f" * 5000, "9" * 5000, "[" * 5000]) | st.sampled_from(
    ["'1G'", "true", "[]", "['a']", "{}", "{listen = 1}", "1979-05-27", '"\\u0000"']
)
lines = (
    st.builds("[{}]".format, sections)
    | st.builds("{} = {}".format, keys, values)
    | st.builds("{}.{} = {}".format, sections, keys, values)
    | st.text(max_size=20)
)


def attempt(path: Path | None, overrides: list[str]) -> Config | BadConfig:
    try:
        return load(path, overrides)
    except BadConfig as refusal:
        return refusal


@given(st.lists(st.builds("{}.{}={}".format, sections, keys, values) | st.text(), max_size=2))
def test_any_override_is_taken_or_refused(overrides: list[str]) -> None:
    assert isinstance(attempt(None, overrides), (Config, BadConfig))


@given(text=st.lists(lines, max_size=6).map("\n".join))
def test_any_file_is_a_configuration_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, encoding="utf-8")
    answer = attempt(path, [])
    if isinstance(answer, BadConfig):
        assert len(str(answer)) < 1000
        assert str(answer).isprintable()
