from hypothesis import given
from hypothesis import strategies as st

from mlbox.web import words
from mlbox.web.answers import table
from mlbox.web.negotiation import preferred


def test_numbers_as_people_read_them() -> None:
    assert [words.size(count) for count in (0, 1023, 1536, 200 * 1024, 5 << 30, None)] == [
        "0 B", "1023 B", "1.5 KiB", "200 KiB", "5.0 GiB", "–",
    ]  # fmt: skip
    assert [words.duration(seconds) for seconds in (0, 0.04, 4.25, 42, 60, 200, 7500, 3600, 90_000, None)] == [
        "0 ms", "40 ms", "4.2 s", "42 s", "1 min", "3 min 20 s", "2 h 5 min", "1 h", "1 d 1 h", "–",
    ]  # fmt: skip
    assert [words.ago(then, 1000) for then in (995, 700, 2000)] == ["just now", "5 min ago", "in 16 min"]


def test_a_log_without_a_terminal() -> None:
    assert words.plain_log("\x1b[31mred\x1b[0m \x1b]0;title\x07plain") == "red plain"
    assert words.plain_log("10 %\r50 %\r100 %\ndone\r\n") == "100 %\ndone\n"
    assert words.plain_log("a\x1b[2Jb\x1b(Bc\x1b7d\x1bPdcs\x1b\\e") == "abcde"
    assert words.plain_log("x\u202ey\x00") == "x\\u202ey\\x00"


@given(st.text(max_size=100))
def test_nothing_that_moves_a_cursor_is_left(text: str) -> None:
    for shown in (words.plain_log(text), str(words.visible(text)), table(("a",), [{"a": text}])):
        assert "\x1b" not in shown
        assert "\r" not in shown
        assert "\u202e" not in shown


def test_the_preferred_form() -> None:
    offered = ("application/json", "text/plain", "text/html")
    for accept, wanted in (
        ("", offered[0]),
        ("*/*", offered[0]),
        ("text/plain", offered[1]),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", offered[2]),
        ("text/*;q=0.5, application/json;q=0.4", offered[1]),
        ("application/json;q=0, */*", offered[1]),
        ("text/plain;q=x", offered[0]),
        ("image/png", offered[0]),
        (";;,,q=", offered[0]),
    ):
        assert preferred(accept, offered) == wanted, accept


@given(st.text(max_size=100))
def test_any_accept_header_has_an_answer(accept: str) -> None:
    assert preferred(accept, ("a/b", "c/d")) in ("a/b", "c/d")
