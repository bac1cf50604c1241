"""Which examples in docstrings and docs are not run, and why?

One that needs what no test has says so on its line, before the mark: `# needs a cluster  # doctest: +SKIP`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def skipped() -> Iterator[tuple[str, str]]:
    """Every example that is not run, `file:line`, and the reason that stands beside it ("" where none does)."""
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src").rglob("*.py"))]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"# *doctest:.*\+SKIP", line):
                (reason,) = re.findall(r"# (needs [^#]+?) *# doctest: \+SKIP", line) or [""]
                yield f"{file.relative_to(ROOT)}:{number}", reason


def counted() -> str:
    """One line for the test summary."""
    reasons = Counter(reason or "no reason" for _, reason in skipped())
    listed = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    return f"examples not run: {listed or 'none'}"
