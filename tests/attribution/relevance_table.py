"""Through which families does relevance propagate? Writes the table of docs/relevance.md, one row for each model type.

    python -m tests.attribution.relevance_table [TYPE ...]

With types given it prints their rows and leaves the document alone.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.attribution.relevance_rules import Rules, opaque
from tests.zoo import build
from tests.zoo.build import entry, model_types
from tests.zoo.inputs import inputs
from tests.zoo.quirks import UNBUILDABLE

DOCUMENT = Path(__file__).parents[2] / "docs" / "relevance.md"
BEGIN, END = "<!-- table: made by python -m tests.attribution.relevance_table -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Row:
    """Where the largest logit at the last position goes; shares of it."""

    model_type: str
    refused: str = ""
    difference: float = 0.0  # of the logits under the rules from the plain ones
    missing: float = 0.0  # of tokens + constants from the logit, relative, with softmax held
    tokens: float = 0.0  # AttnLRP: what the tokens get ...
    biases: float = 0.0  # ... and what constants keep; the softmax has the rest


def account(model_type: str) -> Row:
    """One tiny random model on twelve random tokens."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = build(model_type)
        call = inputs(module, batch=1)
        with torch.no_grad():
            plain = main_output(module(**call))
        try:
            _, missing, *_ = _shares(module, call, hold_softmax=True)
            logits, _, tokens, biases = _shares(module, call, hold_softmax=False)
        except _Refused as error:
            return Row(model_type, refused=str(error))
    return Row(model_type, "", float((logits - plain).abs().max()), missing, tokens, biases)


class _Refused(Exception):
    pass


def _shares(module: torch.nn.Module, call: dict[str, Tensor], hold_softmax: bool) -> tuple[Tensor, float, float, float]:
    streams = {k: v for k, v in call.items() if k in ("input_ids", "decoder_input_ids", "inputs")}
    try:
        with torch.enable_grad(), Rules(module, streams, hold_softmax=hold_softmax) as rules:
            logits = main_output(module(**call))
        score = logits.reshape(-1, logits.shape[-1])[-1].max()
        leaves = [leaf for each in rules.tokens.values() for leaf in each]
        if not leaves:
            raise _Refused("it does not look its tokens up in an embedding")
        if unseen := rules.uncovered | opaque(score):
            raise _Refused(f"no rule for {', '.join(sorted(unseen))}")
        found = torch.autograd.grad(score, [*leaves, *rules.constants], allow_unused=True)
    except (RuntimeError, ValueError) as error:
        raise _Refused(str(error).split(". ")[0].split("\n")[0]) from error
    each = [
        0.0 if g is None else float((x.detach().double() * g).nan_to_num(0.0).sum())
        for x, g in zip([*leaves, *rules.constants], found, strict=True)
    ]
    tokens, biases, whole = sum(each[: len(leaves)]), sum(each[len(leaves) :]), float(score)
    missing = abs(tokens + biases - whole) / max(abs(tokens), abs(biases), abs(whole))
    return logits.detach(), missing, tokens / whole, biases / whole


def table(rows: list[Row]) -> str:
    lines = ["| type | class | unaccounted | tokens | constants | softmax |", "|---|---|---|---|---|---|"]
    for row in rows:
        if not row.refused:
            shares = f"{row.tokens:.2f} | {row.biases:.2f} | {1 - row.tokens - row.biases:.2f}"
            lines.append(f"| {row.model_type} | {entry(row.model_type).class_name} | {row.missing:.0e} | {shares} |")
    return "\n".join(lines)


def document(rows: list[Row]) -> str:
    """The generated part of docs/relevance.md."""
    fine, refused = [r for r in rows if not r.refused], [r for r in rows if r.refused]
    worst, moved = max(r.missing for r in fine), max(r.difference for r in fine)
    head = (
        f"Of {len(rows)} text model types, built tiny with random weights, {len(fine)} let relevance through. Their logits "
        f"under the rules differ from the plain ones by at most {moved:.0e}; with the softmax held (`cp-lrp`), tokens and "
        f"constants add up to the logit within {worst:.0e} of the largest of them."
    )
    causes = "\n".join(f"- **{r.model_type}**: {r.refused}" for r in refused)
    return f"{head}\n\nRefused:\n\n{causes}\n\n{table(fine)}"


def main() -> None:
    types = sys.argv[1:] or [e.model_type for e in model_types() if e.model_type not in UNBUILDABLE]
    rows = [account(t) for t in track(types, "relevance in the zoo")]
    if sys.argv[1:]:
        print(table(rows), *(f"{r.model_type}: {r.refused}" for r in rows if r.refused), sep="\n")
        return
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{document(rows)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
