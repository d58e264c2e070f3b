import pytest

from torchprune_bayes._extras import optional, require
from torchprune_bayes.errors import MissingExtraError


def test_what_is_installed_is_not_in_the_way():
    with optional("json", "none"):
        import json
    require("json", "none")
    assert json.loads("1") == 1


def test_a_missing_package_is_named_with_its_extra():
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[moon\]"`'):
        require("no_such_package", "moon")


def test_other_errors_pass():
    with pytest.raises(ValueError, match="mine"), optional("json", "none"):
        raise ValueError("mine")
