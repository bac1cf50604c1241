"""Does the task need attention at all, and could a model be trained to attend elsewhere with the same answers?

Two controls of Wiegreffe and Pinter (2019) that train a copy of the model (the user's own stays as it is):

uniform_attention (their section 3.2): the model is trained on with its attention frozen to uniform, beside a copy
trained just as long with its own. If both are as accurate, the task cannot tell good attention from none and is no
ground to judge explanations on.

adversarial_training (section 4.3): a copy learns, for all texts at once, to answer as the model does while attending
elsewhere:

    loss = mean over texts of tv(output, base output) - strength * mean over rows of js(A, A of the base)

They subtract KL, which has no upper limit; js, which both papers report, is bounded by log 2. They train from
scratch; our copy starts from the model with noise on its weights, because at the model itself both terms are
stationary. Rows of attention that cannot reach the output are not counted. Per strength the distance of outputs and
of attention on held-out texts is a point of the trade-off: the farther attention moves at the same tv, the less the
answers tie it down. Compare with what `adversarial_attention` finds for one text alone: what only exists text by text
was never a way this model could attend.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from pellucid.attention.adversarial import probe, reaching
from pellucid.attention.comparing import js, moved
from pellucid.attention.patterns import attended, kinds, single
from pellucid.engine.edits import Edit, Replace
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Provenance, Result
from pellucid.statistics import interval

Trained = Callable[[str], bool]


def uniform_attention(
    model: Model, texts: Sequence[str], labels: Sequence[int], test_texts: Sequence[str], test_labels: Sequence[int],
    *, epochs: int = 1, rate: float = 1e-4, batch: int = 16, trained: Trained | None = None, seed: int = 0,
    progress: bool = True,
) -> Result:  # fmt: skip
    """Test accuracy of a classifier with its own and with uniform attention, as it is and trained on.

    `trained` says by its name whether a parameter is trained (all of them by default). Gives `accuracy` [attention,
    training] over attention "own" and "uniform" and training "none" and "further", with the interval over test texts,
    and `right` [attention, training, text]. Refused for models that are no classifier.

    >>> uniform_attention(model, texts, labels, test_texts, test_labels).accuracy  # doctest: +SKIP
    """
    _check(texts, labels)
    _check(test_texts, test_labels)
    told = model.anatomy.answering
    if told.meaning != "class" or (told.independent and told.size > 1):
        raise Refused(
            "uniform_attention trains classifiers of one class a text, and this model is none: open one with "
            "task='classification'"
        )
    right = np.zeros((2, 2, len(test_texts)))
    for i, name in enumerate(("own", "uniform")):
        edits = [] if name == "own" else uniform(model)
        right[i, 0] = _right(model, test_texts, test_labels, edits, batch)
        twin = duplicate(model)
        _fit_labels(twin, texts, labels, edits, epochs, rate, batch, trained, seed, progress)
        right[i, 1] = _right(twin, test_texts, test_labels, edits, batch)
    intervals = np.array([[interval(right[i, j], seed) for j in range(2)] for i in range(2)])
    two = ("attention", "training")
    data = xr.Dataset(
        {"accuracy": (two, right.mean(-1)), "low": (two, intervals[..., 0]), "high": (two, intervals[..., 1]),
         "right": ((*two, "text"), right)},
        {"attention": ["own", "uniform"], "training": ["none", "further"]},
    )  # fmt: skip
    about = Provenance(
        "uniform_attention", model.name, digest=model.digest, seed=seed,
        inputs=f"{len(texts)} texts, {len(test_texts)} to test on",
        arguments={"epochs": epochs, "rate": rate, "batch": batch, "trained": trained},
    )  # fmt: skip
    return Result(data, kind="uniform attention", title="Does the task need attention?", provenance=about)


def adversarial_training(
    model: Model, texts: Sequence[str], test_texts: Sequence[str], *, strengths: Sequence[float] = (0.0, 0.1, 0.3, 1.0),
    epochs: int = 1, rate: float = 1e-4, batch: int = 16, noise: float = 0.1, trained: Trained | None = None,
    seed: int = 0, progress: bool = True,
) -> Result:  # fmt: skip
    """The trade-off between the same answers and other attention, on held-out texts.

    `noise` is in units of each trained weight's standard deviation. Gives `js` [strength], the mean divergence of
    attention in nats, and `tv` [strength], the mean distance of predictions, each with its interval over texts
    (`js_low` ...), `same` [strength], the share of equal decisions, and `js_by_text`, `tv_by_text` [strength, text].
    Strength 0 is the control: training alone moves attention so much.

    >>> adversarial_training(model, texts, test_texts).to_frame("js", "tv")  # doctest: +SKIP
    """
    if not texts or not test_texts or not strengths:
        raise InputError(
            f"{len(texts)} texts, {len(test_texts)} test texts, {len(strengths)} strengths: expected some of each"
        )
    base = Base(model)
    found = np.zeros((3, len(strengths), len(test_texts)))
    for i, strength in enumerate(strengths):
        twin = duplicate(model)
        parameters = _parameters(twin, trained)
        _perturb(parameters, noise, seed)
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for part in tqdm(_parts(len(texts), epochs, batch, seed), desc=f"strength {strength}", disable=not progress):
            optimiser.zero_grad()
            for t in part.tolist():
                with torch.enable_grad():
                    off, far, _ = base.compared(twin, texts[t])
                    ((off - strength * far) / len(part)).backward()
            optimiser.step()
        with torch.no_grad():
            found[:, i] = np.array([[float(x) for x in base.compared(twin, text)] for text in test_texts]).T
    variables: dict[str, Any] = {}
    for name, values in (("js", found[1]), ("tv", found[0])):
        low, high = np.array([interval(row, seed) for row in values]).T
        variables |= {name: values.mean(1), f"{name}_low": low, f"{name}_high": high}
    data = xr.Dataset(
        {
            **{n: ("strength", v) for n, v in variables.items()}, "same": ("strength", found[2].mean(1)),
            "js_by_text": (("strength", "text"), found[1]), "tv_by_text": (("strength", "text"), found[0]),
        },
        {"strength": list(strengths)},
    )  # fmt: skip
    about = Provenance(
        "adversarial_training", model.name, digest=model.digest, seed=seed,
        inputs=f"{len(texts)} texts, {len(test_texts)} to test on",
        arguments={"strengths": list(strengths), "epochs": epochs, "rate": rate, "batch": batch, "noise": noise,
                   "trained": trained},
    )  # fmt: skip
    return Result(data, kind="adversarial training", title="Same answers, other attention", provenance=about)


class Base:
    """What the model itself answers, where it attends, and which rows of attention count, for any text."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[str, tuple[Question, list[Tensor]]] = {}

    def compared(self, twin: Model, text: str) -> tuple[Tensor, Tensor, bool]:
        """tv of the outputs, mean js of attention over counted rows (both with gradients for the twin), and whether the
        decision is the same."""
        inputs = single(self.model, text)
        question, counted = self.about(text, inputs)
        with torch.no_grad():
            own = attended(self.model, inputs)
            before = question.distribution(own.run)
        sites = [kind.site(layer) for kind in own.kinds for layer in kind.layers]
        run = twin.run(inputs, keep=sites)
        after = question.distribution(run)
        originals = [a for kind in own.kinds for a in own.values[kind]]
        total = after.new_zeros(())
        for site, original, rows in zip(sites, originals, counted, strict=True):
            total = total + (js(run.tensor(site)[0].to(original), original) * rows).sum()
        far = total / sum(float(rows.sum()) for rows in counted)
        return moved(after, before)[0], far, bool((after.argmax(-1) == before.argmax(-1)).all())

    def about(self, text: str, inputs: Inputs) -> tuple[Question, list[Tensor]]:
        """How the answer to a text is read, and which rows of each layer's attention count, [head, query]."""
        if text not in self._known:
            question = Question.of(self.model, inputs)
            found = attended(self.model, inputs, grad_of=probe(question))
            counted = [row for kind in found.kinds for row in reaching(found, kind)]
            if not any(bool(row.any()) for row in counted):
                raise InputError(f"no attention reaches the output for {text!r}: give longer texts")
            self._known[text] = question, counted
        return self._known[text]


def duplicate(model: Model) -> Model:
    """The same model with weights of its own."""
    return Model(replace(model.loaded, module=copy.deepcopy(model.module)))


def uniform(model: Model) -> list[Edit]:
    """Edits that spread all attention evenly over the keys each query can see."""

    def even(x: Tensor) -> Tensor:
        seen = (x > 0).any(2, keepdim=True).to(x)  # [batch, query, 1, key]: what any head sees
        return (seen / seen.sum(-1, keepdim=True).clamp_min(1) * x.sum(-1, keepdim=True)).expand_as(x).contiguous()

    return [Replace(kind.site(layer), even) for kind in kinds(model.anatomy) for layer in kind.layers]


def _fit_labels(
    twin: Model, texts: Sequence[str], labels: Sequence[int], edits: Sequence[Edit], epochs: int, rate: float,
    batch: int, trained: Trained | None, seed: int, progress: bool,
) -> None:  # fmt: skip
    y = torch.as_tensor(np.asarray(labels))
    optimiser = torch.optim.AdamW(_parameters(twin, trained), lr=rate, weight_decay=0.01)
    for part in tqdm(_parts(len(texts), epochs, batch, seed), desc="training", disable=not progress):
        with torch.enable_grad():
            z = twin.run([texts[t] for t in part.tolist()], edits=edits).logits
            loss = nn.functional.nll_loss(_classes(z).clamp_min(1e-30).log(), y[part].to(z.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _right(model: Model, texts: Sequence[str], labels: Sequence[int], edits: Sequence[Edit], batch: int) -> np.ndarray:
    """[text] 1 where the label is predicted."""
    guesses = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            z = model.run(list(texts[start : start + batch]), edits=edits).logits
            guesses.append(_classes(z).argmax(1).cpu())
    return (torch.cat(guesses).numpy() == np.asarray(labels)).astype(float)


def _classes(z: Tensor) -> Tensor:
    """[text, class]; a single logit is of two classes, no and yes."""
    return torch.cat([(-z).sigmoid(), z.sigmoid()], 1) if z.shape[1] == 1 else z.softmax(1)


def _parameters(model: Model, trained: Trained | None) -> list[nn.Parameter]:
    named = model.module.named_parameters()
    chosen = [p for name, p in named if p.is_floating_point() and (trained is None or trained(name))]
    if not chosen:
        raise InputError("trained= chose no parameter of this model")
    for p in model.module.parameters():
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    return chosen


def _perturb(parameters: Sequence[nn.Parameter], noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            size = p.float().std(unbiased=False)
            p.add_((noise * size * torch.randn(p.shape, generator=generator).to(p.device)).to(p))


def _parts(n: int, epochs: int, batch: int, seed: int) -> list[Tensor]:
    """Minibatches of all epochs."""
    generator = torch.Generator().manual_seed(seed)
    return [part for _ in range(epochs) for part in torch.randperm(n, generator=generator).split(batch)]


def _check(texts: Sequence[str], labels: Sequence[int]) -> None:
    if not len(texts) or len(texts) != len(labels):
        raise InputError(
            f"{len(texts)} texts and {len(labels)} labels: expected one label for each text, and at least one"
        )
