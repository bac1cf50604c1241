"""The workbench in a real browser, with the real server and a tiny model: what a user types, selects, changes and keeps.

The claims stand in web/e2e/workbench.mjs. They need Node, the packages of web/ (`npm ci`) and Chromium.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.views.test_browser import WEB, lacking

SCRIPT = WEB / "e2e" / "workbench.mjs"
CLAIMS = re.findall(r'^  (?:async )?"(.+)"(?:\(\)|:)', SCRIPT.read_text(), re.MULTILINE) if SCRIPT.is_file() else []


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if lacking():
        assert not os.environ.get("PELLUCID_CI"), lacking()
        pytest.skip(f"no browser tests: {lacking()}")
    folder = tmp_path_factory.mktemp("workspaces")
    command = [sys.executable, "-m", "tests.workbench.serve_tiny", str(folder)]
    server = subprocess.Popen(
        command, cwd=WEB.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_path()}
    )
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address, "the server did not start"
        done = subprocess.run(
            ["node", "e2e/workbench.mjs", address.group()], cwd=WEB, capture_output=True, text=True, timeout=500
        )
    finally:
        server.kill()
        server.communicate()
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _path() -> dict[str, str]:
    """This process's modules are found by the server as well."""
    return {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])}


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_browser(claim: str, outcome: dict[str, str]) -> None:
    assert outcome[claim] == ""
