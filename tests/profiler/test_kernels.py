"""Runs `kernel_cases.py` in a process of its own, in Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def test_every_kernel_equals_its_reference() -> None:
    if find_spec("triton") is None and "MOESCOPE_NO_SKIPS" not in os.environ:
        pytest.skip("Triton is not installed")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("kernel_cases.py")),
        ],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert "35 passed" in run.stdout
