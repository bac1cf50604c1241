"""Do two models, or two depths of one, speak the same language? One runs up to a layer, a map translates, the other goes on.

    stitched(text) = receiver's blocks after `into`  o  s  o  sender's blocks up to `after`
    penalty        = nll(stitched) - nll(receiver), nats a token of held-out text

(Lenc and Vedaldi 2015; Bansal et al. 2021; Csiszarik et al. 2021). The map is fitted by direct matching,
min sum |s(h_sender) - h_receiver|^2, over the positions of some texts:

    identity       s(x) = x
    orthogonal     x Q with the orthonormal Q nearest in least squares (Procrustes; of unequal widths a partial isometry)
    affine         x W + b, least squares
    ridge          the same with |W|^2 held down by `ridge` times the mean variance of the sender's directions
    low_rank       the affine map of rank `rank` with the least squared error (reduced-rank regression)
    trained        affine, then `steps` of Adam on the receiver's own loss, both models frozen: an upper bound

A trained stitch optimises the task and not the match: it invents states that no model has and calls distant layers more alike
than a layer and itself (Balogh and Jelasity 2025). So it is only told beside the others.

The first position is left out of every fit: where it is an attention sink its norm, hundreds of times the others', is most of the
Gram matrix, and a ridge measured with it shrinks everything else. The map is still applied there; `sink` says how it fares.

What a penalty means is said by its controls, `stitching(controls=...)`: a sender with its weights shuffled or redrawn; the
sender's token embeddings alone (what the map makes without any block of the sender); a map fitted on states that belong to
other positions (its own capacity: a constant, nearly); a receiver that was redrawn (whether the map alone can say the answer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.controls import redrawn, shuffled
from pellucid.corpus import Corpus
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Swap
from pellucid.engine.pausing import progress
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused, at_least, listed, nearest
from pellucid.lenses import unembed
from pellucid.lenses.lens import Layers, layer_numbers
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery.aligned import Pair, pairs, residuals, rows, states
from pellucid.surgery.similarity import longer, unbiased_cka
from pellucid.technique import technique
from pellucid.training import draws as drawn
from pellucid.training import linear, train

Kind = Literal["identity", "orthogonal", "affine", "ridge", "low_rank", "trained"]
CONTROLS = ("shuffled", "redrawn", "tokens", "permuted", "redrawn receiver")
EMBED = "layers.0.resid_pre"


@dataclass(eq=False)
class Stitch:
    """A map from the residual after the sender's block `after` to the one after the receiver's block `into`.

    `fit` learns it from texts (what `pl.Corpus` takes; strings, where the two models have different tokenizers); `stitched`
    runs both models joined by it. After `fit`: `weight_` [d sender, d receiver] and `bias_` [d receiver], `digests_` of both
    models, `error_`, the share of the receiver's variance that is not explained on the texts of the fit, `positions_` fitted on,
    `losses_` of the trained kind.

    >>> stitch = Stitch("orthogonal", after=14, into=14).fit(sender, receiver, texts)  # doctest: +SKIP
    >>> stitch.stitched(sender, receiver, "The capital of France is").logits  # doctest: +SKIP
    """

    kind: Kind = "affine"
    after: int = 0
    into: int = 0
    rank: int = 32
    ridge: float = 1e-3
    tokens: int = 4096
    context: int = 64
    steps: int = 100
    batch: int = 4
    learning_rate: float = 1e-3
    seed: int = 0
    weight_: Tensor = field(init=False, repr=False)
    bias_: Tensor = field(init=False, repr=False)
    digests_: tuple[str, str] = field(init=False, repr=False)
    error_: float = field(init=False)
    positions_: int = field(init=False, repr=False)
    losses_: list[float] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"kind={self.kind!r}{nearest(str(self.kind), get_args(Kind))}")
        at_least(1, rank=self.rank, tokens=self.tokens, steps=self.steps, batch=self.batch)
        at_least(0, ridge=self.ridge)

    @technique
    def fit(self, sender: Model, receiver: Model, texts: Any) -> Stitch:
        """Learn the map. InputError for layers there are not, widths that identity cannot join, or too little text."""
        after, into = _ends(sender, receiver, self.after, self.into)
        found = pairs(sender, receiver, texts, self.tokens, self.context)
        mine = states(sender, [p.sender for p in found], [after], "sender")
        yours = states(receiver, [p.receiver for p in found], [into], "receiver")
        self._learn(receiver, found, [m[after] for m in mine], *rows(found, mine, yours, after, into))
        self.digests_ = (sender.digest, receiver.digest)
        return self

    def _learn(self, receiver: Model, found: Sequence[Pair], sent: Sequence[Tensor], x: Tensor, y: Tensor) -> Stitch:
        self.weight_, self.bias_ = _solve(self.kind, x, y, self.rank, self.ridge)
        self.positions_ = len(x)
        if self.kind == "trained":
            _train(self, receiver, found, sent)
        rest = ((x @ self.weight_ + self.bias_) - y).double().pow(2).sum() / (y - y.mean(0)).double().pow(
            2
        ).sum().clamp_min(1e-30)
        self.error_ = float(rest)
        return self

    def translate(self, x: Tensor) -> Tensor:
        """States [..., d] of the sender as the receiver's."""
        return x @ self.weight_.to(x) + self.bias_.to(x)

    def check(self, sender: Model, receiver: Model) -> None:
        """InputError if it is not fitted, or was fitted on other weights than these two models'."""
        if not hasattr(self, "digests_"):
            raise InputError("this stitch is not fitted: call fit(sender, receiver, texts) or Stitch.load(path)")
        for model, digest, what in zip((sender, receiver), self.digests_, ("sender", "receiver"), strict=True):
            check_weights(model, digest, f"this stitch's {what}")

    def stitched(self, sender: Model, receiver: Model, prompt: Any, **options: Any) -> Run:
        """A run of the receiver in which everything up to block `into` is the sender's; `options` are those of `model.run`.

        One prompt. Where the tokenizers differ its text is laid over, as in the fit.
        """
        self.check(sender, receiver)
        after, into = _ends(sender, receiver, self.after, self.into)
        (pair,) = _read(sender, receiver, prompt)
        run = sender.run(pair.sender, keep=[after], logits=False)
        put = Swap(into, self.translate(run.tensor(after)[:, pair.columns.to(run.tensor(after).device)]))
        return receiver.run(pair.receiver, edits=[put, *options.pop("edits", ())], **options)

    @technique
    def penalty(
        self, sender: Model, receiver: Model, texts: Any, *, tokens: int = 512, context: int = 64, seed: int = 0
    ) -> Result:
        """`penalty` in nats a token of held-out texts, with `low`, `high` over texts, `nll` stitched and `receiver`'s own."""
        self.check(sender, receiver)
        after, into = _ends(sender, receiver, self.after, self.into)
        found = pairs(sender, receiver, texts, tokens, context)
        mine = states(sender, [p.sender for p in found], [after], "sender")
        values, plain, sizes = _measured(
            receiver,
            found,
            {0: (into, [self.translate(m[after][p.columns]) for p, m in zip(found, mine, strict=True)])},
        )
        low, high = interval((values[0] - plain) * sizes, seed, over=sizes)
        mean = (values[0] @ sizes, plain @ sizes)
        data = xr.Dataset({"penalty": (mean[0] - mean[1]) / sizes.sum(), "low": low, "high": high,
                           "nll": mean[0] / sizes.sum(), "receiver": mean[1] / sizes.sum()})  # fmt: skip
        return Result(
            data, kind="stitch", title=f"{sender.name} up to block {self.after}, {receiver.name} after {self.into}"
        )

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digests of both models' weights."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight_", "bias_")}
        return write_tensors(path, "pellucid_stitch", about, {"weight": self.weight_, "bias": self.bias_})

    @classmethod
    @technique
    def load(cls, path: str | Path) -> Self:
        """A stitch that was saved; `check(sender, receiver)` says whether it belongs to two models. InputError if it is none."""
        with reading_tensors(path, "pellucid_stitch", "is no Stitch: expected a file that Stitch.save wrote") as (
            about,
            kept,
        ):
            made = cls(**{f.name: about[f.name] for f in fields(cls) if f.init})
            made.weight_, made.bias_ = kept["weight"], kept["bias"]
            made.digests_, made.error_ = tuple(about["digests_"]), about["error_"]
            made.positions_, made.losses_ = about["positions_"], about["losses_"]
        return made


@technique
def stitching(
    sender: Model,
    receiver: Model,
    texts: Any,
    *,
    after: Layers = None,
    into: Layers = None,
    kinds: Sequence[Kind] = ("identity", "orthogonal", "affine"),
    controls: Sequence[str] = ("shuffled", "tokens", "permuted"),
    rank: int = 32,
    ridge: float = 1e-3,
    tokens: int = 4096,
    held_out: int = 512,
    context: int = 64,
    steps: int = 100,
    seed: int = 0,
) -> Result:
    """What each join of a layer of the sender and one of the receiver costs, beside what knows nothing.

    The last `held_out` of `tokens + held_out` tokens of text are measured, the rest fitted. `after` and `into` are five layers
    evenly apart unless given. Gives over `map` x `after` x `into` `penalty` (nats a token, with `low` and `high` over texts),
    `error` (the share of the receiver's variance a map leaves); over `control` x `map` x `after` x `into` `control_penalty`, the
    penalty of the same map fitted with what knows nothing; over `after` and `into` `sink`, how many times longer the first
    position's residual is than the others' median; over `map` x `after` x `into` `sink_error`, the squared error at the first
    position as a share of its squared norm; over `after` x `into` `cka`,
    the unbiased one of the same states, which sees no difference of basis. NaN where a map does not exist (identity across widths, or of permuted states). The title names a control that does as well.

    >>> stitching(model, model, texts, after=[5, 15], into=[5, 15])  # doctest: +SKIP
    """
    at_least(1, tokens=tokens, held_out=held_out)
    kinds, controls = listed("kinds", kinds, "names of maps"), listed("controls", controls, "names")
    if unknown := [k for k in kinds if k not in get_args(Kind)] + [c for c in controls if c not in CONTROLS]:
        raise InputError(
            f"{unknown[0]!r} is no map and no control{nearest(str(unknown[0]), [*get_args(Kind), *CONTROLS])}"
        )
    ends = [_spread(m, layers) for m, layers in ((sender, after), (receiver, into))]
    for i in ends[0]:
        _ends(sender, receiver, i, ends[1][0])
    found = pairs(sender, receiver, texts, tokens + held_out, context)
    fitted, test = _split(found, held_out)
    table = _Table(kinds, ends[0], ends[1], fitted, test, rank, ridge, steps, seed)
    main = table.of(sender, receiver)
    plain, sizes = main.plain, main.sizes
    shape = (len(kinds), len(ends[0]), len(ends[1]))
    low, high = interval(
        np.moveaxis(main.values - plain, -1, 0) * sizes.reshape(-1, 1, 1, 1),
        seed,
        over=np.broadcast_to(sizes.reshape(-1, 1, 1, 1), (len(sizes), *shape)),
    )
    dims = ("map", "after", "into")
    size = sizes.sum()
    data = xr.Dataset({"penalty": (dims, (main.values - plain) @ sizes / size), "low": (dims, low), "high": (dims, high), "error": (dims, main.errors),
                       "sink_error": (dims, main.sinks), "receiver": float(plain @ sizes / size)},
                      {"map": kinds, "after": ends[0], "into": ends[1]}, {"unit": "nats", "tokens": int(size), "texts": len(test)})  # fmt: skip
    for dim, lengths in zip(("after", "into"), (main.mine, main.yours), strict=True):
        data[f"sink_{dim}"] = (dim, lengths)
    data["cka"] = (("after", "into"), main.cka)
    if controls:
        known = [_knowing_nothing(table, name, sender, receiver, seed).values for name in controls]
        data["control_penalty"] = (("control", *dims), (np.stack(known) - plain) @ sizes / size)
        data = data.assign_coords(control=controls)
    return Result(data, kind="stitching", title=f"What it costs to go on from another's residual{_warned(data)}")


def _warned(data: xr.Dataset) -> str:
    said = ""
    if "control_penalty" in data:
        beaten = (data.control_penalty <= data.penalty + 0.05) & np.isfinite(data.penalty)
        names = [f"{c} ({', '.join(data['map'].values[beaten.sel(control=c).any(('after', 'into')).values])})" for c in data["control"].values if bool(beaten.sel(control=c).any())]  # fmt: skip
        said = f"; as well or better in places: {', '.join(names)}" if names else ""
    return said + ("; a trained map is an upper bound, not a likeness" if "trained" in data["map"].values else "")


def _knowing_nothing(table: _Table, name: str, sender: Model, receiver: Model, seed: int) -> _Measured:
    if name in ("shuffled", "redrawn"):
        return table.of((shuffled if name == "shuffled" else redrawn)(sender, seed=seed), receiver)
    if name == "redrawn receiver":
        return table.of(sender, redrawn(receiver, seed=seed))
    return table.of(sender, receiver, name)


# ---- ends, texts


def _ends(sender: Model, receiver: Model, after: int, into: int) -> tuple[str, str]:
    """The two sites. Refused for models that do not say the next token of a text from left to right."""
    for model, what in ((sender, "sender"), (receiver, "receiver")):
        stack = model.anatomy.stacks[0]
        if len(model.anatomy.stacks) > 1 or not stack.causal:
            reads = (
                "has two stacks"
                if len(model.anatomy.stacks) > 1
                else "looks ahead, so it has seen the tokens that are asked for"
            )
            raise Refused(f"{model.name} cannot be a {what}: it {reads}; compare such models with surgery.similarity")
    if receiver.anatomy.answering.meaning != "tokens" or receiver.anatomy.head is None:
        raise Refused(f"{receiver.name} cannot be a receiver: it does not say the next token of a text")
    return residuals(sender, layer_numbers(sender, [after])).popitem()[1], residuals(
        receiver, layer_numbers(receiver, [into])
    ).popitem()[1]


def _read(sender: Model, receiver: Model, prompt: Any) -> list[Pair]:
    given = [prompt] if isinstance(prompt, str) else prompt
    made = pairs(
        sender, receiver, Corpus(given if isinstance(given[0], str | list | tuple) else [given]), 1 << 30, 1 << 30
    )
    if len(made) != 1:
        raise InputError(f"{len(made)} prompts: a stitched run is of one")
    return made


def _spread(model: Model, layers: Layers) -> list[int]:
    n = len(model.anatomy.stacks[-1].blocks)
    return sorted(
        set(
            layer_numbers(model, layers)
            if layers is not None
            else np.linspace(0, n - 1, 5).round().astype(int).tolist()
        )
    )


def _split(found: list[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """The last texts, of about so many tokens, apart."""
    at, size = len(found), 0
    while at > 1 and size < held_out:
        at -= 1
        size += len(found[at])
    if at < 1 or size < held_out / 4 or at == len(found):
        raise InputError(f"there are {len(found)} texts, too few to fit and to measure on others: give more")
    return found[:at], found[at:]


# ---- maps


def _solve(kind: Kind, x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """(weight [d, e], bias [e]) from rows of both."""
    d, e = x.shape[1], y.shape[1]
    nothing = torch.zeros(e)
    if kind == "identity":
        if d != e:
            raise InputError(
                f"the sender is {d} wide and the receiver {e}: identity joins models of one width; use 'affine' or 'orthogonal'"
            )
        return torch.eye(d), nothing
    x, y = x.double(), y.double()
    if kind == "orthogonal":
        u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        return (u @ v).float(), nothing
    if kind != "ridge" and len(x) < 2 * d:
        raise InputError(
            f"{len(x)} positions for a map of {d} inputs: give more text (tokens=), at least {2 * d}, or kind='ridge'"
        )
    mean, to = x.mean(0), y.mean(0)
    gram = (x - mean).T @ (x - mean)
    strength = max(ridge if kind == "ridge" else 0.0, 1e-10) * float(gram.diagonal().mean())
    weight = torch.linalg.solve(gram + strength * torch.eye(d, dtype=x.dtype), (x - mean).T @ (y - to))
    if kind == "low_rank":
        made = (x - mean) @ weight
        _, vectors = torch.linalg.eigh(made.T @ made)
        top = vectors[:, -min(rank, e) :]
        weight = weight @ top @ top.T
    return weight.float(), (to - mean @ weight).float()


def _train(stitch: Stitch, receiver: Model, found: Sequence[Pair], sent: Sequence[Tensor]) -> None:
    """Gradient steps on the receiver's loss through its frozen blocks after `into`; all below was run once, and is `sent`."""
    number = layer_numbers(receiver, [stitch.into])[0]
    alone, blocks = receiver.layers[number + 1 :].alone, receiver.anatomy.stacks[-1].blocks[number + 1 :]
    like = next(p for p in receiver.module.parameters() if p.is_floating_point())
    weight, bias = (t.to(like.device, torch.float32).clone() for t in (stitch.weight_, stitch.bias_))
    given: dict[int, list[Any]] = {}  # what the blocks read besides their residual, by length

    def loss(batch: Tensor, step: int) -> Tensor:
        total: Any = 0.0
        for i in batch.tolist():
            pair = found[i]
            n = len(pair)
            if n not in given:
                given[n] = alone.calls(1, n)
            x = (sent[i][pair.columns].to(like.device) @ weight + bias)[None].to(like.dtype)
            for block in blocks:
                x = alone.call(block, x, given[n][block.index])
            said = unembed(receiver, x)[:, :-1].float().log_softmax(-1)
            ids = pair.receiver.stream("").ids[:, 1:n, None].to(said.device)
            total = total - said.gather(2, ids).mean() / len(batch)
        return total

    epochs = -(-stitch.steps * stitch.batch // len(found)) + 1
    order = drawn(len(found), stitch.batch, epochs, stitch.seed)[: stitch.steps]
    stitch.losses_ = train({"weight": weight, "bias": bias}, order, loss, partial(torch.optim.Adam, lr=stitch.learning_rate),
                           schedule=linear, seed=stitch.seed, what="trained stitch")  # fmt: skip
    stitch.weight_, stitch.bias_ = weight.detach().cpu(), bias.detach().cpu()


# ---- the table


@dataclass
class _Measured:
    values: np.ndarray  # [map, after, into, text] nll of stitched models
    plain: np.ndarray  # [text]
    sizes: np.ndarray  # [text] tokens
    errors: np.ndarray  # [map, after, into]
    sinks: np.ndarray
    mine: np.ndarray  # [after], [into] norm of the first position over the others' median
    yours: np.ndarray
    cka: np.ndarray  # [after, into]


@dataclass
class _Table:
    kinds: list[Kind]
    after: list[int]
    into: list[int]
    fitted: list[Pair]
    test: list[Pair]
    rank: int
    ridge: float
    steps: int
    seed: int

    def of(self, sender: Model, receiver: Model, name: str = "") -> _Measured:
        """Every map fitted and measured; `name` "permuted" or "tokens" for a control that the sender itself gives."""
        both = [*self.fitted, *self.test]
        a, b = residuals(sender, self.after), residuals(receiver, self.into)
        sites = dict.fromkeys(a, EMBED) if name == "tokens" else a
        mine = states(sender, [p.sender for p in both], [*sites.values()], "sender")
        yours = states(receiver, [p.receiver for p in both], [*b.values()], "receiver")
        n = len(self.fitted)
        shape = (len(self.kinds), len(a), len(b))
        errors, sinks = np.full(shape, np.nan), np.full(shape, np.nan)
        put: dict[tuple[int, ...], tuple[str, list[Tensor]]] = {}
        for cell in np.ndindex(shape):
            kind, site, other = self.kinds[cell[0]], [*sites.values()][cell[1]], [*b.values()][cell[2]]
            x, y = rows(self.fitted, mine[:n], yours[:n], site, other)
            if kind == "identity" and (x.shape[1] != y.shape[1] or name == "permuted"):
                continue
            if name == "tokens" and cell[1]:
                continue  # the embeddings are the same for every `after`
            if name == "permuted":
                x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))]
            stitch = Stitch(
                kind, rank=self.rank, ridge=self.ridge, steps=self.steps, into=self.into[cell[2]], seed=self.seed
            )
            stitch._learn(receiver, self.fitted, [m[site] for m in mine[:n]], x, y)
            errors[cell] = stitch.error_
            moved = [stitch.translate(m[site][p.columns]) for p, m in zip(self.test, mine[n:], strict=True)]
            truth = [r[other] for r in yours[n:]]
            sinks[cell] = float(
                sum((m[0] - t[0]).pow(2).sum() for m, t in zip(moved, truth, strict=True))
                / sum(t[0].pow(2).sum() for t in truth)
            )
            put[cell] = (other, moved)
        nll, plain, sizes = _measured(receiver, self.test, put)
        values = np.full((*shape, len(self.test)), np.nan)
        for cell, row in nll.items():
            values[cell] = row
        if name == "tokens":
            values[:], errors[:] = values[:, :1], errors[:, :1]
        lengths = [np.array([longer(each, s) for s in where.values()]) for each, where in ((mine, sites), (yours, b))]
        cka = np.array([[unbiased_cka(*rows(both, mine, yours, s, t)) for t in b.values()] for s in sites.values()])
        return _Measured(values, plain, sizes, errors, sinks, lengths[0], lengths[1], cka)


def _measured(
    receiver: Model, test: Sequence[Pair], put: dict[Any, tuple[str, list[Tensor]]]
) -> tuple[dict[Any, np.ndarray], np.ndarray, np.ndarray]:
    """The receiver's nll of each text with other residuals put in, and as it is; and how many tokens that is of."""
    values: dict[Any, list[float]] = {cell: [] for cell in put}
    plain, sizes = [], []
    for i, pair in enumerate(progress(list(test), "stitched")):
        metric, n = _nll(pair)
        swept = receiver.sweep(pair.receiver, [[Swap(site, moved[i][None])] for site, moved in put.values()], metric)
        for cell, value in zip(values, swept.values.double().cpu().numpy()[:, 0], strict=True):
            values[cell].append(float(value))
        plain.append(float(swept.clean[0]))
        sizes.append(n)
    return {cell: np.array(v) for cell, v in values.items()}, np.array(plain), np.array(sizes, dtype=float)


def _nll(pair: Pair) -> tuple[BoundMetric, int]:
    """Mean nll of a text's tokens, without those after a position at which the sender has read ahead."""
    n = len(pair)
    ids, seen = pair.receiver.stream("").ids[:, 1:n, None], pair.seen[: n - 1]
    many = int(seen.sum())

    def read(logits: Tensor) -> Tensor:
        said = logits[:, : n - 1].float().log_softmax(-1)
        lost = -said.gather(2, ids.to(said.device).expand(len(said), -1, -1))[..., 0]
        return (lost * seen.to(lost)).sum(1) / max(1, many)

    return BoundMetric("nll", None, None, read), many
