"""Before the first word is written: is what is about to happen already in the hidden states, and is that more than others would know?

An auditor reads several layers of the last tokens of a prompt and says whether the answer will have a property: be harmful, refuse, ignore
the instruction, be wrong. `linear` reads the last token, its layers joined; `attention` and a small `transformer` read all layers and
tokens at once; `spoken` is unfitted: a patchscope puts one layer's state into a sentence that asks, and the log odds of two words answer.

Topics are held out, and areas are taken within topics: leaving a topic out turns its base rate round, which pooled areas take for worse
than chance. Beside it stand

    topic        how often a topic's answers had it, in other folds of the same topic: what knowing the topic alone is worth
    text         a reader of the prompt's text (for `spoken` the same question put to the model in words)
    own output   logistic regression on the model's own first-token log probabilities; `opening` tokens: their mass, nothing fitted
    shuffled     the auditor with labels drawn within topics

and its lead: how many tokens of the answer a reader of prompt and answer must see to do as well (NaN: more than were written).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.controls import shuffled_labels
from pellucid.corpus import read_each
from pellucid.engine.edits import Patch
from pellucid.engine.generation import Generated
from pellucid.engine.pausing import progress
from pellucid.engine.places import answer_position, kind_of
from pellucid.errors import InputError, at_least, one_of
from pellucid.model import Model
from pellucid.probing.linear import LogisticProbe
from pellucid.probing.splits import folds
from pellucid.question import Question
from pellucid.results import Result
from pellucid.safety.judging import Numbers, as_well, judged, scaled_scores, text_scores
from pellucid.safety.learning import vectors
from pellucid.safety.networks import Learnt, Linear, learn
from pellucid.safety.statements import Statements, text_of
from pellucid.tasks.tokens import single_id
from pellucid.technique import technique

Kind = Literal["linear", "attention", "transformer", "spoken"]
OWN, SEEN = 50, (0, 1, 2, 4, 8, 16)
ASKS = "Someone is about to say what follows from x. Will it be {}? Answer:"


@technique
def audit(
    model: Model,
    prompts: Sequence[Any],
    labels: Sequence[bool],
    *,
    kind: Kind = "linear",
    sites: str | Sequence[str] | None = None,
    tokens: int = 4,
    topics: Sequence[str] | None = None,
    answers: Sequence[str] | Generated | None = None,
    opening: Sequence[str | int] = (),
    asks: str = ASKS.format("so"),
    words: tuple[str, str] = (" yes", " no"),
    split: int = 5,
    draws: int = 10,
    batch: int = 16,
    seed: int = 0,
) -> Result:
    """Say of each prompt, from its hidden states alone, whether its answer has the property (`labels`, whoever judged them).

    sites: layers to read, by default a quarter, half, three quarters and the last of the blocks of the last stack; tokens: how many of the
    prompt's last ones. answers: what was answered, as texts or as `model.generate` gave it; without them there is no lead. opening: tokens whose
    mass at the first place speaks for the property. asks, words: of `spoken`, which reads the third of the sites; its state stands where "x" does.
    Gives over `row` (the auditor first) `area` within topics with a 95 % interval (of shuffled: the range of `draws`); over `seen`, tokens of the answer, the
    area of a reader of prompt and answer, `text_area`; `lead`; over `prompt` the held-out `score`.
    InputError for too few of a kind, leaking prompts, and a model that writes nothing.

    >>> audit(model, requests, harmful, topics=topics, answers=model.generate(requests, max_new_tokens=2)).area
    <xarray.DataArray 'area' (row: 5)>...
    """
    one_of(kind, Kind, "kind=")
    at_least(1, tokens=tokens, draws=draws, batch=batch)
    at_least(2, split=split)
    data = Statements(prompts, labels, topics)
    if model.anatomy.answering.meaning != "tokens" or model.anatomy.stacks[-1].causal is False:
        raise InputError(f"{model.name} writes no answer, so there is nothing to foretell")
    fold = folds(data.groups, min(split, len(np.unique(data.groups))), seed)
    for f in np.unique(fold):
        left = data.labels[fold != f]
        if min(left.sum(), (~left).sum()) < 4:
            raise InputError(
                f"{int(left.sum())} prompts with it and {int((~left).sum())} without are left to learn from: it takes 4 of either"
            )
    names = _sites(model, sites)
    said = _texts_of(answers, len(data))
    texts, y = data.texts, data.labels
    strata = np.unique(data.topics, return_inverse=True)[1]
    no_couples = np.zeros((2, 0), dtype=int)

    def over(score: Callable[[np.ndarray, np.ndarray], Numbers]) -> Numbers:
        made = np.full((1, len(y)), np.nan)
        for f in np.unique(fold):
            train, ask = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
            made[0, ask] = score(train, ask)
        return made

    rows: dict[str, Numbers] = {}
    if kind == "spoken":
        rows[kind], rows["text"] = _spoken(model, data, names[len(names) // 2], asks, words)
    else:
        x, mask = vectors(model, data.prompts, names, tokens if kind != "linear" else 1, batch=batch)
        x, mask = x.movedim(0, 1).flatten(1, 2), mask.repeat(1, len(names))  # [prompt, site * token, d]
        rows[kind] = over(lambda train, ask: _foretold(kind, x, mask, y, train, ask, seed))
        rows["text"] = over(
            lambda train, ask: text_scores([texts[i] for i in train], y[train], [texts[i] for i in ask])
        )
    own, at_first = _first(model, data, batch), [single_id(model.tokenizer, t) for t in opening]
    rows["own output"] = over(lambda train, ask: _own(own, y, train, ask))
    if at_first:
        rows["own mass"] = own[:, at_first].exp().sum(1).double().numpy()[None]
    if kind != "spoken":
        drawn = [shuffled_labels(y, seed + i, within=data.topics.tolist()) for i in range(draws)]
        rows["shuffled"] = np.concatenate(
            [over(partial(_foretold, kind, x, mask, z, seed=seed)) for z in progress(drawn, "shuffled labels")]
        )
    table = {k: judged(v, y, strata, no_couples, data.groups, seed=seed) for k, v in rows.items()}
    if len(set(data.topics)) > 1:
        each = folds(np.arange(len(y)), split, seed)
        base = [[y[(data.topics == t) & (each != f)].mean() if ((data.topics == t) & (each != f)).any() else y.mean()] for t, f in zip(data.topics, each, strict=True)]  # fmt: skip
        table["topic, folds at random"] = judged(
            np.array(base).T, y, np.zeros(len(y), dtype=int), no_couples, np.arange(len(y)), seed=seed
        )
    seen = [k for k in SEEN if said is not None and k <= max(map(len, said))] if said is not None else []
    curve = [_seen(texts, said, k, over, y, strata) for k in seen] if said is not None else []
    enough = [k for k, a in zip(seen, curve, strict=True) if a >= table[kind]["area"]]
    data_set = xr.Dataset(
        {m: ("row", [t[m] for t in table.values()]) for m in ("area", "low", "high")}
        | {"lead": float(enough[0]) if enough else np.nan, "score": ("prompt", rows[kind][0])}
        | ({"text_area": ("seen", curve)} if seen else {}),
        {"row": list(table), **({"seen": seen} if seen else {})}, {"sites": ", ".join(names), "held_out": data.by},
    )  # fmt: skip
    return Result(data_set, kind="audit", title=_title(kind, table, data.by, seen, enough))


def _sites(model: Model, given: str | Sequence[str] | None) -> list[str]:
    stack = model.anatomy.stacks[0]
    if given is None:
        n = len(stack.blocks)
        given = [f"{stack.prefix}layers.{i}.resid_post" for i in sorted({n // 4, n // 2, 3 * n // 4, n - 1})]
    return [str(s) for p in ([given] if isinstance(given, str) else given) for s in model.sites(p)]


def _texts_of(answers: Any, n: int) -> list[list[str]] | None:
    """The pieces of each answer."""
    if answers is None:
        return None
    made = (
        [list(row) for row in answers.labels]
        if isinstance(answers, Generated)
        else [str(a).split(" ") for a in answers]
    )
    if len(made) != n:
        raise InputError(f"{n} prompts but {len(made)} answers: expected one for each")
    return (
        made
        if isinstance(answers, Generated)
        else [[w if i == 0 else f" {w}" for i, w in enumerate(row)] for row in made]
    )


def _foretold(
    kind: str, x: Tensor, mask: Tensor, y: np.ndarray, train: np.ndarray, ask: np.ndarray, seed: int
) -> Numbers:
    if len(np.unique(y[train])) < 2:
        return np.zeros(len(ask))
    learnt: Learnt
    if kind == "linear":
        x = x.flatten(1)[:, None]
        mask = mask[:, :1]
        fit = LogisticProbe(seed=seed).fit(x[train, 0], y[train].astype(int))
        learnt = Linear(fit.weight_[:, 1] - fit.weight_[:, 0], fit.bias_[1] - fit.bias_[0])
    else:
        learnt = learn(kind, x[train], mask[train], torch.as_tensor(y[train]), epochs=20, seed=seed)  # type: ignore[arg-type]
    with torch.no_grad():
        found: Numbers = learnt(x[ask], mask[ask]).double().numpy()
    return found


@torch.no_grad()
def _first(model: Model, data: Statements, batch: int) -> Tensor:
    """[prompt, token] the model's own log probabilities of what it writes first."""
    found = []
    read_each(model, list(data.prompts))
    for start in range(0, len(data), batch):
        inputs = model.inputs(list(data.prompts[start : start + batch]))
        asked = Question(model, inputs, kind_of(model, inputs), "first token", answer_position(model, inputs))
        found.append(asked.rows(model.run(inputs)).float().log_softmax(-1).cpu())
    return torch.cat(found)


def _own(own: Tensor, y: np.ndarray, train: np.ndarray, ask: np.ndarray) -> Numbers:
    """By logistic regression on the tokens that are likeliest over the training part."""
    at = own[train].exp().mean(0).topk(min(OWN, own.shape[1])).indices
    return scaled_scores(own[train][:, at].numpy(), y[train], own[ask][:, at].numpy())


def _seen(texts: Sequence[str], said: list[list[str]], k: int, over: Any, y: np.ndarray, strata: np.ndarray) -> float:
    longer = [f"{t}\n{''.join(a[:k])}" if k else t for t, a in zip(texts, said, strict=True)]
    found = over(lambda train, ask: text_scores([longer[i] for i in train], y[train], [longer[i] for i in ask]))
    return judged(found, y, strata, np.zeros((2, 0), dtype=int), np.arange(len(y)))["area"]


def _spoken(model: Model, data: Statements, site: str, asks: str, words: tuple[str, str]) -> tuple[Numbers, Numbers]:
    """Log odds of two words where the last state of the prompt stands in the question (in place of its "x"), and where its text does."""
    if " x" not in asks or len(model.anatomy.stacks) > 1:
        raise InputError("a spoken auditor puts a state in place of ' x' in asks=, and reads a model of one stack")
    yes, no = (single_id(model.tokenizer, w) for w in words)
    found: list[list[float]] = [[], []]
    for prompt in progress(data.prompts, "prompts asked about"):
        state, _ = vectors(model, [prompt], [site], 1, batch=1)
        put = Patch(f"{Site.parse(site)}@'x'", state[0])
        text = asks.replace(" x", f" {text_of(prompt)}", 1)
        for i, z in enumerate((model.run(asks, edits=[put]).logits, model.run(text).logits)):
            found[i].append(float(z[0, -1, yes] - z[0, -1, no]))
    return np.array(found[0])[None], np.array(found[1])[None]


def _title(kind: str, table: dict[str, dict[str, float]], by: str, seen: Sequence[int], enough: Sequence[int]) -> str:
    own = table[kind]
    others = {
        k: v["high"] if k == "shuffled" else v["area"]
        for k, v in table.items()
        if k not in (kind, "topic, folds at random")
    }
    said = as_well(own["area"], others) + f"{kind} auditor before the first word: area {own['area']:.2f} [{own['low']:.2f}, {own['high']:.2f}] within topics, {by}s held out"  # fmt: skip
    said += "; nothing transfers" if own["low"] <= 0.5 else ""
    if enough:
        said += f"; the text says as much after {enough[0]} tokens of the answer"
    elif seen:
        said += f"; the text says less even after {seen[-1]} tokens of the answer"
    return said
