"""How many bits does it take to tell the labels to someone who has the representations?

Accuracy does not say how hard a label was to find; description length does (Voita and Titov 2020). Two codes:

* online: labels are sent in blocks, each coded by a probe trained on all blocks before,
  t_1 log2 K + sum_i -log2 p_i(labels after t_i to t_(i+1) | trained on the first t_i); the first block by the uniform code.
  The probe is a logistic regression with a Gaussian prior on all its weights; its strength, the one of m that makes the
  code shortest, is sent too, with log2 m bits. (The reference implementation adds the uniform code's bits to losses in
  nats; here everything is bits.)
* variational: the probe itself is sent, E_q[-log2 p(labels | w)] + KL(q || prior), by the bits-back argument. q and the
  prior are Gaussian with independent weights, the prior's two variances (weights, intercepts) are learned and cost 32
  bits each; Voita and Titov use a normal-Jeffreys prior, whose divergence is only known up to an approximation.

`compression` is the uniform code's n log2 K over the length. Both codes of a control task stand beside for comparison.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.controls import control_task
from pellucid.probing.examples import Examples
from pellucid.probing.features import Features, Pool, features_of
from pellucid.probing.linear import STRENGTHS, Scaling
from pellucid.probing.probe import result
from pellucid.probing.solver import logistic
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.training import cosine, train

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@technique
def online_code(
    source: Model | Features,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    fractions: Sequence[float] = FRACTIONS,
    l2: Sequence[float] = STRENGTHS,
    seeds: int = 3,
    seed: int = 0,
) -> Result:
    """The online code of the labels on every layer, and of a control task, for several orders of sending.

    `bits` [layer], mean over `seeds` orders, with `low` and `high`, the shortest and longest of them; `compression`
    [layer]; `curve` [layer, block], the bits per label of each block, which ends after `sent` [block] labels;
    `control_bits` and `control_compression` [layer]; `uniform`, bits of the uniform code. `fractions` of the examples
    are when the probe is trained anew.

    >>> online_code(features, bank.tags()).compression
    <xarray.DataArray 'compression' (layer: 3)>...
    """
    n, k = len(examples), len(examples.classes)
    ends = sorted({max(1, round(f * n)) for f in fractions} | {n})
    if not all(0 < f <= 1 for f in fractions) or len(ends) < 2:
        raise InputError(f"fractions {list(fractions)} of {n} examples make no blocks: expected some between 0 and 1")
    features = features_of(source, examples, sites, pool)
    sizes = np.diff([0, *ends])
    made: dict[str, list[np.ndarray]] = {"own": [], "control": []}
    for each in range(seed, seed + seeds):
        order = np.random.default_rng(each).permutation(n)
        for name, asked in (("own", examples), ("control", control_task(examples, each))):
            y = np.searchsorted(np.array(examples.classes), asked.labels)[order]
            blocks = [_blocks(features.of(examples, layer)[order], y, k, ends, l2)
                      for layer in range(len(features.sites))]  # fmt: skip
            made[name].append(np.stack(blocks))
    own, control = (np.stack(made[name]) for name in ("own", "control"))  # [seed, layer, block]
    extra = math.log2(len(l2))
    length, placebo = own.sum(2) + extra, control.sum(2) + extra
    uniform = n * math.log2(k)
    return result("online code", f"Online code of {examples.name}", features, bits=length.mean(0), low=length.min(0),
                  high=length.max(0), compression=uniform / length.mean(0), control_bits=placebo.mean(0),
                  control_compression=uniform / placebo.mean(0), curve=(("layer", "block"), own.mean(0) / sizes),
                  uniform=uniform, sent=("block", ends))  # fmt: skip


def _blocks(x: Tensor, y: np.ndarray, k: int, ends: list[int], l2: Sequence[float]) -> np.ndarray:
    """[block] bits, under the strength that makes the whole shortest."""
    x = Scaling.of(x)(x)
    targets = torch.as_tensor(y)
    bits = np.full((len(l2), len(ends)), ends[0] * math.log2(k))
    for i, (start, stop) in enumerate(itertools.pairwise(ends), 1):
        fit = logistic(x[:start], y[:start], l2=list(l2), classes=k, penalise_bias=True, tol=1e-4)
        logs = fit.logits(x[start:stop]).log_softmax(2)
        bits[:, i] = -logs.gather(2, targets[start:stop].expand(len(l2), -1)[..., None]).sum((1, 2)) / math.log(2)
    return bits[bits.sum(1).argmin()]


@technique
def variational_code(
    source: Model | Features,
    examples: Examples,
    *,
    sites: str | Sequence[str] | None = None,
    pool: Pool = "mean",
    steps: int = 1500,
    seed: int = 0,
) -> Result:
    """The variational code on every layer, and of a control task: `bits` [layer] = `data_bits` + `model_bits`,
    `compression`, `control_bits`, `control_compression`; `uniform`. `steps` of Adam on batches of 256.

    >>> variational_code(features, bank.tags(), steps=50).compression
    <xarray.DataArray 'compression' (layer: 3)>...
    """
    features = features_of(source, examples, sites, pool)
    n, k = len(examples), len(examples.classes)
    x = torch.stack([Scaling.of(v)(v) for v in (features.of(examples, i) for i in range(len(features.sites)))])
    lengths = []
    for asked in (examples, control_task(examples, seed)):
        y = torch.as_tensor(np.searchsorted(np.array(examples.classes), asked.labels))
        lengths.append(_variational(x, y, k, steps, seed))
    (data_bits, model_bits), (other, more) = lengths
    uniform = n * math.log2(k)
    bits, placebo = data_bits + model_bits, other + more
    return result("variational code", f"Variational code of {examples.name}", features, bits=bits, data_bits=data_bits,
                  model_bits=model_bits, compression=uniform / bits, control_bits=placebo,
                  control_compression=uniform / placebo, uniform=uniform)  # fmt: skip


def _variational(x: Tensor, y: Tensor, k: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits of the data, bits of the probe), each [layer], for features [layer, n, d]."""
    layers, n, d = x.shape
    x = torch.cat([x, x.new_ones(layers, n, 1)], 2)
    generator = torch.Generator().manual_seed(seed)
    mean = torch.zeros(layers, d + 1, k)
    spread = torch.full((layers, d + 1, k), -4.0)  # log of q's standard deviation
    prior = torch.full((layers, 2), -1.0)  # of the prior's: weights, intercepts

    def nats(rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[layer, row] sampled loss; the noise of the weights is drawn at the logits they make."""
        here = x[:, rows]
        noise = torch.randn(layers, len(rows), k, generator=generator)
        variance = here.square() @ (2 * spread).exp()
        logits = here @ mean + variance.clamp_min(1e-16).sqrt() * noise
        return -logits.log_softmax(2).gather(2, y[rows].expand(layers, -1)[..., None])[..., 0]

    def divergence() -> Tensor:
        """[layer] KL(q || prior) in nats."""
        scale = torch.cat([prior[:, :1].expand(-1, d), prior[:, 1:]], 1)[:, :, None]
        ratio = ((2 * spread).exp() + mean.square()) / (2 * scale).exp()
        return (0.5 * (ratio - 1) + scale - spread).sum((1, 2))

    train(
        {"mean": mean, "spread": spread, "prior": prior},
        [torch.randint(n, (min(256, n),), generator=generator) for _ in range(steps)],
        lambda rows, step: (nats(rows).mean(1) * n + divergence()).sum() / n,
        partial(torch.optim.Adam, lr=0.02),
        schedule=cosine,
        seed=seed,
        what="variational code",
    )
    with torch.no_grad():
        data = torch.stack([nats(torch.arange(n), generator).sum(1) for _ in range(5)]).mean(0) / math.log(2)
        model = divergence() / math.log(2) + 2 * 32
    return data.numpy(), model.numpy()
