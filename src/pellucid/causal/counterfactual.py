"""What is the least that must be said differently for the model to answer differently?

The smallest set of token substitutions that flips the prediction, for language models (next or masked token) and
classifiers. Candidates come from the gradient (Ebrahimi et al. 2018, "HotFlip"): to first order, putting token v in place of
token x at position t changes the margin by

    (E[v] - E[x]) . d margin / d embedding_t,      margin = logit(prediction) - max over other answers of logit

Every candidate is then run and judged by its exact margin. Sets grow one substitution at a time from a beam of the best, so
a set is returned only if no smaller one was found; whatever can be taken back without undoing the flip is taken back. Of
several that flip, the one whose words are closest (cosine of embeddings) is chosen. A substitute is of the kind of what it
replaces (a whole word for a whole word, a piece for a piece) and the text is cut into the very same tokens again. The
control is the share of random sets of the same size that flip as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.causal.embeddings import check_embeddings, first_stream, from_embeddings, vocabulary
from pellucid.causal.grid import described
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import special_ids
from pellucid.errors import InputError, at_least, listed
from pellucid.model import Model
from pellucid.question import Question, answer_text
from pellucid.results import Result
from pellucid.technique import settle, technique


@technique
def counterfactual(
    model: Model,
    prompt: str | Sequence[str],
    *,
    target: str | int | None = None,
    positions: str | int | None = None,
    max_changes: int = 4,
    candidates: int = 64,
    beam: int = 6,
    seed: int = 0,
) -> Result:
    """The smallest substitutions that flip the prediction of each prompt (to `target`, if given: a token or a class).

    `positions` narrows what may change, as a site does after `@` ("2:6", "'France'", an index). Gives for every prompt `text` and `substitutions` (empty where none of up to
    `max_changes` was found), `changes`, `before` and `after` (the predictions), the margin `clean` and `corrupted` (after),
    `random_flips`, the control, and `runs`, the prompts that were tried; `total_effect` is the mean change of the margin.

    >>> counterfactual(model, "The film was good", positions="'good'")
    The smallest change that flips the prediction
    counterfactual: changes, substitutions, text, after, before, ...
    """
    prompts = [prompt] if isinstance(prompt, str) else listed("prompt", prompt, "a text, or several")
    at_least(1, max_changes=max_changes, candidates=candidates, beam=beam)
    if not prompts:
        raise InputError("no prompt was given: expected a text, or several")
    settle(target=target)  # None: any other answer, not the prediction that is asked about first
    searches = [Search.of(model, text, target, positions) for text in prompts]
    rng = np.random.default_rng(seed)
    rows = [search.row(search.smallest(max_changes, candidates, beam), rng) for search in searches]
    data = xr.Dataset({name: ("prompt", [row[name] for row in rows]) for name in rows[0]}, {"prompt": prompts})
    change = data["corrupted"].values - data["clean"].values
    data = data.assign(described("total_effect", change, seed, "total_"))
    return Result(data, kind="counterfactual", title="The smallest change that flips the prediction")


@dataclass(eq=False)
class Search:
    """One prompt: its tokens, its prediction, the positions that may change and what may stand there."""

    model: Model
    inputs: Inputs
    asked: Question  # what the model predicts
    target: int | None
    free: list[int]
    table: Tensor  # embeddings of the vocabulary
    kinds: np.ndarray
    clean: float = 0.0
    runs: int = 0

    @classmethod
    def of(cls, model: Model, text: str, target: Any, positions: Any) -> Search:
        asked = Question.of(model, text)
        if asked.kind not in ("next token", "masked token", "class"):
            raise InputError(f"{model.name} gives a {asked.kind} here: expected a model of tokens or classes")
        if model.anatomy.answering.size == 1:
            raise InputError(f"{model.name} has a single class: there is no other prediction to flip to")
        inputs = asked.inputs
        check_embeddings(model, inputs)
        stream = first_stream(inputs)
        columns = stream.find(positions)
        special = special_ids(model.tokenizer)
        where = range(stream.ids.shape[1]) if columns is None else columns[0].tolist()
        free = [i for i in where if int(stream.ids[0, i]) not in special]
        if not free:
            raise InputError(
                f"no token of {text!r} may be changed: expected `positions` to name some that are not special"
            )
        table = vocabulary(model)
        wanted = None if target is None else Question.of(model, inputs, target).answers[0].id
        if wanted == asked.answers[0].id:
            raise InputError(f"the prediction of {text!r} is the target {target!r} already: there is nothing to flip")
        made = cls(model, inputs, asked, wanted, free, table, _kinds(model, len(table)))
        made.clean = float(made.margins([stream.ids[0]])[0])
        return made

    @property
    def prediction(self) -> int:
        return self.asked.answers[0].id

    # ---- one answer

    def logits(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """[row, answer] for tokens [row, position], or for embeddings in their place."""
        inputs = self.inputs.repeated(len(ids))
        inputs = replace(inputs, tensors=inputs.tensors | {"input_ids": ids})
        given, edits = (inputs, []) if vectors is None else from_embeddings(self.model, inputs, vectors)
        logits = self.model.run(given, edits=edits).logits
        self.runs += len(ids)
        return logits if self.asked.position is None else logits[:, self.asked.position]

    def margin(self, logits: Tensor) -> Tensor:
        """[row] how far the prediction leads; negative once it has flipped."""
        mine = logits[:, self.prediction]
        if self.target is not None:
            return mine - logits[:, self.target]
        others = logits.clone()
        others[:, self.prediction] = -torch.inf
        return mine - others.amax(1)

    def margins(self, rows: list[Tensor]) -> np.ndarray:
        with torch.no_grad():
            found = [self.margin(self.logits(torch.stack(rows[i : i + 64]))) for i in range(0, len(rows), 64)]
        return torch.cat(found).double().cpu().numpy()

    # ---- sets of substitutions

    def smallest(self, max_changes: int, candidates: int, beam: int) -> Tensor | None:
        """The tokens [position] of the smallest set that flips; None if there is none among the candidates."""
        start = first_stream(self.inputs).ids[0]
        states = [start]
        for _ in range(min(max_changes, len(self.free))):
            tried = {tuple(row.tolist()): row for state in states for row in self._candidates(state, start, candidates)}
            rows = list(tried.values())
            if not rows:
                return None
            margins = self.margins(rows)
            order = np.argsort(margins)
            flips = [self._taken_back(rows[i], start) for i in order if margins[i] < 0 and self.stable(rows[i])]
            if flips:
                return min(flips, key=lambda row: (int((row != start).sum()), -self._closeness(row, start)))
            states = [rows[i] for i in order[:beam]]
        return None

    def _candidates(self, ids: Tensor, start: Tensor, n: int) -> list[Tensor]:
        """The `n` further substitutions that by the gradient lower the margin most."""
        vectors = self.table[ids][None].clone().requires_grad_()
        with torch.enable_grad():
            margin = self.margin(self.logits(ids[None], vectors))
            (gradient,) = torch.autograd.grad(margin.sum(), vectors)
        free = [i for i in self.free if ids[i] == start[i]]
        if not free:
            return []
        gain = gradient[0, free] @ self.table.T - (gradient[0, free] * vectors[0, free].detach()).sum(-1, keepdim=True)
        for row, i in zip(gain, free, strict=True):
            row[torch.from_numpy(~self.allowed(int(start[i])))] = torch.inf
        best = gain.flatten().topk(min(n, gain.numel()), largest=False)
        made = []
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value < torch.inf:
                row = ids.clone()
                row[free[index // gain.shape[1]]] = index % gain.shape[1]
                made.append(row)
        return made

    def allowed(self, token: int) -> np.ndarray:
        """[vocabulary] what may replace a token: others of its kind."""
        mine = self.kinds == self.kinds[token]
        mine[token] = False
        return mine & (self.kinds != "")

    def stable(self, ids: Tensor) -> bool:
        """Whether the text of these tokens is cut into them again, so that a person could type it."""
        tokenizer = self.model.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return bool(tokenizer(text)["input_ids"] == ids.tolist())

    def _taken_back(self, ids: Tensor, start: Tensor) -> Tensor:
        """Without the substitutions that the flip does not need: none of those left can be taken back."""
        changed = (ids != start).nonzero().flatten().tolist()
        for i in changed if len(changed) > 1 else []:
            less = ids.clone()
            less[i] = start[i]
            if self.margins([less])[0] < 0 and self.stable(less):
                return self._taken_back(less, start)
        return ids

    def _closeness(self, ids: Tensor, start: Tensor) -> float:
        where = ids != start
        return float(torch.cosine_similarity(self.table[ids[where]], self.table[start[where]], dim=-1).mean())

    # ---- what is reported

    def row(self, found: Tensor | None, rng: np.random.Generator) -> dict[str, Any]:
        start = first_stream(self.inputs).ids[0]
        tokens = self.model.tokenizer
        if found is None:
            none = {"changes": np.nan, "corrupted": np.nan, "random_flips": np.nan}
            words = {"substitutions": "", "text": "", "after": ""}
        else:
            where = (found != start).nonzero().flatten().tolist()
            with torch.no_grad():
                logits = self.logits(found[None])
            pairs = [f"{i}: {tokens.decode([int(start[i])])!r} -> {tokens.decode([int(found[i])])!r}" for i in where]
            text = tokens.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            flips = float((self.margins([self._random(start, len(where), rng) for _ in range(64)]) < 0).mean())
            none = {"changes": float(len(where)), "corrupted": float(self.margin(logits)[0]), "random_flips": flips}
            words = {"substitutions": "; ".join(pairs), "text": text, "after": self._answer(int(logits[0].argmax()))}
        before = self._answer(self.prediction)
        return {"changes": none["changes"], **words, "before": before, "clean": self.clean, **none, "runs": self.runs}

    def _random(self, start: Tensor, n: int, rng: np.random.Generator) -> Tensor:
        row = start.clone()
        for i in rng.choice(self.free, n, replace=False):
            choices = self.allowed(int(start[i])).nonzero()[0]
            row[i] = int(rng.choice(choices)) if len(choices) else row[i]
        return row

    def _answer(self, index: int) -> str:
        return answer_text(self.model, self.asked.kind, index)


def _kinds(model: Model, size: int) -> np.ndarray:
    """[vocabulary] the kind of each token: a word's beginning, a piece of a word, a number, or marks; "" for special ones."""
    special = special_ids(model.tokenizer)
    kinds = np.full(size, "", dtype=object)
    for i in range(min(size, len(model.tokenizer))):
        token = model.tokenizer.convert_ids_to_tokens(i)
        if i not in special and token:
            text = token.lstrip("\u0120\u2581").removeprefix("##")
            sort = "word" if text.isalpha() else "number" if text.isdigit() else "marks"
            # byte-level and sentencepiece tokens mark beginnings, WordPiece marks what goes on
            begins, goes_on = token[:1] in "\u0120\u2581", token.startswith("##")
            kinds[i] = f"{sort} {begins} {goes_on}"
    return kinds
