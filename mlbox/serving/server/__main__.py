"""`python -m mlbox.serving.server`: the inference server, as its supervisor starts it."""

import sys

from mlbox.serving.server.main import main

if __name__ == "__main__":
    sys.exit(main())
