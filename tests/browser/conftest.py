"""A headless Chromium that cannot reach the network.

The browser lives as long as a test file, not as long as the run: while it is open, playwright's event loop counts as
running, and no test could start its own.
"""

import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from browser import Opened, open_page, reopen

from moescope.viz.report_data import ReportData

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL in software
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def _cannot(reason: str) -> NoReturn:
    """Skip, or fail where nothing may be skipped."""
    if "MOESCOPE_NO_SKIPS" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    if find_spec("playwright") is None:
        _cannot("The browser tests need the Python package playwright.")
    program = os.environ.get("MOESCOPE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or shutil.which(program) is None:
        _cannot("The browser tests need a Chromium: on the search path, or named by MOESCOPE_CHROMIUM.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser: "Browser") -> "Iterator[BrowserContext]":
    """A context offline: what goes anywhere but to local files fails, and open_page reports it."""
    context = browser.new_context(offline=True)
    yield context
    context.close()


@pytest.fixture(scope="module")
def show(context: "BrowserContext") -> Callable[[Path, int], Opened]:
    """Opens a file at a width, always in the same page."""
    shown: list[Opened] = []

    def show(path: Path, width: int) -> Opened:
        if shown:
            return reopen(shown[0], path, width)
        shown.append(open_page(context, path, width))
        return shown[0]

    return show


@pytest.fixture(scope="session")
def make_report() -> Callable[..., ReportData]:
    """The maker of reports that the tests of the figures use."""
    return runpy.run_path(str(Path(__file__).parents[1] / "viz" / "conftest.py"))["build_report"]
