"""``torchprune-bayes methods``: list of methods and their options."""

from __future__ import annotations

import argparse
import json
from typing import Any

from torchprune_bayes.cli._help import Parser, command_parser
from torchprune_bayes.cli._options import options_of
from torchprune_bayes.methods import RegisteredMethod, find_method, registered_methods
from torchprune_bayes.reports import ResultsTable

SUMMARY = "list the pruning methods and their options"
"""One line for the list of commands."""


def build_parser() -> Parser:
    """The parser of the subcommand."""
    parser = command_parser(
        description=(
            "List the pruning methods: name, what it does, where it was published, and whether\n"
            "it needs calibration data. With a NAME, list the options of that method."
        ),
        examples=(
            "  torchprune-bayes methods                 all of them, one line each\n"
            "  torchprune-bayes methods woodfisher      the options of one, with their defaults\n"
            "  torchprune-bayes methods --json          for programs, options included"
        ),
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="show the options of this method")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Print the list; returns the exit code."""
    everything = list(registered_methods().values())
    entries = [find_method(arguments.name)] if arguments.name else everything
    if arguments.json:
        print(json.dumps([_described(entry) for entry in entries], indent=1, default=str))
    elif arguments.name:
        print(_details(entries[0]))
    else:
        print(_listed(entries))
    return 0


def _described(entry: RegisteredMethod) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "paper": entry.paper,
        "needs_calibration": entry.needs_calibration,
        "options": options_of(entry.method),
    }


def _listed(entries: list[RegisteredMethod]) -> ResultsTable:
    table = ResultsTable()
    for entry in entries:
        table.add(
            name=entry.name,
            calibration="needed" if entry.needs_calibration else "-",
            title=entry.title,
            paper=entry.paper or "-",
        )
    return table


def _details(entry: RegisteredMethod) -> str:
    lines = [f"{entry.name}: {entry.title}", f"paper: {entry.paper or '-'}"]
    lines.append(f"calibration data: {'needed' if entry.needs_calibration else 'not needed'}")
    options = ResultsTable()
    for name, default in options_of(entry.method).items():
        options.add(option=name, default=repr(default))
    return "\n".join([*lines, "", str(options) if len(options) else "no options"])
