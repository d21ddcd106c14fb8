"""`/api/reservations`: GPUs kept for somebody, or for nobody, for a time."""

import time
from collections.abc import Callable, Sequence
from typing import cast

from starlette.requests import Request
from starlette.responses import Response

from mlbox.errors import FieldError, Impossible, Invalid, NotFound
from mlbox.scheduler import fields
from mlbox.scheduler.placement import Reservation
from mlbox.scheduler.values import Bad, moment, shown
from mlbox.web import answers, bodies
from mlbox.web.answers import Json, Text, table
from mlbox.web.doors import Doors
from mlbox.web.negotiation import wants_text
from mlbox.web.routes import id_in_path, identity_of

_COLUMNS = ("id", "name", "gpus", "starts_at", "ends_at", "for_user", "for_project", "made_by")
_GPUS_MAX = 1024
_WINDOW_MAX_S = 10 * 366 * 86_400.0


class ReservationsApi:
    """The endpoints of reservations. Their permissions are in the route table."""

    def __init__(self, doors: Doors, clock: Callable[[], float] = time.time) -> None:
        self._jobs = doors.jobs
        self._clock = clock

    async def list(self, request: Request) -> Response:
        found = [reservation_json(kept) for kept in await self._jobs.reservations(identity_of(request))]
        if wants_text(request):
            names = self._names()
            rows = [{**row, "gpus": [names.get(uuid, uuid) for uuid in _uuids(row)]} for row in found]
            return Text(table(_COLUMNS, rows))
        return Json({"reservations": found})

    async def create(self, request: Request) -> Response:
        asked = bodies.checked(await bodies.fields_of(request), _PARSERS, required=("name",))
        starts_at, ends_at = _window(asked, self._clock())
        made = await self._jobs.reserve(
            identity_of(request),
            name=asked["name"],
            gpu_uuids=self._gpus(asked.get("gpus", ("all",))),
            starts_at=starts_at,
            ends_at=ends_at,
            for_user=asked.get("for_user"),
            for_project=asked.get("for_project"),
        )
        return Text(f"{made.id}\n", 201) if wants_text(request) else Json(reservation_json(made), 201)

    async def cancel(self, request: Request) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        who, number = identity_of(request), id_in_path(request, "reservation")
        gone = await self._jobs.cancel_reservation(who, number)
        return Text(f"reservation {gone.id} is cancelled\n") if wants_text(request) else Json(reservation_json(gone))

    def _names(self) -> dict[str, str]:
        return {report.gpu.uuid: report.gpu.label for report in self._jobs.gpus()}

    def _gpus(self, words: Sequence[str]) -> tuple[str, ...]:
        """The uuids of the GPUs that are meant by uuid, index or `all`. Raises NotFound, Impossible."""
        known = self._names()
        if not known:
            raise Impossible("this box has no GPU that mlbox can see: there is nothing to reserve")
        found: dict[str, None] = {}
        for word in words:
            fitting = [uuid for uuid, index in known.items() if word in ("all", index, uuid)]
            if not fitting:
                have = ", ".join(f"{index} ({uuid})" for uuid, index in known.items())
                raise NotFound(f"there is no GPU {word[:80]} here; known: {have}")
            found |= dict.fromkeys(fitting)
        return tuple(found)


def reservation_json(kept: Reservation) -> dict[str, object]:
    return {
        "id": kept.id,
        "name": kept.name,
        "gpu_uuids": list(kept.gpu_uuids),
        "starts_at": answers.moment(kept.starts_at),
        "ends_at": answers.moment(kept.ends_at),
        "for_user": kept.for_user,
        "for_project": kept.for_project,
        "made_by": kept.made_by,
    }


def _uuids(row: dict[str, object]) -> Sequence[str]:
    return cast("Sequence[str]", row["gpu_uuids"])


def _window(asked: dict[str, object], now: float) -> tuple[float, float]:
    """From when to when. Raises Invalid, and Impossible for a time that is over or empty."""
    if ("ends_at" in asked) == ("duration" in asked):
        raise Invalid(
            "ends_at: give either ends_at or duration", (FieldError("ends_at", "give either ends_at or duration"),)
        )
    starts_at = cast("float", asked.get("starts_at", now))
    ends_at = cast("float", asked["ends_at"]) if "ends_at" in asked else starts_at + cast("float", asked["duration"])
    if ends_at <= max(starts_at, now):
        when = answers.moment(ends_at)
        raise Impossible(f"the reservation would end at {when}, which is not after its begin and now: end it later")
    return starts_at, ends_at


def _gpu_words(value: object) -> tuple[str, ...]:
    """GPUs by uuid or index, as a list or with commas; `all`."""
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        raise Bad(f"wants uuids or indices of GPUs, or all, got {shown(value)}")
    words = cast("list[object]", value)
    if not 1 <= len(words) <= _GPUS_MAX:
        raise Bad(f"wants 1 to {_GPUS_MAX} GPUs, got {len(words)}")
    for word in words:
        if isinstance(word, bool) or not isinstance(word, (str, int)) or word == "":
            raise Bad(f"wants uuids or indices of GPUs, or all, got {shown(word)}")
    return tuple(str(word) for word in words)


def _user(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 64 or not value.isprintable() or value != value.strip():
        raise Bad(f"wants the name of a user, got {shown(value)}")
    return value


_PARSERS = {
    "name": fields.name,
    "gpus": _gpu_words,
    "starts_at": moment,
    "ends_at": moment,
    "duration": fields.duration(1, _WINDOW_MAX_S),
    "for_user": _user,
    "for_project": fields.name,
}
