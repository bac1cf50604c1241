"""Select, then predict: a selector picks words, the predictor sees these and nothing else.

A selector (the model's first blocks, copied, and a linear score s_t of each token) makes a mask m; the predictor is given

    m_t e_t + (1 - m_t) e_fill                 e_fill the embedding of the mask token (of unk, pad or eos where there is none)

and, with `hide`, attends to and pools no token that was left out. Tokens outside `within`, marks, and in causal models the token at which the
answer is read are always shown. In use k = share * n tokens are shown whole, whatever the mask was in training:

    top_k         1 for the k largest s, with the gradient of sigmoid((s - threshold) / temperature)   (straight-through)
    sparsemax     the nearest point of {0 <= m <= 1, sum m = k}: m = clip(s - tau, 0, 1)               (the budget of SPECTRA, Guerreiro and Martins 2021)
    entmax15      min(1, k entmax_1.5(s))
    hard_kuma     a stretched Kumaraswamy(a, b) variable cut to [0, 1], drawn anew each step; the mean of P(m > 0) is held at the share from both
                  sides by an augmented Lagrangian                                                      (Bastings et al. 2019)

The predictor first learns the full text for `warm` steps; with a cold one neither learns. A soft mask that lets a tenth of a word through has let
the word through, so the share that counts is that of m > 0 (`share_in_training`). What a fit measures, on texts not trained on:

    accuracy, hidden                   on the selection; with what was left out hidden from attention as well
    full_text, complement              the same predictor on everything, on what was left out
    random_tokens, rationale_tokens    on as many random tokens, on those that people marked
    token_f1, token_f1_of_random       of the selection with the tokens that people marked
    positions_only, chance             the label from the places alone, by logistic regression: above chance the selector writes a code

That nothing else is seen is tried before the first step: under a mask, other words in the places left out change no bit of the answer. The control
is a predictor trained on as many random tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm, softplus

from pellucid.anatomy.sites import Site
from pellucid.changed import Copied, Replaced, unchangeable
from pellucid.engine.edits import Edit, Place
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import ordinary_ids
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded, Rationales
from pellucid.tuning.learnt import Learnt
from pellucid.tuning.measuring import plain, shown
from pellucid.tuning.objective import NONE, Objective, Pass, embeddings
from pellucid.tuning.objective import generator as drawing
from pellucid.tuning.sparse import entmax15

Mask = Literal["top_k", "hard_kuma", "sparsemax", "entmax15"]
LOW, HIGH = -0.1, 1.1  # to which a Kumaraswamy variable is stretched
PULL = 10.0  # of the squared distance from the share, beside the multiplier


@dataclass(frozen=True, eq=False, repr=False)
class Mixed(Edit):
    """Embeddings where `mask` [row, position] is 1, `fill` [row, position, d] where it is 0."""

    mask: Tensor
    fill: Tensor

    def new(self, x: Tensor, place: Place) -> Tensor:
        m = self.mask.to(x)[..., None]
        return m * x + (1 - m) * self.fill.to(x)


@dataclass(frozen=True)
class Select(Learnt):
    """The predictor sees a `share` of the tokens, picked by a trained selector of `blocks` blocks (see the module).

    `within` names the span to select from (None: the whole text); `teach` a span of tokens that people marked, whose binary cross-entropy is
    added. From `warm` on the predictor's learning rate is multiplied by `slower`, the selector's is not. An objective of `tuning.fit` with `steps` above `warm`; `shown_tokens` says what a fitted one picks. Refused where words reach the
    answer by another way.

    >>> Select(share=0.3, mask="sparsemax").warm
    45
    """

    share: float = 0.3
    mask: Mask = "top_k"
    warm: int = field(default=45, kw_only=True)
    blocks: int = field(default=1, kw_only=True)
    within: str | None = field(default=None, kw_only=True)
    teach: str | None = field(default=None, kw_only=True)
    hide: bool = field(default=False, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    slower: float = field(default=1.0, kw_only=True)
    random: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in get_args(Mask):
            raise InputError(f"mask={self.mask!r}: expected one of {', '.join(get_args(Mask))}")
        if not 0 < self.share < 1 or self.warm < 0 or self.blocks < 1 or self.temperature <= 0 or self.slower < 0:
            raise InputError(
                f"share={self.share}, warm={self.warm}, blocks={self.blocks}, temperature={self.temperature}, slower={self.slower}: expected a "
                "share between 0 and 1, steps of at least 0, at least one block, a temperature above 0, and a factor of at least 0"
            )

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def spans(self) -> tuple[str, ...]:
        return tuple(name for name in (self.within, self.teach) if name is not None)

    # ---- what it is on one model

    def site(self, model: Model) -> Site:
        stack = model.anatomy.stacks[0]
        if self.blocks > len(stack.blocks):
            raise InputError(f"blocks={self.blocks}: {model.name} has {len(stack.blocks)}")
        (site,) = model.sites(f"{stack.name + '.' if stack.name else ''}layers.{self.blocks - 1}.resid_post")
        return site

    def check(self, model: Model, data: Encoded | None = None) -> None:
        """Of a fitted one (data None): InputError where it belongs to other weights. Else what stands in its way."""
        if data is None:
            return self.belongs(model)
        super().check(model, data)
        first = next((i for i in range(len(data)) if self.candidates(model, data.batch([i]), data).sum() > 1), None)
        if first is None:
            raise InputError("no text has two tokens to select from")
        batch = data.batch([first])
        free = self.candidates(model, batch, data)
        mask = self._drawn(free, torch.Generator().manual_seed(0))
        words = torch.tensor(ordinary_ids(model.tokenizer, model.vocabulary))
        other = words[torch.randint(len(words), batch.ids.shape, generator=torch.Generator().manual_seed(1))].to(
            batch.ids
        )
        gone = (free & ~mask).to(batch.ids.device)
        for hide in (False, True):
            with torch.no_grad():
                a, b = (
                    each.read(model.run(each.inputs, edits=each.edits).logits)
                    for each in (
                        self._masked(model, given, free, mask.float(), hide)
                        for given in (batch, batch.with_ids(torch.where(gone, other, batch.ids)))
                    )
                )
            if not torch.equal(a, b):
                raise Refused(
                    f"{model.name} lets words that were left out reach the answer: others in their places changed it by "
                    f"{float((a - b).abs().max()):.2g}, so the selection would be no reason"
                )
        return None

    def begun(self, model: Model, data: Encoded, seed: int) -> Select:
        self.site(model)
        made, d = replace(self), model.anatomy.stacks[0].d_model
        drawn = torch.Generator().manual_seed(seed)
        blocks = tuple(f"{b.module}." for b in model.anatomy.stacks[0].blocks[: self.blocks])
        names = [
            n
            for n, p in model.module.named_parameters()
            if n.startswith(blocks) and p.is_floating_point() and not unchangeable(p)
        ]
        selector = model.changed(Copied(tuple(names)))
        own = dict(selector.module.named_parameters())
        device = next(model.module.parameters()).device
        tensors = {
            "head.score": (0.02 * torch.randn(2, d, generator=drawn)).to(device),
            "head.bias": torch.zeros(2, device=device),
        }
        if self.mask == "hard_kuma":
            tensors["head.multiplier"] = torch.zeros((), device=device)
        made.state_.update(tensors=tensors | {f"copied.{n}": own[n] for n in names}, seed=seed, _selector=selector)
        return made

    def selector(self, model: Model) -> Model:
        """The model whose first blocks score tokens."""
        if "_selector" not in self.state_:
            self.belongs(model)
            blocks = {k.removeprefix("copied."): v for k, v in self.parameters.items() if k.startswith("copied.")}
            self.state_["_selector"] = model.changed([Replaced(name, v, ties="together") for name, v in blocks.items()])
        found: Model = self.state_["_selector"]
        return found

    def pace(self, step: int) -> float:
        return 1.0 if step < self.warm else self.slower

    # ---- masks

    def candidates(self, model: Model, batch: Batch, data: Encoded) -> Tensor:
        """[row, position] the tokens that may be left out."""
        free = (batch.masks[self.within] if self.within else batch.content).clone()
        if model.anatomy.stacks[0].causal:
            for b, i in enumerate(batch.rows):
                free[b, data.lengths[i] - 1] = False
        return free

    def scores(self, model: Model, batch: Batch) -> Tensor:
        """[row, position, 2] what the selector makes of each token; the second is read by hard_kuma alone."""
        site = self.site(model)
        run = self.selector(model).run(batch.inputs, keep=[site], logits=False, grad=torch.is_grad_enabled())
        h = run.tensor(site).float()
        return layer_norm(h, h.shape[-1:]) @ self.parameters["head.score"].T + self.parameters["head.bias"]

    def shown_tokens(self, model: Model, batch: Batch, data: Encoded) -> Tensor:
        """[row, position] which tokens a fitted selector shows, without those that are always shown."""
        free = self.candidates(model, batch, data)
        if self.random:
            return self._drawn(free, drawing(int(self.state_.get("seed", 0)), "random selection", batch.rows[0]))
        with torch.no_grad():
            return largest(self._rank(self.scores(model, batch)).cpu(), free, self.share)

    def run(
        self, model: Model, texts: Sequence[str], spans: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[Run, list[list[str]]]:
        """The tuned model on texts of which it sees what a fitted selector picks, and the tokens picked of each; `spans` where it
        selects within one.

        >>> run, words = selector.run(tuned.model, ["a fine film"])  # doctest: +SKIP
        """
        self.belongs(model)
        told, paired = model.anatomy.answering.meaning, len(model.anatomy.stacks) > 1
        labels: Any = [0] * len(texts) if told == "class" else [" a"] * len(texts) if paired else None
        data = Encoded(model, Rationales(texts, labels, dict(spans or {})))
        batch = data.batch(range(len(data)))
        mask = self.shown_tokens(model, batch, data)
        given = self.with_only(model, batch, data, mask, self.hide)
        maps = [row.streams.get("encoder", row.stream("")).labels[0] for row in data.rows]
        words = [[maps[b][k] for k in mask[b].nonzero()[:, 0].tolist()] for b in range(len(data))]
        return model.run(given.inputs, edits=given.edits), words

    def _rank(self, scores: Tensor) -> Tensor:
        return _present(scores) if self.mask == "hard_kuma" else scores[..., 0]

    def _drawn(self, free: Tensor, drawn: torch.Generator) -> Tensor:
        return largest(torch.rand(free.shape, generator=drawn), free, self.share)

    def _soft(self, scores: Tensor, free: Tensor, drawn: torch.Generator) -> Tensor:
        """[row, position] the mask in training, with a graph."""
        s, k = scores[..., 0], counts(free, self.share).to(scores.device)
        free = free.to(scores.device)
        if self.mask == "top_k":
            hard = largest(s.detach().cpu(), free.cpu(), self.share).to(s)
            inside = s.masked_fill(hard == 0, torch.inf).amin(1, keepdim=True)
            outside = s.masked_fill(~free | (hard > 0), -torch.inf).amax(1, keepdim=True)
            outside = torch.where(outside.isfinite(), outside, inside - 1)
            threshold = torch.where(inside.isfinite(), (inside + outside) / 2, 0.0)
            soft = ((s - threshold) / self.temperature).sigmoid()
            return (hard + (soft - soft.detach())) * free
        if self.mask == "hard_kuma":
            a, b = _shape(scores)
            u = torch.rand(s.shape, generator=drawn).to(s).clamp(1e-4, 1 - 1e-4)
            x = (1 - (1 - u) ** (1 / b)) ** (1 / a)
            return (LOW + (HIGH - LOW) * x).clamp(0, 1) * free
        s = (s / self.temperature).masked_fill(~free, -torch.inf)
        if self.mask == "entmax15":
            return (entmax15(s) * k[:, None]).clamp(max=1) * free
        return budget(s, k)

    # ---- what the predictor is given

    def shown(
        self, model: Model, batch: Batch, data: Encoded, generator: torch.Generator | None, own: Mapping[str, Tensor] = NONE
    ) -> Batch:  # fmt: skip
        if generator is None:
            return self.with_only(model, batch, data, self.shown_tokens(model, batch, data), self.hide)
        if batch.step < self.warm:
            return batch
        free = self.candidates(model, batch, data)
        if self.random:
            return self._masked(model, batch, free, self._drawn(free, generator).float(), False)
        scores = self.scores(model, batch)
        self.state_["_scores"] = scores, free
        return self._masked(model, batch, free, self._soft(scores, free, generator), False)

    def with_only(self, model: Model, batch: Batch, data: Encoded, mask: Tensor, hide: bool = False) -> Batch:
        """A batch of which only the tokens of `mask` [row, position], and those that are always shown, are seen."""
        return self._masked(model, batch, self.candidates(model, batch, data), mask.float(), hide)

    def _masked(self, model: Model, batch: Batch, free: Tensor, mask: Tensor, hide: bool) -> Batch:
        fill = next(
            (
                i
                for role in ("mask", "unk", "pad", "eos")
                if (i := getattr(model.tokenizer, f"{role}_token_id", None)) is not None
            ),
            0,
        )
        site = embeddings(model)
        with torch.no_grad():
            blank = batch.with_ids(torch.where(free.to(batch.ids.device), fill, batch.ids))
            filled = model.run(blank.inputs, keep=[site], logits=False).tensor(site)
        free = free.to(mask.device)
        whole = torch.where(free, mask, 1.0)
        if hide:
            seen = batch.inputs.tensors["attention_mask"]
            tensors = batch.inputs.tensors | {"attention_mask": seen * (whole > 0).to(seen)}
            batch = replace(batch, inputs=Inputs(tensors, batch.inputs.streams, batch.inputs.texts))
        return replace(batch, edits=(*batch.edits, Mixed(site, whole, filled)))

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor | None:
        found = self.state_.pop("_scores", None)
        if found is None:
            return None
        scores, free = found
        free = free.to(scores.device)
        loss = scores.sum() * 0.0
        if self.mask == "hard_kuma":
            apart = (_present(scores) * free).sum() / free.sum() - self.share
            multiplier = self.parameters["head.multiplier"]
            loss = loss + multiplier.detach() * apart + PULL * apart.square() - multiplier * apart.detach()
        if self.teach is not None:
            marked = (seen.batch.masks[self.teach].to(free.device) & free).to(scores)
            each = binary_cross_entropy_with_logits(scores[..., 0], marked, reduction="none")
            loss = loss + (each * free).sum() / free.sum().clamp_min(1)
        return loss

    def control(self) -> Objective:
        return replace(self, random=True)

    # ---- what came of it

    def numbers(self, model: Model, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
        def right(mask: Callable[[Batch, Tensor, Tensor], Tensor | None], hide: bool = False) -> float:
            found = []
            for batch in shown(model, test):
                free, own = self.candidates(model, batch, test), self.shown_tokens(model, batch, test)
                picked = mask(batch, free, own)
                given = batch if picked is None else self._masked(model, batch, free, picked.float(), hide)
                found.append(plain(model, given)[1])
            return float(np.concatenate(found).mean())

        drawn = drawing(seed, "random tokens", 0)
        people = self.teach or ("rationale" if "rationale" in test.positions else None)
        found = {
            "accuracy": right(lambda batch, free, own: own), "hidden": right(lambda batch, free, own: own, True),
            "full_text": right(lambda batch, free, own: None), "complement": right(lambda batch, free, own: free & ~own),
            "random_tokens": right(lambda batch, free, own: self._drawn(free, drawn)),
        }  # fmt: skip
        if people is not None and any(test.positions.get(people, ())):
            found["rationale_tokens"] = right(lambda batch, free, own: batch.masks[people] & free)
        shares, f1s, soft = [], [], []
        for batch in shown(model, test):
            free, own = self.candidates(model, batch, test), self.shown_tokens(model, batch, test)
            some = free.any(1)
            shares += (own.sum(1) / free.sum(1).clamp_min(1))[some].tolist()
            if not self.random:
                with torch.no_grad():
                    m = self._soft(self.scores(model, batch), free, drawn).cpu()
                soft += (((m > 0) & free).sum(1) / free.sum(1).clamp_min(1))[some].tolist()
            if "rationale_tokens" in found:
                marked = batch.masks[str(people)] & free
                both = [f1(mask, marked)[marked.any(1)].tolist() for mask in (own, self._drawn(free, drawn))]
                f1s += list(zip(*both, strict=True))
        found["share"] = float(np.mean(shares))
        found |= {"share_in_training": float(np.mean(soft))} if soft else {}
        if f1s:
            found["token_f1"], found["token_f1_of_random"] = (float(x) for x in np.mean(f1s, 0))
        return found | self._places(model, train, test)

    def _places(self, model: Model, train: Encoded, test: Encoded) -> dict[str, float]:
        """What the places alone tell of the label."""
        if train.labels is None or test.labels is None:
            return {}
        width = max(b.content.shape[1] for data in (train, test) for b in shown(model, data))
        x, y = [], []
        for data in (train, test):
            rows = [self.shown_tokens(model, b, data) for b in shown(model, data)]
            x.append(np.concatenate([np.pad(m.numpy().astype(float), ((0, 0), (0, width - m.shape[1]))) for m in rows]))
            y.append(np.asarray(data.labels).astype(str))
        if len(set(y[0])) < 2:
            return {}
        score = LogisticRegression(max_iter=1000).fit(x[0], y[0]).score(x[1], y[1])
        return {
            "positions_only": float(score),
            "chance": float(np.unique(y[1], return_counts=True)[1].max() / len(y[1])),
        }

    def said(self, data: xr.Dataset, texts: int) -> list[str]:
        def of(measure: str, arm: str = "objective") -> float:
            known = arm in data["arm"] and measure in data["measure"]
            return float(data["measured"].sel(arm=arm, measure=measure)) if known else float("nan")

        error, said = 2 * (0.25 / texts) ** 0.5, []
        own = of("accuracy")
        if of("full_text") <= of("chance") + error:
            said.append(
                f"the predictor never learnt the full text ({of('full_text'):.2f}), so nothing follows: raise warm, or steps"
            )
        elif of("random_tokens") >= own - error:
            said.append(
                f"as many random tokens do as well ({of('random_tokens'):.2f} against {own:.2f}): the selection is no reason"
            )
        if of("positions_only") > of("chance") + error:
            said.append(f"the places alone tell the label ({of('positions_only'):.2f}): the selection may be a code")
        plausible = (
            f"; token F1 {of('token_f1'):.2f} (random {of('token_f1_of_random'):.2f})"
            if "token_f1" in data["measure"]
            else ""
        )
        said.append(
            f"on {of('share'):.2f} of the tokens it answers {own:.2f} (full text {of('full_text'):.2f}, as many random tokens {of('random_tokens'):.2f}, "
            f"a predictor trained on such {of('accuracy', 'control'):.2f}, what was left out {of('complement'):.2f}){plausible}"
        )
        return said


def counts(free: Tensor, share: float) -> Tensor:
    """[row] how many tokens a share is: at least one, where there is any."""
    n = free.sum(1)
    return torch.minimum((share * n).round().clamp_min(1), n).long()


def largest(scores: Tensor, free: Tensor, share: float) -> Tensor:
    """[row, position] exactly so many of the free tokens, those of the largest scores, the earlier of equal ones.

    >>> largest(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), torch.tensor([[True, True, True, False]]), 0.5)
    tensor([[False,  True,  True, False]])
    """
    order = scores.masked_fill(~free, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    made = torch.zeros_like(free)
    return made.scatter(1, order, torch.arange(free.shape[1]) < counts(free, share)[:, None]) & free


def budget(scores: Tensor, k: Tensor) -> Tensor:
    """[row, position] the nearest point of {0 <= m <= 1, sum m = k}, k [row] whole numbers: sparsemax for k = 1. Scores of -inf get 0.

    >>> budget(torch.tensor([[3.0, 1.0, 0.5, -2.0]]), torch.tensor([2]))
    tensor([[1.0000, 0.7500, 0.2500, 0.0000]])
    """
    with torch.no_grad():
        known = scores.isfinite()
        low = scores.masked_fill(~known, torch.inf).amin(1, keepdim=True) - 1
        high = scores.amax(1, keepdim=True)
        low, high = (torch.where(x.isfinite(), x, 0.0).double() for x in (low, high))
        for _ in range(60):
            tau = (low + high) / 2
            more = (scores - tau).clamp(0, 1).sum(1, keepdim=True) > k[:, None]
            low, high = torch.where(more, tau, low), torch.where(more, high, tau)
        whole, active = scores - high >= 1, (scores - high > 0) & (scores - high < 1)
    n = active.sum(1, keepdim=True).clamp_min(1)
    tau = (scores.masked_fill(~active, 0).sum(1, keepdim=True) - (k[:, None] - whole.sum(1, keepdim=True))) / n
    return torch.where(active, (scores - tau).clamp(0, 1), whole.to(scores))


def f1(mask: Tensor, marked: Tensor) -> Tensor:
    """[row] of two sets of tokens."""
    return 2 * (mask & marked).sum(1) / (mask.sum(1) + marked.sum(1)).clamp_min(1)


def _shape(scores: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of each Kumaraswamy variable; score 0 is 1, the uniform distribution."""
    a, b = (softplus(scores[..., i] * (1 if i == 0 else -1) + 0.5413) for i in (0, 1))
    return a.clamp(1e-2, 100), b.clamp(1e-2, 100)


def _present(scores: Tensor) -> Tensor:
    """P(m > 0) = (1 - x^a)^b, x where the stretched variable is 0."""
    a, b = _shape(scores)
    return (1 - (-LOW / (HIGH - LOW)) ** a) ** b
