"""When could the model have stopped? Policies of early exit (`pellucid.surgery.exit_policy`), judged offline from one pass over some texts.

What a policy costs counts its checks: one unembedding is `unembedding` blocks (8 in a 135 M model), and a check after each of ten
layers costs more than the whole model. In blocks a token

    blocks = blocks run + checks * (unembedding + lens),     the whole model: blocks + unembedding

without what missing keys and values cost later, which `generate_early` counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr

from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.exit_reading import Pass, costs, judge, lens_cost, passed
from pellucid.technique import technique


@technique
def exits(
    model: Model,
    texts: Any,
    policies: Mapping[str, Exit] | Sequence[Exit] | Exit,
    *,
    tokens: int = 2048,
    context: int | None = 64,
    seed: int = 0,
) -> Result:
    """What each policy of early exit would have done on some texts, from one pass over them.

    Gives over `policy` `agreement` (share of tokens with the full model's first choice; `low`, `high` over rows of text), the
    mean `layer` (blocks run), `exited`, `added` (nats a token), `checks`, and `blocks` with the checks paid; `oracle`, the
    mean number of blocks after which the answer stays, read through its lens at its checks; and `full`, the whole model's blocks.
    The title names the policies that are cheaper than the model, or says that none is. Refused for models that do not say the next token in one stack.

    >>> exits(model, texts, [Exit("margin", 0.9), Exit("cosine", 0.99)]).agreement
    <xarray.DataArray 'agreement' (policy: 2)>...
    """
    at_least(1, tokens=tokens)
    named = _named(policies)
    for policy in named.values():
        policy.check(model)
    every = sorted({i for p in named.values() for i in p.checked(model)})
    rows = corpus_rows(model, texts, tokens, context)
    unembedding, n = costs(model)
    passes = [passed(model, row, [*named.values()]) for row in progress(rows, "exits")]
    found: dict[str, list[float]] = {}
    for number, policy in enumerate(named.values()):
        layers = policy.checked(model)
        judged = judge(passes, number, layers, n, policy.threshold)
        check = unembedding + lens_cost(model, policy.lens) if policy.reads else 0.0
        end = (
            (1 - judged.exited) * unembedding if policy.reads else unembedding
        )  # the check's own logits are the answer
        columns = {"agreement": judged.agrees, "layer": judged.layer, "exited": judged.exited, "added": judged.added, "checks": judged.checks,
                   "blocks": judged.layer + judged.checks * check + end}  # fmt: skip
        low, high = interval(judged.agrees, seed, groups=judged.row, within=(0, 1))
        stays = _oracle(passes, number, layers, n)
        for name, value in {
            **{k: v.mean() for k, v in columns.items()},
            "low": low,
            "high": high,
            "oracle": stays,
        }.items():
            found.setdefault(name, []).append(float(value))
    data = xr.Dataset({k: ("policy", v) for k, v in found.items()}, {"policy": list(named)})
    data = data.assign(full=n + unembedding, unembedding=unembedding)
    cheaper = [f"{p} (agrees in {float(g):.0%})" for p, g, b in zip(named, data.agreement.values, data.blocks.values, strict=True) if b < n + unembedding]  # fmt: skip
    note = f"cheaper than the full model, checks counted: {', '.join(cheaper) or 'none of these policies'}"
    return Result(
        data.assign_attrs(tokens=int(sum(len(r.ids) for r in rows)), layers=every),
        kind="exits",
        title=f"Early exits: {note}",
    )


def _named(policies: Any) -> dict[str, Exit]:
    several = [policies] if isinstance(policies, Exit) else policies
    found = list(several.values()) if isinstance(several, Mapping) else list(several)
    if not found or not all(isinstance(p, Exit) for p in found):
        raise InputError("policies= are Exit(...), one or several, or a mapping of names to them")
    if isinstance(several, Mapping):
        return dict(several)
    return {f"{p.by} >= {p.threshold:g}" + (" through a lens" if p.lens is not None else ""): p for p in found}


def _oracle(passes: Sequence[Pass], number: int, layers: Sequence[int], n: int) -> float:
    """Mean number of blocks after which every later check says what the model says."""
    found = []
    for each in passes:
        right = torch.cat([each.read[number].said == each.final, torch.ones_like(each.final, dtype=torch.bool)[None]])
        stays = right.flip(0).long().cumprod(0).flip(0)
        found.append(torch.tensor([*(i + 1 for i in layers), n])[(stays == 0).sum(0)].double())
    return float(torch.cat(found).mean())
