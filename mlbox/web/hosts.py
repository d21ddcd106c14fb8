"""Is this request meant for us? The Host header against DNS rebinding, and where a browser's request came from. Pure.

A page of a stranger can make a member's browser talk to this server under a name of the stranger's (DNS rebinding), or
send along the member's cookie (cross-site requests). Neither the address nor the cookie proves anything then; the Host
header and the browser's own Sec-Fetch-Site or Origin do.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence

from mlbox.errors import Denied, Invalid
from mlbox.web.problems import Misdirected

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})))(?::([0-9]{1,5}))?")
SAFE_METHODS = frozenset({"GET", "HEAD"})


def host_of(values: Sequence[bytes]) -> str:
    """The name or address in the Host header, without the port, in lower case. Raises Invalid unless there is one."""
    if len(values) != 1:
        raise Invalid(f"a request needs exactly one Host header; this one has {len(values)}")
    match = _HOST.fullmatch(values[0].decode("latin-1"))
    if match is None or (match[3] and int(match[3]) > 65535):
        raise Invalid("the Host header is neither a name nor an address")
    return normal((match[1] or match[2]).lower())


def normal(host: str) -> str:
    """An address in its one canonical form (IPv4 within IPv6 as IPv4); a name in lower case."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).compressed


def check_host(host: str, names: frozenset[str], own_address: str | None) -> None:
    """Raises Misdirected unless `host` is one of `names` or the very address that the connection came in on."""
    if host not in names and (own_address is None or host != normal(own_address)):
        raise Misdirected(
            f"this server does not answer for the host {host!r}: add the name to server.hosts in its configuration, "
            f"or use {', '.join(sorted(names))}"
        )


def check_origin(method: str, headers: Mapping[bytes, bytes], *, streams: bool) -> None:
    """Raises Denied for a request with a cookie that another site made the browser send.

    Unsafe methods and streams need proof that they come from our own pages; a link from elsewhere may open a page.
    Browsers that do not send Sec-Fetch-Site (over plain HTTP, to a name other than localhost) send Origin with unsafe
    methods, and with streams a Referer, which `Referrer-Policy: same-origin` makes them do for us only.
    """
    site = headers.get(b"sec-fetch-site")
    safe = method in SAFE_METHODS and not streams
    if site is not None:
        opened = safe and headers.get(b"sec-fetch-mode") == b"navigate"
        fine = site == b"same-origin" or (site == b"none" and method in SAFE_METHODS) or opened
    elif (origin := headers.get(b"origin")) is not None:
        fine = _same(origin, headers)
    elif streams:
        fine = _same(headers.get(b"referer", b""), headers)
    else:
        fine = safe
    if not fine:
        raise Denied("this request comes from another site: a browser's session is good for mlbox's own pages only")


def check_own_form(headers: Mapping[bytes, bytes]) -> None:
    """Raises Denied for a sign-in form that another site sent: it would sign a member in as somebody else.

    Every browser says where a form comes from; a client that does not is no browser, and nobody's cookie is at stake.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if (site is not None and site != b"same-origin") or (origin is not None and not _same(origin, headers)):
        raise Denied("this sign-in comes from another site: open /login of mlbox itself")


def _same(address: bytes, headers: Mapping[bytes, bytes]) -> bool:
    """Whether an Origin or Referer is of the host that the request itself names (which was checked to be ours)."""
    scheme, _, rest = address.lower().partition(b"://")
    return scheme in (b"http", b"https") and rest.partition(b"/")[0] == headers.get(b"host", b"").lower()
