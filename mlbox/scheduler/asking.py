"""What every door of the scheduler asks before it does anything, and how it carries through what it began."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from mlbox.errors import Denied, FieldError, Invalid
from mlbox.identity import Identity

T = TypeVar("T")


def person(who: Identity, what: str) -> None:
    """Raises Denied for a job's own token."""
    if who.job_id is not None:
        raise Denied(f"the token of job {who.job_id} cannot {what}: use a token of your own")


def admin(who: Identity, what: str) -> None:
    person(who, what)
    if not who.admin:
        raise Denied(f"only an admin may {what}")


def refused(field: str, why: str) -> Invalid:
    return Invalid(f"{field}: {why}", (FieldError(field, why),))


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """Carry `work` through even where its caller is cancelled: memory must follow what was committed."""
    return await asyncio.shield(asyncio.ensure_future(work))
