"""Tiny models of every kind, and what the foundation does written out by hand: changed tokens, one run each."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import pellucid
from pellucid.model import Model
from tests.zoo import build, tokenizer

PROMPT = "The capital of France is"


@cache
def opened(family: str, **config: object) -> Model:
    """A zoo model, opened once for all tests (which must leave it as it is)."""
    module = build(family, **config)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def classifier() -> Model:
    """A tiny BERT with three named classes."""
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    return pellucid.load(BertForSequenceClassification(config).eval(), tokenizer=tokenizer())


def token(model: Model, text: str) -> int:
    return int(model.tokenizer.convert_tokens_to_ids("▁" + text))


def run_ids(model: Model, rows: Tensor, decoder: Tensor | None = None) -> Tensor:
    """Logits of token ids [row, position], each row by itself through the plain module."""
    extra = {} if decoder is None else {"decoder_input_ids": decoder}
    with torch.no_grad():
        return torch.cat([model.module(input_ids=row[None], **extra).logits for row in rows])
