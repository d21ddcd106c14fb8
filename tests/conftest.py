"""What every room's tests share: a real, freshly migrated database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlbox.database import Database


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(tmp_path / "mlbox.db")
    yield opened
    await opened.close()
