"""``python -m torchprune_bayes``: the command line."""

import sys

from torchprune_bayes.cli import main

if __name__ == "__main__":
    sys.exit(main())
