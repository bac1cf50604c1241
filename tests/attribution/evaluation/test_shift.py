"""The share of altered prompts that lie outside clean ones rises with what is taken away, and is warned about."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.evaluation import distribution_shift
from pellucid.errors import InputError
from pellucid.metrics import logit
from tests.attribution.evaluation.models import TEXTS, opened


@pytest.mark.parametrize("how", ["pad", "remove"])
def test_taking_more_away_leads_further_out_and_is_warned_about(how):
    with pytest.warns(UserWarning, match="most prompts lie outside"):
        found = distribution_shift(opened("bert"), TEXTS, replacement=how, seed=1)
    assert found.outside.values[-1] == 1
    assert (np.diff(found.distance.values) > 0).all()
    assert found.data.attrs["replacement"] == how


def test_reference_prompts_stay_nearer_than_padding():
    model = opened("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        padded = distribution_shift(model, TEXTS, replacement="pad")
        resampled = distribution_shift(model, TEXTS, replacement="resample", reference=TEXTS)
    assert (resampled.distance.values < padded.distance.values).all()


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("how", ["pad", "remove"])
def test_vectors_are_the_mean_of_what_enters_the_middle_block(family, how):
    model = opened(family)
    case = Case.of(model, TEXTS[0], logit(" Paris"))
    world = absence(case, how=how)
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]]).bool()
    ids = case.ids.tolist()
    words = [i for i, fixed in enumerate(case.fixed) if not fixed]
    gone = {words[1], words[3]}
    altered = (
        [0 if i in gone else t for i, t in enumerate(ids)]
        if how == "pad"
        else [t for i, t in enumerate(ids) if i not in gone]
    )
    prefix = "encoder." if family == "t5" else ""
    more = {k: v for k, v in case.inputs.tensors.items() if k.startswith("decoder_")}
    for row, given in zip(world.vectors(present), (ids, altered), strict=True):
        inputs = {
            "input_ids": torch.tensor([given]),
            "attention_mask": torch.ones(1, len(given), dtype=torch.long),
            **more,
        }
        with torch.no_grad():
            expected = model.run(inputs, keep=[f"{prefix}layers.1.resid_pre"]).tensor(f"{prefix}layers.1.resid_pre")
        torch.testing.assert_close(row, expected[0].mean(0), atol=1e-4, rtol=1e-3)


def test_few_prompts_do_not_say_what_is_far():
    with pytest.raises(InputError, match="3 prompts: expected 10 or more"):
        distribution_shift(opened("gpt2"), TEXTS[:3])
