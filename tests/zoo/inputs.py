"""What does each text model class expect in a plain call?

Most take tokens and a mask, encoder-decoders take decoder tokens too. What a family needs beyond that is one
row of `EXTRAS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .shrink import FIRST_WORD, POSITIONS, SPECIAL, VOCABULARY


def inputs(module: PreTrainedModel, *, batch: int = 2, length: int = 12, seed: int = 3) -> dict[str, Any]:
    """Keyword arguments of one native forward pass: random words, no padding, no cache.

    Decoder tokens of an encoder-decoder model have a length of their own, length // 2 + 1.
    """
    config, accepted = module.config, inspect.signature(module.forward).parameters
    draw = Draw(torch.Generator().manual_seed(seed), batch, length, module.dtype)
    call: dict[str, Any] = {
        "input_ids": draw.words(),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "use_cache": False,
    }
    if "SequenceClassification" in type(module).__name__:
        call["input_ids"][:, -1] = SPECIAL["eos_token_id"]  # where BART-like classifiers read
    elif config.is_encoder_decoder:
        call["decoder_input_ids"] = draw.words(length // 2 + 1)
    if config.model_type in EXTRAS:
        call |= EXTRAS[config.model_type](config, draw)
    return {name: value for name, value in call.items() if name in accepted and value is not None}


@dataclass(frozen=True)
class Draw:
    """Random values for one batch."""

    generator: torch.Generator
    batch: int
    length: int
    dtype: torch.dtype

    def words(self, length: int | None = None, rows: int = 1) -> Tensor:
        """[batch * rows, length]"""
        shape = (self.batch * rows, length or self.length)
        return torch.randint(FIRST_WORD, VOCABULARY, shape, generator=self.generator)

    def boxes(self) -> Tensor:
        """[batch, position, 4]: left, top, right, bottom"""
        corners = torch.randint(POSITIONS, (self.batch, self.length, 2, 2), generator=self.generator)
        return corners.sort(dim=2).values.flatten(2)

    def vectors(self, length: int, width: int) -> Tensor:
        """[batch, length, width]"""
        return torch.randn(self.batch, length, width, generator=self.generator).to(self.dtype)


def _boxes(config: PreTrainedConfig, draw: Draw) -> dict[str, Tensor | None]:
    return {"bbox": draw.boxes()}


def _codebooks(config: PreTrainedConfig, draw: Draw) -> dict[str, Tensor | None]:
    """Music decoders read one row of tokens per codebook."""
    return {"input_ids": draw.words(rows=config.num_codebooks)}


def _audio(config: PreTrainedConfig, draw: Draw) -> dict[str, Tensor | None]:
    """Every token comes with a stretch of audio."""
    frames = draw.length * config.downsample_factor
    return {"encoder_inputs_embeds": draw.vectors(frames, config.audio_config.hidden_size)}


def _renamed(config: PreTrainedConfig, draw: Draw) -> dict[str, Tensor | None]:
    return {"inputs": draw.words(), "input_ids": None}


EXTRAS: dict[str, Callable[[PreTrainedConfig, Draw], dict[str, Tensor | None]]] = {
    "layoutlm": _boxes,
    "layoutlmv3": _boxes,
    "lilt": _boxes,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "perceiver": _renamed,
    "voxtral_realtime": _audio,
}
