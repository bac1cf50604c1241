"""Value zeroing equals raw hooks that blank one token's values in one layer, one token and layer at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.attention import value_zeroing
from pellucid.errors import InputError, Refused
from tests.attention.opening import PROMPT, TARGET, opened

BLOCKS = {"llama": "model.layers", "gemma2": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}


def by_hooks(model: pl.Model, family: str) -> np.ndarray:
    """[layer, query, key] distances, by the native module alone."""
    ids = model.inputs(PROMPT).tensors
    blocks = model.module.get_submodule(BLOCKS[family])

    def after(layer: int, token: int | None) -> torch.Tensor:
        block, out = blocks[layer], []

        def blank(_: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            if token is not None:
                x[0, token, -x.shape[-1] // 3 if family == "gpt2" else None :] = 0
            return x

        value = {"gpt2": "attn.c_attn", "bert": "attention.self.value"}.get(family, "self_attn.v_proj")
        hooks = [
            block.get_submodule(value).register_forward_hook(blank),
            block.register_forward_hook(lambda _, __, x: out.append(x[0] if isinstance(x, tuple) else x)),
        ]
        with torch.no_grad():
            model.module(**ids)
        for hook in hooks:
            hook.remove()
        return out[0].reshape(-1, out[0].shape[-1]).double()

    n = ids["input_ids"].shape[1]
    return np.stack([
        np.stack([(1 - torch.cosine_similarity(after(i, None), after(i, j), dim=-1)).numpy() for j in range(n)], 1)
        for i in range(len(blocks))
    ])  # fmt: skip


@pytest.mark.parametrize("family", BLOCKS)
def test_distances_are_those_of_raw_hooks(family: str) -> None:
    model = opened(family)
    found, slow = value_zeroing(model, PROMPT, batch=3), by_hooks(model, family)
    assert found.distance.dims == ("layer", "query", "key")
    np.testing.assert_allclose(found.distance.values, slow, atol=1e-6)
    np.testing.assert_allclose(found["share"].sum("key"), 1, atol=1e-5)
    if family != "bert":
        assert not np.triu(found.distance.values, 1).any()


def test_one_layer_after_edits_and_with_padding_on_the_left() -> None:
    model = opened("llama")
    bare = value_zeroing(model, PROMPT)
    ids = model.inputs(PROMPT).tensors["input_ids"]
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * ids.shape[1]]),
    }
    np.testing.assert_allclose(value_zeroing(model, padded).distance, bare.distance, atol=1e-6)
    edited = value_zeroing(model, PROMPT, edits=[pl.Ablate("layers.0.attn.out")])
    np.testing.assert_allclose(edited.distance.sel(layer=0), 0, atol=1e-12)
    assert not np.allclose(edited.distance.sel(layer=1), bare.distance.sel(layer=1), rtol=1e-3, atol=0)


def test_an_encoder_decoder_has_three_kinds() -> None:
    found = value_zeroing(opened("t5"), PROMPT, decoder=TARGET)
    assert found.distance.dims == ("layer", "query", "key")
    assert found.distance_encoder.dims == ("encoder_layer", "source_query", "source_key")
    assert found.distance_cross.dims == ("layer", "query", "source_key")
    assert float(found.distance_cross.min()) >= 0 and float(found.distance_cross.max()) > 0


def test_what_has_no_values_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        value_zeroing(opened("gpt2"), PROMPT, batch=0)
    with pytest.raises(Refused):
        value_zeroing(opened("mamba"), PROMPT)
