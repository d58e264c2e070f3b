"""Run the tests with the lowest versions of all packages that pyproject.toml allows.

    python tests/lowest_versions.py                 a fresh environment, then the whole suite
    python tests/lowest_versions.py tests/methods   a part of it; arguments go to pytest
    python tests/lowest_versions.py --list          the versions, and nothing else

Needs `uv` (`python -m pip install uv`), whose resolver knows `lowest-direct`: direct dependencies
at their lower bounds, indirect ones the newest that fit. pip would have to be told every pin, and
searches for half an hour.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOWEST = ["--resolution", "lowest-direct"]


def uv(*arguments: str | Path) -> None:
    """Run uv in the checkout.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=ROOT, check=True)


def main() -> int:
    """Make the environment and run the tests; returns their exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the versions and stop")
    parser.add_argument("--environment", type=Path, help="folder to keep; default a temporary one")
    args, tests = parser.parse_known_args()
    if importlib.util.find_spec("uv") is None:
        parser.error("Expected uv: `python -m pip install uv`.")
    if args.list:
        uv("pip", "compile", "pyproject.toml", "--extra", "test", "--no-annotate", *LOWEST)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        place = (args.environment or Path(folder) / "environment").absolute()
        python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        if not python.exists():
            uv("venv", "--python", sys.executable, place)
        versions = ["--upgrade", "--exact", *LOWEST]
        uv("pip", "install", "--python", python, *versions, "-e", ".[test]")
        pytest = [python, "-m", "pytest", *(tests or ["-n", "auto"])]
        return subprocess.run(pytest, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
