"""The command line: `mlbox serve` runs the daemon, everything else is a thin client of its HTTP API."""

import argparse
import http.client
import os
import sys
from collections.abc import Callable, Sequence

from mlbox import config
from mlbox.cli import client
from mlbox.cli.parser import parser

EXIT_UNREACHABLE = 69
"""EX_UNAVAILABLE in sysexits.h: there is no daemon to ask."""
EXIT_HUNG_UP = 141
"""128 + SIGPIPE: whoever read our output is gone, as with `mlbox log 12 | head`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except config.BadConfig as error:
        print(f"mlbox: {error}", file=sys.stderr)
        return config.EXIT_CONFIG
    except client.Refused as error:
        print(f"mlbox: {error}", file=sys.stderr)
        return 1
    except client.HungUp:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return EXIT_HUNG_UP
    except (OSError, http.client.HTTPException) as error:
        print(f"mlbox: no answer from {client.where(options)}: {error}", file=sys.stderr)
        return EXIT_UNREACHABLE
    except KeyboardInterrupt:
        return 130
