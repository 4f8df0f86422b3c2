"""``python -m bnguard``."""

import sys

from bnguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
