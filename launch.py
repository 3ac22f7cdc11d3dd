"""`python launch.py` is `locus serve`."""

import sys

from studio.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
