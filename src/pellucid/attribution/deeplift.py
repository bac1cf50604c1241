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

from typing import Any

import torch

from pellucid.attribution.baseline import Baseline
from pellucid.attribution.case import Case
from pellucid.attribution.deeplift_rules import Chord, Recorded, Rescaled
from pellucid.attribution.path import Embedded
from pellucid.attribution.players import Players
from pellucid.attribution.relevance_rules import opaque
from pellucid.errors import Refused
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique


@technique
def deeplift(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    baseline: Any = None,
    players: Any = "token",
    keep_special: bool = True,
) -> Result:
    """Differences from the baseline handed back to the tokens, from two forward passes and one backward.

    The options are those of `integrated_gradients`. Refused where prompt and baseline take different ways (routed
    experts), the model passes an operator without a rule, or the attributions do not add up in the model's precision.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation), `score`, `baseline_score` and
    `gap` = sum of attributions - (score - baseline_score), which is rounding.

    >>> deeplift(model, "The capital of France is", " Paris", baseline="mean").top(3)  # doctest: +SKIP
    """
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special)
    credited, embedded = Players.of(case, players), Embedded(case)
    start = Baseline.of(embedded, baseline)
    with torch.no_grad(), Recorded(model.module, model.anatomy.memo) as record:
        below = embedded.scores(start.values)[0]
    x = embedded.values.detach().clone().requires_grad_()
    with torch.enable_grad(), Rescaled(record) as rules:
        scores = embedded.scores(x)[0]
    rules.uncovered |= opaque(scores) - {Chord.__name__}
    if rules.uncovered or not scores.requires_grad:
        why = (
            f"it passes {', '.join(sorted(rules.uncovered))}"
            if rules.uncovered
            else "no gradient reaches its embeddings"
        )
        raise Refused(f"DeepLIFT has no rule for a part of {model.name} ({why}): use integrated_gradients or shapley")
    n = len(scores)
    with torch.enable_grad():  # else scores[o] forgets where it comes from
        each = [torch.autograd.grad(scores[o], x, retain_graph=o + 1 < n)[0][0] for o in range(n)]
    multipliers = torch.stack(each)
    found = ((embedded.values - start.values) * multipliers).double().sum(-1).cpu()
    above, below = (t.detach().double().cpu() for t in (scores, below))
    gap = found.sum(1) - (above - below)
    if bool((gap.abs() > 0.01 * (above - below).abs() + 1e-4 * above.abs().maximum(below.abs())).any()):
        raise Refused(
            f"DeepLIFT's multipliers from the baseline {start.name!r} grow through the layers of {model.name} until rounding "
            f"drowns the attributions, which sum to {float(found.sum(1)[0]):.3g} for a change of "
            f"{float((above - below)[0]):.3g}: choose another baseline, such as '.', or use integrated_gradients"
        )
    values, labels = credited.pooled(case, found)
    return case.result(
        f"DeepLIFT of {case.question.name} from {start.name!r}",
        {"attribution": values, "score": above, "baseline_score": below, "gap": gap,
         "gradients": 1, "evaluations": 1},
        labels=labels, attrs={"baseline": start.name},
        coords={} if labels else {"baseline_token": ("position", list(start.labels))},
    )  # fmt: skip
