"""The daemon's end of the process from which shims are copied (`shim.template`)."""

import os
import signal
import socket
import sys
import weakref
from contextlib import suppress
from pathlib import Path

_PATIENCE_S = 5.0
"""A template that does not answer in so long is stopped or starved; one that starts answers in 20 ms."""
_ANSWER_BYTES = 32
_RUN = (
    "import sys; from importlib.machinery import SourceFileLoader as Loader; "
    "exec(Loader('__main__', sys.argv[1]).get_code('__main__'))"
)
"""What `python shim.py` does, with the bytecode cache that scripts do without: 5 ms faster."""
SHIM = Path(__file__).parents[1] / "shim.py"


def command(argument: str) -> list[str]:
    """What runs the shim's file with an argument."""
    return [sys.executable, "-I", "-S", "-E", "-c", _RUN, str(SHIM), argument]


def environment() -> dict[str, str]:
    """All that a shim needs of ours: by LD_LIBRARY_PATH some Pythons find themselves."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


class Template:
    """A process that turns into shims. Not safe to use from several threads at once. Ends with this object.

    What a shim inherits (umask, limits) is what we had when this was made.
    """

    def __init__(self) -> None:
        """Start it, without waiting until it is ready. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
            arguments = command("--template")
            self.pid = os.posix_spawn(arguments[0], arguments, environment(), file_actions=actions, setsid=True)
        ours.settimeout(_PATIENCE_S)
        self._socket = ours
        self.close = weakref.finalize(self, _end, ours, self.pid)

    def shim(self, launch: str) -> int:
        """Have a shim for an attempt; returns its pid, a child of ours. After an OSError the template is useless."""
        self._socket.sendall(launch.encode("ascii") + b"\0")
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._socket.recv(_ANSWER_BYTES)
            if not part:
                raise ConnectionResetError("it is gone")
            answer += part
        pid = int(answer)
        if pid <= 0:
            raise OSError(-pid, os.strerror(-pid))
        return pid


def _end(end: socket.socket, pid: int) -> None:
    end.close()
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
