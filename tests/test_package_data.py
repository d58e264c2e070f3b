"""What a wheel carries: every file of the package that is no Python."""

import re
from fnmatch import fnmatch
from pathlib import Path

import torchprune_bayes

ROOT = Path(__file__).resolve().parents[1]


def test_every_file_beside_the_code_is_packed():
    package = Path(torchprune_bayes.__file__).parent
    text = (ROOT / "pyproject.toml").read_text()
    [listed] = re.findall(r"^torchprune_bayes = \[(.*)\]$", text, re.MULTILINE)
    patterns = re.findall(r'"([^"]+)"', listed)
    others = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert others
    assert [path for path in others if not any(fnmatch(path, one) for one in patterns)] == []
