"""Layer-wise relevance propagation written out layer by layer: what `relevance_propagation` must equal.

No gradients here: every function takes the relevance of what a layer made and gives that of what it was made from, with
the formulas of the AttnLRP paper, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

D = torch.float64


def linear(x: Tensor, weight: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """y_j = sum_i x_i W_ij + b_j: R_i = sum_j x_i W_ij R_j / y_j"""
    return x * (torch.where(y == 0, 0.0, r / y) @ weight.T)


def product(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """y_ij = sum_k a_ik b_kj: half of every contribution to each factor."""
    ratio = torch.where(y == 0, 0.0, r / y) / 2
    return a * (ratio @ b.mT), b * (a.mT @ ratio)


def softmax(x: Tensor, r: Tensor) -> Tensor:
    s = x.softmax(-1)
    return torch.where(x.isinf(), 0.0, x) * (r - s * r.sum(-1, keepdim=True))


def centred_norm(norm: torch.nn.LayerNorm, x: Tensor, r: Tensor) -> Tensor:
    """y = (x - mean) / size * w + b, size held."""
    d = x.shape[-1]
    centre = torch.eye(d, dtype=D) - 1 / d
    size = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    y = (x @ centre) / size * norm.weight.to(D) + norm.bias.to(D)
    return x * ((r / y * norm.weight.to(D) / size) @ centre)


def layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight.to(D), norm.bias.to(D), norm.eps)


def rms_norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight.to(D)


def split(x: Tensor, heads: int) -> Tensor:
    """[position, (head e)] -> [head, position, e]"""
    return x.unflatten(-1, (heads, -1)).movedim(1, 0)


def merge(x: Tensor) -> Tensor:
    return x.movedim(0, 1).flatten(1)


class Attention:
    """softmax(q k^T / sqrt(e)) v for [head, position, e], forward and back; keeps the relevance of its scores."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, q.shape[-1] ** -0.5
        self.raw = q @ k.mT * self.scale
        blocked = torch.ones(self.raw.shape[-2:]).triu(1).bool() if causal else torch.zeros(self.raw.shape[-2:]).bool()
        self.scores = self.raw.masked_fill(blocked, float("-inf"))
        self.pattern = self.scores.softmax(-1)
        self.z = self.pattern @ v

    def back(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.r_pattern, r_v = product(self.pattern, self.v, self.z, r)
        self.r_scores = softmax(self.scores, self.r_pattern)
        r_q, r_kt = product(self.q, self.k.mT * self.scale, self.raw, self.r_scores)
        return r_q, r_kt.mT, r_v


def ratio(part: Tensor, whole: Tensor, r: Tensor) -> Tensor:
    """The share of a summand."""
    return part * r / whole


# ---- whole models


def llama(model: torch.nn.Module, ids: Tensor, answer: int) -> tuple[Tensor, list[Attention], list[Tensor]]:
    """Relevance of the tokens, the attentions (for that of their scores), and that of every layer's end."""
    stack, config = model.model, model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    x = stack.embed_tokens.weight.to(D)[ids]
    positions = torch.arange(len(ids))[None]
    cos, sin = (t[0].to(D) for t in stack.rotary_emb(x.float()[None], positions))
    e = cos.shape[-1]
    half = torch.eye(e, dtype=D)[:, torch.arange(e).roll(e // 2)] * torch.cat([torch.ones(e // 2), -torch.ones(e // 2)])
    turned = torch.diag_embed(cos) + half.T * sin[:, None, :]  # [position, e in, e out]

    def turn(h: Tensor) -> Tensor:
        return torch.einsum("hpi,pij->hpj", h, turned)

    def turn_back(h: Tensor, r: Tensor) -> Tensor:
        return h * torch.einsum("hpj,pij->hpi", r / turn(h), turned)

    tape = []
    for layer in stack.layers:
        a, m = layer.self_attn, layer.mlp
        w = {n: getattr(a, f"{n}_proj").weight.to(D).T for n in "qkvo"} | {
            n: getattr(m, f"{n}_proj").weight.to(D).T for n in ("gate", "up", "down")
        }
        n1 = rms_norm(layer.input_layernorm, x)
        q, k, v = split(n1 @ w["q"], heads), split(n1 @ w["k"], kv), split(n1 @ w["v"], kv)
        seen = Attention(
            turn(q), turn(k).repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0), causal=True
        )
        z = merge(seen.z)
        out = z @ w["o"]
        mid = x + out
        n2 = rms_norm(layer.post_attention_layernorm, mid)
        gate, up = n2 @ w["gate"], n2 @ w["up"]
        neurons = torch.nn.functional.silu(gate) * up
        made = neurons @ w["down"]
        tape.append((w, x, n1, q, k, v, seen, z, out, mid, n2, gate, up, neurons, made))
        x = mid + made
    normed, unembed = rms_norm(stack.norm, x), model.lm_head.weight.to(D)
    r = torch.zeros_like(x)
    r[-1] = normed[-1] * unembed[answer]  # a norm hands everything on
    ends = []
    for w, x, n1, q, k, v, seen, z, out, mid, n2, gate, up, neurons, made in reversed(tape):
        ends.append(r)
        post = mid + made
        r_neurons = linear(neurons, w["down"], made, ratio(made, post, r))
        r_n2 = linear(n2, w["gate"], gate, r_neurons / 2) + linear(n2, w["up"], up, r_neurons / 2)
        r_mid = ratio(mid, post, r) + r_n2
        r_z = linear(z, w["o"], out, ratio(out, mid, r_mid))
        r_q, r_k, r_v = seen.back(split(r_z, heads))
        r_k, r_v = (t.unflatten(0, (kv, -1)).sum(1) for t in (r_k, r_v))
        r_n1 = linear(n1, w["q"], merge(q), merge(turn_back(q, r_q)))
        r_n1 = r_n1 + linear(n1, w["k"], merge(k), merge(turn_back(k, r_k))) + linear(n1, w["v"], merge(v), merge(r_v))
        r = ratio(x, mid, r_mid) + r_n1
    return r.sum(-1), [entry[6] for entry in tape], ends[::-1]


def gpt2(model: torch.nn.Module, ids: Tensor, answer: int) -> tuple[Tensor, list[Attention], list[Tensor]]:
    stack, heads = model.transformer, model.config.n_head
    words = stack.wte.weight.to(D)[ids]
    x, tape = words + stack.wpe.weight.to(D)[: len(ids)], []
    start = x
    for block in stack.h:
        w = {n: (m.weight.to(D), m.bias.to(D)) for n, m in (
            ("qkv", block.attn.c_attn), ("o", block.attn.c_proj), ("fc", block.mlp.c_fc), ("down", block.mlp.c_proj)
        )}  # fmt: skip
        n1 = layer_norm(block.ln_1, x)
        qkv = n1 @ w["qkv"][0] + w["qkv"][1]
        seen = Attention(*(split(part, heads) for part in qkv.chunk(3, -1)), causal=True)
        z = merge(seen.z)
        out = z @ w["o"][0] + w["o"][1]
        mid = x + out
        n2 = layer_norm(block.ln_2, mid)
        pre = n2 @ w["fc"][0] + w["fc"][1]
        neurons = block.mlp.act(pre)
        made = neurons @ w["down"][0] + w["down"][1]
        tape.append((block, w, x, n1, qkv, seen, z, out, mid, n2, pre, neurons, made))
        x = mid + made
    normed, unembed = layer_norm(stack.ln_f, x), model.lm_head.weight.to(D)
    r = torch.zeros_like(x)
    r[-1] = normed[-1] * unembed[answer]
    r = centred_norm(stack.ln_f, x, r)
    ends = []
    for block, w, x, n1, qkv, seen, z, out, mid, n2, pre, neurons, made in reversed(tape):
        ends.append(r)
        post = mid + made
        r_pre = linear(neurons, w["down"][0], made, ratio(made, post, r))
        r_mid = ratio(mid, post, r) + centred_norm(block.ln_2, mid, linear(n2, w["fc"][0], pre, r_pre))
        r_z = linear(z, w["o"][0], out, ratio(out, mid, r_mid))
        r_qkv = torch.cat([merge(t) for t in seen.back(split(r_z, heads))], -1)
        r = ratio(x, mid, r_mid) + centred_norm(block.ln_1, x, linear(n1, w["qkv"][0], qkv, r_qkv))
    return ratio(words, start, r).sum(-1), [entry[5] for entry in tape], ends[::-1]


def bert(model: torch.nn.Module, ids: Tensor, answer: int) -> tuple[Tensor, list[Attention], list[Tensor]]:
    stack, heads, parts = model.bert, model.config.num_attention_heads, model.bert.embeddings
    act = torch.nn.functional.gelu

    def weights(m: torch.nn.Linear) -> tuple[Tensor, Tensor]:
        return m.weight.to(D).T, m.bias.to(D)

    words = parts.word_embeddings.weight.to(D)[ids]
    start = words + parts.position_embeddings.weight.to(D)[: len(ids)] + parts.token_type_embeddings.weight.to(D)[0]
    x, tape = layer_norm(parts.LayerNorm, start), []
    for layer in stack.encoder.layer:
        a = layer.attention
        w = {n: weights(getattr(a.self, n)) for n in ("query", "key", "value")} | {
            "o": weights(a.output.dense), "fc": weights(layer.intermediate.dense), "down": weights(layer.output.dense)
        }  # fmt: skip
        q, k, v = (x @ w[n][0] + w[n][1] for n in ("query", "key", "value"))
        seen = Attention(split(q, heads), split(k, heads), split(v, heads), causal=False)
        z = merge(seen.z)
        out = z @ w["o"][0] + w["o"][1]
        mid = layer_norm(a.output.LayerNorm, x + out)
        pre = mid @ w["fc"][0] + w["fc"][1]
        neurons = act(pre)
        made = neurons @ w["down"][0] + w["down"][1]
        tape.append((layer, w, x, q, k, v, seen, z, out, mid, pre, neurons, made))
        x = layer_norm(layer.output.LayerNorm, mid + made)
    head = model.cls.predictions
    w, b = weights(head.transform.dense)
    pre = x @ w + b
    bent = act(pre)
    r = torch.zeros_like(x)
    r[-1] = layer_norm(head.transform.LayerNorm, bent)[-1] * head.decoder.weight.to(D)[answer]
    r[:-1] = 0
    r = linear(
        x, w, pre, torch.cat([torch.zeros_like(x[:-1]), centred_norm(head.transform.LayerNorm, bent[-1:], r[-1:])])
    )
    ends = []
    for layer, w, x, q, k, v, seen, z, out, mid, pre, neurons, made in reversed(tape):
        ends.append(r)
        r = centred_norm(layer.output.LayerNorm, mid + made, r)
        r_pre = linear(neurons, w["down"][0], made, ratio(made, mid + made, r))
        r = ratio(mid, mid + made, r) + linear(mid, w["fc"][0], pre, r_pre)
        r = centred_norm(layer.attention.output.LayerNorm, x + out, r)
        r_z = linear(z, w["o"][0], out, ratio(out, x + out, r))
        shares = zip(("query", "key", "value"), (q, k, v), seen.back(split(r_z, heads)), strict=True)
        r = ratio(x, x + out, r) + sum(linear(x, w[n][0], y, merge(part)) for n, y, part in shares)
    r = centred_norm(parts.LayerNorm, start, r)
    return ratio(words, start, r).sum(-1), [entry[6] for entry in tape], ends[::-1]
