"""`python -m robustkit`, for machines where the `robustkit` command is not on PATH."""

import sys

from robustkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
