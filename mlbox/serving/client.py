"""What the daemon asks of the inference server: only the Open Inference Protocol, as any other client. Blocking."""

import http.client
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from mlbox.errors import Unavailable

T = TypeVar("T")

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVersion:
    """One row of the repository index: `state` is READY, LOADING, UNLOADING, UNAVAILABLE or UNKNOWN."""

    name: str
    version: int | None
    state: str
    reason: str


class _Row(msgspec.Struct, frozen=True):
    """One row of the index as the protocol writes it; everything but the name may be left out."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


_decode_rows = msgspec.json.Decoder(list[_Row]).decode


class InferenceClient:
    """Speaks to one inference server. `host` and `port` are its HTTP address, `token` one with every scope it needs."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._address = (host, port)
        self._token = token

    def index(self) -> list[ServedVersion]:
        """Every version that the server knows. Raises Unavailable when it does not answer."""
        return [
            ServedVersion(
                name=row.name,
                version=int(row.version) if row.version.isdecimal() and row.version.isascii() else None,
                state=row.state or "UNKNOWN",
                reason=row.reason,
            )
            for row in self._ask("POST", "/v2/repository/index", _decode_rows)
        ]

    def _ask(self, method: str, path: str, decode: Callable[[bytes], T]) -> T:
        connection = http.client.HTTPConnection(*self._address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self._token}"})
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise Unavailable(f"the inference server answered {response.status} to {method} {path}")
            return decode(body)
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise Unavailable(f"the inference server does not answer: {error}") from error
        finally:
            connection.close()
