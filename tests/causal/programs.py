"""A transformer whose inner variables are known: it answers whether (a = b) and (c = d) are alike.

Tokens a, b, c, d and "?". Head 0 of layer 0 reads a - b at "?", head 1 reads c - d, its MLP makes same = [a = b] and
other = [c = d] of them, the MLP of layer 1 makes the answer; head 0 and 1 of layer 1 do nothing. The residual basis is
rotated at random, so no variable lies on an axis.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pellucid import Model, load
from pellucid.causal.abstraction import CausalModel, Task

VALUES, D, E = 6, 16, 8
NO, YES, ASK = 24, 25, 26
PROGRAM = CausalModel(
    dict.fromkeys("abcd", range(VALUES)),
    {
        "same": (("a", "b"), lambda a, b: a == b),
        "other": (("c", "d"), lambda c, d: c == d),
        "answer": (("same", "other"), lambda s, t: s == t),
    },
)


def setting(rng: random.Random) -> dict[str, int]:
    a, c = rng.randrange(VALUES), rng.randrange(VALUES)
    b = a if rng.random() < 0.5 else rng.choice([v for v in range(VALUES) if v != a])
    d = c if rng.random() < 0.5 else rng.choice([v for v in range(VALUES) if v != c])
    return {"a": a, "b": b, "c": c, "d": d}


def encode(s: Mapping[str, Any]) -> list[int]:
    return [slot * VALUES + s[name] for slot, name in enumerate("abcd")] + [ASK]


TASK = Task(PROGRAM, encode, lambda same: YES if same else NO, setting)


def both_alike(seed: int = 0) -> Model:
    """The hand-weighted model, opened."""
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=D, n_layer=2, n_head=2, n_inner=8, activation_function="relu",
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    first, second = module.transformer.h
    module.transformer.ln_f = nn.Identity()
    for block in (first, second):
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        w = module.transformer.wte.weight
        for slot in range(4):
            for value in range(VALUES):
                token = slot * VALUES + value
                w[token, slot // 2] = value * (1 - 2 * (slot % 2))  # a and c count up, b and d down
                w[token, 3 + slot // 2] = 1.0
        w[ASK, 2] = 1.0
        for head in range(2):
            first.attn.c_attn.weight[2, head * E] = 60.0  # "?" asks ...
            first.attn.c_attn.weight[3 + head, D + head * E] = 1.0  # ... for the tokens of its pair ...
            first.attn.c_attn.weight[head, 2 * D + head * E] = 1.0  # ... and takes their values' mean
            first.attn.c_proj.weight[head * E, 5 + head] = 1.0
            for i, (offset, height) in enumerate([(1, 1), (0, -2), (-1, 1)]):  # a tent that is 1 at 0, 0 at 1, 2, ...
                first.mlp.c_fc.weight[5 + head, 3 * head + i] = 2.0
                first.mlp.c_fc.bias[3 * head + i] = offset
                first.mlp.c_proj.weight[3 * head + i, 7 + head] = height
            second.mlp.c_fc.weight[7 + head, :2] = 1.0
        second.mlp.c_fc.bias[1] = -1.0
        second.mlp.c_proj.weight[0, 9], second.mlp.c_proj.weight[1, 9] = -1.0, 2.0
        second.mlp.c_proj.bias[9] = 1.0
        module.lm_head.weight[YES, 9], module.lm_head.weight[NO, 2] = 10.0, 5.0
        _rotate(module, torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0])
    return load(module)  # its token 0 is a word, not the padding of a tokenizer


def _rotate(module: GPT2LMHeadModel, q: torch.Tensor) -> None:
    """The same function in another basis of the residual stream."""
    module.transformer.wte.weight.copy_(module.transformer.wte.weight @ q)
    module.lm_head.weight.copy_(module.lm_head.weight @ q)
    for block in module.transformer.h:
        for reader in (block.attn.c_attn, block.mlp.c_fc):
            reader.weight.copy_(q.T @ reader.weight)
        for writer in (block.attn.c_proj, block.mlp.c_proj):
            writer.weight.copy_(writer.weight @ q)
            writer.bias.copy_(writer.bias @ q)
