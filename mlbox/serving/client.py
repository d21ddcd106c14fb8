"""What the daemon asks of the inference server: only the Open Inference Protocol, as any other client. Blocking."""

import http.client
from dataclasses import dataclass
from typing import Any

import msgspec

from mlbox.errors import Unavailable

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVersion:
    """One row of the repository index: `state` is READY, LOADING, UNLOADING, UNAVAILABLE or UNKNOWN."""

    name: str
    version: int | None
    state: str
    reason: str


class InferenceClient:
    """Speaks to one inference server. `host` and `port` are its HTTP address, `token` one with every scope it needs."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._address = (host, port)
        self._token = token

    def index(self) -> list[ServedVersion]:
        """Every version that the server knows. Raises Unavailable when it does not answer."""
        rows: list[dict[str, Any]] = self._ask("POST", "/v2/repository/index")
        return [
            ServedVersion(
                name=str(row["name"]),
                version=int(row["version"]) if str(row.get("version", "")).isdigit() else None,
                state=str(row.get("state") or "UNKNOWN"),
                reason=str(row.get("reason") or ""),
            )
            for row in rows
        ]

    def metadata(self, model: str) -> dict[str, Any]:
        """The model's metadata. Raises Unavailable when it cannot be had."""
        return self._ask("GET", f"/v2/models/{model}")

    def _ask(self, method: str, path: str) -> Any:
        connection = http.client.HTTPConnection(*self._address, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self._token}"})
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise Unavailable(f"the inference server answered {response.status} to {method} {path}")
            return msgspec.json.decode(body)
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            raise Unavailable(f"the inference server does not answer: {error}") from error
        finally:
            connection.close()
