"""Everything on a device that is not the CPU, made on a machine without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (2, 14)
TOOL = ROOT.parent / "shared" / "tools" / "ghost_device"


@pytest.mark.timeout(1500)  # the device is compiled the first time, once for a version of torch
def test_what_holds_on_the_cpu_holds_on_another_device() -> None:
    if not TOOL.is_dir():
        pytest.skip(f"needs the device that {TOOL} makes")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST:
        pytest.skip("the device is written for the C++ interface of newer versions of torch")
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("needs g++ and ninja to compile the device")
    path = os.pathsep.join([str(ROOT), str(TOOL), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/device/ghost_cases.py"],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
