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

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.attention.adversarial import probe, reaching
from pellucid.attention.comparing import js, moved
from pellucid.attention.patterns import attended, kinds, single
from pellucid.changed import Copied
from pellucid.corpus import read_each
from pellucid.engine.edits import Edit, Replace
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused, nearest
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.training import draws, train


@technique
def uniform_attention(
    model: Model, texts: Sequence[str], labels: Sequence[int], test_texts: Sequence[str], test_labels: Sequence[int],
    *, parameters: str | Sequence[str] = "*", epochs: int = 1, learning_rate: float = 1e-4, batch: int = 16, seed: int = 0,
) -> Result:  # fmt: skip
    """Test accuracy of a classifier with its own and with uniform attention, as it is and trained on.

    `parameters` are patterns of the names of those that are trained ("classifier.*"). Gives `accuracy` [attention,
    training] over attention "own" and "uniform" and training "none" and "further", with the interval over test texts,
    and `right` [attention, training, text]. Refused for models that are no classifier, and for quantised weights.

    >>> uniform_attention(classifier, texts, labels, test_texts, test_labels).accuracy
    <xarray.DataArray 'accuracy' (attention: 2, training: 2)>...
    """
    _check(texts, labels)
    _check(test_texts, test_labels)
    told = model.anatomy.answering
    if told.meaning != "class" or (told.independent and told.size > 1):
        raise Refused(
            "uniform_attention trains classifiers of one class a text, and this model is none: open one with "
            "task='classification'"
        )
    for given, what in ((texts, "text"), (test_texts, "test text")):
        read_each(model, list(given), what=what)
    right = np.zeros((len(test_texts), 2, 2))
    y = torch.as_tensor(np.asarray(labels))
    for i, edits in enumerate(([], uniform(model))):
        right[:, i, 0] = _right(model, test_texts, test_labels, edits, batch)
        twin, trained = copied(model, parameters)

        def loss(rows: Tensor, step: int, twin: Model = twin, edits: list[Edit] = edits) -> Tensor:
            z = _classes(twin.run([texts[t] for t in rows.tolist()], edits=edits).logits)
            return nn.functional.nll_loss(z.clamp_min(1e-30).log(), y[rows].to(z.device))

        train(
            trained, draws(len(texts), batch, epochs, seed), loss,
            lambda each: torch.optim.AdamW(each, lr=learning_rate, weight_decay=0.01), seed=seed,
        )  # fmt: skip
        right[:, i, 1] = _right(twin, test_texts, test_labels, edits, batch)
    low, high = interval(right, seed, within=(0, 1))
    two = ("attention", "training")
    data = xr.Dataset(
        {"accuracy": (two, right.mean(0)), "low": (two, low), "high": (two, high), "right": (("text", *two), right)},
        {"attention": ["own", "uniform"], "training": ["none", "further"]},
    )
    return Result(data.transpose(*two, "text"), kind="uniform attention", title="Does the task need attention?")


@technique
def adversarial_training(
    model: Model, texts: Sequence[str], test_texts: Sequence[str], *, strengths: Sequence[float] = (0.0, 0.1, 0.3, 1.0),
    parameters: str | Sequence[str] = "*", epochs: int = 1, learning_rate: float = 1e-4, batch: int = 16, noise: float = 0.1,
    seed: int = 0,
) -> Result:  # fmt: skip
    """The trade-off between the same answers and other attention, on held-out texts.

    `noise` is in units of each trained weight's standard deviation, `parameters` as in `uniform_attention`. Gives `js`
    [strength], the mean divergence of attention in nats, and `tv` [strength], the mean distance of predictions, each
    with its interval over texts (`js_low` ...), `same` [strength], the share of equal decisions, and `js_by_text`,
    `tv_by_text` [strength, text]. Strength 0 is the control: training alone moves attention so much.

    >>> adversarial_training(classifier, texts, test_texts).to_frame("js", "tv")
    strength js tv
    ...
    """
    if not texts or not test_texts or not strengths:
        raise InputError(
            f"{len(texts)} texts, {len(test_texts)} test texts, {len(strengths)} strengths: expected some of each"
        )
    for given, what in ((texts, "text"), (test_texts, "test text")):
        read_each(model, list(given), what=what)
    base = Base(model)
    found = np.zeros((len(test_texts), 3, len(strengths)))
    for i, strength in enumerate(progress(strengths, "strengths")):
        twin, trained = copied(model, parameters)
        _perturb(list(trained.values()), noise, seed)

        def loss(
            rows: Tensor,
            step: int,
            twin: Model = twin,
            trained: dict[str, Tensor] = trained,
            strength: float = strength,
        ) -> list[float]:
            noted = []
            for t in rows.tolist():  # one graph at a time
                off, far, _ = base.compared(twin, texts[t])
                ((off - strength * far) / len(rows)).backward(inputs=list(trained.values()))
                noted.append(float((off - strength * far).detach()))
            return noted

        train(
            trained, draws(len(texts), batch, epochs, seed), loss,
            lambda each: torch.optim.AdamW(each, lr=learning_rate, weight_decay=0.0), seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            found[..., i] = [[float(x) for x in base.compared(twin, text)] for text in test_texts]
    means, (low, high) = found.mean(0), interval(found, seed)
    variables: dict[str, Any] = {"same": ("strength", means[2])}
    for j, name in ((1, "js"), (0, "tv")):
        variables |= {
            name: ("strength", means[j]), f"{name}_low": ("strength", low[j]), f"{name}_high": ("strength", high[j]),
            f"{name}_by_text": (("strength", "text"), found[:, j].T),
        }  # fmt: skip
    data = xr.Dataset(variables, {"strength": list(strengths)})
    first = ["js", *(name for name in variables if name != "js")]
    return Result(data[first], kind="adversarial training", title="Same answers, other attention")


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


def copied(model: Model, parameters: str | Sequence[str] = "*") -> tuple[Model, dict[str, Tensor]]:
    """The model with parameters of its own where their names fit the patterns, and those: what is trained."""
    names = [name for name, _ in model.module.named_parameters()]
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise InputError(f"no parameter of this model is called {' or '.join(map(repr, patterns))}{nearest('', names)}")
    twin = model.changed(Copied(tuple(chosen)))
    return twin, {name: p for name, p in twin.module.named_parameters() if name in chosen}


def uniform(model: Model) -> list[Edit]:
    """Edits that spread all attention evenly over the keys each query can see."""

    def even(x: Tensor) -> Tensor:
        seen = (x > 0).any(2, keepdim=True).to(x)  # [batch, query, 1, key]: what any head sees
        return (seen / seen.sum(-1, keepdim=True).clamp_min(1) * x.sum(-1, keepdim=True)).expand_as(x).contiguous()

    return [Replace(kind.site(layer), even) for kind in kinds(model.anatomy) for layer in kind.layers]


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


def _perturb(parameters: Sequence[Tensor], noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            size = p.float().std(unbiased=False)
            p.add_((noise * size * torch.randn(p.shape, generator=generator).to(p.device)).to(p))


def _check(texts: Sequence[str], labels: Sequence[int]) -> None:
    if not len(texts) or len(texts) != len(labels):
        raise InputError(
            f"{len(texts)} texts and {len(labels)} labels: expected one label for each text, and at least one"
        )
