"""Without any extra, what the package itself promises works: nothing else is imported."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_PROGRAM = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from torchprune_bayes.cli import main

model = ["--model", "tests.cli.toys:make_model", "--data", "tests.cli.toys:make_batches"]
small = ["--num-samples", "16"]
codes = [
    main(["prune", *model, *small, "--method", "woodfisher", "--amount", "0.5",
          "--output", f"{FOLDER}/pruned"]),
    main(["shrink", *model, *small, "--sparsity", "0.3", "--output", f"{FOLDER}/shrunk"]),
    main(["evaluate", *model, "--pruned", f"{FOLDER}/pruned", f"{FOLDER}/shrunk",
          "--output", f"{FOLDER}/evaluated"]),
]
sys.exit(max(codes))
"""


def names_of(requirements):
    """Names of the packages that are required whatever the extras."""
    return {
        re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0].lower().replace("_", "-")
        for one in requirements
        if "extra ==" not in one
    }


def closure(wanted):
    """These packages and all that they require."""
    found, waiting = set(), set(wanted)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            waiting |= names_of(requires(name) or []) - found
        except PackageNotFoundError:  # of another platform
            continue
    return found


def test_pruning_shrinking_and_evaluating_need_no_extra(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    [block] = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    allowed = closure(names_of(re.findall(r'"([^"]+)"', block))) | {"torchprune-bayes"}
    blocked = {
        module
        for module, owners in packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & allowed
    }
    assert {"pytest", "sklearn"} & blocked
    program = f"BLOCKED, FOLDER = {blocked - {'tests'}!r}, {str(tmp_path)!r}\n{_PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "evaluated" / "evaluate.json").is_file()
