"""Two variants of the same layers side by side: which of them should a token take, and does choosing gain anything?

The model's blocks before the span run once; every variant's span runs on that state; a route makes one state of theirs, per token,
and the model's own blocks go on:

    mean         the average of the states
    confidence   the variant whose state, after the model's next block and read by its head, has the lowest entropy
    gate         the variant a fitted `Gate` names from the state before the span
    random       one drawn for each token: the control that choosing must beat

The average needs no choice and is the other control. `oracle` (the best variant of each text) and `oracle per token` are told from
each variant's own loss: the second is a minimum over noise and no ceiling that a gate could reach. Routing by confidence can be
worse than chance: the surer variant is often the one that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformers import Cache

from pellucid.anatomy.modes import accepted_by
from pellucid.changed import check_weights
from pellucid.corpus import inputs
from pellucid.engine.alone import Alone
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.engine.recording import BlockCall, record
from pellucid.errors import InputError, Refused, at_least, nearest
from pellucid.lenses import unembed
from pellucid.lenses.lens import Layers, layer_numbers
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

Route = Literal["mean", "confidence", "gate", "random"]


@dataclass(eq=False)
class Gate:
    """For each token, from the residual before the span, which variant will say the next token better: a logistic probe.

    After `fit`: `weights_` [variant, d], `biases_` [variant], `names_` of the variants, `right_`, how often it names the better one of
    the texts of the fit, weighted by what is at stake, and `digests_` of the model and the variants.

    >>> gate = Gate().fit(model, {"a": one, "b": other}, texts, layers=slice(8, 20))  # doctest: +SKIP
    """

    tokens: int = 4096
    context: int | None = 64
    penalty: float = 1.0
    weights_: Tensor = field(init=False, repr=False)
    biases_: Tensor = field(init=False, repr=False)
    names_: tuple[str, ...] = field(init=False)
    right_: float = field(init=False)
    digests_: tuple[str, ...] = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, variants: Mapping[str, Model], texts: Any, *, layers: Layers) -> Gate:
        """Learn which variant loses less, token by token. The frozen blocks run once for each row of text."""
        from sklearn.linear_model import LogisticRegression

        span = _Span.of(model, variants, layers)
        xs, losses = [], []
        for row in progress(corpus_rows(model, texts, self.tokens, self.context), "gate"):
            seen = _Seen.of(span, inputs(model, [row]))
            xs.append(seen.before[0, :-1].float().cpu())
            losses.append(torch.stack([span.nll(seen, state) for state in seen.states]))
        x, loss = torch.cat(xs).double().numpy(), torch.cat(losses, 1).double().numpy()
        best, stake = loss.argmin(0), loss.max(0) - loss.min(0)
        self.names_, self.digests_ = tuple(variants), _digests(model, variants)
        if len(np.unique(best[stake > 0])) < len(variants):
            raise InputError("one of the variants is never the better one on these texts: there is nothing to choose")
        mean, size = x.mean(0), x.std(0) + 1e-6
        solved = LogisticRegression(C=1 / (self.penalty * len(x) ** 0.5), max_iter=500).fit(
            (x - mean) / size, best, sample_weight=stake / stake.mean()
        )
        w = solved.coef_ / size
        b = solved.intercept_ - w @ mean
        w, b = (np.concatenate([-w / 2, w / 2]), np.concatenate([-b / 2, b / 2])) if len(w) == 1 else (w, b)
        self.weights_, self.biases_ = torch.tensor(w, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
        self.right_ = float(((self.scores(torch.tensor(x)).argmax(-1).numpy() == best) * stake).sum() / stake.sum())
        return self

    def scores(self, state: Tensor) -> Tensor:
        """[..., variant] log odds from states [..., d] before the span."""
        return state.float() @ self.weights_.T.to(state.device) + self.biases_.to(state.device)

    def check(self, model: Model, variants: Mapping[str, Model]) -> None:
        """InputError if it is not fitted, or was fitted on other weights or variants."""
        if not hasattr(self, "digests_"):
            raise InputError("this gate is not fitted: call fit(model, variants, texts, layers=...)")
        if tuple(variants) != self.names_:
            raise InputError(f"this gate chooses between {list(self.names_)}, not {list(variants)}")
        for each, digest in zip((model, *variants.values()), self.digests_, strict=True):
            check_weights(each, digest, "this gate")

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digests of the model and of every variant. InputError before `fit`."""
        if not hasattr(self, "digests_"):
            raise InputError("this gate is not fitted: call fit(model, variants, texts, layers=...)")
        about = {"tokens": self.tokens, "context": self.context, "penalty": self.penalty, "names_": list(self.names_), "right_": self.right_,
                 "digests_": list(self.digests_)}  # fmt: skip
        return write_tensors(path, "pellucid_gate", about, {"weights": self.weights_, "biases": self.biases_})

    @classmethod
    @technique
    def load(cls, path: str | Path) -> Self:
        """A gate that was saved; `check(model, variants)` says whether it belongs to them. InputError if it is none."""
        with reading_tensors(path, "pellucid_gate", "is no Gate: expected a file that Gate.save wrote") as (
            about,
            kept,
        ):
            made = cls(int(about["tokens"]), about["context"], float(about["penalty"]))
            made.weights_, made.biases_ = kept["weights"], kept["biases"]
            made.names_, made.digests_ = tuple(about["names_"]), tuple(about["digests_"])
            made.right_ = float(about["right_"])
        return made


@technique
def ensemble(
    model: Model,
    variants: Mapping[str, Model],
    texts: Any,
    *,
    layers: Layers,
    routes: Sequence[Route] = ("mean", "confidence", "random"),
    gate: Gate | None = None,
    tokens: int = 1024,
    context: int | None = 64,
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """The loss of texts with each variant of a span of `layers` alone, and with every route between them.

    `variants` are models that differ from `model` in these layers only, by name (`model` itself may be one). Gives over `route`
    (the variants' names, the routes, the oracles) `nll` (nats a token, with `low`, `high` over texts) and `gain`, what it is
    below the random route, with `gain_low`, `gain_high`; over `route` x `variant` `taken`, the share of tokens that took each.
    The title names routes that gain nothing over the random one or the mean. InputError for variants that differ elsewhere, fewer
    than two, no span; Refused for models that do not say the next token from left to right in one stack.

    >>> ensemble(model, {"a": one, "b": other}, texts, layers=slice(8, 20), gate=gate)  # doctest: +SKIP
    """
    at_least(1, tokens=tokens, draws=draws)
    asked = list(dict.fromkeys([*routes, *(["gate"] if gate is not None else []), "random", "mean"]))
    if unknown := [r for r in asked if r not in get_args(Route)]:
        raise InputError(f"route {unknown[0]!r}{nearest(str(unknown[0]), get_args(Route))}")
    if "gate" in asked:
        if gate is None:
            raise InputError("the route 'gate' needs gate=Gate().fit(...)")
        gate.check(model, variants)
    span = _Span.of(model, variants, layers)
    names = [*variants, *asked, "oracle per text", "oracle per token"]
    rows: list[np.ndarray] = []
    taken = np.zeros((len(names), len(variants)))
    taken[: len(variants)] = np.eye(len(variants))
    sizes = []
    for number, row in enumerate(progress(corpus_rows(model, texts, tokens, context), "ensemble")):
        seen = _Seen.of(span, inputs(model, [row]))
        each = torch.stack([span.nll(seen, state) for state in seen.states])
        found = [*each.mean(1)]
        for route in asked:
            values = []
            for draw in range(draws if route == "random" else 1):
                state, chosen = span.routed(seen, route, gate, (seed * 1009 + number) * 1009 + draw)
                values.append(span.nll(seen, state).mean())
                if chosen is not None:
                    taken[len(found)] += np.bincount(chosen[0, :-1].cpu().numpy(), minlength=len(variants)) / (
                        draws if route == "random" else 1
                    )
                else:
                    taken[len(found)] += (each.shape[1]) / len(variants)
            found.append(torch.stack(values).mean())
        rows.append(np.array([*map(float, found), float(each.mean(1).min()), float(each.min(0).values.mean())]))
        sizes.append(each.shape[1])
    lost, size = np.stack(rows), np.array(sizes, dtype=float)[:, None]  # [text, route]
    low, high = interval(lost * size, seed, over=np.broadcast_to(size, lost.shape))
    gain = lost[:, [names.index("random")]] - lost
    gain_low, gain_high = interval(gain * size, seed, over=np.broadcast_to(size, gain.shape))
    total = size.sum()
    taken[len(variants) : -2] /= np.maximum(taken[len(variants) : -2].sum(1, keepdims=True), 1e-12)
    taken[-2:] = np.nan
    data = xr.Dataset({"nll": ("route", (lost * size).sum(0) / total), "low": ("route", low), "high": ("route", high), "gain": ("route", (gain * size).sum(0) / total),
                       "gain_low": ("route", gain_low), "gain_high": ("route", gain_high), "taken": (("route", "variant"), taken)},
                      {"route": names, "variant": list(variants)}, {"unit": "nats", "tokens": int(total)})  # fmt: skip
    idle = [
        r
        for r in asked
        if r not in ("random", "mean")
        and (
            float(data.gain_low.sel(route=r)) <= 0 or float(data.nll.sel(route=r)) >= float(data.nll.sel(route="mean"))
        )
    ]
    note = f"; no gain over the random route and the average: {', '.join(idle)}" if idle else ""
    return Result(data, kind="ensemble", title=f"Variants of layers {span.first} to {span.last}{note}")


@technique
def chosen_variants(
    model: Model,
    variants: Mapping[str, Model],
    prompt: Any,
    *,
    layers: Layers,
    route: Route = "confidence",
    gate: Gate | None = None,
    seed: int = 0,
) -> Result:
    """Which variant each token of one prompt takes: over `position` (with `token`) `chosen`, its number, and `nll` of what follows.

    `attrs["variants"]` are their names by number. Raises as `ensemble` does.

    >>> chosen_variants(model, {"a": one, "b": other}, "The film was", layers=slice(8, 20))  # doctest: +SKIP
    """
    if route == "mean" or route not in get_args(Route):
        raise InputError(f"route={route!r} chooses nothing: expected 'confidence', 'gate' or 'random'")
    if route == "gate":
        if gate is None:
            raise InputError("the route 'gate' needs gate=Gate().fit(...)")
        gate.check(model, variants)
    span = _Span.of(model, variants, layers)
    given = model.inputs(prompt)
    if len(given) != 1:
        raise InputError(f"{len(given)} prompts: expected one")
    seen = _Seen.of(span, given)
    state, chosen = span.routed(seen, route, gate, seed)
    assert chosen is not None
    nll = np.append(span.nll(seen, state).double().numpy(), np.nan)
    labels = list(given.stream("").labels[0])
    data = xr.Dataset({"chosen": ("position", chosen[0].cpu().numpy()), "nll": ("position", nll)}, {"position": range(len(labels)), "token": ("position", labels)},
                      {"variants": list(variants)})  # fmt: skip
    return Result(
        data,
        kind="chosen variants",
        title=f"Which variant each token takes, by {route}: {', '.join(f'{i} {n}' for i, n in enumerate(variants))}",
    )


def _digests(model: Model, variants: Mapping[str, Model]) -> tuple[str, ...]:
    return (model.digest, *(each.digest for each in variants.values()))


# ---- side by side


@dataclass
class _Span:
    """The model, the variants of layers `first` to `last`, and how single blocks of each are called."""

    model: Model
    first: int
    last: int
    own: Alone
    others: list[Alone]

    @classmethod
    def of(cls, model: Model, variants: Mapping[str, Model], layers: Layers) -> _Span:
        stack = model.anatomy.stacks[-1]
        if len(model.anatomy.stacks) > 1 or not stack.causal or model.anatomy.answering.meaning != "tokens":
            raise Refused(
                f"{model.name} does not say the next token from left to right in one stack: its variants have no loss to compare"
            )
        if broken := next((b for b in stack.blocks if not b.whole or b.nth), None):
            raise Refused(
                f"layer {broken.index} of {model.name} is no module of its own, so no variant can stand beside it"
            )
        span = sorted(set(layer_numbers(model, layers)))
        if span != list(range(span[0], span[-1] + 1)) or span[-1] == len(stack.blocks) - 1:
            raise InputError(f"layers {span}: expected neighbours, with a layer of the model's own after them")
        if len(variants) < 2:
            raise InputError(f"{len(variants)} variants: expected two or more, by name")
        inside = tuple(f"{stack.blocks[i].module}." for i in span)
        ours = dict(model.module.named_parameters())
        for name, other in variants.items():
            theirs = dict(other.module.named_parameters())
            if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
                raise InputError(f"variant {name!r} is of another shape than {model.name}")
            for key, p in ours.items():
                q = theirs[key]
                if not key.startswith(inside) and p.data_ptr() != q.data_ptr() and not torch.equal(p, q):
                    raise InputError(
                        f"variant {name!r} differs outside layers {span[0]} to {span[-1]}, in {key}: bring in its layers alone, with surgery.remix"
                    )
        make = [Alone(each.anatomy, each.anatomy.stacks[-1], each.inputs) for each in (model, *variants.values())]
        return cls(model, span[0], span[-1], make[0], make[1:])

    def through(self, alone: Alone, x: Tensor, calls: list[BlockCall], first: int, last: int) -> Tensor:
        for block in alone.stack.blocks[first : last + 1]:
            x = alone.call(block, x, calls[block.index])
        return x

    def nll(self, seen: _Seen, state: Tensor) -> Tensor:
        """[position - 1] of the text, going on from a state after the span."""
        with torch.no_grad():
            done = self.through(self.own, state, seen.calls, self.last + 1, len(self.own.stack.blocks) - 1)
            said = unembed(self.model, done)[0, :-1].float().log_softmax(-1)
        return -said.gather(1, seen.inputs.stream("").ids[0, 1:, None].to(said.device))[:, 0].cpu()

    def routed(self, seen: _Seen, route: str, gate: Gate | None, seed: int) -> tuple[Tensor, Tensor | None]:
        """The state after the span, and which variant each position [1, position] took (None: the average)."""
        states = torch.stack(seen.states)  # [variant, 1, position, d]
        if route == "mean":
            return states.mean(0), None
        if route == "random":
            chosen = torch.randint(len(states), states.shape[1:3], generator=torch.Generator().manual_seed(seed)).to(
                states.device
            )
        elif route == "gate":
            assert gate is not None
            chosen = gate.scores(seen.before).argmax(-1)
        else:
            with torch.no_grad():
                after = [self.through(self.own, s, seen.calls, self.last + 1, self.last + 1) for s in seen.states]
                chosen = torch.stack(
                    [torch.special.entr(unembed(self.model, s).float().softmax(-1)).sum(-1) for s in after]
                ).argmin(0)
        return states.gather(0, chosen[None, ..., None].expand(1, *states.shape[1:]))[0], chosen


@dataclass
class _Seen:
    """One text: what the blocks before the span made of it, once, and what each variant made of that."""

    inputs: Inputs
    calls: list[BlockCall]
    before: Tensor
    states: list[Tensor]

    @classmethod
    def of(cls, span: _Span, given: Inputs) -> _Seen:
        accepted = accepted_by(span.model.module)
        with torch.no_grad():
            options = {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in accepted}
            calls = record(span.model.anatomy, span.own.stack, given, **options).calls
            for call in calls:
                call.args = tuple(None if isinstance(a, Cache) else a for a in call.args)
                call.kwargs = {k: None if isinstance(v, Cache) else v for k, v in call.kwargs.items()}
            tap = span.own.stack.blocks[span.first].taps["resid_pre"]
            before = tap.layout.read(calls[span.first].hidden, len(given))
            states = [span.through(other, before, calls, span.first, span.last) for other in span.others]
        return cls(given, [replace(call, output=None) for call in calls], before, states)
