"""`python -m lm` is `lm`."""

import sys

from lm.cli import main

if __name__ == "__main__":
    sys.exit(main())
