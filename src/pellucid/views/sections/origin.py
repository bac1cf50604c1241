"""How was this made? Everything needed to make it again."""

from __future__ import annotations

from collections.abc import Sequence

from pellucid.results import Provenance
from pellucid.views.maps import anatomy
from pellucid.views.markup import details, join, table, tag, token
from pellucid.views.page import Section
from pellucid.views.question import Question, described
from pellucid.views.schema import Document


def origin(question: Question, others: Sequence[Section]) -> Section:
    model = question.model
    made = Provenance("report", model.name, revision=model.loaded.revision, digest=model.digest, inputs=question.text)
    proofs = [p for p in model.anatomy.proofs if p.holds is not None]
    failed = [p.name for p in proofs if not p.holds]
    facts = [
        ("model", model.name), ("class", type(model.module).__name__), ("size", described(model)),
        *([("revision", made.revision)] if made.revision else []), ("weights", f"digest {made.digest}, {str(model.loaded.dtype).removeprefix('torch.')}"),
        ("map", f"{len(proofs) - len(failed)} of {len(proofs)} proofs hold on these weights" + (f"; failed: {', '.join(failed)}" if failed else "")),
        ("prompt", join(token(t) for t in question.tokens)),
        *([("counterfactual", question.counterfactual)] if question.counterfactual else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in made.versions.items())), ("made", f"{made.created} (UTC)"),
    ]  # fmt: skip
    runs = [r.provenance for s in others for r in s.results]
    rows = [
        (
            p.method,
            "" if p.seed is None else str(p.seed),
            ", ".join(f"{k} {v!r}" for k, v in p.arguments.items() if v is not None),
        )
        for p in runs[:24]
    ]
    figure = join(
        tag("div", table([], facts), class_="facts"),
        details(
            "The methods and their arguments", tag("div", table(["method", "seed", "arguments"], rows), class_="facts")
        ),
    )
    lead = "The page holds everything it shows and asks no network for anything. In tokens ␣ is a space, ⏎ a line end, ⇥ a tab; layers, heads and positions are counted from 0."
    return Section(
        "origin",
        "How this was made",
        "How was this made?",
        lead,
        figure,
        (Document(title="What the model is made of", data=anatomy(model.anatomy)),),
        python=question.code("print(model.anatomy)"),
    )
