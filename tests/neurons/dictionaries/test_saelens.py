"""Dictionaries are written and read as SAELens folders; what another writer meant is read as it meant it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pellucid.errors import InputError
from pellucid.neurons.dictionaries import Dictionary, Gated, JumpReLU, ReLU, TopK

G = torch.Generator().manual_seed(0)
T = {
    "W_enc": torch.randn(6, 10, generator=G), "W_dec": torch.randn(10, 6, generator=G), "b_dec": torch.randn(6, generator=G),
    "b_enc": torch.randn(10, generator=G), "threshold": torch.rand(10, generator=G), "b_gate": torch.randn(10, generator=G),
    "b_mag": torch.randn(10, generator=G), "r_mag": torch.randn(10, generator=G),
}  # fmt: skip
X = torch.randn(7, 6, generator=G)
BASIC = ("W_enc", "W_dec", "b_dec")


def written(folder, names, **config):
    save_file({n: T[n].clone() for n in names}, str(folder / "sae_weights.safetensors"))
    (folder / "cfg.json").write_text(json.dumps({"d_in": 6, "d_sae": 10, "dtype": "float32", **config}))
    return folder


@pytest.mark.parametrize(
    "activation",
    [ReLU(), TopK(3), JumpReLU(T["threshold"]), Gated(T["r_mag"], T["b_mag"])],
    ids=["standard", "topk", "jumprelu", "gated"],
)
@pytest.mark.parametrize("writes", ["", "layers.3.mlp.out"], ids=["sae", "transcoder"])
def test_a_dictionary_comes_back_as_it_was_saved(tmp_path, activation, writes):
    d = Dictionary(
        T["W_enc"], T["b_enc"], T["W_dec"], T["b_dec"], activation, "layers.3.resid_mid", writes, 50.0, "gpt2", "ab"
    )
    back = Dictionary.load(d.save(tmp_path / "d"))
    torch.testing.assert_close(back.encode(X), d.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.decode(back.encode(X)), d.decode(d.encode(X)), rtol=1e-5, atol=1e-5)
    same = ("site", "writes", "limit", "model", "digest")
    assert [getattr(back, n) for n in same] == [getattr(d, n) for n in same]
    assert type(back.activation) is type(d.activation)


def test_the_input_bias_is_taken_off_as_the_file_says(tmp_path):
    names = (*BASIC, "b_enc")
    place = {"metadata": {"hook_name": "blocks.2.hook_resid_pre", "model_name": "m", "sae_lens_version": "6.1.0"}}
    taken = Dictionary.load(written(tmp_path, names, architecture="standard", **place))
    torch.testing.assert_close(taken.encode(X), ((X - T["b_dec"]) @ T["W_enc"] + T["b_enc"]).relu())
    assert (taken.site, taken.writes, taken.model) == ("layers.2.resid_pre", "layers.2.resid_pre", "m")
    left = Dictionary.load(written(tmp_path, names, architecture="standard", apply_b_dec_to_input=False, **place))
    torch.testing.assert_close(left.encode(X), (X @ T["W_enc"] + T["b_enc"]).relu())


def test_a_gated_file_is_read_by_its_two_biases(tmp_path):
    d = Dictionary.load(written(tmp_path, (*BASIC, "b_gate", "b_mag", "r_mag"), architecture="gated"), site="embed")
    c = X - T["b_dec"]
    expected = ((c @ T["W_enc"] + T["b_gate"]) > 0) * (c @ (T["W_enc"] * T["r_mag"].exp()) + T["b_mag"]).relu()
    torch.testing.assert_close(d.encode(X), expected, rtol=1e-4, atol=1e-4)


def test_files_from_before_version_six_are_read(tmp_path):
    old = {"hook_point": "blocks.1.hook_mlp_out", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    d = Dictionary.load(written(tmp_path, (*BASIC, "b_enc"), normalize_activations=False, **old))
    torch.testing.assert_close(d.encode(X), TopK(4)((X - T["b_dec"]) @ T["W_enc"] + T["b_enc"]))
    assert d.site == "layers.1.mlp.out"


def test_top_k_of_activations_times_decoder_norms_is_folded(tmp_path):
    d = Dictionary.load(
        written(tmp_path, (*BASIC, "b_enc"), architecture="topk", k=2, rescale_acts_by_decoder_norm=True),
        site="embed",
    )
    norms = T["W_dec"].norm(dim=1)
    f = TopK(2)(((X - T["b_dec"]) @ T["W_enc"] + T["b_enc"]) * norms)
    torch.testing.assert_close(d.decode(d.encode(X)), (f / norms) @ T["W_dec"] + T["b_dec"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        ((*BASIC, "b_enc"), {"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
        ((*BASIC, "b_enc"), {"finetuning_scaling_factor": True}, "fold it into the weights"),
        ((*BASIC, "b_enc", "r_mag"), {"architecture": "standard"}, r"not understood \(r_mag\)"),
        (BASIC, {"architecture": "jumprelu"}, "has no 'b_enc'"),
        ((*BASIC, "b_enc"), {"architecture": "topk"}, "'k' is missing"),
        ((*BASIC, "b_enc"), {"architecture": "temporal"}, "'temporal'"),
        ((*BASIC, "b_enc"), {}, "does not say where it belongs"),
        ((*BASIC, "b_enc"), {"hook_name": "blocks.1.ln2.hook_normalized"}, "a name not known here"),
        (("W_enc",), {}, "expected a readable cfg.json"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, names, config, message):
    with pytest.raises(InputError, match=message):
        Dictionary.load(written(tmp_path, names, **config))
