"""Weights that are 0, heads that are nearly one-hot, and which parts are worth training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pellucid import tuning as tu
from pellucid.errors import InputError
from tests.tuning.test_fit import KINDS, QUICK, data, equal, opened, weights
from tests.tuning.test_trainer import arguments


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_weights_end_as_zeros_and_a_model_once_cut_comes_back(family: str) -> None:
    model = opened(family)
    made = tu.fit(model, data(KINDS[family]), tu.SparseWeights(0.75), **QUICK)
    assert tu.weight_zeros(made.model) == pytest.approx(0.75, abs=0.01) == tu.weight_zeros(made.control)  # type: ignore[arg-type]
    assert tu.weight_zeros(made.arms["plain"]) < 0.01 and not made.changed
    cut = tu.pruned(model, 0.75)
    for name in (n for n, p in cut.module.named_parameters() if (p == 0).float().mean() > 0.5 and p.ndim == 2):
        old, new = (dict(m.module.named_parameters())[name].detach() for m in (model, cut))
        assert old[new == 0].abs().max() <= old[new != 0].abs().min() and torch.equal(old[new != 0], new[new != 0])
    assert equal(weights(cut.undo()), weights(model))


def test_the_table_of_shares_and_the_zeros_in_a_trainers_file(tmp_path: Path) -> None:
    found = tu.weight_sparsity(opened("bert-class"), data(), shares=[0.5], steps=2, batch=4)
    assert found.data["way"].values.tolist() == ["cut", "retrained", "random"]
    assert found.data["zeros"].values == pytest.approx(0.5, abs=0.02) and found.title
    made = tu.trainer(
        opened("bert-class"), data(), tu.SparseWeights(0.9), arguments(tmp_path, 4, 1, max_steps=2, save_strategy="steps", save_steps=2)
    )  # fmt: skip
    made.train()
    assert tu.weight_zeros(made.tuned) == pytest.approx(0.9, abs=0.02)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    assert float((kept == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
    with pytest.raises(InputError, match="between 0 and 1"):
        tu.SparseWeights(1.0)


def test_penalties_that_make_weights_and_heads_fewer() -> None:
    objectives = [tu.WeightL1(weight=5.0), tu.AttentionEntropy(heads="layers.1.attn.heads.0", weight=5.0)]
    made = tu.fit(opened("bert-class"), data(), objectives, control=False, **QUICK | {"steps": 12})
    after = made.result.data["after"]
    for term in after["term"].values.tolist():
        assert float(after.sel(arm="objective", term=term)) < float(after.sel(arm="plain", term=term))
    hot = tu.sparsity(made.model, data()).data["one_hot"]
    plain = tu.sparsity(made.arms["plain"], data()).data["one_hot"]
    assert hot.dims == ("layer", "head") and float(hot.sel(layer=1)[0]) >= float(plain.sel(layer=1)[0])
    assert tu.weight_zeros(made.model) < 0.01


def test_importance_is_what_the_gradients_of_weights_say() -> None:
    model, given = opened("bert-class"), data(n=1)
    found = tu.importance(model, given, "neurons")
    with torch.enable_grad():
        from pellucid.tuning.data import Encoded

        row = Encoded(model, given)
        loss = model.module(**row.rows[0].tensors, labels=torch.tensor(row.labels)).loss
        w = model.module.bert.encoder.layer[1].output.dense.weight
        (g,) = torch.autograd.grad(loss, [w])
    assert torch.allclose(found[1], (w.detach() * g).sum(0).abs(), atol=1e-6)
    assert found[0].shape == (48,) and tu.importance(model, given, "heads")[0].shape == (
        model.module.config.num_attention_heads,
    )
    assert tu.importance(model, given, "layers").keys() == {0, 1}


@pytest.mark.parametrize(("what", "share"), [("layers", 0.5), ("neurons", 0.1)])
def test_found_random_least_head_and_all_stand_side_by_side(what: str, share: float) -> None:
    made = tu.compare_parts(
        opened("bert-class"), data(), what=what, share=share, shifts={"reversed": data(reverse=True)}, weight_decay=0.5, **QUICK  # type: ignore[arg-type]
    )  # fmt: skip
    found = made.result.data
    assert found["arm"].values.tolist() == ["all", "found", "random", "least", "head"]
    assert not found["changed"].any() and float(found["cost"].sel(arm="all")) == 1.0
    assert found["trained"].values.argmax() == 0 and found["trained"].values.argmin() == 4
    assert "ound" in made.result.title and made.models.keys() == made.only.keys()
