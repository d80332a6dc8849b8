"""A headless Chromium that opens pages: for pictures of the documentation, and for the tests of the report's page.

The variable ROCR_CHROMIUM names the browser; without it the first of NAMES on PATH is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

VARIABLE = "ROCR_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = (
    f"No Chromium was found: install it (Debian: apt install chromium), so that one of {', '.join(NAMES)} is on PATH, "
    f"or set {VARIABLE} to its file."
)


def find_browser() -> str | None:
    """Return the path of the browser, or None if there is none."""
    named = os.environ.get(VARIABLE)
    return next(filter(None, map(shutil.which, (named,) if named else NAMES)), None)


def open_page(folder: Path, *arguments: str) -> str:
    """Open a page, and return what Chromium writes to stdout.

    Args:
        folder: Folder for the browser's profile.
        arguments: Options of Chromium, and the page.

    Raises:
        RuntimeError: There is no browser, it failed, or the page wrote to its console.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError(MISSING)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{browser} ended with {done.returncode}: {done.stderr[-2000:]}")
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if messages:
        raise RuntimeError(f"The page wrote to its console: {messages}")
    return done.stdout
