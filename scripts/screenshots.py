"""Make the pictures of docs/img from the packaged model's report: python scripts/screenshots.py

Needs Node, Chromium and the packages of web/ (npm ci). With --report FILE, of a report that is there already.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from demo_model import smollm2

ROOT = Path(__file__).resolve().parents[1]
PROMPT, OTHER = "The capital of France is", "The capital of Italy is"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--report", type=Path)
    report = options.parse_args().report
    with tempfile.TemporaryDirectory() as folder:
        if report is None:
            import pellucid
            from pellucid.views.report import build

            report = Path(folder) / "report.html"
            report.write_text(build(pellucid.load(str(smollm2())), PROMPT, counterfactual=OTHER).html, encoding="utf-8")
        pictures = ROOT / "docs" / "img"
        pictures.mkdir(exist_ok=True)
        subprocess.run(
            ["node", "e2e/screenshots.mjs", str(report.resolve()), str(pictures)], cwd=ROOT / "web", check=True
        )


if __name__ == "__main__":
    main()
