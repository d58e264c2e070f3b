"""Parsing of options from the shell or a file, and help texts, for all commands."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples and ends each option with its default."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default is None or default is False or default in (argparse.SUPPRESS, [], {})
        if silent or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} (default: {shown})".replace("%", "%%")


class Parser(ArgumentParser):
    """A parser that prints the usage and one sentence on errors, and exits with code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and exit."""
        parser = getattr(ex, "subcommand_parser", None) or self
        parser.print_usage(sys.stderr)
        name = parser.prog.replace(" [options]", "")
        self.exit(2, f"error: {sentence(message)}; `{name} --help` lists what it takes.\n")


def command_parser(*, description: str, examples: str) -> Parser:
    """A parser of one subcommand, which reads a configuration file too.

    Args:
        description: Text above its options.
        examples: Commands to copy, below its options.
    """
    parser = Parser(description=description, epilog=f"examples:\n{examples}")
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of options by their names; what is typed after it has precedence",
    )
    return parser


def sentence(message: str) -> str:
    r"""The message of jsonargparse about a value as one line, without its final stop.

    Example:
        >>> sentence('Parser key "steps":\\n  Expected a <class \'int\'>. Got value: x')
        "Expected `steps` to be int, got 'x'"
    """
    key = re.search(r'Parser key "(.+?)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    if not (key and value and kinds):
        return " ".join(message.split()).rstrip(".")
    words = [re.sub(r"<class '(\w+)'>", r"\1", kind).removeprefix("typing.") for kind in kinds]
    return f"Expected `{key[1]}` to be {' or '.join(words)}, got {value[1].strip()!r}"
