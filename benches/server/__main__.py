"""Started as ``python benches/server``: puts the folder above on the path, so that this one is a package."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from server.cli import main

    sys.exit(main(sys.argv[1:]))
