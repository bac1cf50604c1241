"""Interchange interventions and distributed alignment search on a transformer whose variables are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pellucid import Model
from pellucid.causal.abstraction import CausalModel, Pairs, Task, alignment_search, interchange
from pellucid.causal.alignment import DistributedAlignment
from pellucid.controls import shuffled
from pellucid.errors import InputError
from tests.causal.programs import PROGRAM, TASK, both_alike


@pytest.fixture(scope="module")
def model() -> Model:
    return both_alike()


def test_the_right_alignment_is_exact_and_wrong_ones_are_at_chance(model: Model) -> None:
    right = interchange(model, TASK, {"same": "layers.0.attn.heads.0@-1"})
    assert right["accuracy"].item() == right["changed"].item() == right["task"].item() == 1.0
    assert right["floor"].item() == pytest.approx(0.5, abs=0.01)
    for site in ("layers.0.attn.heads.1@-1", "layers.1.attn.heads.0@-1", "layers.0.resid_post@1", "layers.0.mlp.out@0"):
        wrong = interchange(model, TASK, {"same": site})
        assert wrong["low"].item() < 0.6, site
        assert 0.35 < wrong["accuracy"].item() < 0.65, site


def test_both_variables_together_have_an_alignment_too(model: Model) -> None:
    both = {"same": "layers.0.attn.heads.0@-1", "other": "layers.0.attn.heads.1@-1"}
    assert interchange(model, TASK, both)["accuracy"].item() == 1.0
    swapped = {"same": both["other"], "other": both["same"]}
    assert interchange(model, TASK, swapped)["accuracy"].item() == 1.0  # as a pair they are the same intervention
    assert interchange(model, TASK, {"answer": "layers.1.mlp.out@-1"})["accuracy"].item() == 1.0


def test_a_search_over_heads_finds_the_variable_and_keeps_its_accuracy_on_held_out_pairs(model: Model) -> None:
    result = alignment_search(model, TASK, "other", over="layers.*.attn.heads.*@-1")
    assert result.data.attrs["best"] == "layers.0.attn.heads.1@-1"
    assert result["held_out"].item() == 1.0
    assert result.accuracy.sel(layer=0, head=0).item() < 0.65
    positions = alignment_search(model, TASK, "same", over="layers.0.resid_pre@*")
    assert positions.accuracy.dims == ("position",)
    assert positions.accuracy.values.max() < 0.8


def test_distributed_search_finds_the_variable_from_random_starts_and_the_placebos_fail(model: Model) -> None:
    found = []
    for seed in range(5):
        search = DistributedAlignment(
            TASK, "same", "layers.0.resid_post@-1", seed=seed, pairs=256, placebos=seed < 1
        ).fit(model)
        result = search.result_
        found.append(result["accuracy"].item() >= 0.99)
        assert search.rotation_.shape == (16, 1)
        if search.placebos:
            for placebo in ("shuffled_model", "arbitrary_labels"):
                assert result[placebo].item() < result["chance"].item() + 0.12, placebo
    assert sum(found) >= 4


def test_there_is_nothing_to_find_at_a_wrong_site(model: Model) -> None:
    search = DistributedAlignment(
        TASK, "same", "layers.0.resid_post@3", size=4, pairs=256, epochs=10, placebos=False
    ).fit(model)
    assert search.result_["accuracy"].item() < 0.6


def test_the_boundless_variant_learns_that_few_directions_are_enough(model: Model) -> None:
    search = DistributedAlignment(TASK, "same", "layers.0.resid_post@-1", size=None, placebos=False).fit(model)
    assert search.result_["accuracy"].item() >= 0.95
    assert search.size_ <= 6


def test_a_saved_rotation_comes_back_and_swaps_as_it_did(model: Model, tmp_path: Path) -> None:
    found = DistributedAlignment(TASK, "same", "layers.0.resid_post@-1", pairs=64, epochs=2, placebos=False).fit(model)
    file = found.save(tmp_path / "rotation.safetensors")
    back, bare = DistributedAlignment.load(file, task=TASK), DistributedAlignment.load(file)
    back.check(model)
    assert torch.equal(back.rotation_, found.rotation_) and (back.pairs, back.size, back.size_) == (64, 1, 1)
    pairs = Pairs.draw(TASK, ["same"], 20, 1)
    assert back.score(model, pairs) == found.score(model, pairs)
    base, source = TASK.prompts(pairs.base), TASK.prompts(pairs.source)
    run = model.run(source, keep=["layers.0.resid_post"])
    edited = model.run(base, keep=["layers.0.resid_post"], edits=[bare.swap(run)]).tensor("layers.0.resid_post")
    x, y = (model.run(p, keep=["layers.0.resid_post"]).tensor("layers.0.resid_post") for p in (base, source))
    r = found.rotation_
    torch.testing.assert_close(edited[:, -1], x[:, -1] + (y - x)[:, -1] @ r @ r.T)
    torch.testing.assert_close(edited[:, :-1], x[:, :-1])
    with pytest.raises(InputError, match="without its task"):
        bare.score(model, pairs)
    with pytest.raises(InputError, match="weights"):
        back.check(shuffled(model, 0))
    with pytest.raises(InputError, match="not fitted"):
        DistributedAlignment(TASK, "same", "layers.0.resid_post@-1").check(model)
    file.write_bytes(b"no")
    with pytest.raises(InputError, match="no alignment"):
        DistributedAlignment.load(file)


def test_a_causal_model_is_checked_and_interchanges_by_hand(model: Model) -> None:
    base, source = {"a": 1, "b": 1, "c": 2, "d": 3}, {"a": 1, "b": 2, "c": 3, "d": 3}
    assert PROGRAM.run(base) == base | {"same": True, "other": False, "answer": False}
    assert PROGRAM.interchange(base, source, ["same"])["answer"] is True
    with pytest.raises(InputError, match="the parent 'x' of 'y' does not stand before it"):
        CausalModel({"a": range(2)}, {"y": (("x",), lambda x: x)})
    with pytest.raises(InputError, match="has no variable 'sane'; did you mean 'same'"):
        interchange(model, TASK, {"sane": "layers.0.resid_post@-1"})
    constant = CausalModel({"a": range(2)}, {"s": (("a",), lambda a: a), "out": (("s",), lambda s: 0)})
    with pytest.raises(InputError, match="never changes the output"):
        interchange(model, Task(constant, lambda s: [s["a"]], lambda v: v), {"s": "layers.0.resid_post@-1"})
