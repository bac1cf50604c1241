"""A tiny model in a folder, which workers can open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pellucid as pl
from tests.workers.lanes import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2)).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> pl.Model:
    return pl.load(folder, tokenizer=False)
