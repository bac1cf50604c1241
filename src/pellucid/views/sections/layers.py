"""When does the answer appear? The logit lens."""

from __future__ import annotations

import numpy as np

from pellucid.lenses import logit_lens
from pellucid.views.figures import Axis, Curve, curves, details, grid, table, token_axis
from pellucid.views.markup import join, percent, quoted, tag, token, visible
from pellucid.views.page import Section
from pellucid.views.question import Question
from pellucid.views.window import Window

TITLE = "When does the answer appear?"


def layers(question: Question, top: int) -> Section:
    assert question.target is not None and question.against is not None
    window = Window.of(question.answered, question.position)
    targets = [question.word(question.target), question.word(question.against)]
    found = logit_lens(question.model, question.inputs, top=top, targets=targets, positions=window.selector)
    names = [str(layer) for layer in found["layer"].values]
    guess, p = found["top_token"].values, found["probability"].values  # [layer, position, top]
    rank = found["target_rank"].values  # [layer, position, target]
    said = visible(question.target.text)
    tips = [
        ["\n".join([*(f"{visible(str(t))}\t{percent(v)}" for t, v in zip(guess[i, j], p[i, j], strict=True)), f"rank of {said}\t{int(rank[i, j, 0]) + 1}"])
         for j in range(p.shape[1])]
        for i in range(p.shape[0])
    ]  # fmt: skip
    at = window.positions.index(question.position)
    likely = np.exp(found["target_log_probability"].values[:, at])  # [layer, target]
    lines = [
        Curve(token(question.target.text), likely[:, 0], "first"),
        Curve(token(question.against.text), likely[:, 1], "second"),
    ]
    after = f"after {quoted(question.answered[question.position])}"
    rows = [
        (name, percent(a), int(r[at, 0]) + 1, percent(b)) for name, (a, b), r in zip(names, likely, rank, strict=True)
    ]
    columns = ["layer", f"{said}", "its rank", visible(question.against.text)]
    figure = join(
        grid(
            p[:, :, 0], Axis("layer", names), token_axis(window.cut(question.answered), window.positions), label=f"Logit lens: best guess by layer and token, {TITLE}",
            name="probability of the best guess", scale="amount", texts=guess[:, :, 0], tips=tips, marked=guess[:, :, 0] == question.target.text,
        ),
        window.note(len(question.answered)),
        tag("h3", f"The answer’s probability {after}, layer by layer"),
        curves(names, lines, label=f"Probability of {said} and {visible(question.against.text)} by layer"),
        details("As a table", table(columns, rows)),
    )  # fmt: skip
    lead = (
        "The model’s state after every layer, read as if it were the last: through the final norm and the unembedding (logit lens). "
        "Each cell shows the best guess for what follows that token; outlined where it is the answer. Point at a cell, or move with the arrow keys, for the top "
        f"{p.shape[2]}."
    )
    code = [f"lens = pl.lenses.logit_lens(model, prompt, top={top}, targets={targets!r})", "lens.show()"]
    return Section(
        "layers", "The layers", TITLE, lead, figure,
        care="early layers were never trained to be read this way, so a blank there is no proof that the answer is absent. "
        "The last row was checked against the model’s own output.",
        python=question.code(*code), shell=question.shell, finding=_finding(names, rank[:, at, 0], likely[:, 0], said_of(question)), results=(found,),
    )  # fmt: skip


def said_of(question: Question) -> str:
    assert question.target is not None
    return quoted(question.target.text)


def _finding(names: list[str], rank: np.ndarray, likely: np.ndarray, said: str) -> str:
    """From which layer on the answer leads for good."""
    if rank[-1] != 0:
        best = int(rank.argmin())
        return (
            f"{said} never ends up as the top guess: its best rank is {int(rank[best]) + 1}, after layer {names[best]}."
        )
    first = len(rank) - int(np.argmin(np.append(rank[::-1] == 0, False)))
    if first == 0:
        return f"{said} is the top guess from the embedding on."
    return (
        f"{said} becomes the top guess after layer {names[first]} ({percent(float(likely[first]))}; the last layer is {names[-1]}) and stays it; "
        f"{_after(names[first - 1])} it was at rank {int(rank[first - 1]) + 1}."
    )


def _after(layer: str) -> str:
    return "in the embedding" if layer == "embed" else f"after layer {layer}"
