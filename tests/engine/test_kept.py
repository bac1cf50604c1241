"""What a run holds on to, and what it takes on its way, beyond the plain forward pass: counted by the allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pellucid as pl
from tests.zoo import build

LENGTH = 60


def allocated(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of CPU memory at the peak of `work`, and what it returned still holds, both above what was there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        made = work()
        gc.collect()
    steps = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for step in sorted((s for s in steps if s.name() == "[memory]"), key=lambda s: s.start_ns()):
        now += step.nbytes()
        peak = max(peak, now)
    del made
    return peak, now


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["layers.1.resid_post@-1", "layers.1.resid_post"])
def test_a_run_holds_what_it_keeps_and_no_more(family: str, site: str) -> None:
    module = build(family)
    model = pl.load(module, tokenizer=False)
    ids = torch.randint(5, 90, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    size = model.run(ids, keep=site).tensor(site).nbytes  # what a model remembers of itself is made here

    def plain() -> Any:
        with torch.no_grad():
            return module(input_ids=ids, use_cache=False).logits

    plain()
    (plain_peak, plain_held), (peak, held) = allocated(plain), allocated(lambda: model.run(ids, keep=site))
    assert plain_held > size  # the allocator is heard
    small = 64  # the columns of the vector, the one of a mask that says nothing, a row's start and length
    assert size <= held - plain_held <= size + small
    assert peak - plain_peak <= 1.2 * size + LENGTH * 16 + small  # while its prompt is read: a mask and its edges
