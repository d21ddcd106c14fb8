"""`python -m mlbox` is the console script `mlbox`."""

import sys

from mlbox.cli import main

if __name__ == "__main__":
    sys.exit(main())
