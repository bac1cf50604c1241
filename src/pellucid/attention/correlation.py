"""Do attention weights agree with other ways to say which token mattered?

For each prompt the tokens are ranked by attention and by measures that ask the model itself, and the rankings are
compared by Kendall's tau-b (Jain and Wallace 2019, section 4.1):

    gradient        |x_t . dy/dx_t|, x_t the embedding of token t, y the logit of the prediction
    leave-one-out   tv(prediction, prediction without token t), the token really removed

Attention has as many readings as a model has layers and heads. `measures` are some of

    last layer, all layers    mean over heads (and layers) of what a token gets from the rows the output reads
    rollout, flow, norms      attention rollout, attention flow, norm-weighted attention of the last layer, in those rows
    relevance                 Chefer et al.

Special tokens are not compared: they cannot be left out. Low agreement does not prove attention wrong (gradients and
leave-one-out also disagree: that row is the ceiling to read the others by), but it means that attention cannot stand
in for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.attention.comparing import last_residual, moved, rows_read
from pellucid.attention.flow import flow
from pellucid.attention.gradients import relevances
from pellucid.attention.norms import norm_weighted
from pellucid.attention.patterns import asked, attended, single, special
from pellucid.attention.rollout import rollout
from pellucid.corpus import read_each
from pellucid.engine.edits import Edit
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

MEASURES = ("last layer", "all layers", "rollout", "flow", "norms", "relevance")
REFERENCES = ("gradient", "leave-one-out")
ROWS = 32  # shortened prompts run at a time


@technique
def attention_correlation(
    model: Model,
    prompts: Sequence[Any] | str,
    *,
    measures: Sequence[str] = ("last layer", "all layers", "rollout", "norms", "relevance"),
    edits: Sequence[Edit] = (),
    seed: int = 0,
) -> Result:
    """Kendall's tau between attention and gradients, attention and leave-one-out, over the tokens of each prompt.

    Gives `tau` [measure, reference], the mean over prompts, with its bootstrap interval `low`, `high`, `significant`,
    the share of prompts whose tau differs from 0 at p < .05, and `by_prompt` [measure, reference, prompt]; the measure
    "gradient" compares the references with one another. One-stack models that predict something; InputError for an
    unknown measure or prompts with fewer than three ordinary tokens.

    >>> attention_correlation(classifier, ["A dull and lifeless film."]).tau
    <xarray.DataArray 'tau' (measure: 6, reference: 2)>...
    """
    from scipy.stats import kendalltau

    texts = read_each(model, prompts)
    for name in measures:
        if name not in MEASURES:
            raise InputError(f"unknown measure {name!r}{nearest(name, MEASURES)}")
    if len(model.anatomy.stacks) > 1:
        raise InputError("the correlation is for models of one stack: this one has several")
    rows = [*measures, "gradient"]
    taus, chances = np.full((2, len(rows), len(REFERENCES), len(texts)), np.nan)
    for b, text in enumerate(texts):
        inputs = single(model, text)
        usable = np.flatnonzero(~special(model, inputs.stream("")))
        if len(usable) < 3:
            raise InputError(f"prompt {b} has {len(usable)} ordinary tokens: expected at least 3")
        scores = token_scores(model, inputs, measures, edits)
        references = {"gradient": scores["gradient"], "leave-one-out": leave_one_out(model, inputs, usable, edits)}
        for i, name in enumerate(rows):
            for j, other in enumerate(REFERENCES):
                if name != other:
                    taus[i, j, b], chances[i, j, b] = kendalltau(scores[name][usable], references[other][usable])
    intervals = np.array([[interval(taus[i, j], seed) for j in range(len(REFERENCES))] for i in range(len(rows))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the gradient beside itself is empty
        mean = np.nanmean(taus, -1)
    two = ("measure", "reference")
    data = xr.Dataset(
        {
            "tau": (two, mean), "low": (two, intervals[..., 0]), "high": (two, intervals[..., 1]),
            "significant": (two, np.where(np.isnan(mean), np.nan, (chances < 0.05).mean(-1))),
            "by_prompt": ((*two, "prompt"), taus),
        },
        {"measure": rows, "reference": list(REFERENCES)},
    )  # fmt: skip
    return Result(data, kind="attention correlation", title="Does attention agree with the model?")


def token_scores(
    model: Model, inputs: Inputs, measures: Sequence[str] = MEASURES, edits: Sequence[Edit] = ()
) -> dict[str, np.ndarray]:
    """Name -> [token] of some `MEASURES` and of "gradient", on one prompt (under edits)."""
    last = last_residual(model)
    found = attended(
        model, inputs, edits, grad_of=asked(model, inputs).metric, keep=["embed", *([last] if last else [])]
    )
    read = rows_read(model, found.run).double()
    layers = [x.double().mean(0) for x in found.values[found.main]]
    stream = inputs.stream("")
    where = slice(int(stream.starts[0]), int(stream.starts[0]) + int(stream.lengths[0]))
    x, slope = (values[0, where].double() for values in (found.run.tensor("embed"), found.run.grad("embed")))
    made = {"gradient": (x * slope).sum(-1).abs().cpu().numpy()}
    for name in measures:
        if name in ("last layer", "all layers"):
            made[name] = (read @ (layers[-1] if name == "last layer" else torch.stack(layers).mean(0))).numpy()
        elif name == "rollout":
            made[name] = read.numpy() @ rollout(model, inputs, edits=edits).values[-1]
        elif name == "norms":
            made[name] = read.numpy() @ norm_weighted(model, inputs, edits=edits).together.values[-1]
        elif name == "relevance":
            made[name] = (read @ relevances(found)[found.main.stack, found.main.stack]).numpy()
        else:
            chosen = read.nonzero().flatten()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # whether it is degenerate is seen in the numbers
                flows = flow(model, inputs, queries=chosen.tolist(), edits=edits).values
            made[name] = read[chosen].numpy() @ flows
    return made


def leave_one_out(
    model: Model, inputs: Inputs, tokens: Sequence[int] | np.ndarray, edits: Sequence[Edit] = ()
) -> np.ndarray:
    """[token] how far the prediction moves when a token is removed; 0 for those not asked about."""
    stream, question = inputs.stream(""), asked(model, inputs)
    if stream.padded:
        raise InputError("the prompt is padded: give it without padding")
    if question.kind == "span":
        raise Refused(
            f"{model.name} answers at every token, so that without one token there is no answer to compare with"
        )
    n = stream.ids.shape[1]
    with torch.no_grad():
        before = question.distribution(model.run(inputs, edits=edits))
        made = np.zeros(n)
        gone = np.asarray(tokens)
        at = question.position
        nearer = question if at is None or at < 0 else replace(question, position=at - 1)
        # a token before a mask moves it by one
        sides = ((gone, question),) if nearer is question else ((gone[gone < at], nearer), (gone[gone > at], question))
        for side, there in sides:
            for start in range(0, len(side), ROWS):
                part = side[start : start + ROWS]
                left = torch.tensor([[i for i in range(n) if i != t] for t in part])
                shorter = {k: _shortened(v, n, left) for k, v in inputs.tensors.items()}
                made[part] = moved(there.distribution(model.run(shorter, edits=edits)), before).numpy()
    return made


def _shortened(x: Any, n: int, left: torch.Tensor) -> Any:
    """A tensor [1, n] with the columns `left` [row, n - 1]; anything else as it is."""
    return x[0, left.to(x.device)] if isinstance(x, torch.Tensor) and x.shape == (1, n) else x
