"""Does the answer come from the concepts? What a fitted `Bottleneck` measures, on texts not trained on:

concept_auc, concept_accuracy      of predicted concepts (rare ones flatter the accuracy)
with_true, with_another_texts      accuracy with every concept set to the truth, to that of another text (must fall to chance)
ceiling                            the label from true concepts by logistic regression: what beats it leaks
within                             AUC of the label from z_k among texts with the same true concept, mean over k; .5 says no leak, and
                                   the control says where few texts put that
from_values, from_bits             the label from z, from 1[z > 1/2], by logistic regression
concepts_at_mean, residual_at_mean accuracy with the concepts, or the residual, at their mean: what the other one does alone
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from pellucid.controls import shuffled_labels
from pellucid.model import Model
from pellucid.tuning.concepts import Narrow, truth_of, where_read
from pellucid.tuning.data import Encoded
from pellucid.tuning.measuring import number_of, plain, shown


def seen(model: Model, bottleneck: Any, data: Encoded) -> dict[str, np.ndarray]:
    """[text, ...] concept logits and the residual's values."""
    found: dict[str, list[Tensor]] = {}
    for batch in shown(model, data, [bottleneck]):
        (edit,) = (e for e in batch.edits if isinstance(e, Narrow))
        with torch.no_grad():
            model.run(batch.inputs, keep=[edit.site], edits=batch.edits, logits=False)
        for name in ("logits", "rest"):
            if name in edit.seen:
                found.setdefault(name, []).append(where_read(edit.seen[name], batch, data).cpu())
    return {name: torch.cat(v).double().numpy() for name, v in found.items()}


def right(
    model: Model, bottleneck: Any, data: Encoded, known: np.ndarray | None = None, rest: np.ndarray | None = None
) -> np.ndarray:
    """[text] whether it is answered right with concepts [text, concept], or the residual, put in."""
    kept = None if known is None else torch.tensor(known, dtype=torch.float32)
    held = None if rest is None else torch.tensor(rest, dtype=torch.float32)
    found = []
    for batch in shown(model, data):
        edit = bottleneck.narrow(model, None if kept is None else kept[list(batch.rows)], held)
        found.append(plain(model, replace(batch, edits=(edit,)))[1])
    return np.concatenate(found)


def measures(model: Model, bottleneck: Any, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
    """The numbers of the module."""
    own, taught = (seen(model, bottleneck, each) for each in (test, train))
    z, of_train = (bottleneck.said_as(torch.from_numpy(each["logits"])).numpy() for each in (own, taught))
    found = {"accuracy": float(right(model, bottleneck, test).mean())}
    mean = np.broadcast_to(of_train.mean(0), z.shape)
    found["concepts_at_mean"] = float(right(model, bottleneck, test, mean).mean())
    if bottleneck.residual:
        found["residual_at_mean"] = float(right(model, bottleneck, test, None, taught["rest"].mean(0)).mean())
    labels = [
        None if each.labels is None else np.unique(np.asarray(each.labels).astype(str), return_inverse=True)
        for each in (train, test)
    ]
    sides = [None if each is None else each[1] for each in labels]
    if all(name in test.data.properties for name in bottleneck.names):
        truth = np.array(
            [[np.nan if v is None else float(v) for v in test.data.properties[n]] for n in bottleneck.names]
        ).T
        known = [~np.isnan(t) for t in truth.T]
        aucs = [
            roc_auc_score(t[k], s[k])
            for t, s, k in zip(truth.T, own["logits"].T, known, strict=True)
            if len(set(t[k])) > 1
        ]
        found["concept_auc"] = float(np.mean(aucs)) if aucs else np.nan
        found["concept_accuracy"] = float(((own["logits"] > 0) == truth)[~np.isnan(truth)].mean())
        found["with_true"] = float(right(model, bottleneck, test, truth).mean())
        other = truth[shuffled_labels(np.arange(len(truth)), seed)]
        found["with_another_texts"] = float(right(model, bottleneck, test, other).mean())
        if sides[1] is not None and len(set(sides[1])) == 2:
            found["within"] = _within(own["logits"], truth, sides[1])
        if sides[0] is not None and not np.isnan(truth).any():
            given = truth_of(train.data, bottleneck.names)[1]
            found["ceiling"] = _read(np.nan_to_num(given, nan=0.5), sides[0], truth, sides[1])
    if sides[0] is not None:
        soft = [1 / (1 + np.exp(-each["logits"])) for each in (taught, own)]
        found["from_values"] = _read(soft[0], sides[0], soft[1], sides[1])
        found["from_bits"] = _read(soft[0] > 0.5, sides[0], soft[1] > 0.5, sides[1])
    return found


def _within(scores: np.ndarray, truth: np.ndarray, y: np.ndarray) -> float:
    found = []
    for s, t in zip(scores.T, truth.T, strict=True):
        for value in (0, 1):
            rows = t == value
            if 0 < y[rows].sum() < rows.sum():
                auc = roc_auc_score(y[rows], s[rows])
                found.append(max(auc, 1 - auc))
    return float(np.mean(found)) if found else float("nan")


def _read(x: Any, y: Any, test: Any, labels: Any) -> float:
    """Accuracy of logistic regression fitted on one set and read on another."""
    if labels is None or len(set(y)) < 2:
        return float("nan")
    return float(LogisticRegression(max_iter=1000).fit(x, y).score(test, labels))


def verdict(data: xr.Dataset, residual: int, error: float) -> list[str]:
    """Sentences about a result of `fit`, what was found in front; `error` is two standard errors of an accuracy."""

    of = partial(number_of, data)
    own, control = of("accuracy"), of("accuracy", "control")
    said = []
    alone = of("concepts_at_mean")
    if alone >= own - error and own > of("residual_at_mean"):
        beside = (
            f"shuffled concepts do as well ({control:.2f} against {own:.2f}), and " if control >= own - error else ""
        )
        said.append(
            f"the concepts are not used: {beside}with them at their mean it answers {alone:.2f}, so the residual of {residual} is the "
            f"model (without it {of('residual_at_mean'):.2f})"
        )
    lost = own - of("with_true")
    if lost > error:
        said.append(f"it leaks: told the true concepts, accuracy falls from {own:.2f} to {own - lost:.2f}")
    if own > of("ceiling") + error:
        said.append(f"it leaks: {own:.2f} is more than true concepts can tell ({of('ceiling'):.2f})")
    told = (
        f"concepts of AUC {of('concept_auc'):.2f} (shuffled {of('concept_auc', 'control'):.2f}); accuracy {own:.2f}, with the true ones "
        f"{of('with_true'):.2f}, with another text's {of('with_another_texts'):.2f}, ceiling {of('ceiling'):.2f}"
    )
    return [*said, told]
