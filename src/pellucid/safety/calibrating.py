"""What does a monitor give for whole conversations, where is its threshold, and what does it find and miss there?

Conversations are prompts with the model's own greedy answers, or with `replies` that are there already: one forward pass
over prompt and reply gives the scores that a generation would have given. A conversation's score is the largest statistic of
its rule. `calibrate` sets the threshold on benign ones, `evaluate` measures it on others: false alarms and what is found,
each with its exact interval, over all and for each source. A rate that holds on one source need not hold on another (other
languages, another form of the same request), so name the sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.anatomy.sites import Site
from pellucid.corpus import read_each
from pellucid.engine.limits import check_length
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.probing.roc import area, area_interval
from pellucid.results import Result
from pellucid.safety.guarding import Given, Guard, Seen, said_up_to
from pellucid.safety.monitors import Monitored
from pellucid.safety.shifts import named as by_name
from pellucid.safety.shifts import shifted
from pellucid.safety.thresholds import Promise, rate, threshold
from pellucid.technique import technique


def conversation_scores(
    model: Model,
    monitor: Monitored,
    prompts: Sequence[Any],
    *,
    replies: Sequence[str] | None = None,
    max_new_tokens: int = 40,
    batch: int = 8,
) -> np.ndarray:
    """[conversation] the largest statistic in each; -inf where the monitor counted nothing.

    InputError for a single prompt that is not in a list, and for an encoder where answers are to be generated.
    """
    return np.array(
        [float(made.max(initial=-np.inf)) for made in traces(model, monitor, prompts, replies, max_new_tokens, batch)]
    )


def traces(
    model: Model, monitor: Any, prompts: Any, replies: Any = None, max_new_tokens: int = 40, batch: int = 8,
    states: list[dict[str, Any]] | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The statistic at the tokens of each conversation, where there is one; `states` gets what the monitor kept of each batch."""
    at_least(1, batch=batch, max_new_tokens=max_new_tokens)
    prompts = several("prompts", prompts)
    replies = None if replies is None else several("replies", replies)
    if replies is not None and len(replies) != len(prompts):
        raise InputError(f"{len(replies)} replies for {len(prompts)} prompts: give one for each")
    monitor.check(model)
    alone = getattr(monitor, "reads", "") == "prompt"
    encoder = len(model.anatomy.stacks) == 1 and not model.anatomy.stacks[0].causal
    if encoder and replies is not None and getattr(monitor, "reads", "prompt") != "prompt":
        raise InputError(f"{model.name} writes no answer: let the monitor read the prompt (reads='prompt')")
    given = read_each(model, prompts, 0 if replies is not None or alone else max_new_tokens)
    if replies is not None and model.tokenizer is not None and len(model.anatomy.stacks) == 1:
        for i, (each, reply) in enumerate(zip(given, replies, strict=True)):
            said = model.tokenizer(reply, add_special_tokens=False)["input_ids"]
            check_length(model.module, each.stream("").ids.shape[1] + len(said), what=f"conversation {i} has")
    for start in progress(range(0, len(prompts), batch), "conversations read"):
        some = prompts[start : start + batch]
        if replies is None and not alone:
            guard = Guard(replace(monitor, then=None), model)
            model.generate(some, max_new_tokens=max_new_tokens, monitors=[Given(guard)])
            found = np.concatenate([np.where(t.ran[:, None], t.statistic, np.nan) for t in guard.trace], 1)
            state = guard.state
        else:
            state = {}
            said = None if replies is None else replies[start : start + batch]
            found = monitor.follow(state, _read(model, monitor, some, said))[1]
        if states is not None:
            states.append(state)
        yield from (row[~np.isnan(row)] for row in found)


def several(name: str, given: Any) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not len(given):
        raise InputError(f"{name}={given!r:.60}: expected a list with one for each conversation")
    return list(given)


def _read(model: Model, monitor: Monitored, prompts: list[Any], replies: list[str] | None) -> Seen:
    """Conversations that are there, in one pass."""
    paired = len(model.anatomy.stacks) > 1
    if replies is None or paired:
        inputs = model.inputs(prompts, decoder=replies) if replies is not None else model.inputs(prompts)
        lengths = np.ones(len(inputs), dtype=int) if paired else inputs.stream("").lengths.cpu().numpy()
    else:
        if model.tokenizer is None:
            raise InputError("this model was opened without a tokenizer: let it answer (leave replies= out)")
        first = [model.inputs([prompt]).stream("").ids[0].tolist() for prompt in prompts]
        ids = [model.tokenizer(reply, add_special_tokens=False)["input_ids"] for reply in replies]
        empty = next((i for i, row in enumerate(ids) if not row), None)
        if empty is not None:
            raise InputError(f"reply {empty} is empty: there is nothing to read")
        inputs = model.inputs([a + list(b) for a, b in zip(first, ids, strict=True)])
        lengths = np.array([len(row) for row in first])
    stream = inputs.stream("")
    real = stream.mask.bool().cpu().numpy()
    place = np.cumsum(real, 1) - 1  # of real tokens, from 0
    total = real.sum(1)
    in_prompt = real & (place < lengths[:, None])
    in_answer = real & (place >= lengths[:, None] - 1) & (place < total[:, None] - 1)
    if replies is None:
        in_answer &= False
    run = model.run(inputs, keep=list(monitor.sites), logits=False) if monitor.sites else None

    def foreign(site: Site) -> np.ndarray | None:
        assert run is not None
        own = run.stream(site)
        return None if own is stream else own.mask.bool().cpu().numpy()

    def values(site: Site) -> torch.Tensor:
        assert run is not None
        return run.everywhere(site)[0]

    def text(reads: str, row: int, position: int) -> str:
        upto = stream.ids[row, : position + 1][stream.mask[row, : position + 1].bool()]
        n = int(lengths[row])
        return said_up_to(model, reads, upto[:n], upto[n:])

    return Seen(in_prompt, in_answer, values, foreign, text)


# ---- the two things one does with them


@technique
def calibrate(
    model: Model,
    monitor: Any,
    prompts: Sequence[Any],
    *,
    replies: Sequence[str] | None = None,
    alarms: float = 0.05,
    promise: Promise = "average",
    confidence: float = 0.95,
    groups: Sequence[Any] | None = None,
    max_new_tokens: int = 40,
    batch: int = 8,
) -> Any:
    """The monitor with the threshold that benign conversations give it, tied to this model's weights.

    At most a share `alarms` of conversations like these will set it off, by `promise` "average" or "confidence"
    (`pellucid.safety.thresholds`). Of a cascade it is the second stage's, so that the promise is the whole cascade's.
    `groups` says which conversations belong together. The promise is for answers as long as those it was set on: give `max_new_tokens` (or replies)
    of the length that will be written, for a longer answer has more tokens at which to fire. InputError where there are too few: 19 for 5 % on average, 299 for 1 %
    with confidence.

    >>> monitor = calibrate(model, monitor, benign, alarms=0.1)
    """
    prompts = several("prompts", prompts)
    threshold(
        [0.0] * (len(prompts) if groups is None else len(set(groups))), alarms, promise=promise, confidence=confidence
    )
    scores = conversation_scores(model, monitor, prompts, replies=replies, max_new_tokens=max_new_tokens, batch=batch)
    found = threshold(scores, alarms, promise=promise, confidence=confidence, groups=groups)
    written = 0 if replies is not None or getattr(monitor, "reads", "") == "prompt" else max_new_tokens
    return replace(monitor, threshold=replace(found, tokens=written)).tie(model)


@technique
def evaluate(
    model: Model,
    monitor: Any,
    prompts: Sequence[Any],
    labels: Sequence[Any],
    *,
    replies: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    shifts: Any = (),
    max_new_tokens: int = 40,
    batch: int = 8,
    seed: int = 0,
) -> Result:
    """What a monitor with a threshold does on conversations it was not set on; `labels` [conversation]: should it fire?

    Over `source` ("all" first): `alarms`, the share of the others that set it off, and `recall`, of those that should, each
    with its exact 95 % interval and number; `area` under the ROC curve with its interval (bootstrap by `seed`) over all.
    `score` and `fires` [conversation]. Where the threshold promises a rate that a source's interval lies above, the title
    says so. The scores make the curve: `pl.probing.roc(result.score, result.label)`.

    `shifts` are the same conversations said otherwise, each a further source and outside of "all": names of `SHIFTS`
    ("upper case", "in a story"), or by name a function of a prompt or the prompts themselves, such as translations. What is answered to
    them is generated anew.
    """
    if monitor.threshold is None:
        raise InputError(f"{monitor.name!r} has no threshold: safety.calibrate sets one from benign conversations")
    truth = np.asarray(labels).astype(bool)
    prompts = several("prompts", prompts)
    named = ["all"] * len(prompts) if sources is None else [str(s) for s in sources]
    if not len(truth) == len(prompts) == len(named):
        raise InputError(
            f"{len(prompts)} prompts, {len(truth)} labels and {len(named)} sources: give one of each for each"
        )
    otherwise = {name: shifted(model, prompts, shift) for name, shift in by_name(shifts).items()}
    if taken := set(otherwise) & {"all", *named}:
        raise InputError(f"{', '.join(sorted(taken))}: a shift and a source of one name; call the shift otherwise")
    scores = conversation_scores(model, monitor, prompts, replies=replies, max_new_tokens=max_new_tokens, batch=batch)
    moved = {
        name: conversation_scores(model, monitor, some, max_new_tokens=max_new_tokens, batch=batch)
        for name, some in otherwise.items()
    }
    return judged(monitor, scores, truth, named, seed, f"{monitor.name} on {model.name}", moved)


def judged(
    monitor: Any, scores: np.ndarray, truth: np.ndarray, sources: list[str], seed: int, title: str, moved: Any = None
) -> Result:
    """`moved`: scores of the same conversations said otherwise, by name."""
    fires = scores > monitor.level
    which = np.array(sources)
    parts = {"all": (fires, truth)}
    parts |= {s: (fires[which == s], truth[which == s]) for s in dict.fromkeys(sources) if s != "all"}
    parts |= {name: (z > monitor.level, truth) for name, z in (moved or {}).items()}
    names = list(parts)
    rows: dict[str, list[float]] = {}
    for fired, wished in parts.values():
        for kind, wanted in (("alarms", False), ("recall", True)):
            for end, value in zip(("", "_low", "_high", "_n"), rate(fired[wished == wanted]), strict=True):
                rows.setdefault(kind + end, []).append(value)
    promised = getattr(monitor.threshold, "alarms", None)
    worse = [n for n, low in zip(names, rows["alarms_low"], strict=True) if promised is not None and low > promised]
    data = xr.Dataset(
        {k: ("source", np.array(v)) for k, v in rows.items()},
        coords={"source": names},
    )
    if truth.any() and not truth.all():
        finite = np.where(np.isfinite(scores), scores, scores[np.isfinite(scores)].min(initial=0.0) - 1)
        low, high = area_interval(finite, truth, None, seed)
        data = data.assign(area=area(finite, truth), area_low=low, area_high=high)
    data = data.assign(
        threshold=monitor.level,
        score=("conversation", scores),
        fires=("conversation", fires),
        label=("conversation", truth),
    )
    data = data.assign_coords(source_of=("conversation", which))
    if moved:
        data = data.assign(shifted_score=(("shift", "conversation"), np.stack(list(moved.values()))))
        data = data.assign_coords(shift=list(moved))
    said = f"{rows['alarms'][0]:.1%} false alarms, {rows['recall'][0]:.0%} found"
    said += f"; above the promised {promised:.1%} on {', '.join(worse)}" if worse else ""
    return Result(data, kind="monitor evaluation", title=f"{title}: {said}")
