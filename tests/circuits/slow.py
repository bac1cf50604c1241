"""Circuit runs by hand: every reader has a residual stream of its own, which takes in every message, own or other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pellucid.circuits import Graph

Messages = dict[str, Tensor]


@dataclass
class Slow:
    """`weight(source, reader)` is 1 where the edge is off, or a weight [batch, position, 1]; `theirs` are the
    messages of the other prompts (empty: this is their own run)."""

    graph: Graph
    weight: Callable[[str, str], Any]
    theirs: Messages = field(default_factory=dict)
    own: Messages = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)

    def write(self, name: str, message: Tensor, constant: Tensor | float = 0.0) -> None:
        """A source has written; `constant` is what is added to the stream for everybody."""
        self.own[name] = message
        for reader in self._readers(name):
            off = self.weight(name, reader) if self.theirs else 0.0
            said = message + off * (self.theirs.get(name, message) - message)
            self.streams[reader] = self.streams.get(reader, torch.zeros_like(message)) + said + constant

    def norm(self, stack: str, norm: Callable[[Tensor], Tensor]) -> None:
        """Every stream of a stack passes a norm."""
        for reader in [*self._readers(f"{stack}embed"), f"{stack}itself"]:
            if reader in self.streams:
                self.streams[reader] = norm(self.streams[reader])

    def _readers(self, name: str) -> list[str]:
        stack = self.graph.sources[self.graph.source(name)].stack
        return [r.name for r in self.graph.readers if self.graph.sources[r.first].stack == stack]

    def hear(self, reader: str) -> Tensor:
        return self.streams[self.graph.readers[self.graph.reader(reader)].name]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    """z [batch, position, e] of one head."""
    return (q @ k.mT * scale + bias).softmax(-1) @ v


def causal(length: int) -> Tensor:
    return torch.full((length, length), -1e9).triu(1)


def bert(module: Any, ids: Tensor, slow: Slow) -> Tensor:
    """The logits of a post-norm encoder."""
    body, heads = module.bert, module.config.num_attention_heads
    slow.write("embed", body.embeddings(ids))
    for i, layer in enumerate(body.encoder.layer):
        attention, out = layer.attention.self, layer.attention.output
        e = attention.attention_head_size
        said = []
        for h in range(heads):
            cut = slice(h * e, (h + 1) * e)
            q, k, v = (
                getattr(attention, name)(slow.hear(f"{i}.{h}.{name[0]}"))[..., cut]
                for name in ("query", "key", "value")
            )
            said.append(attend(q, k, v, e**-0.5) @ out.dense.weight[:, cut].T)
        for h, message in enumerate(said):
            slow.write(f"{i}.{h}", message, out.dense.bias if h == 0 else 0.0)
        slow.norm("", out.LayerNorm)
        slow.write(f"m{i}", layer.output.dense(layer.intermediate(slow.hear(f"m{i}"))))
        slow.norm("", layer.output.LayerNorm)
    return module.cls(slow.hear("logits"))


def t5(module: Any, encoder_ids: Tensor, ids: Tensor, slow: Slow) -> Tensor:
    """The logits of a pre-norm encoder-decoder."""

    def attention(part: Any, norm: Any, name: str, bias: Any) -> None:
        e, said = part.key_value_proj_dim, []
        for h in range(part.n_heads):
            cut, head = slice(h * e, (h + 1) * e), f"{name}.heads.{h}"
            own = [part.q(norm(slow.hear(f"{head}.q")))]
            far = module.encoder.final_layer_norm if ".cross" in name else norm
            own += [getattr(part, port)(far(slow.hear(f"{head}.{port}"))) for port in "kv"]
            q, k, v = (x[..., cut] for x in own)
            here = bias if isinstance(bias, float) else bias[:, h]
            said.append(attend(q, k, v, 1.0, here) @ part.o.weight[:, cut].T)
        for h, message in enumerate(said):
            slow.write(f"{name}.heads.{h}", message)

    for stack, given in (("encoder", encoder_ids), ("decoder", ids)):
        body, length = getattr(module, stack), given.shape[1]
        slow.write(f"{stack}.embed", body.embed_tokens(given))
        bias = body.block[0].layer[0].SelfAttention.compute_bias(length, length)
        if stack == "decoder":
            bias = bias + causal(length)
        for i, block in enumerate(body.block):
            first, *_, last = block.layer
            name = f"{stack}.layers.{i}"
            attention(first.SelfAttention, first.layer_norm, f"{name}.attn", bias)
            if stack == "decoder":
                attention(block.layer[1].EncDecAttention, block.layer[1].layer_norm, f"{name}.cross", 0.0)
            slow.write(f"{name}.mlp", last.DenseReluDense(last.layer_norm(slow.hear(f"{name}.mlp"))))
    final = module.decoder.final_layer_norm(slow.hear("logits"))
    return module.lm_head(final * (module.model_dim**-0.5 if module.config.tie_word_embeddings else 1.0))


def gpt2(module: Any, ids: Tensor, slow: Slow, neurons: dict[int, list[int]] | None = None) -> Tensor:
    """The logits of a decoder whose MLPs may be split into some neurons and the rest."""
    body, heads, d = module.transformer, module.config.n_head, module.config.n_embd
    e = d // heads
    slow.write("embed", body.wte(ids) + body.wpe(torch.arange(ids.shape[1])))
    for i, block in enumerate(body.h):
        said = []
        for h in range(heads):
            q, k, v = (
                block.attn.c_attn(block.ln_1(slow.hear(f"{i}.{h}.{port}")))[..., n * d + h * e : n * d + (h + 1) * e]
                for n, port in enumerate("qkv")
            )
            z = attend(q, k, v, e**-0.5, causal(ids.shape[1]))
            said.append(z @ block.attn.c_proj.weight[h * e : (h + 1) * e])
        for h, message in enumerate(said):
            slow.write(f"{i}.{h}", message, block.attn.c_proj.bias if h == 0 else 0.0)
        acts = block.mlp.act(block.mlp.c_fc(block.ln_2(slow.hear(f"m{i}"))))
        own = {n: acts[..., n, None] * block.mlp.c_proj.weight[n] for n in (neurons or {}).get(i, [])}
        slow.write(f"m{i}", block.mlp.c_proj(acts) - sum(own.values()))
        for n, message in own.items():
            slow.write(f"layers.{i}.mlp.neurons.{n}", message)
    return module.lm_head(body.ln_f(slow.hear("logits")))
