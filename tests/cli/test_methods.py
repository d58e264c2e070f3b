import json

import pytest

from torchprune_bayes.cli import main
from torchprune_bayes.methods import registered_methods


def test_the_table_has_a_line_for_every_registered_method(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(registered_methods())
    for name, entry in registered_methods().items():
        (line,) = (line for line in lines if line.split()[0] == name)
        assert entry.title in line
        assert (" needed " in line) == entry.needs_calibration


def test_json_describes_every_method_and_its_options(capsys):
    assert main(["methods", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == list(registered_methods())
    assert found["magnitude"]["options"]["scope"] == "global"
    assert found["woodtaylor"]["options"]["gradient_step"] == "auto"
    assert found["woodtaylor"]["options"]["steps"] == 1  # passed on to the base class
    assert found["random"] == {
        "name": "random",
        "title": registered_methods()["random"].title,
        "paper": "",
        "needs_calibration": False,
        "options": {},
    }


def test_one_method_is_shown_with_its_options(capsys):
    assert main(["methods", "woodfisher"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("woodfisher: ")
    assert "update" in out
    assert "'joint'" in out


def test_a_method_without_options_says_so(capsys):
    assert main(["methods", "random"]) == 0
    assert capsys.readouterr().out.endswith("no options\n")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_an_unknown_method_is_a_usage_error(capsys, extra):
    assert main(["methods", "nothing", *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: Expected one of ")
    assert captured.err.count("\n") == 1
