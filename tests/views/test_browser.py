"""The views in a real browser: what a user sees, does with the keyboard, takes along; and that nothing leaves the page.

The claims stand in web/e2e/views.mjs. They need Node, the packages of web/ (`npm ci`) and Chromium.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.views import gallery

WEB = Path(__file__).parents[2] / "web"
CLAIMS = (
    re.findall(r'^  async "(.+)"\(\)', (WEB / "e2e" / "views.mjs").read_text(), re.MULTILINE) if WEB.is_dir() else []
)


def lacking() -> str:
    """What a browser test needs and does not find; CI installs all of it, so there it is an error."""
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        return "run `npm ci` in web/"
    if shutil.which("node") is None:
        return "install Node"
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    return "" if Path(chromium).exists() else f"install Chromium ({chromium})"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if lacking():
        assert not os.environ.get("PELLUCID_CI"), lacking()
        pytest.skip(f"no browser tests: {lacking()}")
    folder = tmp_path_factory.mktemp("views")
    gallery.write(folder)
    done = subprocess.run(["node", "e2e/views.mjs", str(folder)], cwd=WEB, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_browser(claim: str, outcome: dict[str, str]) -> None:
    assert outcome[claim] == ""
