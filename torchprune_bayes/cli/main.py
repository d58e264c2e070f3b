"""The entry point: the subcommands, and errors as one line."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from torchprune_bayes.cli import compare, evaluate, methods, prune, reproduce, shrink
from torchprune_bayes.cli._help import Parser
from torchprune_bayes.errors import CalibrationError, NumericalError, TorchPruneBayesError

_COMMANDS = {
    "methods": methods,
    "compare": compare,
    "prune": prune,
    "shrink": shrink,
    "evaluate": evaluate,
    "reproduce": reproduce,
}

_DESCRIPTION = """\
Second-order and Bayesian pruning of PyTorch models.

Without a model at hand, `torchprune-bayes compare` prunes a small network with every method
and shows what each costs and what it keeps; it downloads nothing.
"""

_EPILOG = """\
examples:
  torchprune-bayes methods                         what there is
  torchprune-bayes compare                         all methods on a small real problem
  torchprune-bayes prune --help                    single weights of your model
  torchprune-bayes shrink --help                   a smaller model
  torchprune-bayes evaluate --help                 all of them side by side

exit codes: 0 done, 1 a method failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; default those of the process.

    Returns:
        0 on success, 1 if a method failed, 2 for wrong usage, 130 if interrupted, 141 if
        the output is no longer read.

    Example:
        >>> main(["methods", "random"])
        random: uniformly at random
        paper: -
        calibration data: not needed
        <BLANKLINE>
        no options
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parsers = {name: module.build_parser() for name, module in _COMMANDS.items()}
    parsed = _build_parser(parsers).parse_args(words)
    name = parsed.subcommand
    arguments = parsed[name]
    arguments.resolved = parsers[name].dump(arguments)
    arguments.command = shlex.join(["torchprune-bayes", *words])
    try:
        code = int(_COMMANDS[name].run(arguments))
        sys.stdout.flush()
        return code
    except TorchPruneBayesError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, (CalibrationError, NumericalError)) else 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has exited
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the last flush
        return 141


def _build_parser(parsers: Mapping[str, Parser]) -> Parser:
    """The parser of all subcommands."""
    parser = Parser(prog="torchprune-bayes", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=version("torchprune_bayes"))
    commands = parser.add_subcommands(title="commands", metavar="COMMAND", description="")
    for name, command in parsers.items():
        commands.add_subcommand(name, command, help=_COMMANDS[name].SUMMARY)
    return parser
