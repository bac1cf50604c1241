"""Select, then predict: a selector picks words, the predictor sees these and nothing else.

A selector (the model's first blocks, copied, and a linear score s_t of each token) makes a mask m; the predictor is given

    m_t e_t + (1 - m_t) e_fill                 e_fill the embedding of the mask token (of unk, pad or eos where there is none)

and, with `hide`, attends to and pools no token that was left out. Tokens outside `within`, marks, and in causal models the token at which the
answer is read are always shown. In use k = share * n tokens are shown whole, whatever the mask was in training (`tuning.masks`: straight-through
top-k, sparsemax, entmax 1.5, or hard Kumaraswamy gates, whose mean of P(m > 0) is held at the share from both sides by an augmented Lagrangian).

The predictor first learns the full text for `warm` steps; with a cold one neither learns. What a fit measures stands in `tuning.selected`.
That nothing else is seen is tried before the first step: under a mask, other words in the places left out change no bit of the answer. The control
is a predictor trained on as many random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm

from pellucid.anatomy.sites import Site
from pellucid.changed import Copied, Replaced, unchangeable
from pellucid.engine.inputs import Inputs
from pellucid.engine.marks import ordinary_ids
from pellucid.engine.run import Run
from pellucid.errors import InputError, Refused, one_of
from pellucid.model import Model
from pellucid.tuning.data import Batch, Encoded, Rationales
from pellucid.tuning.learnt import Learnt
from pellucid.tuning.masks import Mask, Mixed, largest, present, ranked, soft
from pellucid.tuning.objective import NONE, Objective, Pass, embeddings
from pellucid.tuning.objective import generator as drawing
from pellucid.tuning.selected import measures, verdict

PULL = 10.0  # of the squared distance from the share, beside the multiplier


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
        one_of(self.mask, Mask, "mask=")
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
        mask = self.drawn(free, torch.Generator().manual_seed(0))
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
                        self.masked(model, given, free, mask.float(), hide)
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
            return self.drawn(free, drawing(int(self.state_.get("seed", 0)), "random selection", batch.rows[0]))
        with torch.no_grad():
            return largest(ranked(self.mask, self.scores(model, batch)).cpu(), free, self.share)

    def run(
        self, model: Model, texts: Sequence[str], spans: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[Run, list[list[str]]]:
        """The tuned model on texts of which it sees what a fitted selector picks, and the tokens picked of each; `spans` where it
        selects within one.

        >>> (selector,) = selecting.objectives["objective"]
        >>> run, words = selector.run(selecting.model, ["a fine film"])
        >>> len(words)
        1
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

    def drawn(self, free: Tensor, drawn: torch.Generator) -> Tensor:
        return largest(torch.rand(free.shape, generator=drawn), free, self.share)

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
            return self.masked(model, batch, free, self.drawn(free, generator).float(), False)
        scores = self.scores(model, batch)
        self.state_["_scores"] = scores, free
        return self.masked(
            model, batch, free, soft(self.mask, scores, free, self.share, self.temperature, generator), False
        )

    def with_only(self, model: Model, batch: Batch, data: Encoded, mask: Tensor, hide: bool = False) -> Batch:
        """A batch of which only the tokens of `mask` [row, position], and those that are always shown, are seen."""
        return self.masked(model, batch, self.candidates(model, batch, data), mask.float(), hide)

    def masked(self, model: Model, batch: Batch, free: Tensor, mask: Tensor, hide: bool) -> Batch:
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
            apart = (present(scores) * free).sum() / free.sum() - self.share
            multiplier = self.parameters["head.multiplier"]
            loss = loss + multiplier.detach() * apart + PULL * apart.square() - multiplier * apart.detach()
        if self.teach is not None:
            marked = (seen.batch.masks[self.teach].to(free.device) & free).to(scores)
            each = binary_cross_entropy_with_logits(scores[..., 0], marked, reduction="none")
            loss = loss + ((each * free).sum(1) / free.sum(1).clamp_min(1)).mean()
        return loss

    def control(self) -> Objective:
        return replace(self, random=True)

    # ---- what came of it

    def numbers(self, model: Model, train: Encoded, test: Encoded, seed: int) -> dict[str, float]:
        return measures(model, self, train, test, seed)

    def said(self, data: xr.Dataset, texts: int) -> list[str]:
        return verdict(data, texts)
