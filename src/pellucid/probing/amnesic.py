"""Is the property used: does the model behave otherwise once it is erased?

Amnesic probing (Elazar et al. 2021): at one site of the running model the property is erased from every token, and the
model's predictions are compared with its own. A probe that finds the property says it is there; only a change beyond
that of a random subspace of the same rank says that something reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from pellucid.engine.edits import Edit
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.erasure import Eraser, Inlp, Leace, RandomSubspace
from pellucid.probing.examples import Examples
from pellucid.probing.features import read
from pellucid.probing.linear import LogisticProbe
from pellucid.probing.splits import held_out
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique


@technique
def amnesic(
    model: Model,
    examples: Examples,
    site: str,
    *,
    erasers: Mapping[str, Eraser] | None = None,
    draws: int = 3,
    seed: int = 0,
    batch: int = 16,
) -> Result:
    """Erase the labels at a site of a causal language model and see what becomes of its predictions on held-out texts.

    Over `eraser` ("leace", "inlp" by default, each followed by its control, e.g. "random as leace", the mean of `draws`
    random subspaces of its rank): `kl` from the model's own next-token distribution (nats per token) with its 95 %
    interval `low` to `high` (bootstrap of texts), `agreement` of the likeliest token, `loss` of the text itself (nats per
    token; without edits `own_loss`), `rank`, and the held-out `probe` accuracy after erasure (before: `own_probe`; saying
    the most frequent class: `majority`). Erasers and probes are fitted on the last token of every training word, and
    judged on texts they have not seen.

    >>> amnesic(model, bank.tags(), "layers.1.resid_post").kl
    <xarray.DataArray 'kl' (eraser: 4)>...
    """
    (stack, *more) = model.anatomy.stacks
    if model.anatomy.head is None or not stack.causal or more:
        raise InputError(f"{model.name} is no causal language model: amnesic probing reads its next-token predictions")
    if examples.second is not None or len(examples.classes) < 2:
        raise InputError("what is erased is a class of single words or spans, of at least two classes, not of pairs")
    features = read(model, examples, sites=site, pool="last")
    if len(features.sites) != 1:
        raise InputError(f"{site!r} names {len(features.sites)} sites: erase one at a time")
    x, labels, (at,) = features.of(examples, 0), examples.labels, features.sites
    held = held_out(examples.texts, 0.25, seed)
    fitted: dict[str, list[Eraser]] = {}
    for name, eraser in (erasers or {"leace": Leace(), "inlp": Inlp()}).items():
        known = eraser.fit(x[~held], labels[~held])
        fitted[name] = [known]
        fitted[f"random as {name}"] = [RandomSubspace(known.rank, seed + i).fit(x[~held]) for i in range(draws)]

    def accuracy(eraser: Eraser | None) -> float:
        kept = x if eraser is None else eraser.transform(x)
        fitted = LogisticProbe(seed=seed).fit(kept[~held], labels[~held], examples.texts[~held])
        return fitted.score(kept[held], labels[held])

    texts = [examples.spans.texts[i] for i in np.unique(examples.texts[held])]
    everyone = [e for erased in fitted.values() for e in erased]
    sums = iter(_compared(model, texts, [[], *([e.edit(at)] for e in everyone)], batch))
    _, _, own, tokens = next(sums)
    rows = []
    for erased in fitted.values():
        kl, same, loss, _ = np.mean([next(sums) for _ in erased], 0)
        low, high = interval(kl, seed, over=tokens, within=(0.0, np.inf))
        means = [total.sum() / tokens.sum() for total in (kl, same, loss)]
        rows.append([means[0], low, high, *means[1:], erased[0].rank, np.mean([accuracy(e) for e in erased])])
    measures = ("kl", "low", "high", "agreement", "loss", "rank", "probe")
    names, counts = np.unique(labels[~held], return_counts=True)
    data = xr.Dataset(
        {name: ("eraser", values) for name, values in zip(measures, np.array(rows, dtype=float).T, strict=True)}
        | {
            "own_loss": own.sum() / tokens.sum(),
            "own_probe": accuracy(None),
            "majority": float((labels[held] == names[counts.argmax()]).mean()),
        },
        coords={"eraser": list(fitted)},
        attrs={"site": at, "texts": len(texts)},
    )
    title = f"{examples.name} erased at {at} of {model.name}"
    return Result(data, kind="amnesic probing", title=title)


def _compared(model: Model, texts: list[str], variants: Sequence[Sequence[Edit]], batch: int) -> np.ndarray:
    """[variant, 4, text] sums over the tokens of each text: KL(own || edited), agreement of the likeliest token, loss of
    the text; and how many tokens."""
    parts = []
    for start in range(0, len(texts), batch):
        inputs = model.inputs(texts[start : start + batch])
        stream = inputs.stream("")
        ids, real = stream.ids[:, 1:], stream.mask[:, 1:].bool() & stream.mask[:, :-1].bool()
        here, own = [], None
        for edits in variants:
            with torch.no_grad():
                q = model.run(inputs, edits=edits).logits[:, :-1].float().log_softmax(-1)
            own = q if own is None else own
            measured = (
                (own.exp() * (own - q)).sum(-1),
                (own.argmax(-1) == q.argmax(-1)).float(),
                -q.gather(2, ids[..., None])[..., 0],
                torch.ones_like(q[..., 0]),
            )
            here.append(torch.stack([(value * real).sum(1) for value in measured]))
        parts.append(torch.stack(here).cpu())
    return torch.cat(parts, 2).double().numpy()
