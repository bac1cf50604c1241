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

What a penalty means is said by its controls: `stitching` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args

import xarray as xr
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Swap
from pellucid.engine.run import Run
from pellucid.errors import InputError, among, at_least, nearest
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery.aligned import Pair, pairs, rows, states
from pellucid.surgery.joined import ends, measured, read_pair
from pellucid.surgery.maps import Kind, solve, trained
from pellucid.technique import technique


@dataclass(eq=False)
class Stitch:
    """A map from the residual after the sender's block `after` to the one after the receiver's block `into`.

    `fit` learns it from texts (what `pl.Corpus` takes; strings, where the two models have different tokenizers); `stitched`
    runs both models joined by it. After `fit`: `weight_` [d sender, d receiver] and `bias_` [d receiver], `digests_` of both
    models, `error_`, the share of the receiver's variance that is not explained on the texts of the fit, `positions_` fitted on,
    `losses_` of the trained kind.

    >>> stitch = Stitch("orthogonal", after=4, into=4).fit(sender, receiver, texts)
    >>> stitch.stitched(sender, receiver, "The capital of France is").logits.shape
    torch.Size([1, 5, 49152])
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
        if not among(self.kind, Kind):
            raise InputError(f"kind={self.kind!r}{nearest(str(self.kind), get_args(Kind))}")
        at_least(1, rank=self.rank, tokens=self.tokens, steps=self.steps, batch=self.batch)
        at_least(0, ridge=self.ridge)

    @technique
    def fit(self, sender: Model, receiver: Model, texts: Any) -> Stitch:
        """Learn the map. InputError for layers there are not, widths that identity cannot join, or too little text."""
        after, into = ends(sender, receiver, self.after, self.into)
        found = pairs(sender, receiver, texts, self.tokens, self.context)
        mine = states(sender, [p.sender for p in found], [after], "sender")
        yours = states(receiver, [p.receiver for p in found], [into], "receiver")
        self._learn(receiver, found, [m[after] for m in mine], *rows(found, mine, yours, after, into))
        self.digests_ = (sender.digest, receiver.digest)
        return self

    def _learn(self, receiver: Model, found: Sequence[Pair], sent: Sequence[Tensor], x: Tensor, y: Tensor) -> Stitch:
        self.weight_, self.bias_ = solve(self.kind, x, y, self.rank, self.ridge)
        self.positions_ = len(x)
        if self.kind == "trained":
            trained(self, receiver, found, sent)
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
        after, into = ends(sender, receiver, self.after, self.into)
        (pair,) = read_pair(sender, receiver, prompt)
        run = sender.run(pair.sender, keep=[after], logits=False)
        put = Swap(into, self.translate(run.tensor(after)[:, pair.columns.to(run.tensor(after).device)]))
        return receiver.run(pair.receiver, edits=[put, *options.pop("edits", ())], **options)

    @technique
    def penalty(
        self, sender: Model, receiver: Model, texts: Any, *, tokens: int = 512, context: int = 64, seed: int = 0
    ) -> Result:
        """`penalty` in nats a token of held-out texts, with `low`, `high` over texts, `nll` stitched and `receiver`'s own."""
        self.check(sender, receiver)
        after, into = ends(sender, receiver, self.after, self.into)
        found = pairs(sender, receiver, texts, tokens, context)
        mine = states(sender, [p.sender for p in found], [after], "sender")
        values, plain, sizes = measured(
            receiver,
            found,
            {0: (into, [self.translate(m[after][p.columns]) for p, m in zip(found, mine, strict=True)])},
        )
        low, high = interval((values[0] - plain) * sizes, seed, over=sizes)
        nll, own = values[0] @ sizes / sizes.sum(), plain @ sizes / sizes.sum()
        data = xr.Dataset({"penalty": nll - own, "low": low, "high": high, "nll": nll, "receiver": own})
        said = f"costs {nll - own:+.3f} nats a token [{float(low):.3f}, {float(high):.3f}]"
        return Result(data, kind="stitch", title=f"{sender.name} up to block {self.after}, {receiver.name} after {self.into}: {said}")  # fmt: skip

    # ---- files

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the digests of both models' weights."""
        about = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("weight_", "bias_")}
        return write_tensors(path, "pellucid_stitch", about, {"weight": self.weight_, "bias": self.bias_})

    @classmethod
    @technique
    def load(cls, path: str | Path) -> Self:
        """A stitch that was saved; `check(sender, receiver)` says whether it belongs to two models. InputError if it is none."""
        said = "is no Stitch: expected a file that Stitch.save wrote"
        with reading_tensors(path, "pellucid_stitch", said) as (about, kept):
            made = cls(**{f.name: about[f.name] for f in fields(cls) if f.init})
            made.weight_, made.bias_ = kept["weight"], kept["bias"]
            made.digests_, made.error_ = tuple(about["digests_"]), about["error_"]
            made.positions_, made.losses_ = about["positions_"], about["losses_"]
        return made
