"""How many failed sign-ins an address may make: a token bucket for each, in bounded memory."""

import ipaddress
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.types import Scope

from mlbox.errors import TooMany

log = logging.getLogger(__name__)

BURST = 20
PER_S = 0.5
_ADDRESSES_MAX = 10_000
"""About 2 MB; beyond it the address that failed longest ago is forgotten, and with it that it failed."""


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float
    warned: bool = False


class Throttle:
    """Counts failures. Only failures: whoever brings a good credential is never kept out by a neighbour's bad ones."""

    def __init__(self, *, burst: int = BURST, per_s: float = PER_S, addresses_max: int = _ADDRESSES_MAX) -> None:
        self._burst = burst
        self._per_s = per_s
        self._addresses_max = addresses_max
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def count_failure(self, scope: Scope) -> None:
        """Note that a request brought a bad credential. Raises TooMany when its address has brought too many."""
        client: tuple[str, int] | None = scope.get("client")
        wait_s = self.failed(client[0] if client else "unix socket", time.monotonic())
        if wait_s is not None:
            raise TooMany("too many bad credentials from your address: wait, then use a good one", wait_s)

    def failed(self, address: str, now: float) -> float | None:
        """Note a failure; the seconds until the next one is listened to again, None while there is patience."""
        key = network_of(address)
        bucket = self._buckets.setdefault(key, _Bucket(self._burst, now))
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._addresses_max:
            self._buckets.popitem(last=False)
        bucket.left = min(self._burst, bucket.left + max(0.0, now - bucket.at) * self._per_s)
        bucket.at = now
        if bucket.left >= 1:
            bucket.left -= 1
            bucket.warned = False
            return None
        if not bucket.warned:  # one line for each flood, whatever its size
            log.warning("sign-in: too many bad credentials from %s", key)
            bucket.warned = True
        return (1 - bucket.left) / self._per_s


def network_of(address: str) -> str:
    """What counts as one asker: an IPv4 address, an IPv6 /64 (the least that one customer is given)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
