"""`python -m d2moe` is the command line."""

import sys

from d2moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
