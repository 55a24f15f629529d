"""What can keep an export from being written."""

from importlib import import_module
from typing import Any


class ExportError(ValueError):
    """An export cannot be written; the message says why and what would be right."""


def require(module: str, export_format: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name, such as `pyarrow.parquet`.
        export_format: the format that needs it.
        extra: the extra of this package that brings it.

    Raises:
        ExportError: the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or package).partition(".")[0] != package:
            raise
        raise ExportError(f"--format {export_format} needs {package}: pip install 'moescope[{extra}]'") from error
