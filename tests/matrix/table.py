"""The matrix as a section of docs/architectures.md: which technique is right under which condition, and what is refused."""

from __future__ import annotations

from collections import defaultdict

from rich.progress import track

from .cells import CONDITIONS, TECHNIQUES, cells
from .hand import FAMILIES

TITLE = "## What works under which condition, and what is refused"
TEXT = f"""
Twenty families, tiny, under {len(CONDITIONS)} conditions, by {len(TECHNIQUES)} techniques: {", ".join(TECHNIQUES)} (runs and generation
under edits, a sweep over heads, patching, gradient x input, the logit lens, an edge of the circuit graph). *equal*: all
seven give the numbers of plain torch hooks on the native module (an adapted model: on its twin with merged weights; a GGUF file: on
what transformers reads). A number stands for what is refused by name, below; *-*: there is no such model. `tests/matrix` holds every
cell in place.
"""


def section() -> str:
    reasons: dict[str, int] = {}
    lines = [f"| family | {' | '.join(CONDITIONS)} |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for family in track(FAMILIES, description="filling the matrix"):
        shown = [_cell(cells(family, condition), reasons) for condition in CONDITIONS]
        lines.append(f"| {family} | {' | '.join(shown)} |")
    notes = [f"{n}. {reason}" for reason, n in reasons.items()]
    return "\n".join([TITLE, TEXT, *lines, "", *notes, ""])


def _cell(found: dict[str, str], reasons: dict[str, int]) -> str:
    """ "equal", or the techniques that are not, with the numbers of their reasons."""
    if all(said.startswith("not there") for said in found.values()):
        return "-"
    by_reason: dict[int, list[str]] = defaultdict(list)
    for technique, said in found.items():
        if said != "equal":
            by_reason[reasons.setdefault(_general(said), len(reasons) + 1)].append(technique)
    return "; ".join(f"{', '.join(names)} ({n})" for n, names in by_reason.items()) or "equal"


def _general(said: str) -> str:
    """A refusal without its numbers and class names, so that it stands once."""
    words = (
        said.removeprefix("refused: ")
        .split(" (with no edges on")[0]
        .split(" (logits are")[0]
        .split(" (RuntimeError")[0]
    )
    words = " ".join("a masked model" if w.endswith("ForMaskedLM") else w for w in words.split()).replace(
        "a a masked", "a masked"
    )
    return words.replace("generate for prompts", "run prompts").replace("pad on the right, or ", "")
