"""Which layers does the model need, and for what?

Each layer (or its attention, or its MLP) is taken out, one at a time, and what is lost is measured: of ordinary text

    loss[layer] = nll without it - nll,     divergence = KL(p || p without it),     kept = share of tokens with the same first choice

and of every capability its own metric, edited minus unedited. Capabilities come apart from text: a layer whose removal costs .04
nats may be the one that holds induction. A layer is taken out by handing on what it was given, exact for every family, since
nothing before it has changed; all removals are one sweep that begins behind the layer (Sun et al. 2024, Lad et al. 2024).

Beside the truth stand the estimates that are read off one plain pass, each with its rank correlation with `loss`:

    block influence      1 - cos(h_l, h_l+1), mean over tokens                        Men et al. 2024
    angular distance     arccos(cos(h_l, h_l+1)) / pi                                 Gromov et al. 2024
    relative magnitude   |h_l+1 - h_l| / |h_l|                                        Samragh et al. 2023
    prediction depth     share of tokens whose answer, read by the logit lens, settles with this layer

None of them sees an attention sink: a layer that makes the first token's residual many times longer changes few angles, and
everything depends on it. `sink` says how many times longer; those of more than ten times are named in `attrs["sinks"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.causal.contrast import ask, numbers
from pellucid.causal.grid import described
from pellucid.corpus import Corpus, batches, inputs, longest
from pellucid.engine.edits import Ablate, Edit, Swap, aligned_values
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.engine.run import Run
from pellucid.errors import InputError, PellucidError, at_least
from pellucid.lenses import unembed
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.tasks import Prompts
from pellucid.technique import technique

Part = Literal["layer", "attn", "mlp"]
ESTIMATES = ("block influence", "angular distance", "relative magnitude", "prediction depth")
MEASURES = ("loss", "divergence", "kept")
SINK = 10.0  # times longer


@technique
def layer_importance(
    model: Model,
    texts: Any,
    capabilities: Mapping[str, Prompts | tuple[Any, Any]] | None = None,
    *,
    parts: Sequence[Part] = ("layer",),
    context: int = 96,
    tokens: int = 2048,
    batch: int = 2,
    seed: int = 0,
) -> Result:
    """What is lost without each layer of a language model (or without its attention or MLP).

    `texts` are what `pl.Corpus` takes; at most `tokens` tokens, one text a row or cut into rows of `context`, `batch` rows at a time. `capabilities` are
    tasks by name, or pairs (prompts, metric). Gives over `part` x `layer` `loss` (nats a token, with `low`, `high` and `p` over
    rows of text), `divergence` and `kept`; over `capability` x `part` x `layer` `effect` with `effect_low`, `effect_high`,
    `effect_p`, and `clean`; over `estimate` x `layer` `estimated`, over `estimate` `agreement`; over `layer` `sink`. NaN where a
    layer has no such part, Refused where none has. InputError for a model that does not predict the next token, or texts without two tokens.

    >>> layer_importance(model, texts, {"capitals": pl.tasks.capitals(model.tokenizer)}, parts=["layer", "mlp"])  # doctest: +SKIP
    """
    at_least(1, batch=batch, tokens=tokens)
    at_least(2, context=context)
    if not parts or isinstance(parts, str) or not set(parts) <= {"layer", "attn", "mlp"}:
        raise InputError(f"parts={parts!r}: expected a list of 'layer', 'attn' and 'mlp'")
    stack = model.anatomy.stacks[-1]
    if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
        raise InputError(f"{model.name} does not predict the next token of a text: there is no loss to compare")
    n = len(stack.blocks)
    fitting = min(context, longest(model))
    corpus = Corpus.of(texts, context=fitting, tokens=tokens, packed=False, long="windows")
    found: list[np.ndarray] = []
    seen: list[dict[str, np.ndarray]] = []
    for rows in batches(progress(list(corpus.rows(model)), "rows of text"), batch):
        if min(len(row.ids) for row in rows) < 2:
            continue
        given = inputs(model, rows)
        run = _run(model, given)
        seen.append(_estimates(model, run, n))
        found.append(_swept(model, given, run, parts, n, _reading(run)))
    if not found:
        raise InputError("there is no text of two tokens or more: give some ordinary text")
    values = np.concatenate(found, 2)  # [part, layer, row, measure]
    columns = described("loss", np.moveaxis(values[..., 0], 2, 0), seed, test=True)
    columns |= {name: values[..., i].mean(2) for i, name in enumerate(MEASURES) if i}
    data = xr.Dataset(
        {name: (("part", "layer"), x) for name, x in columns.items()}, {"part": list(parts), "layer": range(n)}
    )
    estimated = np.stack([np.concatenate([s[name] for s in seen], 1).mean(1) for name in ESTIMATES])
    sink = np.concatenate([s["sink"] for s in seen], 1).mean(1)
    data = data.assign(estimated=(("estimate", "layer"), estimated), sink=("layer", sink)).assign_coords(
        estimate=list(ESTIMATES)
    )
    if "layer" in parts:
        truth = columns["loss"][list(parts).index("layer")]
        data = data.assign(agreement=("estimate", [spearman(x, truth) for x in estimated]))
    data.attrs["sinks"] = [i for i in range(n) if sink[i] > SINK]
    for name, value in _capabilities(model, capabilities or {}, parts, n, seed).items():
        data[name] = value
    return Result(data, kind="layer importance", title=f"What is lost without each layer of {model.name}")


def _capabilities(
    model: Model, tasks: Mapping[str, Any], parts: Sequence[Part], n: int, seed: int
) -> dict[str, xr.DataArray]:
    made: dict[str, list[Any]] = {}
    for task in progress(list(tasks.values()), "capabilities"):
        prompts, metric = task if isinstance(task, tuple) else (task, None)
        asked = ask(model, prompts, metric)
        run = _run(model, asked.inputs)
        clean = asked.score(model, run)
        values = _swept(model, asked.inputs, run, parts, n, asked.metric)
        for key, column in described("effect", np.moveaxis(values - clean, 2, 0), seed, "effect_", test=True).items():
            made.setdefault(key, []).append(column)
        made.setdefault("clean", []).append(clean.mean())
    coords = {"capability": list(tasks)}
    whole = {
        name: columns for name, columns in made.items() if len(columns) == len(tasks)
    }  # one prompt has no interval
    return {
        name: xr.DataArray(np.stack(columns), coords, ("capability", "part", "layer")[: np.ndim(columns[0]) + 1])
        for name, columns in whole.items()
    }


# ---- taking parts out


def _run(model: Model, given: Inputs) -> Run:
    return model.run(given, keep=["layers.*.resid_pre", "layers.*.resid_post"])


def _swept(model: Model, given: Inputs, run: Run, parts: Sequence[Part], n: int, metric: BoundMetric) -> np.ndarray:
    """[part, layer, row, ...] the metric without each part; NaN where there is none."""
    edits = {(p, i): edit for p, part in enumerate(parts) for i in range(n) if (edit := _without(model, run, part, i))}
    swept = numbers(model.sweep(given, [[edit] for edit in edits.values()], metric).values)
    values = np.full((len(parts), n, *swept.shape[1:]), np.nan)
    for at, value in zip(edits, swept, strict=True):
        values[at] = value
    return values


def _without(model: Model, run: Run, part: Part, layer: int) -> Edit | None:
    if part == "layer":
        (given,) = model.sites(f"layers.{layer}.resid_pre")
        return Swap(f"layers.{layer}.resid_post", aligned_values(run, given))
    try:
        (site,) = model.sites(f"layers.{layer}.{part}.out")
    except PellucidError:  # a layer without attention, or without an MLP
        model.sites(f"layers.*.{part}.out")  # if no layer has it, that is the error
        return None
    return Ablate(site)


# ---- what is read


def _reading(run: Run) -> BoundMetric:
    """loss, divergence and kept [row, measure] against the plain run: means over the tokens that have a next one."""
    stream = run.inputs.stream("")
    ids, mask = stream.ids, stream.mask.bool()
    real = mask[:, :-1] & mask[:, 1:]
    plain = run.logits[:, :-1].float().log_softmax(-1)

    def mean(x: Tensor) -> Tensor:
        return (x * real.to(x)).sum(1) / real.sum(1)

    def read(logits: Tensor) -> Tensor:
        now = logits[:, :-1].log_softmax(-1)
        target = ids[:, 1:, None].to(now.device)
        lost = plain.gather(2, target) - now.gather(2, target)
        apart = (plain.exp() * (plain - now)).sum(-1)
        same = (plain.argmax(-1) == now.argmax(-1)).to(now)
        return torch.stack([mean(lost[..., 0]), mean(apart), mean(same)], 1)

    return BoundMetric("text", None, None, read, outputs=len(MEASURES))


@torch.no_grad()
def _estimates(model: Model, run: Run, n: int) -> dict[str, np.ndarray]:
    """[layer, row] of every estimate, over the real tokens."""
    stream = run.inputs.stream("")
    mask = stream.mask.bool()
    rows = torch.arange(len(mask))
    final = run.logits.argmax(-1)
    settled = torch.ones_like(mask)  # reading from the last layer to the first
    depth: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in (*ESTIMATES, "sink")}

    def mean(x: Tensor) -> Tensor:
        return ((x * mask.to(x)).sum(1) / mask.sum(1)).cpu()

    for layer in range(n):
        x, y = (run.tensor(f"layers.{layer}.{side}") for side in ("resid_pre", "resid_post"))
        x, y = x.float(), y.float()
        cos = torch.cosine_similarity(x, y, dim=-1)
        found["block influence"].append(mean(1 - cos))
        found["angular distance"].append(mean(cos.clamp(-1, 1).arccos() / torch.pi))
        found["relative magnitude"].append(mean((y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)))
        first = [t[rows, stream.starts].norm(dim=-1) for t in (x, y)]
        found["sink"].append((first[1] / first[0].clamp_min(1e-12)).cpu())
    for layer in reversed(range(n)):  # settled[layer]: the answer is final after this layer and every later one
        said = _said(model, run.tensor(f"layers.{layer}.resid_pre"))
        before = settled & (said == final)
        depth.append(mean((settled & ~before).float()))
        settled = before
    found["prediction depth"] = depth[::-1]
    return {name: torch.stack(values).numpy() for name, values in found.items()}


def _said(model: Model, resid: Tensor) -> Tensor:
    """[row, position] the head's first choice, read one position at a time where the vocabulary is large."""
    parts: list[Tensor] = [unembed(model, x).argmax(-1) for x in resid.split(32, 1)]
    return torch.cat(parts, 1)
