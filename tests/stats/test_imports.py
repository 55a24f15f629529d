"""The statistics need numpy and scipy alone."""

import subprocess
import sys

PROBE = """
import importlib, pkgutil, sys
for name in ("torch", "transformers", "vllm", "plotly"):
    sys.modules[name] = None  # any import of it raises
import moescope.stats
modules = [module.name for module in pkgutil.iter_modules(moescope.stats.__path__)]
for module in modules:
    importlib.import_module(f"moescope.stats.{module}")
print(" ".join(modules))
"""


def test_every_module_imports_without_torch_and_plotly() -> None:
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"activation", "correlation", "periodicity", "similarity"} <= set(result.stdout.split())
