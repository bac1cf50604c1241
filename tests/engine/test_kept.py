"""What a run holds on to, and what it takes on its way, beyond the plain forward pass: counted by the allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pellucid as pl
from benchmarks.clock import allocated
from tests.zoo import build

LENGTH = 60


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
