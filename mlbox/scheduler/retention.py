"""Removes the files of ended jobs by age and by what all of them take; their rows stay."""

import asyncio
import logging
import time
from collections.abc import Sequence

from mlbox.database import Database
from mlbox.errors import Conflict
from mlbox.scheduler import queue
from mlbox.scheduler.folders import Folders

log = logging.getLogger(__name__)

_DAY_S = 86_400.0


async def prune(
    database: Database, folders: Folders, *, now: float, keep_days: float | None, keep_bytes: int | None
) -> Sequence[int]:
    """Remove logs, artifacts and code of the jobs that ended first; returns the ids of those jobs.

    They go when their job ended more than `keep_days` days ago, or as long as the ended jobs together take more than
    `keep_bytes` on disk; None: no such bound. What a job under way writes costs no other its files. What a model is
    still to be made of stays. Raises Unavailable.
    """
    if keep_days is None and keep_bytes is None:
        return []
    began = time.monotonic()
    sizes = await asyncio.to_thread(folders.sizes) if keep_bytes is not None else {}
    kept = await database.read(queue.with_files)
    left = sum(sizes.get(job_id, 0) for job_id, _ in kept)
    removed: list[int] = []
    for job_id, ended_at in kept:
        too_old = keep_days is not None and ended_at < now - keep_days * _DAY_S
        too_much = keep_bytes is not None and left > keep_bytes
        if not too_old and not too_much:
            break
        left -= sizes.get(job_id, 0)  # also where they cannot be removed: that is not to cost the others theirs
        try:
            await asyncio.to_thread(folders.remove, job_id)
        except (Conflict, OSError) as error:
            log.warning("job %d: its files stay: %s", job_id, error)
            continue
        # After its files: a crash in between leaves a job whose files are looked for once more, and none forgotten.
        await database.write(queue.mark_removed, job_id, now=now)
        removed.append(job_id)
    if removed:
        log.info("jobs: removed the files of %d jobs in %.1f s", len(removed), time.monotonic() - began)
    return removed
