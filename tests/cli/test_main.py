import argparse
import subprocess
import sys

import pytest

from torchprune_bayes.cli import main
from torchprune_bayes.errors import (
    ArgumentError,
    CalibrationError,
    MissingExtraError,
    NumericalError,
    ParameterError,
)

COMMANDS = ["methods", "compare", "prune", "shrink"]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_and_defaults(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"torchprune-bayes {command}" in out.partition("examples:")[2]
    assert "%%" not in out
    assert command == "methods" or "(default: " in out


def test_defaults_in_help_are_written_as_they_are_typed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.8 0.9 0.95 0.98)" in words
    assert "(default: results)" in words
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "random weights (default: 0)" in words
    assert "default: []" not in words
    assert "default: False" not in words


@pytest.mark.parametrize("argv", [[], ["nothing"], ["compare", "--seeds", "two"], ["prune"]])
def test_what_cannot_be_parsed_exits_with_two(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "usage: torchprune-bayes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ArgumentError, 2),
        (ParameterError, 2),
        (MissingExtraError, 2),
        (CalibrationError, 1),
        (NumericalError, 1),
    ],
)
def test_errors_of_the_library_are_one_line(monkeypatch, capsys, error, code):
    def failing(arguments: argparse.Namespace) -> int:
        raise error("Expected this,\n  got that.")

    monkeypatch.setattr("torchprune_bayes.cli.methods.run", failing)
    assert main(["methods"]) == code
    assert capsys.readouterr().err == "error: Expected this, got that.\n"


def test_other_exceptions_are_not_hidden(monkeypatch):
    def broken(arguments: argparse.Namespace) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr("torchprune_bayes.cli.methods.run", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["methods"])


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(arguments: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchprune_bayes.cli.methods.run", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_the_command_is_kept_as_it_was_typed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "torchprune_bayes.cli.methods.run", lambda arguments: seen.append(arguments.command) or 0
    )
    assert main(["methods", "two words"]) == 0
    assert seen == ["torchprune-bayes methods 'two words'"]


def test_a_reader_that_has_seen_enough_is_no_error():
    program = (
        "import sys; from torchprune_bayes.cli import main; sys.exit(main(['methods', '--json']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert err == b""
