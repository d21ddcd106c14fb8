"""Daemons for the whole-program tests."""

from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.whole.harness import Daemon


@pytest.fixture
def make_daemon(tmp_path: Path) -> Generator[Callable[..., Daemon]]:
    """Makes daemons on state folders of their own; they end with the test, and so does what their jobs started."""
    made: list[Daemon] = []

    def make(*settings: str, environment: dict[str, str] | None = None) -> Daemon:
        daemon = Daemon(tmp_path / f"state{len(made)}", *settings, environment=environment)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    return make_daemon().start()
