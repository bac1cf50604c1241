"""Sound and pictures beside text: equal to transformers alone, on tiny models."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import pellucid as pl
from pellucid.errors import InputError, Refused

IMAGE = 99


@cache
def whisper() -> pl.Model:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=100, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=20, max_target_positions=30, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None,
        suppress_tokens=None,
    )  # fmt: skip
    return pl.load(WhisperForConditionalGeneration(config).eval(), probe=heard())


def heard(batch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_features": torch.randn(batch, 8, 40, generator=generator),
        "decoder_input_ids": torch.tensor([[3, 7, 8]] * batch),
    }


def test_sound_is_read_and_its_positions_are_the_encoders_frames() -> None:
    model = whisper()
    run = model.run(
        heard(),
        keep=["encoder.layers.0.resid_post", "encoder.layers.1.resid_post@-1", "decoder.layers.1.cross.pattern"],
    )
    with torch.no_grad():
        native = model.module(**heard())
    assert float((run.logits - native.logits).abs().max()) < 1e-5
    assert run.tensor("encoder.layers.0.resid_post").shape == (1, 20, 16)
    assert run.tensor("decoder.layers.1.cross.pattern").shape == (1, 2, 3, 20)
    zeroed = model.run(heard(), edits=[pl.Ablate("encoder.layers.0.mlp.out@5:9")]).logits

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([out[:, :5], torch.zeros_like(out[:, 5:9]), out[:, 9:]], 1)

    handle = model.module.model.encoder.layers[0].fc2.register_forward_hook(hook)
    with torch.no_grad():
        wanted = model.module(**heard()).logits
    handle.remove()
    assert float((zeroed - wanted).abs().max()) < 1e-5
    pair = model.inputs(heard(2))
    assert torch.equal(model.run(pair.rows([1])).logits, model.run({k: v[1:] for k, v in heard(2).items()}).logits)


def test_sound_is_continued_as_transformers_does() -> None:
    model = whisper()
    features = {"input_features": heard()["input_features"]}
    wanted = model.module.generate(**features, max_new_tokens=4)
    made = model.generate(features, max_new_tokens=4).tokens
    assert made[0].tolist() == wanted[0, -made.shape[1] :].tolist()


@cache
def llava() -> pl.Model:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    module = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE)
    )
    return pl.load(module.eval(), probe=seen())


def seen() -> dict[str, Any]:
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"input_ids": torch.tensor([[1, *[IMAGE] * 4, 7, 8]]), "pixel_values": pixels}


def both() -> dict[str, Any]:
    """Two prompts, each with its picture; the second is one token shorter."""
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, *[IMAGE] * 4, 7, 8], [1, *[IMAGE] * 4, 9, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def test_pictures_beside_text_are_read_and_continued() -> None:
    model = llava()
    with torch.no_grad():
        native = model.module(**seen()).logits
    assert torch.equal(model.run(seen()).logits, native)
    wanted = model.module.generate(**seen(), max_new_tokens=4, do_sample=False)[0, 7:].tolist()
    assert model.generate(seen(), max_new_tokens=4).tokens[0].tolist() == wanted
    together = model.generate(both(), max_new_tokens=4).tokens.tolist()
    for i, n in enumerate((7, 6)):
        alone = {"input_ids": both()["input_ids"][i : i + 1, :n], "pixel_values": both()["pixel_values"][i : i + 1]}
        assert model.generate(alone, max_new_tokens=4).tokens[0].tolist() == together[i]
        assert (
            float((model.run(model.inputs(both()).rows([i])).logits[:, :n] - model.run(alone).logits).abs().max())
            < 1e-5
        )


def test_the_positions_of_a_picture_are_its_own() -> None:
    model = llava()
    names = [s.name for s in model.anatomy.stacks]
    run = model.run(seen(), keep=[f"{names[-1]}.layers.0.resid_post@-1"])
    assert run.tensor(f"{names[-1]}.layers.0.resid_post@-1").shape == (1, 1, 16)
    if "encoder" in names:
        run = model.run(seen(), keep=["encoder.layers.0.resid_post"])
        assert run.tensor("encoder.layers.0.resid_post").shape == (1, 5, 16)
        with pytest.raises(Refused, match="has 5 positions for 7 tokens"):  # which are not the text's
            model.run(seen(), keep=["encoder.layers.0.resid_post@4"])


def test_what_has_no_tokens_to_count_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="have no 'input_ids'"):
        llava().run({"pixel_values": seen()["pixel_values"], "attention_mask": torch.ones(1, 3)})
