"""Every query about GPUs beside their leases: reservations, and what went wrong with them."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from mlbox.errors import Conflict, NotFound
from mlbox.scheduler.placement import Reservation

FaultSource = Literal["recovery_action", "nvml", "xid", "job"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """Something that went wrong with a GPU, at Unix seconds; `uid` is whose job was hit."""

    gpu_uuid: str
    at: float
    source: FaultSource
    cause: str
    code: int | None = None
    job_id: int | None = None
    uid: int | None = None
    id: int = 0


# Reservations


def reserve(connection: sqlite3.Connection, wanted: Reservation, *, now: float) -> Reservation:
    """Insert a reservation and return it with its id. Raises Conflict when another has one of its GPUs meanwhile."""
    gpus = json.dumps(wanted.gpu_uuids)
    row = connection.execute(
        "SELECT * FROM reservations AS r WHERE cancelled_at IS NULL AND starts_at < ? AND ends_at > ? "
        "AND EXISTS (SELECT 1 FROM json_each(r.gpu_uuids) WHERE value IN (SELECT value FROM json_each(?))) "
        "ORDER BY starts_at, id LIMIT 1",
        (wanted.ends_at, wanted.starts_at, gpus),
    ).fetchone()
    if row is not None:
        other = _reservation(row)
        shared = ", ".join(sorted(set(other.gpu_uuids) & set(wanted.gpu_uuids)))
        raise Conflict(
            f"reservation {other.id} ({other.name}) has {shared} from {_utc(other.starts_at)} to "
            f"{_utc(other.ends_at)}: choose another time or other GPUs, or cancel that one first"
        )
    made = connection.execute(
        "INSERT INTO reservations (name, gpu_uuids, starts_at, ends_at, for_user, for_project, made_by, made_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            wanted.name,
            gpus,
            wanted.starts_at,
            wanted.ends_at,
            wanted.for_user,
            wanted.for_project,
            wanted.made_by,
            now,
        ),
    ).lastrowid
    return replace(wanted, id=made or 0)


def reservations(connection: sqlite3.Connection, *, now: float) -> list[Reservation]:
    """Those that are neither over nor cancelled, the first to begin first."""
    rows = connection.execute(
        "SELECT * FROM reservations WHERE cancelled_at IS NULL AND ends_at > ? ORDER BY starts_at, id", (now,)
    )
    return [_reservation(row) for row in rows]


def cancel_reservation(connection: sqlite3.Connection, reservation_id: int, *, now: float) -> Reservation:
    """End a reservation; one that ended before stays as it ended. Raises NotFound."""
    row = connection.execute("SELECT * FROM reservations WHERE id = ?", (reservation_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no reservation {reservation_id}")
    connection.execute(
        "UPDATE reservations SET cancelled_at = ? WHERE id = ? AND cancelled_at IS NULL", (now, reservation_id)
    )
    return _reservation(row)


# Faults


def add_fault(connection: sqlite3.Connection, fault: GpuFault) -> None:
    connection.execute(
        "INSERT INTO gpu_faults (gpu_uuid, at, source, code, cause, job_id, uid) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (fault.gpu_uuid, fault.at, fault.source, fault.code, fault.cause, fault.job_id, fault.uid),
    )


def open_faults(connection: sqlite3.Connection) -> dict[str, list[GpuFault]]:
    """Those since each GPU was last taken into service, by UUID, the oldest first."""
    faults: dict[str, list[GpuFault]] = {}
    for row in connection.execute("SELECT * FROM gpu_faults WHERE cleared_at IS NULL ORDER BY id"):
        fault = GpuFault(
            id=row["id"],
            gpu_uuid=row["gpu_uuid"],
            at=row["at"],
            source=row["source"],
            code=row["code"],
            cause=row["cause"],
            job_id=row["job_id"],
            uid=row["uid"],
        )
        faults.setdefault(fault.gpu_uuid, []).append(fault)
    return dict(faults)


def clear_failures(connection: sqlite3.Connection, gpu_uuids: Sequence[str], *, now: float) -> None:
    """Forget the jobs that failed on GPUs: another one has just succeeded there."""
    connection.executemany(
        "UPDATE gpu_faults SET cleared_at = ? WHERE gpu_uuid = ? AND source = 'job' AND cleared_at IS NULL",
        [(now, uuid) for uuid in gpu_uuids],
    )


def resumed(connection: sqlite3.Connection) -> dict[str, float]:
    """When the faults of each GPU were last cleared by an admin, by UUID."""
    rows = connection.execute(
        "SELECT gpu_uuid, max(cleared_at) AS at FROM gpu_faults WHERE source <> 'job' AND cleared_at IS NOT NULL "
        "GROUP BY gpu_uuid"
    )
    return {row["gpu_uuid"]: row["at"] for row in rows}


def clear_faults(connection: sqlite3.Connection, gpu_uuid: str, *, now: float) -> None:
    """Forget what went wrong with a GPU: somebody says that it works."""
    connection.execute(
        "UPDATE gpu_faults SET cleared_at = ? WHERE gpu_uuid = ? AND cleared_at IS NULL", (now, gpu_uuid)
    )


def _reservation(row: sqlite3.Row) -> Reservation:
    return Reservation(
        id=row["id"],
        name=row["name"],
        gpu_uuids=tuple(json.loads(row["gpu_uuids"])),
        starts_at=row["starts_at"],
        ends_at=row["ends_at"],
        for_user=row["for_user"],
        for_project=row["for_project"],
        made_by=row["made_by"],
    )


def _utc(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
