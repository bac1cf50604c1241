"""Small models whose circuits are known: a program written into weights, and random ones of several
families."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import pellucid as pl
from pellucid.model import Model
from tests.zoo.build import build
from tests.zoo.tokenizer import tokenizer

VOCABULARY, LENGTH, WIDTH = 6, 5, 32


def random_model(model_type: str = "gpt2", **config: object) -> Model:
    module = build(model_type, **config)
    return pl.load(module, tokenizer=tokenizer(module))


def previous_token() -> Model:
    """Two layers, two heads, no norms: says at each position which token stood before it.

    Head 0.1 attends to the position before (queries and keys from the position embedding) and copies its
    token (value from the token embedding) into directions that the logits read; nothing else has weights that
    are not zero.
    """
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=4,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).double().eval()
    for parameter in module.parameters():
        parameter.data.zero_()
    body = module.transformer
    body.ln_f = torch.nn.Identity()
    for block in body.h:
        block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
    eye = torch.eye(WIDTH, dtype=torch.float64)
    tokens, places, answers = 0, VOCABULARY, VOCABULARY + LENGTH  # where each stands in the residual stream
    body.wte.weight.data[:, tokens : tokens + VOCABULARY] = eye[:VOCABULARY, :VOCABULARY]
    body.wpe.weight.data[:, places : places + LENGTH] = eye[:LENGTH, :LENGTH]
    attention, e = body.h[0].attn, WIDTH // 2
    q, k, v = (slice(part * WIDTH + e, part * WIDTH + 2 * e) for part in range(3))  # head 1
    for here in range(LENGTH):
        attention.c_attn.weight.data[places + here, q.start + max(here - 1, 0)] = 200.0
        attention.c_attn.weight.data[places + here, k.start + here] = 1.0
    for token in range(VOCABULARY):
        attention.c_attn.weight.data[tokens + token, v.start + token] = 1.0
        attention.c_proj.weight.data[e + token, answers + token] = 1.0
        module.lm_head.weight.data[token, answers + token] = 10.0
    probe = {"input_ids": torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))}
    return pl.load(module, tokenizer=tokenizer(), probe=probe)


PREVIOUS_TOKEN_EDGES = {
    "embed.positions -> layers.0.attn.heads.1.q",
    "embed.positions -> layers.0.attn.heads.1.k",
    "embed.tokens -> layers.0.attn.heads.1.v",
    "layers.0.attn.heads.1 -> logits",
}
