"""Which low-rank change of one site makes the model give these answers? Its weights stay as they are.

    h + R^T (W h + b - R h),      R [rank, d] with orthonormal rows          LoReFT (Wu et al. 2024, "ReFT")

R, W and b are trained on the answers' mean negative log-likelihood per token. The paper writes at the first and last tokens of the
prompt; here it is the last one and every token of the answer, as steering does. Judged on held-out prompts, beside the same
training with answers that were drawn from other prompts: what that arm gains is the form of the answers, not what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.changed import check_weights
from pellucid.engine.checkpoint import reading_tensors, write_tensors
from pellucid.engine.edits import Edit, Place
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused, at_least, listed
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.training import draws, linear, train

KEY = "pellucid_learnt_edit"


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Edit):
    """The change of the module's formula; with `starts` [row] at positions from there on only."""

    rotation: Tensor  # [rank, d]
    weight: Tensor  # [rank, d]
    bias: Tensor  # [rank]
    starts: Tensor | None = None

    def new(self, x: Tensor, place: Place) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.rotation.shape[1] != x.shape[-1]:
            raise InputError(f"{str(place.site)!r} is {x.shape[-1]} wide, and this edit {self.rotation.shape[1]}")
        change = (x.to(wide) @ (self.weight - self.rotation).T.to(wide) + self.bias.to(wide)) @ self.rotation.to(wide)
        if self.starts is not None:
            change = change * (place.positions >= self.starts.to(place.positions)[:, None])[..., None]
        return x + change.to(x.dtype)


@dataclass(eq=False)
class LearntEdit:
    """A low-rank change of `site`, fitted to answers. `held_out` is the share of prompts it is judged on.

    After `fit`: `edit_` for `model.run` and `model.generate`, and `result_`.

    >>> LearntEdit("layers.14.resid_post", rank=2).fit(model, prompts, answers).edit_
    LowRank('layers.14.resid_post', rotation=<tensor [2, 32]>, weight=<tensor [2, 32]>, bias=<tensor [2]>, tokens='-1:')
    """

    site: str
    rank: int = 4
    epochs: int = 10
    batch: int = 8
    learning_rate: float = 4e-3
    held_out: float = 0.25
    seed: int = 0
    edit_: LowRank = field(init=False, repr=False)
    result_: Result = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, prompts: Any, answers: Any) -> LearntEdit:
        """Fit on prompts and the answer (text or token ids) that should follow each.

        `result_` over `arm` (plain, learnt, drawn answers): held-out `loss` in nats per token of the true answers, with its 95 %
        interval `low` to `high` over prompts. InputError for fewer than eight prompts, Refused for an encoder-decoder.
        """
        at_least(1, rank=self.rank, epochs=self.epochs, batch=self.batch)
        stacks = model.anatomy.stacks
        if len(stacks) > 1 or not stacks[0].causal or model.anatomy.answering.meaning != "tokens":
            raise Refused(f"{model.name} does not continue a text: an edit is learnt on the answers of those that do")
        prompts, answers = (
            listed("prompts", prompts, "several prompts"),
            listed("answers", answers, "one for each prompt"),
        )
        if len(prompts) != len(answers) or len(prompts) < 8:
            raise InputError(
                f"{len(prompts)} prompts and {len(answers)} answers: expected one for each, and at least 8"
            )
        if len(found := model.sites(self.site)) != 1 or found[0].dims[-1] != "d_model":
            raise InputError(f"{self.site!r}: expected one site of the residual stream, such as layers.3.resid_post")
        rows = [_row(model, p, a) for p, a in zip(prompts, answers, strict=True)]
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(rows)).tolist()
        cut = max(2, round(len(rows) * self.held_out))
        test, fitted = [rows[i] for i in order[:cut]], [rows[i] for i in order[cut:]]
        n = len(fitted)
        drawn = [(fitted[i][0], fitted[(i + 1 + int(rng.integers(n - 1))) % n][1]) for i in range(n)]
        self.edit_ = self._trained(model, fitted)
        losses = [_losses(model, test, edit) for edit in (None, self.edit_, self._trained(model, drawn))]
        values = torch.stack(losses, 1).detach().double().cpu().numpy()
        low, high = interval(values, self.seed)
        arms = ["plain", "learnt", "drawn answers"]
        data = xr.Dataset({"loss": ("arm", values.mean(0)), "low": ("arm", low), "high": ("arm", high)}, {"arm": arms})
        plain, own, chance = values.mean(0)
        said = f"{plain:.2f} to {own:.2f} nats per token, {chance:.2f} with drawn answers"
        worse = "; it learnt the form of the answers, no more" if chance <= own + 1e-6 else ""
        self.result_ = Result(data, kind="learnt edit", title=f"Rank {self.rank} at {self.site}: {said}{worse}")
        object.__setattr__(self.edit_, "_digest", model.digest)
        return self

    def _trained(self, model: Model, rows: Sequence[tuple[list[int], list[int]]]) -> LowRank:
        generator = torch.Generator().manual_seed(self.seed)
        d = model.run([rows[0][0]], keep=[self.site], logits=False).tensor(self.site).shape[-1]
        if self.rank > d:
            raise InputError(f"rank={self.rank}: {self.site!r} is {d} wide")
        given = torch.randn(d, self.rank, generator=generator)
        weight = torch.linalg.qr(given)[0].T.clone()  # at first nothing is changed
        p = {"given": given, "weight": weight, "bias": torch.zeros(self.rank)}

        def edit() -> LowRank:
            return LowRank(self.site, torch.linalg.qr(p["given"])[0].T, p["weight"], p["bias"])

        def loss(batch: Tensor, step: int) -> Tensor:
            return _losses(model, [rows[i] for i in batch.tolist()], edit()).mean()

        batches = draws(len(rows), self.batch, self.epochs, self.seed)
        train(p, batches, loss, lambda ps: torch.optim.Adam(ps, lr=self.learning_rate), schedule=linear, seed=self.seed)
        made = edit()
        return LowRank(
            self.site, made.rotation.detach().clone(), p["weight"].detach(), p["bias"].detach(), tokens="-1:"
        )

    def check(self, model: Model) -> None:
        """InputError if it was fitted on other weights."""
        check_weights(model, self.edit_.digest, f"the edit learnt at {self.site}")

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        tensors = {name: getattr(self.edit_, name).contiguous() for name in ("rotation", "weight", "bias")}
        return write_tensors(path, KEY, {"settings": settings, "digest": self.edit_.digest}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> LearntEdit:
        """What `save` wrote, without its `result_`."""
        with reading_tensors(path, KEY, "is no saved LearntEdit") as (about, tensors):
            made = cls(**about["settings"])
            made.edit_ = LowRank(made.site, *(tensors[k] for k in ("rotation", "weight", "bias")), tokens="-1:")
        object.__setattr__(made.edit_, "_digest", about["digest"])
        return made


def _row(model: Model, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    stream = model.inputs([prompt]).stream("")
    if isinstance(answer, str):
        if model.tokenizer is None:
            raise InputError("this model was opened without a tokenizer: give answers as token ids")
        answer = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not len(answer):
        raise InputError(f"the answer to {prompt!r} is empty: there is nothing to learn from it")
    return stream.ids[0][stream.mask[0].bool()].tolist(), [int(i) for i in answer]


def _losses(model: Model, rows: Sequence[tuple[list[int], list[int]]], edit: LowRank | None) -> Tensor:
    """[row] the mean negative log-likelihood per token of answers after their prompts, the edit from the prompt's last token on."""
    inputs: Inputs = model.inputs([[*p, *a] for p, a in rows])
    starts = torch.tensor([len(p) - 1 for p, _ in rows])
    edits = [] if edit is None else [LowRank(edit.site, edit.rotation, edit.weight, edit.bias, starts)]
    stream = inputs.stream("")
    log_p = model.run(inputs, edits=edits).logits.float().log_softmax(-1)
    made = []
    for row, (prompt, answer) in enumerate(rows):
        at = int(stream.starts[row]) + len(prompt) - 1
        made.append(
            -log_p[row, at : at + len(answer)].gather(1, torch.tensor(answer, device=log_p.device)[:, None]).mean()
        )
    return torch.stack(made)
