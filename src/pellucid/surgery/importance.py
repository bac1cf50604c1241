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

Which layer does a capability need that text does not? Losses of different kinds have no common unit, so each is put on a scale of
its own: `needed` is what is lost as a part of the most that is lost without any layer, of "text" and of every capability, and

    specific = z(what the capability loses) - z(what text loses),   z over the layers of a part

with an interval from resampled prompts and rows of text (Student's, with the smaller of the two numbers); `attrs["specific"]`
names the layers of each capability at which it is above 0 with p < .05 / layers.

None of them sees an attention sink: a layer that makes the first token's residual many times longer changes few angles, and
everything depends on it. `sink` says how many times longer; those of more than ten times are named in `attrs["sinks"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from scipy.stats import t as student
from torch import Tensor

from pellucid.anatomy.modes import uncached
from pellucid.anatomy.structure import Stack
from pellucid.anatomy.trace import take
from pellucid.causal.contrast import Asked, ask, numbers
from pellucid.causal.grid import described
from pellucid.corpus import Corpus, batches, inputs, longest
from pellucid.engine.edits import Ablate, Edit, Swap, aligned_values
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.engine.recording import Recording, record
from pellucid.engine.run import Run
from pellucid.errors import InputError, PellucidError, at_least
from pellucid.lenses import unembed
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import DRAWS, spearman, weights
from pellucid.tasks import Prompts
from pellucid.technique import technique

Part = Literal["layer", "attn", "mlp"]
ESTIMATES = ("block influence", "angular distance", "relative magnitude", "prediction depth")
MEASURES = ("loss", "divergence", "kept")
SINK = 10.0  # times longer
CHUNK = 16  # positions of a row whose logits are compared at a time


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
    `effect_p`, `clean` and `specific`, over `measure` (text and the capabilities) x `part` x `layer` `needed`; over `estimate` x `layer` `estimated`, over `estimate` `agreement`; over `layer` `sink`. NaN where a
    layer has no such part, Refused where none has. InputError for a model that does not predict the next token, or texts without two tokens.

    >>> layer_importance(model, texts, {"capitals": pl.tasks.capitals(model.tokenizer, 8)}).loss
    <xarray.DataArray 'loss' (part: 1, layer: 8)>...
    """
    at_least(1, batch=batch, tokens=tokens)
    at_least(2, context=context)
    if not parts or isinstance(parts, str) or not set(parts) <= {"layer", "attn", "mlp"}:
        raise InputError(f"parts={parts!r}: expected a list of 'layer', 'attn' and 'mlp'")
    n, asked = len(predicting(model).blocks), questions(model, capabilities or {})
    found: list[np.ndarray] = []
    seen: list[dict[str, np.ndarray]] = []
    for given in rows_of(model, texts, context, tokens, batch):
        run, recording = recorded(model, given)
        seen.append(estimates(model, run, n))
        found.append(_swept(model, given, run, parts, n, reading(run), recording))
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
    if asked:
        found_too, effects = _capabilities(model, asked, parts, n, seed)
        data = data.assign(found_too)
        lost = {"text": values[..., 0], **{name: -x for name, x in effects.items()}}
        most = {name: x.mean(2) for name, x in lost.items()}
        most = {name: x / np.nanmax(np.abs(x), 1, keepdims=True).clip(1e-12) for name, x in most.items()}
        data = data.assign(_specific(lost, seed)).assign_coords(capability=list(asked), measure=list(most))
        # what is shown first: all of it on one scale
        needed = xr.DataArray(np.stack(list(most.values())), dims=("measure", "part", "layer"))
        data = xr.Dataset({"needed": needed}).assign_attrs(data.attrs).merge(data)
        data.attrs["specific"] = _named(data)
    return Result(data, kind="layer importance", title=_title(model, data))


def _specific(lost: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """z of each capability's loss minus z of text's, [capability, part, layer], with the deviation over resampled prompts."""

    def z(x: np.ndarray) -> np.ndarray:
        spread: np.ndarray = np.nanstd(x, -1, keepdims=True)
        return (x - np.nanmean(x, -1, keepdims=True)) / spread.clip(1e-12)

    def drawn(x: np.ndarray, i: int) -> np.ndarray:  # [draw, part, layer]
        return z(np.einsum("dr,plr->dpl", weights(x.shape[2], DRAWS, seed + i), np.nan_to_num(x)) / x.shape[2])

    text, *others = lost.values()
    base, again = z(text.mean(2)), drawn(text, 0)
    found = np.stack([z(x.mean(2)) - base for x in others])
    several = np.array([min(x.shape[2], text.shape[2]) for x in others])[:, None, None]  # examples
    freedom = np.where(several > 1, several - 1, np.nan)
    error = np.stack([(drawn(x, i) - again).std(0) for i, x in enumerate(others, 1)]) * np.sqrt(several / freedom)
    p, reach = 2 * student.sf(np.abs(found) / error.clip(1e-12), freedom), student.ppf(0.975, freedom) * error
    made = {"": found, "_low": found - reach, "_high": found + reach, "_p": p}
    return {f"specific{name}": (("capability", "part", "layer"), x) for name, x in made.items()}


def _named(data: xr.Dataset) -> dict[str, list[int]]:
    """The layers that a capability needs more than text does, at the level of so many questions."""
    size, p = (data[name].isel(part=0) for name in ("specific", "specific_p"))
    found = {}
    for name in data["capability"].values:
        own = size.where((size > 0) & (p < 0.05 / data.sizes["layer"])).sel(capability=name).dropna("layer")
        found[str(name)] = [int(i) for i in own.sortby(own, ascending=False)["layer"].values]
    return found


def _title(model: Model, data: xr.Dataset) -> str:
    part = str(data["part"].values[0])
    loss = data["loss"].sel(part=part).dropna("layer")
    dear = ", ".join(str(int(i)) for i in loss.sortby(loss, ascending=False)["layer"].values[:4])
    what = "layers" if part == "layer" else f"{part} of layers"
    said = [f"{model.name}: text needs {what} {dear} most"]
    said += [f"{name} {', '.join(map(str, i[:3]))}" for name, i in data.attrs.get("specific", {}).items() if i]
    if data.attrs["sinks"]:
        said.append(
            f"layer {', '.join(map(str, data.attrs['sinks']))} makes the attention sink, which no estimate sees"
        )
    return "; ".join(said)


def questions(model: Model, capabilities: Any) -> dict[str, Asked]:
    """What is asked for each capability (a task brings its own metric), read before anything runs."""
    if not isinstance(capabilities, Mapping):
        raise InputError(
            "capabilities= are tasks, or pairs (prompts, metric), by name: {'capitals': pl.tasks.capitals(tokenizer)}"
        )
    made = {name: task if isinstance(task, tuple) else (task, None) for name, task in capabilities.items()}
    if wrong := [name for name, pair in made.items() if len(pair) != 2]:
        raise InputError(
            f"capability {wrong[0]!r} has {len(made[wrong[0]])} parts: expected a task, or (prompts, metric)"
        )
    return {name: ask(model, *pair) for name, pair in made.items()}


def _capabilities(
    model: Model, tasks: Mapping[str, Asked], parts: Sequence[Part], n: int, seed: int
) -> tuple[dict[str, xr.DataArray], dict[str, np.ndarray]]:
    """What is in the result, and by capability the effects [part, layer, prompt]."""
    made: dict[str, list[Any]] = {}
    effects: dict[str, np.ndarray] = {}
    for name, asked in progress(list(tasks.items()), "capabilities"):
        run, recording = recorded(model, asked.inputs)
        clean = asked.score(model, run)
        values = _swept(model, asked.inputs, run, parts, n, asked.metric, recording)
        effects[name] = values - clean
        for key, column in described("effect", np.moveaxis(effects[name], 2, 0), seed, "effect_", test=True).items():
            made.setdefault(key, []).append(column)
        made.setdefault("clean", []).append(clean.mean())
    coords = {"capability": list(tasks)}
    whole = {
        name: columns for name, columns in made.items() if len(columns) == len(tasks)
    }  # one prompt has no interval
    return {
        name: xr.DataArray(np.stack(columns), coords, ("capability", "part", "layer")[: np.ndim(columns[0]) + 1])
        for name, columns in whole.items()
    }, effects


# ---- what it is tried on


def predicting(model: Model) -> Stack:
    """The blocks of a model that predicts the next token; InputError for any other."""
    stack = model.anatomy.stacks[-1]
    if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
        raise InputError(f"{model.name} does not predict the next token of a text: there is no loss to compare")
    return stack


def rows_of(model: Model, texts: Any, context: int, tokens: int, batch: int) -> list[Inputs]:
    """Rows of text in batches; InputError where none has two tokens."""
    corpus = Corpus.of(texts, context=min(context, longest(model)), tokens=tokens, packed=False, long="windows")
    rows = [row for row in corpus.rows(model) if len(row.ids) > 1]
    if not rows:
        raise InputError("there is no text of two tokens or more: give some ordinary text")
    return [inputs(model, each) for each in batches(progress(rows, "rows of text"), batch)]


# ---- taking parts out


def kept_run(model: Model, given: Inputs) -> Run:
    return model.run(given, keep=["layers.*.resid_pre", "layers.*.resid_post"])


def recorded(model: Model, given: Inputs) -> tuple[Run, Recording | None]:
    """The clean run with every layer's residual, and the recording it was read from, which a sweep of the same inputs begins with."""
    stack = model.anatomy.stacks[-1]
    if any(b.nth or not b.whole for b in stack.blocks):
        return kept_run(model, given), None
    with torch.no_grad():
        found = record(model.anatomy, stack, given, **uncached(model.module))
    kept: dict[Any, Tensor] = {}
    for block, call in zip(stack.blocks, found.calls, strict=True):
        for tap, x in (
            (block.taps["resid_pre"], call.hidden),
            (block.taps["resid_post"], take(call.output, block.taps["resid_post"].key)),
        ):
            kept[tap] = tap.layout.read(x, len(given))
    return Run(model.anatomy, given, found.output, kept, []), found


def _swept(
    model: Model,
    given: Inputs,
    run: Run,
    parts: Sequence[Part],
    n: int,
    metric: BoundMetric,
    recording: Recording | None = None,
) -> np.ndarray:
    """[part, layer, row, ...] the metric without each part; NaN where there is none."""
    edits = {(p, i): edit for p, part in enumerate(parts) for i in range(n) if (edit := without(model, run, part, i))}
    plan = model.plan(given, [[edit] for edit in edits.values()], metric)
    if recording is not None:
        plan.job.recording = recording
    swept = numbers(plan.run().values)
    values = np.full((len(parts), n, *swept.shape[1:]), np.nan)
    for at, value in zip(edits, swept, strict=True):
        values[at] = value
    return values


def without(model: Model, run: Run, part: Part, layer: int) -> Edit | None:
    if part == "layer":
        (given,) = model.sites(f"layers.{layer}.resid_pre")
        last = layer == len(model.anatomy.stacks[-1].blocks) - 1  # else the next layer is where the sweep begins
        return Swap(
            f"layers.{layer}.resid_post" if last else f"layers.{layer + 1}.resid_pre", aligned_values(run, given)
        )
    try:
        (site,) = model.sites(f"layers.{layer}.{part}.out")
    except PellucidError:  # a layer without attention, or without an MLP
        model.sites(f"layers.*.{part}.out")  # if no layer has it, that is the error
        return None
    return Ablate(site)


# ---- what is read


def reading(run: Run) -> BoundMetric:
    """loss, divergence and kept [row, measure] against the plain run: means over the tokens that have a next one."""
    stream = run.inputs.stream("")
    ids, mask = stream.ids, stream.mask.bool()
    real = mask[:, :-1] & mask[:, 1:]
    known, p = ids[:, 1:, None].to(run.logits.device), run.logits[:, :-1].float().softmax(-1)
    first = p.argmax(-1, keepdim=True)

    def mean(x: Tensor) -> Tensor:
        return (x * real.to(x)).sum(1) / real.sum(1)

    def said(logits: Tensor) -> Tensor:
        """[loss, cross-entropy to p, first choice kept] x row x position; the vocabulary is passed over in parts that stay in the cache."""
        parts = []
        for at in range(0, p.shape[1], CHUNK):
            here = slice(at, min(at + CHUNK, p.shape[1]))
            x = logits[:, here].to(p.dtype if logits.dtype.itemsize < 4 else logits.dtype)
            asked, before = (x.gather(2, i[:, here].to(x.device))[..., 0] for i in (known, first))
            top = x.amax(-1)
            shifted = x - top[..., None]
            expected = torch.linalg.vecdot(p[:, here].to(x), shifted)
            total = shifted.exp_().sum(-1).log()  # log of the sum of exp, above the top
            parts.append(torch.stack([total + top - asked, total - expected, (before == top).to(x)]))
        return torch.cat(parts, 2)

    plain = said(run.logits)[:2]

    def read(logits: Tensor) -> Tensor:
        found = said(logits)
        return torch.stack([*map(mean, found[:2] - plain.to(found)), mean(found[2])], 1)

    return BoundMetric("text", None, None, read, outputs=len(MEASURES))


@torch.no_grad()
def estimates(model: Model, run: Run, n: int) -> dict[str, np.ndarray]:
    """[layer, row] of every estimate, over the real tokens."""
    stream = run.inputs.stream("")
    mask = stream.mask.bool()
    rows = torch.arange(len(mask))
    final = run.logits.argmax(-1)
    settled = mask.clone()  # reading from the last layer to the first
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
        before = torch.zeros_like(settled)
        if len(at := settled.nonzero()):  # nothing is read where a later layer has already changed the answer
            rows_at, columns = at.T
            x = run.tensor(f"layers.{layer}.resid_pre")[rows_at, columns]
            said = torch.cat([unembed(model, each[None])[0].argmax(-1) for each in x.split(64)])
            before[rows_at, columns] = (said == final[rows_at, columns]).to(before.device)
        depth.append(mean((settled & ~before).float()))
        settled = before
    found["prediction depth"] = depth[::-1]
    return {name: torch.stack(values).numpy() for name, values in found.items()}
