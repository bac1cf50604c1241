"""How much of the change from a baseline does each token account for, operator by operator?

    attribution_i = sum over d of (x_i - b_i) * m_i,   m the product of multipliers on the way to the answer

DeepLIFT (Shrikumar et al. 2017) compares two runs, the prompt's and the baseline's, and gives each operator's difference
to its inputs by a multiplier in the place of a gradient, so that what saturates still passes credit on. The rescale rule
is defined for functions of one number; transformers multiply activations and take softmaxes, for which we add rules that
keep the sum (see `deeplift_rules`). The attributions add up to F(x) - F(b) up to rounding: the gap is reported.

The two runs must pass the same operators, so models that route tokens to experts are refused, and with them those that
pass an operator without a rule. A product of many multipliers, each the slope of a long chord, can be as large as it
likes: from some baselines it outgrows the model's precision, and what does not add up is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.attribution.baseline import Baseline
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.deeplift_rules import Chord, Recorded, Rescaled
from pellucid.attribution.path import Embedded, Pack, packed
from pellucid.attribution.players import Players
from pellucid.attribution.relevance_rules import opaque
from pellucid.engine.edits import Edit
from pellucid.engine.lockstep import asked
from pellucid.errors import Refused
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
@batched
def deeplift(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    baseline: Any = None,
    players: Any = "token",
    keep_special: bool = True,
    keep_first: bool | None = None,
) -> Result:
    """Differences from the baseline handed back to the tokens, from two forward passes and one backward.

    The options are those of `integrated_gradients`. Refused where prompt and baseline take different ways (routed
    experts), the model passes an operator without a rule, or the attributions do not add up in the model's precision.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation), `score`, `baseline_score` and
    `gap` = sum of attributions - (score - baseline_score), which is rounding.

    >>> deeplift(model, "The capital of France is", " Paris", baseline="mean").top(3)
    position token special baseline_token attribution score baseline_score gap gradients evaluations
    ...
    """
    if edits:
        raise Refused(
            "DeepLIFT has rules for the operators of a model, and an edit is none of them: use integrated_gradients, or a "
            "method that only runs the model, such as occlusion"
        )
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    credited, embedded = Players.of(case, players), Embedded(case)
    start = Baseline.of(embedded, baseline, keep_first)
    above, below, multipliers = asked(_multipliers, (embedded, embedded.values, start.values))
    found = ((embedded.values - start.values) * multipliers).double().sum(-1).cpu()
    above, below = above.double().cpu(), below.double().cpu()
    gap = found.sum(1) - (above - below)
    if bool((gap.abs() > 0.01 * (above - below).abs() + 1e-4 * above.abs().maximum(below.abs())).any()):
        dtype = str(embedded.values.dtype).removeprefix("torch.")
        wider = (
            "open the model in float32"
            if torch.finfo(embedded.values.dtype).bits < 32
            else "choose another baseline, such as '.'"
        )
        raise Refused(
            f"DeepLIFT's multipliers from the baseline {start.name!r} grow through the layers of {model.name} until rounding to {dtype} "
            f"drowns the attributions, which sum to {float(found.sum(1)[0]):.3g} for a change of "
            f"{float((above - below)[0]):.3g}: {wider}, or use integrated_gradients"
        )
    values, labels = credited.pooled(case, found)
    return case.result(
        f"DeepLIFT of {case.question.name} from {start.name!r}",
        {"attribution": values, "score": above, "baseline_score": below, "gap": gap,
         "gradients": 1, "evaluations": 1},
        labels=labels, attrs={**start.about},
        coords={} if labels else {"baseline_token": ("position", list(start.labels))},
    )  # fmt: skip


def _multipliers(items: Sequence[tuple[Embedded, Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The score [output] at each case's embeddings and at its baseline, and the multipliers [output, position, d]."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for chosen in packed(items):
        cases = [items[i] for i, _ in chosen]
        pack, there = (Pack([(embedded, (own, base)[n]) for embedded, own, base in cases]) for n in (0, 1))
        there.inputs = pack.inputs  # made before anything is recorded
        model, low, high = pack.model, there.joined(), [x.detach().requires_grad_() for x in pack.joined()]
        with torch.no_grad(), Recorded(model.module, model.anatomy.memo) as record:
            below = there.scores(low)
        with torch.enable_grad(), Rescaled(record) as rules:
            scores = pack.scores(high)
        for each in scores:
            rules.uncovered |= opaque(each) - {Chord.__name__}
        if rules.uncovered or not all(each.requires_grad for each in scores):
            why = (
                f"it passes {', '.join(sorted(rules.uncovered))}"
                if rules.uncovered
                else "no gradient reaches its embeddings"
            )
            raise Refused(
                f"DeepLIFT has no rule for a part of {model.name} ({why}): use integrated_gradients or shapley"
            )
        slopes_of: list[list[Tensor]] = [[] for _ in cases]
        most = max(each.shape[1] for each in scores)
        for o in range(most):  # prompts do not meet
            asking = [k for k, each in enumerate(scores) if o < each.shape[1]]
            with torch.enable_grad():
                total = torch.stack([scores[k][0, o] for k in asking]).sum()
            slopes = torch.autograd.grad(total, high, retain_graph=o + 1 < most)
            for k in asking:
                slopes_of[k].append(pack.cut(slopes, k)[0])
        for (i, _), up, down, slopes_here in zip(chosen, scores, below, slopes_of, strict=True):
            found[i] = up[0].detach(), down[0], torch.stack(slopes_here)
    return [found[i] for i in range(len(items))]
