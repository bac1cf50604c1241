"""Which architectures does pellucid open, and what is proven of each? Writes docs/architectures.md.

    python -m tests.zoo.table [-n JOBS] [--json FILE] [--matrix] [TYPE ...]

With types given it prints their table and leaves the document alone; with --matrix it writes that section alone
(`tests/matrix/table.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import get_args

import transformers
from rich.progress import track

from tests.matrix import table as matrix

from .build import Entry, Kind, model_types
from .examine import Row, examine_all
from .known import KNOWN_FAILURES, REFUSED
from .quirks import UNBUILDABLE

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

HEADER = """\
# Architectures

Every text model type of transformers {version}, built tiny with random weights, opened and proven.
`make docs` writes this file; the tests in `tests/zoo` hold its facts in place.

| model types | |
|---|---|
| that transformers' auto classes offer as language model or text classifier | {known} |
| built tiny | {built} |
| opened | {opened} |
| completely proven: every proof holds that has something to be about | {proven} |
| of those, with attention, MLP or experts in a form of their own whose sites are refused by name | {refusing} |

*Stacks*: the number of blocks of each residual stream. *Attention*: met through transformers' attention
interface or among the operators of the attention module. *Proofs*: how many hold of those that apply.
*Error*: the largest relative error of a proof that holds, rounded up to a power of ten. *Refused*: the sites
that are not offered, and why.
"""
TITLES: dict[Kind, str] = {
    "causal-lm": "Causal language models",
    "masked-lm": "Masked language models",
    "seq2seq-lm": "Encoder-decoder language models",
    "classification": "Classifiers only",
}


def document(rows: list[Row]) -> str:
    """The whole of docs/architectures.md."""
    counts = {
        "known": len(rows) + len(UNBUILDABLE),
        "built": len(rows),
        "opened": sum("opens" not in row.failing for row in rows),
        "proven": sum(not row.failing for row in rows),
        "refusing": sum(not row.failing and row.entry.model_type in REFUSED for row in rows),
    }
    parts = [HEADER.format(version=transformers.__version__, **counts)]
    for kind in sorted(get_args(Kind), key=list(TITLES).index):
        parts.append(f"## {TITLES[kind]}\n\n{table([row for row in rows if row.entry.kind == kind])}")
    parts.append(f"## What is not proven, and why\n\n{_bullets(_causes(rows))}")
    refused = {t: [f"{p}: {why}" for p, why in proofs.items()] for t, proofs in sorted(REFUSED.items())}
    parts.append(f"## What is refused because of its form\n\n{_bullets(refused)}")
    parts.append(f"## What cannot be built\n\n{_bullets({t: [why] for t, why in UNBUILDABLE.items()})}")
    parts.append(matrix.section())
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    lines = [
        "| type | class | stacks | attention | proofs | error | refused |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.entry):
        cells = [
            row.entry.model_type,
            row.entry.class_name,
            _stacks(row),
            row.route,
            _proofs(row),
            _error(row),
        ]
        lines.append("| " + " | ".join([*cells, _refused(row)]) + " |")
    return "\n".join(lines) + "\n"


def _stacks(row: Row) -> str:
    return ", ".join(f"{name} {blocks}".strip() for name, blocks in row.stacks)


def _proofs(row: Row) -> str:
    if "opens" in row.failing:
        return "**cannot be opened**"
    count = f"{len(row.holding)} of {len(row.holding) + len(row.failing)}"
    return f"**{count}**, not {', '.join(row.failing)}" if row.failing else count


def _error(row: Row) -> str:
    worst = max((error for error in row.holding.values() if error is not None), default=None)
    if worst is None:
        return ""
    return "0" if worst == 0 else f"1e{math.ceil(math.log10(worst)):+03d}"


def _refused(row: Row) -> str:
    sites = defaultdict(list)
    for site, reason in row.refused.items():
        sites[reason].append(f"`{site}`")
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in sites.items()).replace("|", "\\|")


def _causes(rows: list[Row]) -> dict[str, list[str]]:
    """For each type with failing proofs, the committed causes, or else the words of the proof."""
    return {
        row.entry.model_type: [
            f"{proof}: {KNOWN_FAILURES.get(row.entry.model_type, {}).get(proof, detail)}"
            for proof, detail in row.failing.items()
        ]
        for row in sorted(rows, key=lambda row: row.entry)
        if row.failing
    }


def _bullets(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"- **{name}**: {'; '.join(why)}" for name, why in reasons.items()) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.table")
    parser.add_argument("types", nargs="*", help="model types (default: all, and write the document)")
    parser.add_argument("-n", "--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file too, with full detail")
    parser.add_argument("--matrix", action="store_true", help="write only the section on families and conditions")
    options = parser.parse_args()
    if options.matrix:
        before = DOCUMENT.read_text().partition(matrix.TITLE)[0].rstrip("\n")
        DOCUMENT.write_text(f"{before}\n\n{matrix.section()}")
        return

    entries = _entries(options.types)
    progress = track(examine_all(entries, options.jobs), total=len(entries), description="opening the zoo")
    rows = sorted(progress, key=lambda row: row.entry)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if options.types:
        print(table(rows), _bullets(_causes(rows)), sep="\n")
    else:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(rows))
        print(f"{DOCUMENT}: {sum(not row.failing for row in rows)} of {len(rows)} completely proven")


def _entries(types: list[str]) -> list[Entry]:
    buildable = [entry for entry in model_types() if entry.model_type not in UNBUILDABLE]
    unknown = set(types) - {entry.model_type for entry in buildable}
    if unknown:
        sys.exit(f"not in the zoo: {', '.join(sorted(unknown))}")
    return [entry for entry in buildable if not types or entry.model_type in types]


if __name__ == "__main__":
    main()
