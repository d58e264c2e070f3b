"""The command line ``torchprune-bayes``: parse, call, print.

Every subcommand is one file with ``add_parser`` and ``run``.
"""

from torchprune_bayes.cli.main import main

__all__ = ["main"]
