"""Right for the right reasons: some words must not matter, or others must.

z are the logits, l the answer's log odds, e_t the embedding of token t, g_t = dl / de_t, m the tokens that must not matter.

Consistency     the words are exchanged and the prediction must stay (default; first order, any attention kernel)
                    1/2 KL(p(x) || p(x')) + 1/2 KL(p(x') || p(x))
Augment         the same knowledge without a penalty: x' is trained on in the place of x. What it does as well was bought for nothing
RightReasons    a penalty on attributions a_t, by its form
                    share       sum m |a_t|^2 / sum |a_t|^2        has no scale: shrinking the logits does not meet it
                    outside     sum (1 - m) |a_t|^2 / sum |a_t|^2  positive: m are the reasons
                    absolute    sum m |a_t|^2                      as published
                of gradients g (Ross, Hughes and Doshi-Velez 2017), of integrated gradients over some points of the way from a
                baseline (Liu and Avci 2019), or of expected gradients with another text as baseline, drawn anew each step (Erion et al. 2021)

Ross et al. differentiate sum_c log p_c. For two classes that is exactly tanh(l/2)^2 times the penalty of the log odds: 0 at
l = 0, so silent while a shortcut is being learnt, and at full strength once the model is sure. The gradient of a probability,
or of the cross-entropy, vanishes as the model gets sure, and is not offered. Even a penalty that is met un-teaches nothing
where the model has made itself flat at two points and keeps the step between them: read behaviour, not the penalty.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pellucid.engine.marks import ordinary_ids
from pellucid.errors import InputError, Refused, among, at_least, one_of
from pellucid.model import Model
from pellucid.tuning.data import NOT_ASKED, Batch, Encoded
from pellucid.tuning.kernels import check_curvature, check_kernels, exact_kernels
from pellucid.tuning.objective import Given, Objective, Opened, Pass, embeddings

Form = Literal["share", "outside", "absolute"]
Of = Literal["log_odds", "log_probability_sum"]
By = Literal["gradient", "integrated", "expected"]
Path = Literal["exact", "finite"]
LEAST = 1e-12
STEP = 1e-2  # of the mean norm of an embedding


@dataclass(frozen=True)
class Where(Objective):
    """Base of objectives about the tokens of one span; with `random`, about as many other tokens, drawn anew each step."""

    where: str = "decoy"
    random: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.where})"

    @property
    def spans(self) -> tuple[str, ...]:
        return (self.where,)

    @property
    def forbidden(self) -> tuple[str, ...]:
        return (self.where,)

    def mask(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """[row, position]."""
        mask = batch.masks[self.where]
        return random_mask(mask, batch.content, generator) if self.random else mask

    def control(self) -> Objective | None:
        return replace(self, random=True)


def random_mask(mask: Tensor, content: Tensor, generator: torch.Generator) -> Tensor:
    """As many tokens of every row as `mask` has, drawn from its other text (from all of it where that is too little)."""
    made = torch.zeros_like(mask)
    for row, (own, text) in enumerate(zip(mask, content, strict=True)):
        n = int(own.sum())
        free = (text & ~own).nonzero()[:, 0]
        free = free if len(free) >= n else text.nonzero()[:, 0]
        made[row, free[torch.randperm(len(free), generator=generator)[:n]]] = True
    return made


# ---- exchanging words


@dataclass(frozen=True)
class Exchange(Where):
    """Base of objectives that exchange a span's tokens: `by` "swap" (what the same place holds in another text), "mask",
    "random" (any word of the vocabulary) or a text whose tokens are taken one after another."""

    by: str = field(default="swap", kw_only=True)

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        if self.by == "mask" and getattr(model.tokenizer, "mask_token_id", None) is None:
            raise InputError(f"{self.name}: this model's tokenizer has no mask token: use by='swap' or by='random'")
        if self.by == "swap" and sum(bool(p) for p in data.positions[self.where]) < 2:
            raise InputError(
                f"{self.name}: only one text has the span {self.where!r}, so there is nothing to swap it with"
            )

    def exchanged(self, batch: Batch, data: Encoded, mask: Tensor, generator: torch.Generator) -> Batch:
        """The batch with other tokens under the mask."""
        ids = batch.ids.clone()
        donors = [i for i, p in enumerate(data.positions[self.where]) if p]
        words: list[int] = []
        if self.by == "random":
            words = ordinary_ids(batch.model.tokenizer, batch.model.vocabulary)
        elif self.by == "mask":
            words = [batch.model.tokenizer.mask_token_id]
        elif self.by != "swap":
            words = batch.model.tokenizer(self.by, add_special_tokens=False)["input_ids"]
        for b in range(len(batch)):
            places = mask[b].nonzero()[:, 0].tolist()
            if not places:
                continue
            if self.by == "swap":
                others = [i for i in donors if i != batch.rows[b]]
                donor = others[int(torch.randint(len(others), (1,), generator=generator))]
                new = self._donated(data, donor, places)
            elif self.by == "random":
                new = [words[k] for k in torch.randint(len(words), (len(places),), generator=generator).tolist()]
            else:
                new = [words[k % len(words)] for k in range(len(places))]
            ids[b, places] = torch.tensor(new).to(ids)
        return batch.with_ids(ids)

    def _donated(self, data: Encoded, donor: int, places: list[int]) -> list[int]:
        """What another text has: its own span's tokens in order, or (for random places) those at the same places."""
        row = data.rows[donor]
        given = row.streams.get("encoder", row.stream("")).ids[0]
        content, span = data.content[donor], data.positions[self.where][donor]
        if self.random:
            own = [k if k in content else content[k % len(content)] for k in places]
        else:
            own = [span[k % len(span)] for k in range(len(places))]
        return [int(given[k]) for k in own]


@dataclass(frozen=True)
class Consistency(Exchange):
    """The prediction stays when a span's words are exchanged (see the module). Mean over rows, in nats.

    >>> Consistency("decoy", weight=10.0)
    Consistency(weight=10.0, where='decoy', random=False, by='swap')
    """

    weight: float = field(default=10.0, kw_only=True)

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        batch = seen.batch
        mask = self.mask(batch, generator)
        other = seen.again(self.exchanged(batch, seen.data, mask, generator))
        a, b = seen.logits.log_softmax(-1), other.logits.log_softmax(-1)
        apart = ((a.exp() - b.exp()) * (a - b)).sum(-1) / 2
        return batch.by_row(apart).mean()


@dataclass(frozen=True)
class Augment(Exchange):
    """No penalty: what is trained on has the span's words exchanged, drawn anew each step. The label stays.

    >>> Augment("decoy").by
    'swap'
    """

    def batch(self, batch: Batch, data: Encoded, generator: torch.Generator) -> Batch:
        return self.exchanged(batch, data, self.mask(batch, generator), generator)


# ---- penalties on attributions


@dataclass(frozen=True)
class RightReasons(Where):
    """A penalty on what the answer's attributions give to a span (see the module). Mean over rows.

    `through`: "gradient", "integrated" (with `steps` points from a baseline of mask or padding tokens) or "expected" (with
    `steps` draws of another text as baseline). The first derivative's own derivative is taken: check says where a model has none, and
    `path="finite"` (of gradients) does without it: sizes |g| are differences along g's own direction, so first gradients are enough, for
    two or four more passes.

    >>> RightReasons("decoy", weight=100.0).form
    'share'
    """

    weight: float = field(default=100.0, kw_only=True)
    form: Form = field(default="share", kw_only=True)
    of: Of = field(default="log_odds", kw_only=True)
    through: By = field(default="gradient", kw_only=True)
    steps: int = field(default=2, kw_only=True)
    path: Path = field(default="exact", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, steps=self.steps)
        for name, kinds in (("form", Form), ("through", By), ("path", Path)):
            one_of(getattr(self, name), kinds, f"{name}=")
        if self.path == "finite" and self.through != "gradient":
            raise InputError(f"path='finite' is for through='gradient', not {self.through!r}, which sums signed parts")
        if not among(self.of, Of):
            raise InputError(
                f"of={self.of!r}: expected 'log_odds' or 'log_probability_sum'; the gradient of a probability or of the loss "
                "vanishes as the model gets sure, and that of the sum of probabilities is 0 always"
            )

    @property
    def forbidden(self) -> tuple[str, ...]:
        return () if self.form == "outside" else (self.where,)

    @property
    def reasons(self) -> tuple[str, ...]:
        return (self.where,) if self.form == "outside" else ()

    @property
    def second_order(self) -> bool:
        return self.path == "exact"

    def check(self, model: Model, data: Encoded) -> None:
        super().check(model, data)
        model.anatomy.check_gradients()
        if self.path == "finite":
            if next(model.module.parameters()).dtype not in (torch.float32, torch.float64):
                raise Refused(
                    f"{self.name}: path='finite' takes small differences, which 16 bits cannot hold: open the model in float32"
                )
            return
        check_kernels(model, self.name)
        batch = data.batch([next(i for i, p in enumerate(data.positions[self.where]) if p)])
        with torch.enable_grad():
            x = Pass(model, batch, data, gradients=True).embedded.detach()

            def gradient(at: Tensor) -> Tensor:
                at = at if at.requires_grad else at.requires_grad_()
                with exact_kernels(model):
                    seen = Pass(model, batch, data, edits=[Given(embeddings(model), at)])
                (g,) = torch.autograd.grad(self.value(seen).sum(), [at], create_graph=True)
                return g

            check_curvature(gradient, x, self.name)

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        mask = self.mask(seen.batch, generator).to(seen.logits.device)
        content = seen.batch.content.to(mask.device) | mask
        if self.path == "finite":
            inside, total = self._finite(seen, mask, content)
        else:
            sizes = (
                self.attributions(seen, generator).square().sum(-1)
            )  # over dimensions last: opposite signs must not cancel
            sizes = sizes[:, : mask.shape[1]]
            inside, total = (sizes * mask).sum(1), (sizes * content).sum(1)
        if self.form == "absolute":
            return inside.mean()
        share = inside / total.clamp_min(LEAST)
        return seen.mean_where(1 - share if self.form == "outside" else share, self.spans)

    def _finite(self, seen: Pass, mask: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """[row] sum over the mask, and over the content, of |g_t|^2, with gradients right to h^2: d|g| = v . dg along v = g / |g|."""
        first = seen.again(gradients=True, create_graph=False)
        g, x = first.gradient(self.value(first)), first.embedded
        wide = [nn.functional.pad(m, (0, g.shape[1] - m.shape[1])) for m in (mask, content)]

        def size(v: Tensor) -> Tensor:
            n = v.flatten(1).norm(dim=1)[:, None, None]
            h = STEP * x.detach().norm(dim=-1).mean()
            ends = [x + sign * h * (v / n.clamp_min(LEAST)).to(x) for sign in (1, -1)]
            up, down = (seen.again(edits=[Given(embeddings(seen.model), end)]) for end in ends)
            return ((self.value(up) - self.value(down)) / (2 * h)).square()

        inside = size(g * wide[0][..., None])
        return inside, inside if self.form == "absolute" else size(g * wide[1][..., None])

    def value(self, seen: Pass) -> Tensor:
        """[row] what is differentiated."""
        if self.of == "log_odds":
            return seen.log_odds
        asked = seen.logits.detach() > NOT_ASKED
        return seen.batch.by_row((seen.logits.log_softmax(-1) * asked).sum(-1))

    def attributions(self, seen: Pass, generator: torch.Generator) -> Tensor:
        """[row, position, d]."""
        if self.through == "gradient":
            return seen.slopes if self.of == "log_odds" else seen.gradient(self.value(seen))
        x = seen.embedded
        total = torch.zeros_like(x, dtype=torch.float32 if x.dtype != torch.float64 else x.dtype)
        for k in range(self.steps):
            base = self._baseline(seen, generator)
            at = (
                (k + 0.5) / self.steps
                if self.through == "integrated"
                else torch.rand(len(x), 1, 1, generator=generator).to(x)
            )
            point = base + at * (x - base)
            point = point if point.requires_grad else point.requires_grad_()
            other = _embedded(seen, point)
            (g,) = torch.autograd.grad(self.value(other).sum(), [point], create_graph=True)
            total = total + (x - base) * g / self.steps
        return total

    def _baseline(self, seen: Pass, generator: torch.Generator) -> Tensor:
        """[row, position, d] the embeddings of mask (or padding) tokens, or of another row's text, marks kept."""
        batch, tokenizer = seen.batch, seen.model.tokenizer
        if self.through == "integrated":
            fill = getattr(tokenizer, "mask_token_id", None)
            fill = fill if fill is not None else (getattr(tokenizer, "pad_token_id", None) or 0)
            ids = torch.where(batch.content.to(batch.ids.device), fill, batch.ids)
        else:
            ids = batch.ids.clone()
            for b in range(len(batch)):
                donor = int(torch.randint(len(seen.data), (1,), generator=generator))
                row = seen.data.rows[donor]
                text = row.streams.get("encoder", row.stream("")).ids[0][seen.data.content[donor]].to(ids)
                places = batch.content[b].nonzero()[:, 0]
                ids[b, places] = text[torch.arange(len(places)) % len(text)]
        with torch.no_grad():
            opened = Opened(embeddings(seen.model))
            seen.model.run(batch.with_ids(ids).inputs, keep=[embeddings(seen.model)], edits=[opened], logits=False)
        return opened.put[-1].detach()


def _embedded(seen: Pass, x: Tensor) -> Pass:
    with exact_kernels(seen.model):
        return Pass(seen.model, seen.batch, seen.data, edits=[*seen.edits, Given(embeddings(seen.model), x)])
