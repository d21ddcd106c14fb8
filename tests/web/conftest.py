"""A running box for tests of the web."""

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest_asyncio

from mlbox.config import Config, SchedulerConfig, ServerConfig
from tests.web.harness import Box, running_box


@pytest_asyncio.fixture
async def box(tmp_path: Path) -> AsyncGenerator[Box]:
    config = Config(
        server=ServerConfig(body_max="8M", followers_max=20, followers_per_user=10),
        scheduler=SchedulerConfig(cpu_slots=2),
    )
    async with running_box(tmp_path, config) as running:
        yield running
