"""A workspace as a Jupyter notebook (format 4.5): the cells make anew what the page showed.

All code is written here, from the state alone: what a person typed stands in it as quoted text, and no code from a
workspace file is ever put into a cell. Views that were saved come along as outputs, so that the notebook shows something
before it is run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pellucid.errors import PellucidError
from pellucid.model import Model
from pellucid.views.hosts import output
from pellucid.views.markup import visible
from pellucid.views.question import Question, read_at, with_mask
from pellucid.views.schema import Document
from pellucid.workbench.answers import answers, generates
from pellucid.workbench.edits import edit_lines, opening
from pellucid.workbench.hub import Hub
from pellucid.workbench.messages import Pane, State
from pellucid.workbench.panels import posed

SAVED = "# This view was saved with the workspace; the cells above make such views anew."
VIEWS = {
    "lens": "pl.lenses.logit_lens(model, prompt, edits=edits).show()",
    "attention": "pl.attention.patterns(model, prompt, edits=edits).show()",
    "anatomy": "model.anatomy",
}
MEASURED = {  # need an answer to be measured
    "tokens": "pl.attribution.gradient_x_input(model, prompt, metric).show()",
    "contributions": 'pl.lenses.direct_logit_attribution(model, prompt, answer, by="head", positions=position).show()',
    "heads": 'pl.causal.ablation(model, prompt, over="{prefix}layers.*.attn.heads.*", metric=metric).show()',
    "neurons": 'pl.lenses.direct_logit_attribution(model, prompt, answer, by="neuron", positions=position).top(50)',
}
PATCHING = 'pl.causal.patching(model, prompt, other, over="{prefix}layers.*.resid_pre@*", metric=metric).show()'


def notebook(hub: Hub, state: State, documents: Sequence[Document]) -> bytes:
    """The .ipynb file."""
    cells = [_text("# From the pellucid workbench\n\nEach prompt below stands alone: run the cells from the top.")]
    for i, pane in enumerate(state.panes):
        cells += [_text(f"## Prompt {i + 1}"), *_pane(hub, pane)]
    for shown in documents:
        cells.append(_code(SAVED, [{"output_type": "display_data", "metadata": {}, "data": {"text/html": output(shown), "text/plain": visible(shown.title)}}]))  # fmt: skip
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    return json.dumps(whole, ensure_ascii=False, indent=1).encode()


def _pane(hub: Hub, pane: Pane) -> list[dict[str, Any]]:
    opened = next((each for each in hub.models.values() if each.card.name == pane.model), None)
    model = None if opened is None else opened.model
    prompt = pane.prompt if model is None else with_mask(model, pane.prompt)[0]
    at = read_at(model, prompt) if model is not None and prompt.strip() else -1
    lines = [*opening(f"pl.load({pane.model!r})" if model is None else model.opened), f"prompt = {prompt!r}"]
    if pane.other:
        lines.append(f"other = {pane.other if model is None else with_mask(model, pane.other)[0]!r}")
    cells = [_code("\n".join(lines)), _code("\n".join(edit_lines(pane.edits, pane.other, model, at)))]
    asked = _asked(model, pane)
    answered = _answer(model, bool(pane.other), at) if asked is None else _about(asked)
    if answered:
        cells.append(_code("\n".join(answered)))
    if pane.generate and (model is None or generates(model)):
        cells.append(_code(f"print(model.generate(prompt, edits=edits, max_new_tokens={int(pane.generate)}))"))
    prefix = "" if model is None else model.anatomy.stacks[0].prefix
    for view in dict.fromkeys(("lens", *pane.views)):
        line = VIEWS.get(view) or (MEASURED.get(view) if answered else None)
        if asked is not None and view in ("lens", "contributions", "neurons") and asked.lacks("direct"):
            line = None
        line = PATCHING if view == "patching" and pane.other and answered else line
        if line is not None and not (view == "lens" and not answered):
            cells.append(_code(line.replace("{prefix}", prefix)))
    return cells


def _asked(model: Model | None, pane: Pane) -> Question | None:
    """What the page asked about, where that is more than the model's own choice among words or classes."""
    if model is None or not pane.prompt.strip():
        return None
    kind = answers(model).kind
    if kind in ("word", "class", "") and not pane.answer.strip():
        return None
    with suppress(PellucidError):  # as the page said
        return posed(model, pane.prompt, pane.other, answer=pane.answer, word=pane.word)[0]
    return None


def _about(question: Question) -> list[str]:
    """The metric of an answer that was named."""
    named = (
        []
        if question.target is None
        else [f"position, answer = {question.last_first}, {question.word(question.target)!r}"]
    )
    if question.kind == "span":
        named = []
    return [
        "run, edited = model.run(prompt), model.run(prompt, edits=edits)",
        *named,
        question.metric_code,
        "model.score(run, metric), model.score(edited, metric)",
    ]


def _answer(model: Model | None, pair: bool, at: int) -> list[str]:
    """The likeliest answers without and with the edits, and the metric; nothing for a model that gives vectors."""
    module: Any = None if model is None else model.module
    if "Classification" in type(module).__name__:
        return [
            "run, edited = model.run(prompt), model.run(prompt, edits=edits)",
            "position, answer = None, int(run.logits[0].argmax())",
            "metric = pl.metrics.class_logit(answer)",
            "run.logits[0].softmax(-1), edited.logits[0].softmax(-1)",
        ]
    if module is not None and module.get_output_embeddings() is None:
        return []
    rivals = ["model.run(other).logits[0, position].argmax()"] if pair else []
    rivals.append("run.logits[0, position].topk(2).indices[1]")
    return [
        f"position = {at}",
        "run, edited = model.run(prompt), model.run(prompt, edits=edits)",
        "answer = int(run.logits[0, position].argmax())",
        f"rival = next(i for i in map(int, [{', '.join(rivals)}]) if i != answer)",
        "metric = pl.metrics.logit_difference(answer, rival, position=position)",
        "for each in (run, edited):",
        "    likeliest = each.logits[0, position].softmax(-1).topk(10)",
        "    print([(model.tokenizer.decode([i]), round(float(p), 4)) for p, i in zip(*likeliest, strict=True)])",
    ]


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def _code(source: str, outputs: Sequence[Any] = ()) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "execution_count": None, "source": source, "outputs": list(outputs)}
