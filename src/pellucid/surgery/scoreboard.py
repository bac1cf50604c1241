"""What did an edit change, and what else moved?

    efficacy        p(new) > p(true) after the fact's prompt; `exact`: the model says it
    paraphrase      the same after other wordings
    neighbourhood   p(right) > p(new) of neighbours' facts (whose answer is another one); `kept`: of what was said before, what still is
    score           harmonic mean of these three                                        (Meng et al. 2022)
    same subject    what else was said of the subject and still is: essence             (its drift: KL of the next token)
    portability     what follows from the new fact and is said
    said, fluency   the new answer in what is generated freely; its n-gram entropy in bits, 2/3 of pairs + 4/3 of triples of words
    text            perplexity of texts that have nothing to do with it, and KL from the model before

Probabilities compared flatter: an edit of 97 % efficacy may be said in 38 % of free answers (Yang et al. 2025, "The Mirage of Model
Editing"), so what is said stands beside it. Each number has an interval over facts (texts), the model before the edit, and the
same edit under conditions that know less: without C (the identity in its stead, values as they are), at a wrong layer, and with
random keys of the same length. The prompts of neighbours must not be edited themselves: those that are, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr

from pellucid.causal.tracing import window_curve
from pellucid.changed import Added
from pellucid.corpus import Corpus, batches, longest
from pellucid.corpus import inputs as as_inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, PellucidError, among
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval, spearman
from pellucid.surgery.answers import Measured, divergence, measured
from pellucid.surgery.covariance import KeyCovariance
from pellucid.surgery.editing import Edited, How, again, edit, layers_for, wrong_layer
from pellucid.surgery.keys import Fact, Memory, Text, facts_of
from pellucid.surgery.values import Search
from pellucid.technique import technique

Control = Literal["without C", "wrong layer", "random keys"]
MEASURES = (
    "efficacy", "efficacy exact", "paraphrase", "paraphrase exact", "neighbourhood", "neighbourhood kept", "neighbourhood KL",
    "same subject kept", "same subject KL", "portability exact", "said", "fluency", "text KL", "perplexity", "score",
)  # fmt: skip
UNBOUNDED = ("neighbourhood KL", "same subject KL", "fluency", "text KL", "perplexity")


@technique
def scoreboard(
    edited: Edited | Sequence[Edited],
    texts: Any = None,
    *,
    controls: Sequence[Control] = ("without C", "wrong layer", "random keys"),
    max_new_tokens: int = 20,
    tokens: int = 2048,
    seed: int = 0,
) -> Result:
    """The measures of the module over `measure` x `model` ("before", "edited", and the controls), with `low`, `high`.

    Several edits of one model are judged each on its own facts, and averaged. `texts` are read as `pl.Corpus` does, at most `tokens`
    tokens; without them nothing is said of text, and with `max_new_tokens=0` nothing of what is generated. `broken` names the
    same-subject facts that the edit broke. InputError for edits of different models.

    >>> scoreboard(edited, texts, max_new_tokens=0).sel(measure="efficacy", model="edited").value
    <xarray.DataArray 'value' ()>...
    """
    edits = [edited] if isinstance(edited, Edited | Model) else list(edited)
    for name in [controls] if isinstance(controls, str) else controls:
        if not among(name, Control) or isinstance(controls, str):
            raise InputError(
                f"controls={controls!r}: expected a list with some of {', '.join(map(repr, get_args(Control)))}"
            )
    if (
        not edits
        or not all(isinstance(e, Edited) for e in edits)
        or any(e.before is not edits[0].before for e in edits)
    ):
        raise InputError("expected one edit, or several of one and the same model")
    arms: dict[str, list[Model]] = {"before": [e.before for e in edits], "edited": [e.model for e in edits]}
    notes: dict[str, str] = {}
    for name in controls:
        try:
            arms[name] = [_control(e, name, seed + i) for i, e in enumerate(edits)]
        except PellucidError as why:
            notes[name] = str(why)
    facts = [(i, f) for i, e in enumerate(edits) for f in e.facts]
    found: dict[str, dict[str, tuple[np.ndarray, Any]]] = {}
    plain, text = dict[int, Any](), None
    broken: list[str] = []
    with progress[None](what="scoreboard", total=sum(map(len, arms.values()))) as bar:
        for arm, models in arms.items():
            parts: list[dict[str, tuple[np.ndarray, Any]]] = []
            for i, model in enumerate(models):
                mine = [f for j, f in facts if j == i]
                values, plain[i], text, lost = _judged(model, mine, plain.get(i), text, texts, tokens, max_new_tokens)
                broken += lost if arm == "edited" else []
                parts.append(values)
                bar.step(1)
            found[arm] = _joined(parts, [len(e.facts) for e in edits])
    value, low, high = (np.full((len(MEASURES), len(arms)), np.nan) for _ in range(3))
    for column, arm in enumerate(arms):
        for row, measure in enumerate(MEASURES[:-1]):
            if measure in found[arm]:
                x, groups = found[arm][measure]
                over = groups[1] if isinstance(groups, tuple) else None
                groups = groups[0] if isinstance(groups, tuple) else groups
                n = np.sum(~np.isnan(x)) if over is None else over.sum()
                value[row, column] = np.nansum(x) / n if n else np.nan
                low[row, column], high[row, column] = interval(
                    x, seed, groups=groups, over=over, within=(0, np.inf if measure in UNBOUNDED else 1)
                )
        three = [found[arm][m] for m in ("efficacy", "paraphrase", "neighbourhood") if m in found[arm]]
        if len(three) == 3:
            statistic = _harmonic(three, len(facts))
            value[-1, column] = statistic(np.ones((1, len(facts))))[0]
            low[-1, column], high[-1, column] = interval(statistic, seed, n=len(facts), within=(0, 1))
    row = MEASURES.index("perplexity")
    for table in (value, low, high):
        table[row] = np.exp(table[row])
    data = xr.Dataset(
        {"value": (("measure", "model"), value, {"rows": "unlike"}), "low": (("measure", "model"), low), "high": (("measure", "model"), high)},
        {"measure": list(MEASURES), "model": list(arms)},
        {"broken": broken, "left_out": notes, "wrong_layer": _wrong_layer_said(edits[0]) if "wrong layer" in arms else ""},
    )  # fmt: skip
    return Result(data, kind="edit scoreboard", title=_title(data, edits))


def _wrong_layer_said(edited: Edited) -> str:
    layers, covariance = _far_away(edited)
    off = covariance == "off" != edited.settings["covariance"]
    return f"{', '.join(map(str, layers))}{', without C: it was not fitted there' if off else ''}"


def _title(data: xr.Dataset, edits: Sequence[Edited]) -> str:
    def at(measure: str, model: str) -> float:
        return float(data["value"].sel(measure=measure, model=model)) if model in data.model.values else float("nan")

    said = f"{edits[0].how}: {at('efficacy exact', 'edited'):.0%} of {sum(len(e.facts) for e in edits)} facts are said"
    kept, off = at("neighbourhood", "edited"), at("neighbourhood", "without C")
    said += f", {kept:.0%} of neighbours hold" if kept == kept else ""
    said += f" ({off:.0%} without C)" if off == off else ""
    lost = at("same subject kept", "edited")
    said += f"; {1 - lost:.0%} of what else was known of the subjects is lost" if lost == lost else ""
    doing_as_well = [
        c for c in ("without C", "wrong layer", "random keys") if at("score", c) >= at("score", "edited") > 0
    ]
    return f"No better than {' and '.join(doing_as_well)}. {said}" if doing_as_well else said


# ---- one model


def _judged(
    model: Model,
    facts: Sequence[Fact],
    plain: Any = None,
    text: Any = None,
    texts: Any = None,
    tokens: int = 0,
    new_tokens: int = 0,
) -> tuple[dict[str, tuple[np.ndarray, Any]], Any, Any, list[str]]:
    """Values by measure with the fact of each (of text: its rows and tokens); what later models are compared with (`plain`, and
    `text`, which is the same for all facts); what broke."""
    # of several edits at once, neighbours that were edited themselves say nothing
    edited_prompts = {f.asked for f in facts if isinstance(f.asked, str)}
    items: list[tuple[int, str, Text, Text | None, Text | None]] = []  # fact, kind, prompt, new, right
    for i, f in enumerate(facts):
        items.append((i, "efficacy", f.asked, f.new, f.true))
        items += [(i, "paraphrase", p, f.new, f.true) for p in f.paraphrases]
        pairs = {"neighbourhood": f.neighbours, "same subject": f.same_subject, "portability": f.portability}
        items += [(i, kind, p, f.new, a) for kind, each in pairs.items() for p, a in each if p not in edited_prompts]
    known, n = [j for j, item in enumerate(items) if item[4] is not None], len(items)
    asked = [(p, a) for _, _, p, a, _ in items] + [
        (items[j][2], items[j][4]) for j in known
    ]  # of one prompt in one run
    both = measured(model, asked, keep=n)
    new = Measured(both.probability[:n], both.exact[:n], both.log_p)
    p_right, exact_right = np.full(n, np.nan), np.full(n, np.nan)
    p_right[known], exact_right[known] = both.probability[n:], both.exact[n:]
    before: tuple[Measured, np.ndarray] = plain or (new, exact_right)
    drift = divergence(before[0], new)
    kind, fact = np.array([item[1] for item in items]), np.array([item[0] for item in items])
    more = np.where(np.isnan(p_right), np.nan, new.probability > p_right)
    alike = np.array(
        [n == a for _, _, _, n, a in items]
    )  # a neighbour whose answer is the new one cannot be compared with it
    less = np.where(np.isnan(p_right) | alike, np.nan, p_right > new.probability)
    columns = {
        "efficacy": ("efficacy", more), "efficacy exact": ("efficacy", new.exact),
        "paraphrase": ("paraphrase", more), "paraphrase exact": ("paraphrase", new.exact),
        "neighbourhood": ("neighbourhood", less), "neighbourhood KL": ("neighbourhood", drift),
        "neighbourhood kept": ("neighbourhood", np.where(before[1] == 1, exact_right, np.nan)),
        "same subject kept": ("same subject", np.where(before[1] == 1, exact_right, np.nan)),
        "same subject KL": ("same subject", drift), "portability exact": ("portability", exact_right),
    }  # fmt: skip
    found: dict[str, tuple[np.ndarray, Any]] = {}
    for name, (which, x) in columns.items():
        if (here := kind == which).any():
            found[name] = np.asarray(x, dtype=float)[here], fact[here]
    lost = [str(items[j][2]) for j in np.flatnonzero((kind == "same subject") & (before[1] == 1) & (exact_right == 0))]
    if new_tokens and model.tokenizer is not None and _writes(model):
        told = [_told(model, f, new_tokens) for f in facts]
        found["said"] = np.array([s for s, _ in told], dtype=float), np.arange(len(facts))
        found["fluency"] = np.array([e for _, e in told]), np.arange(len(facts))
    if texts is not None:
        spoken = text if text and plain is None else _text(model, texts, tokens, text and text[0])
        text, rows = text or spoken, spoken[1]
        found["perplexity"] = rows[:, 0], (np.arange(len(rows)), rows[:, 2])
        found["text KL"] = rows[:, 1], (np.arange(len(rows)), rows[:, 2])
    return found, before, text, lost


def _writes(model: Model) -> bool:
    can: Any = getattr(model.module, "can_generate", None)
    return can is not None and bool(can())


def _told(model: Model, fact: Fact, n: int) -> tuple[bool, float]:
    """Whether freely generated text says the new answer, and its n-gram entropy."""
    made = model.generate(fact.asked, max_new_tokens=n).texts[0]
    return str(fact.new).strip() in made, ngram_entropy(made)


def ngram_entropy(text: str) -> float:
    """Bits: 2/3 of the entropy of pairs and 4/3 of that of triples of words (Zhang et al. 2018).

    >>> ngram_entropy("a a a a"), round(ngram_entropy("a b c d"), 2)
    (0.0, 2.39)
    """
    words, total = text.split(), 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), dtype=float)
        p = counts / counts.sum() if counts.size else counts
        total -= weight * float((p * np.log2(p)).sum())
    return max(0.0, total)


@torch.no_grad()
def _text(model: Model, texts: Any, tokens: int, first: Any) -> tuple[list[torch.Tensor], np.ndarray]:
    """Of each row of text the sums of -log p and of KL from the first model, and its tokens; log p of the model by row."""
    corpus = Corpus.of(texts, packed=False, long="cut", context=min(128, longest(model), tokens), tokens=tokens)
    kept, rows = [], []
    for i, (row,) in enumerate(batches(corpus.rows(model), 1)):
        given = as_inputs(model, [row])
        log_p = model.run(given).logits[0].float().log_softmax(-1)
        ids = given.stream("").ids[0].to(log_p.device)
        shifted = bool(model.anatomy.stacks[-1].causal)
        said = log_p[:-1].gather(1, ids[1:, None]) if shifted else log_p.gather(1, ids[:, None])
        plain = log_p if first is None else first[i].float()
        kl = float((plain.exp() * (plain - log_p)).sum())
        rows.append((-float(said.sum()), kl * len(said) / len(log_p), len(said)))
        kept.append(log_p.half() if first is None else log_p[:0])
    if not rows:
        raise InputError("there is no text to measure on: give more of it")
    return kept, np.array(rows)


def _joined(
    parts: Sequence[dict[str, tuple[np.ndarray, Any]]], sizes: Sequence[int]
) -> dict[str, tuple[np.ndarray, Any]]:
    """The values of several edits together, facts numbered through; rows of the same text are drawn together."""
    starts = np.cumsum([0, *sizes])
    made: dict[str, tuple[np.ndarray, Any]] = {}
    for name in dict.fromkeys(n for part in parts for n in part):
        have = [(part[name], start) for part, start in zip(parts, starts, strict=False) if name in part]
        x = np.concatenate([v for (v, _), _ in have])
        if isinstance(have[0][0][1], tuple):
            made[name] = x, tuple(np.concatenate([g[k] for (_, g), _ in have]) for k in range(2))
        else:
            made[name] = x, np.concatenate([g + start for (_, g), start in have])
    return made


def _harmonic(measures: Sequence[tuple[np.ndarray, Any]], n: int) -> Callable[[np.ndarray], np.ndarray]:
    sums = []
    for x, fact in measures:
        good = ~np.isnan(x)
        sums.append([np.bincount(fact[good], weights=w, minlength=n) for w in (x[good], np.ones(good.sum()))])

    def statistic(weights: np.ndarray) -> np.ndarray:
        means = np.stack([(weights @ top) / (weights @ count) for top, count in sums])
        with np.errstate(divide="ignore"):
            made: np.ndarray = len(means) / (1 / means).sum(0)
        return made

    return statistic


# ---- controls


def _control(edited: Edited, name: Control, seed: int) -> Model:
    if name == "without C":
        if edited.settings["covariance"] == "off":
            raise InputError("the edit was made without C")
        return again(edited, covariance="off", values=edited.values).model
    if name == "random keys":
        return edited.before.changed(_random_keys(edited, seed))
    layers, covariance = _far_away(edited)
    return again(edited, layers=layers, covariance=covariance).model


def _far_away(edited: Edited) -> tuple[list[int], Any]:
    """A wrong layer, and C there: the farthest that C was fitted on, but none next door; "off" at a layer that it lacks."""
    covariance, far = edited.settings["covariance"], wrong_layer(edited.before, edited.layers)
    if not isinstance(covariance, KeyCovariance):
        return far, "off"
    least = max(1, min(abs(i - j) for i in far for j in edited.layers) / 2)
    fitted = {int(m.partition(".")[0]) for m in covariance.moments_}
    fitted = {i for i in fitted if min(abs(i - j) for j in edited.layers) >= least}
    if len(fitted) < len(far):
        return far, "off"
    return sorted(sorted(fitted, key=lambda i: abs(i - far[-1]))[: len(far)]), covariance


def _random_keys(edited: Edited, seed: int) -> list[Added]:
    """The changes with directions of the same length in the place of those that answer to the keys."""
    generator, made = torch.Generator().manual_seed(seed), []
    rows_in = {m.parameter: m.rows_in for m in (Memory.of(edited.before, layer) for layer in edited.layers)}
    own = edited.model.loaded.changes[len(edited.before.loaded.changes) :] or edited.model.loaded.changes
    for change in own:
        assert isinstance(change, Added)
        factor = change.left.T if rows_in[change.parameter] else change.right
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        noise *= (factor.norm(dim=1) / noise.norm(dim=1))[:, None]
        made.append(
            replace(change, left=noise.T.contiguous()) if rows_in[change.parameter] else replace(change, right=noise)
        )
    return made


# ---- where


@technique
def editing_by_layer(
    model: Model,
    facts: Any,
    *,
    covariance: KeyCovariance | Literal["off"],
    layers: Sequence[int] | None = None,
    how: How = "rome",
    contexts: int | Sequence[str] = 1,
    search: Search | None = None,
    seed: int = 0,
) -> Result:
    """Does editing work where tracing finds the fact? They need not agree (Hase et al. 2023).

    Over `layer`: `new` = p(new) after an edit there (with `low`, `high` over facts), `efficacy`, `neighbourhood` where neighbours are
    given, and `traced`, the indirect effect of restoring the MLPs around it at the subject's last token; `attrs["agreement"]` is the
    rank correlation of `new` and `traced`. Layers where nothing reaches the answer have `new` as it was before.
    """
    known = facts_of(facts)
    trace, (best,) = layers_for(model, known, "rome", None, seed)
    assert trace is not None
    effect = trace.data["effect"].values.reshape(-1)
    chosen = list(range(len(effect))) if layers is None else list(layers)
    if not chosen:
        raise InputError("layers=[]: expected the layers to edit at, or None for all")
    columns: dict[str, list[Any]] = {"new": [], "low": [], "high": [], "efficacy": [], "neighbourhood": []}
    for layer in progress(chosen, "layers"):
        try:
            made = edit(
                model, known, how, covariance=covariance, layers=layer, contexts=contexts, search=search, seed=seed
            ).model
        except InputError as why:
            if "reaches its answer" not in str(why):
                raise
            made = model
        values = _judged(made, known)[0]
        p = measured(made, [(f.asked, f.new) for f in known]).probability
        low, high = interval(p, seed, within=(0, 1))
        row = [
            p.mean(),
            low,
            high,
            *(np.nanmean(values[k][0]) if k in values else np.nan for k in ("efficacy", "neighbourhood")),
        ]
        for column, x in zip(columns.values(), row, strict=True):
            column.append(float(x))
    traced = effect[chosen]
    data = xr.Dataset(
        {k: ("layer", np.array(v)) for k, v in columns.items()} | {"traced": ("layer", traced)}, {"layer": chosen}
    )
    agreement = spearman(np.array(columns["new"]), traced)
    data.attrs |= {"agreement": agreement, "traced_layer": best}
    works = chosen[int(np.argmax(columns["new"]))]
    title = f"Tracing says layer {best}, editing works best at layer {works} (rank agreement {agreement:.2f})"
    return Result(data, kind="editing by layer", title=title)


@technique
def traced_again(edited: Edited, *, windows: Sequence[int] = (10,), draws: int = 3, seed: int = 0) -> Result:
    """Where the new fact is recalled now: the edited model traced as `edit` traces (`causal.window_curve`), for its own answer."""
    if not isinstance(edited, Edited):
        raise InputError(f"expected what pl.surgery.edit gives, got a {type(edited).__name__}")
    n = len(edited.model.anatomy.stacks[0].blocks)
    subjects: Any = [f.subject for f in edited.facts]
    prompts: Any = [f.asked for f in edited.facts]
    one = len(prompts) == 1
    return window_curve(
        edited.model, prompts[0] if one else prompts, subject=subjects[0] if one else subjects,
        windows=tuple(min(w, n) for w in windows), draws=draws, seed=seed,
    )  # fmt: skip
