"""Small models whose circuits are known: a program written into weights, and random ones of several
families."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

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
    return pl.load(module, probe=probe)  # its token 0 is a word, not the padding of a tokenizer


PREVIOUS_TOKEN_EDGES = {
    "embed.positions -> layers.0.attn.heads.1.q",
    "embed.positions -> layers.0.attn.heads.1.k",
    "embed.tokens -> layers.0.attn.heads.1.v",
    "layers.0.attn.heads.1 -> logits",
}


# ---- programs in general: weights by layer and head, run by hand, and the same as a transformers module


@dataclass
class Program:
    """A transformer without norms. `heads[l]` is a list of (W_Q, W_K, W_V [d, e], W_O [e, d]); `mlps[l]` is
    (W_in [d, n], b_in [n], W_out [n, d]), None for a layer that has no MLP, "zero" for one that is all zeros."""

    tokens: Tensor  # [vocabulary, d]
    positions: Tensor  # [context, d]
    heads: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]
    mlps: list[tuple[Tensor, Tensor, Tensor] | str | None]
    unembed: Tensor  # [d, vocabulary]

    @property
    def sources(self) -> list[str]:
        names = ["embed.tokens", "embed.positions"]
        for layer, heads in enumerate(self.heads):
            names += [f"layers.{layer}.attn.heads.{h}" for h in range(len(heads))] + [f"layers.{layer}.mlp"]
        return names

    def run(self, ids: Tensor, patch: dict[tuple[str, str], Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(logits, messages); `patch` replaces what a source says to one reader."""
        said = {
            "embed.tokens": self.tokens[ids],
            "embed.positions": self.positions[: ids.shape[1]].expand(len(ids), -1, -1),
        }
        mask = torch.full((ids.shape[1],) * 2, -1e30, dtype=torch.float64).triu(1)

        def hear(reader: str) -> Tensor:
            return sum(((patch or {}).get((s, reader), x) for s, x in said.items()), torch.zeros(()))

        for layer, (heads, mlp) in enumerate(zip(self.heads, self.mlps, strict=True)):
            made = {}
            for h, (q, k, v, o) in enumerate(heads):
                name = f"layers.{layer}.attn.heads.{h}"
                scores = (hear(f"{name}.q") @ q) @ (hear(f"{name}.k") @ k).mT / q.shape[1] ** 0.5 + mask
                made[name] = scores.softmax(-1) @ (hear(f"{name}.v") @ v) @ o
            said |= made
            name = f"layers.{layer}.mlp"
            if isinstance(mlp, tuple):
                said[name] = (hear(name) @ mlp[0] + mlp[1]).relu() @ mlp[2]
            elif mlp == "zero":
                said[name] = torch.zeros_like(said["embed.tokens"])
        return hear("logits") @ self.unembed, said

    def module(self) -> GPT2LMHeadModel:
        vocabulary, d = self.tokens.shape
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=len(self.positions), n_embd=d, n_layer=len(self.heads), n_head=1,
            n_inner=4, activation_function="relu", tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        module = GPT2LMHeadModel(config).double().eval()
        body = module.transformer
        body.ln_f = torch.nn.Identity()
        body.wte.weight.data, body.wpe.weight.data = self.tokens.clone(), self.positions.clone()
        module.lm_head.weight.data = self.unembed.T.clone()
        for layer, (block, heads, mlp) in enumerate(zip(body.h, self.heads, self.mlps, strict=True)):
            block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
            config.n_head = len(heads)
            block.attn = GPT2Attention(config, layer_idx=layer).double().eval()
            e = d // len(heads)
            for linear in (block.attn.c_attn, block.attn.c_proj):
                linear.weight.data.zero_(), linear.bias.data.zero_()
            for h, (q, k, v, o) in enumerate(heads):
                for part, weight in enumerate((q * (e / q.shape[1]) ** 0.5, k, v)):
                    block.attn.c_attn.weight.data[:, part * d + h * e : part * d + h * e + weight.shape[1]] = weight
                block.attn.c_proj.weight.data[h * e : h * e + len(o)] = o
            if mlp is None:
                block.mlp = Nothing()
            elif isinstance(mlp, tuple):
                block.mlp.c_fc, block.mlp.c_proj = Conv1D(mlp[0].shape[1], d), Conv1D(d, mlp[0].shape[1])
                block.mlp.double()
                block.mlp.c_fc.weight.data, block.mlp.c_fc.bias.data = mlp[0].clone(), mlp[1].clone()
                block.mlp.c_proj.weight.data = mlp[2].clone()
                block.mlp.c_proj.bias.data.zero_()
            else:
                for parameter in block.mlp.parameters():
                    parameter.data.zero_()
        config.n_head = len(self.heads[0])
        return module

    def model(self) -> Model:
        return pl.load(self.module(), tokenizer=tokenizer())  # the probe is the default one


class Nothing(torch.nn.Module):
    """A block's MLP that is not there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Directions:
    """Names for directions of the residual stream."""

    def __init__(self, d: int, **sizes: int) -> None:
        self.d, self.at, start = d, {}, 0
        for name, size in sizes.items():
            self.at[name] = range(start, start + size)
            start += size
        assert start <= d

    def write(self, name: str) -> Tensor:
        """[size, d]"""
        return torch.eye(self.d, dtype=torch.float64)[list(self.at[name])]

    def previous(self, strength: float = 300.0) -> tuple[Tensor, Tensor]:
        """W_Q, W_K of a head that looks at the position before (the first one: at itself)."""
        n = len(self.at["position"])
        back = torch.eye(n, dtype=torch.float64).roll(-1, 1)
        back[0] = torch.eye(n, dtype=torch.float64)[0]
        back[1:] = torch.eye(n, dtype=torch.float64)[:-1]
        read = self.write("position").T
        return strength * read @ back, read

    def idle(self, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zero = torch.zeros(self.d, e, dtype=torch.float64)
        return zero, zero, zero, zero.T


def induction(vocabulary: int = 7, context: int = 6) -> Program:
    """Says what followed the last time: three layers of 2, 3 and 1 heads, the last layer idle."""
    s = Directions(48, token=vocabulary, position=context, before=vocabulary, answer=vocabulary)
    token, before, answer = s.write("token"), s.write("before"), s.write("answer")
    back = (*s.previous(), token.T, before)
    match = (60.0 * token.T, before.T, token.T, answer)
    idle = s.idle(4)
    return Program(
        token, s.write("position"), [[idle, back], [idle, idle, match], [idle]], ["zero", None, "zero"], 10 * answer.T
    )


def two_before(vocabulary: int = 5, context: int = 6) -> Program:
    """Says the token two places before: each layer hands one step back; an MLP in the first layer only, idle."""
    s = Directions(48, token=vocabulary, position=context, one=vocabulary, two=vocabulary)
    token, one, two = s.write("token"), s.write("one"), s.write("two")
    first, second = (*s.previous(), token.T, one), (*s.previous(), one.T, two)
    return Program(token, s.write("position"), [[first], [s.idle(3), second, s.idle(3)]], ["zero", None], 10 * two.T)


def pairs(vocabulary: int = 3, context: int = 4) -> Program:
    """An MLP with biases that knows this token and the one before: says (this + before) mod vocabulary."""
    s = Directions(48, token=vocabulary, position=context, before=vocabulary, answer=vocabulary)
    token, before, answer = s.write("token"), s.write("before"), s.write("answer")
    both = [(a, b) for a in range(vocabulary) for b in range(vocabulary)]
    into = torch.stack([token[a] + before[b] for a, b in both], 1)
    out = torch.stack([answer[(a + b) % vocabulary] for a, b in both])
    heads = [[(*s.previous(), token.T, before), s.idle(4)]]
    return Program(
        token, s.write("position"), heads, [(into, torch.full((len(both),), -1.0).double(), out)], 10 * answer.T
    )


def sparse(seed: int) -> Program:
    """Random weights through few random directions: another depth, width of heads, vocabulary and context each time."""
    rng = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    layers, vocabulary, context, d, e = number(1, 4), number(2, 12), number(3, 7), 48, 3

    def matrix(rows: int, columns: int, size: float = 1.0) -> Tensor:
        kept = torch.rand(rows, columns, generator=rng) < 0.15
        return (torch.randn(rows, columns, generator=rng, dtype=torch.float64) * kept * size).double()

    heads = [
        [(matrix(d, e, 2.0), matrix(d, e, 2.0), matrix(d, e), matrix(e, d)) for _ in range((1, 2, 3, 4)[number(0, 3)])]
        for _ in range(layers)
    ]
    mlps = [
        None if number(0, 3) == 0 else (matrix(d, 5), 0.3 * torch.randn(5, generator=rng).double(), matrix(5, d))
        for _ in range(layers)
    ]
    return Program(matrix(vocabulary, d, 2.0), matrix(context, d, 2.0), heads, mlps, matrix(d, vocabulary))
