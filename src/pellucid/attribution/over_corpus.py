"""Which words does a model rest on, over a whole corpus and not in one example?

    importance(w) = mean over the occurrences o of w of attribution(o | answer of its text)

the average of local attributions as a global importance (van der Linden, Haned and Kanoulas 2019, "Global Aggregations of
Local Explanations for Black Box Models"), signed, with an interval over whole texts, since the words of a text share its
gradient. The mean of sizes stands beside it: a word that speaks for some answers and against others has a mean of nothing.

The control asks the same of another text's answer. What a word gets there it gets for whatever is asked; what speaks for
the answer is the difference, occurrence by occurrence.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import xarray as xr

from pellucid.attribution.batches import predicted
from pellucid.attribution.methods import METHODS
from pellucid.corpus import Corpus, Row, batches, inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least, listed, nearest
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import settling, technique

COLUMNS = ("importance", "low", "high", "size", "control", "difference", "difference_low", "difference_high", "count", "texts")  # fmt: skip


@technique
def word_importance(
    model: Model,
    texts: Any,
    target: Any = None,
    *,
    method: str = "gradient_x_input",
    against: Answers | None = None,
    control: Any = None,
    players: str = "word",
    options: dict[str, Any] | None = None,
    fewest: int = 2,
    batch: int = 32,
    seed: int = 0,
) -> Result:
    """The mean attribution of each word (or token) over texts, beside what it gets for the answers of other texts.

    `texts` is a list, an iterable that is streamed, or a `Corpus` (its `long=` says what becomes of long ones; here they are
    read in windows where nothing is said). `target` is one answer for all, a list with one for each text, or None: what the
    model predicts for each. `control` is the other answer, one for all; None: that of another text of the same `batch`, drawn
    by `seed` (none where all have the same one). `method` is a name of `METHODS`, which gets `options`. Words that stand in
    fewer than `fewest` texts are left out; equal words are those that are written alike.

    Gives [word], most texts first: `importance` in units of the target with `low` and `high` (95 %, whole texts), `size` (the mean
    of absolute values), `control`, `difference` from it with its interval, `count` (occurrences) and `texts`. InputError for an
    unknown method, another number of targets than texts, or where no word stands in so many texts.

    >>> word_importance(classifier, reviews, 1, control=0, method="integrated_gradients").difference
    <xarray.DataArray 'difference' (word: 24)>...
    """
    at_least(1, batch=batch, fewest=fewest)
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}{nearest(method, METHODS)}")
    targets = listed("target", target, "one answer for each text") if isinstance(target, list | tuple) else None
    corpus = Corpus.of(texts, packed=False, long="windows")
    found: dict[str, dict[int, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(5)))
    rng = np.random.default_rng(seed)
    read = 0
    for rows in progress(batches(corpus.rows(model), batch), "batches explained"):
        read = rows[-1].text + 1
        if targets is not None and read > len(targets):
            raise InputError(f"{len(targets)} targets for more texts: give one for all, or one for each")
        asked = [targets[r.text] for r in rows] if targets is not None else target
        asked, other = _answers(model, rows, asked, control, rng)
        told = {"against": against, "players": players, **(options or {})}
        ours = _explained(model, rows, method, asked, told)
        theirs = _explained(model, rows, method, other, told) if other is not None else None
        for i, row in enumerate(rows):
            for k, (word, value) in enumerate(ours[i]):
                beside = theirs[i][k][1] if theirs else np.nan
                known = not np.isnan(beside)
                found[word][row.text] += (value, abs(value), 1, beside if known else 0.0, known)
    if targets is not None and read != len(targets):
        raise InputError(f"{len(targets)} targets for {read} texts: give one for all, or one for each")
    words = sorted((w for w in found if len(found[w]) >= fewest), key=lambda w: (-len(found[w]), w))
    if not words:
        raise InputError(f"no word stands in {fewest} of the {read} texts: give more texts, or fewest=1")
    data = _table(words, found, seed)
    return Result(data, kind="word importance", title=_title(data, read, method))


def _answers(model: Model, rows: list[Row], target: Any, control: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """What each text is asked about, and what it is asked about as a control (None: there is none)."""
    if target is None:
        whole = inputs(model, rows)
        with settling({}):
            target = predicted(model, [whole.alone(i) for i in range(len(rows))], ())
    if control is not None or not isinstance(target, list):
        return target, control
    others = [[t for t in target if t != mine] for mine in target]
    if not all(others):
        return target, None
    return target, [some[int(rng.integers(len(some)))] for some in others]


def _explained(
    model: Model, rows: list[Row], method: str, target: Any, options: dict[str, Any]
) -> list[list[tuple[str, float]]]:
    """[row][player] its text and its attribution; special tokens are left out."""
    with settling({}):  # what is predicted for a batch is not what the whole call was asked
        result = METHODS[method](model, [list(row.ids) for row in rows], target, **options)
    made = []
    for each in result.prompts:
        data = each.data
        values = data.attribution.sum("output") if "output" in data.attribution.dims else data.attribution
        names = data["text" if "player" in data.dims else "token"].values
        real = ~data.special.values if "special" in data.coords else np.ones(len(names), dtype=bool)
        made.append([(str(n).strip(), float(v)) for n, v, ok in zip(names, values.values, real, strict=True) if ok])
    return made


def _table(words: list[str], found: Any, seed: int) -> xr.Dataset:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for word in words:
        sums = np.stack([*found[word].values()])  # [text, column]: a text's words share its gradient
        total, size, count, beside, compared = sums.sum(0)
        low, high = interval(sums[:, 0], seed, over=sums[:, 2])
        apart = np.where(sums[:, 4] == sums[:, 2], sums[:, 0] - sums[:, 3], np.nan)
        known = ~np.isnan(apart)
        ends = interval(apart, seed, over=sums[:, 2]) if known.sum() > 1 else (np.nan, np.nan)
        difference = apart[known].sum() / sums[known, 2].sum() if known.any() else np.nan
        control = beside / compared if compared else np.nan
        row = (total / count, low, high, size / count, control, difference, *ends, int(count), len(sums))
        for name, value in zip(COLUMNS, row, strict=True):
            columns[name].append(value)
    return xr.Dataset({k: ("word", np.asarray(v)) for k, v in columns.items()}, {"word": words})


def _title(data: xr.Dataset, texts: int, method: str) -> str:
    about = f"{method.replace('_', ' ')} over {texts} texts"
    if np.isnan(data.difference.values).all():
        return f"Words by {about} (no control: one answer for all)"
    apart = (data.difference_low > 0) | (data.difference_high < 0)
    if not bool(apart.any()):
        return f"No word's {about} differs from its control, the answer of other texts"
    top = str(data.word.values[np.where(apart, np.abs(data.difference), -1).argmax()])
    return f"{int(apart.sum())} of {data.sizes['word']} words differ from their control, most {top!r}: {about}"
