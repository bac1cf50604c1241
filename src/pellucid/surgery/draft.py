"""Greedy text, drafted by the first blocks: they write some tokens, the whole model judges several at once.

The text is the greedy one, token for token (Elhoushi et al. 2024; Leviathan et al. 2023).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import xarray as xr

from pellucid.errors import InputError, at_least
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.exit_policy import Exit
from pellucid.surgery.walk import begun, ends, plainly
from pellucid.technique import technique


@technique
def draft_and_verify(
    model: Model, prompt: Any, *, layers: int, ahead: int = 4, lens: Any = None, max_new_tokens: int = 40
) -> Result:
    """Greedy text, drafted `ahead` tokens at a time by the first `layers` blocks and judged by all of them at once.

    The tokens are those of greedy generation of the one prompt. Gives over `position` `drafted` (whether the token was a draft that
    was accepted); `accepted`, the share of drafts that were right, `passes`, of the whole model, and `time`, seconds over those of
    plain greedy generation, cached too: above 1 nothing was gained. InputError for several prompts, whose drafts would be right to
    different lengths; raises else as `generate_early` does.

    >>> draft_and_verify(model, "The capital of France is", layers=6, ahead=4).passes
    <xarray.DataArray 'passes' ()>...
    """
    at_least(1, ahead=ahead, max_new_tokens=max_new_tokens, layers=layers)
    n = len(model.anatomy.stacks[-1].blocks)
    if layers >= n:
        raise InputError(f"layers={layers}: a draft by all {n} blocks is the model: expected fewer")
    always = Exit("probability", 0.0, layers=(layers - 1,), lens=lens)
    (walk, texts), end = begun(model, prompt, always, "recompute"), ends(model)
    if len(texts) != 1:
        raise InputError(f"{len(texts)} prompts: expected one")
    begin, most = len(texts[0]), len(texts[0]) + max_new_tokens
    started = time.perf_counter()
    (row,), said = walk.begin(texts)
    row.ids.append(int(said.argmax()))
    accepted, tried, passes = [False], 0, 0
    while len(row.ids) < most and row.ids[-1] not in end:
        sure = len(row.ids)  # what stands is greedy
        for _ in range(min(ahead, most - sure - 1)):
            row.ids.append(int(walk.run([row], 1, True).argmax()))
            if row.ids[-1] in end:
                break
        drafts = row.ids[sure:]
        judged = (
            walk.catch_up([row], False, every=True)[0].argmax(-1).tolist()[-len(drafts) - 1 :]
        )  # after `sure` tokens, and each draft
        passes += 1
        right = next((k for k, draft in enumerate(drafts) if draft != judged[k]), len(drafts))
        tried += len(drafts)
        row.ids = [*row.ids[: sure + right], judged[right]]
        accepted += [True] * right + [False]
        if end & set(row.ids[sure : sure + right]):
            row.ids, accepted = row.ids[: sure + right], accepted[:-1]
        row.whole = sure + right
    seconds, new = time.perf_counter() - started, row.ids[begin:most]
    started = time.perf_counter()
    plainly(model, texts, len(new))
    times = seconds / (time.perf_counter() - started)
    words = [model.tokenizer.decode([i]) for i in new] if model.tokenizer is not None else [f"#{i}" for i in new]
    share = sum(accepted[: len(new)]) / max(1, tried)
    data = xr.Dataset({"drafted": ("position", np.array(accepted[: len(new)], dtype=float)), "accepted": share, "passes": passes, "time": times},
                      {"position": range(len(new)), "token": ("position", words), "id": ("position", new)},
                      {"text": model.tokenizer.decode(new) if model.tokenizer is not None else ""})  # fmt: skip
    gain = f"{1 / times:.2f} times as fast" if times < 1 else f"{times:.2f} times as slow"
    return Result(data, kind="draft and verify", title=f"Greedy text, {share:.0%} of {tried} drafts accepted, {gain} as greedy generation")  # fmt: skip
