"""Make the pictures of docs/img from the packaged model: of its report and of the workbench: python scripts/screenshots.py

Needs Node, Chromium and the packages of web/ (npm ci). With --report FILE, of a report that is there already; with
--only report or --only workbench, half of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from demo_model import smollm2

ROOT = Path(__file__).resolve().parents[1]
PROMPT, OTHER = "The capital of France is", "The capital of Italy is"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--report", type=Path)
    options.add_argument("--only", choices=("report", "workbench"))
    given = options.parse_args()
    (ROOT / "docs" / "img").mkdir(exist_ok=True)
    if given.only != "workbench":
        report(given.report)
    if given.only != "report":
        workbench()


def report(made: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if made is None:
            import pellucid
            from pellucid.views.report import build

            made = Path(folder) / "report.html"
            made.write_text(build(pellucid.load(str(smollm2())), PROMPT, counterfactual=OTHER).html, encoding="utf-8")
        pictures("screenshots.mjs", str(made.resolve()))


def workbench() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pellucid", "workbench", str(smollm2()), "--no-browser", "--folder", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = next((found.group() for line in server.stdout if (found := re.search(r"http://\S+", line))), None)
            if address is None:
                sys.exit("the workbench did not start")
            pictures("workbench_pictures.mjs", address)
        finally:
            server.terminate()
            server.wait()


def pictures(script: str, of: str) -> None:
    subprocess.run(["node", f"e2e/{script}", of, str(ROOT / "docs" / "img")], cwd=ROOT / "web", check=True)


if __name__ == "__main__":
    main()
