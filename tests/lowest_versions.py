"""Run the tests with the lowest versions of all packages that pyproject.toml allows.

    python tests/lowest_versions.py                 a fresh environment, then the whole suite
    python tests/lowest_versions.py tests/methods   a part of it
    python tests/lowest_versions.py --list          the versions, and nothing else

Needs Python 3.11 or newer to read pyproject.toml; indirect dependencies are the newest that fit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import tomllib  # type: ignore[import-not-found]  # from 3.11 on

ROOT = Path(__file__).resolve().parents[1]
_BOUND = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9][0-9A-Za-z.]*)$")


def lowest_versions(project: dict[str, Any]) -> list[str]:
    """Pins of all direct dependencies, those of extras too; the highest bound where there are many.

    Raises:
        ValueError: If a dependency has no lower bound.
    """
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += [one for one in extra if not one.startswith(project["name"])]
    pins: dict[str, str] = {}
    for one in wanted:
        found = _BOUND.match(one.replace(" ", ""))
        if found is None:
            raise ValueError(f"Expected `package>=version`, got {one!r}.")
        name, version = found.groups()
        pins[name] = max(pins.get(name, version), version, key=_as_numbers)
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def main() -> int:
    """Make the environment and run the tests; returns their exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the versions and stop")
    parser.add_argument("--environment", type=Path, help="folder to keep; default a temporary one")
    parser.add_argument("tests", nargs="*", help="arguments of pytest")
    args = parser.parse_args()
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = "\n".join(lowest_versions(content["project"])) + "\n"
    print(pins, end="", flush=True)
    if args.list:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        place = args.environment or Path(folder) / "environment"
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(pins, encoding="utf-8")
        venv.create(place, with_pip=True)
        python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        install = [python, "-m", "pip", "install", "-c", constraints, "-e", ".[test]"]
        subprocess.run(install, cwd=ROOT, check=True)
        tests = args.tests or ["-n", "auto"]
        return subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
