"""Every cell of the matrix once more, by plain torch hooks on the native module: nothing of pellucid.

A prompt is run alone and unpadded, a head is a slice of what its output projection is given, and an edge is a part that is
silenced while all that it could speak through but one reader says what it said before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
Hook = tuple[str, str, Change]  # module, "in" or "out", what is done to its first tensor


@dataclass(frozen=True)
class Family:
    """Where the parts of a family are: its blocks, in a block what projects the heads and what writes the MLP's part."""

    blocks: str
    heads: str
    mlp: str
    stack: str = ""
    cross: str = ""
    embedding: str = ""  # of the prompt's tokens; "" where the module says itself

    def block(self, n: int) -> str:
        return f"{self.blocks}.{n}"


DECODER = Family("model.layers", "self_attn.o_proj", "mlp")
POST_NORM = ("attention.output.dense", "output.dense")
FAMILIES: dict[str, Family] = {
    "llama": DECODER,
    "qwen3": DECODER,
    "mixtral": DECODER,
    "granite": DECODER,
    "cohere": DECODER,
    "qwen3_next": DECODER,
    "gemma3_text": Family("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "olmo2": Family("model.layers", "self_attn.o_proj", "post_feedforward_layernorm"),
    "gpt2": Family("transformer.h", "attn.c_proj", "mlp"),
    "gptj": Family("transformer.h", "attn.out_proj", "mlp"),
    "falcon": Family("transformer.h", "self_attention.dense", "mlp"),
    "bloom": Family("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": Family("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "phi": Family("model.layers", "self_attn.dense", "mlp"),
    "gpt_neox": Family("gpt_neox.layers", "attention.dense", "mlp"),
    "bert": Family("bert.encoder.layer", *POST_NORM),
    "roberta": Family("roberta.encoder.layer", *POST_NORM),
    "deberta-v2": Family("deberta.encoder.layer", *POST_NORM),
    "t5": Family(
        "decoder.block",
        "layer.0.SelfAttention.o",
        "layer.2.DenseReluDense.wo",
        "decoder.",
        "layer.1.EncDecAttention.o",
        "encoder.embed_tokens",
    ),
    "bart": Family(
        "model.decoder.layers",
        "self_attn.out_proj",
        "fc2",
        "decoder.",
        "encoder_attn.out_proj",
        "model.encoder.embed_tokens",
    ),
}


@contextmanager
def hooked(module: nn.Module, hooks: list[Hook]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, port, change in hooks:
            where = module.get_submodule(name)
            if port == "in":
                handle = where.register_forward_pre_hook(_before(change), with_kwargs=True)
            else:
                handle = where.register_forward_hook(_after(change))
            stack.callback(handle.remove)
        yield


def _before(change: Change) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        return args, kwargs | {name: change(kwargs[name])}

    return hook


def _after(change: Change) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


@dataclass(frozen=True)
class Hand:
    """A family's module, prompts as ids (each run alone), and where each is answered."""

    family: Family
    module: nn.Module
    prompts: list[list[int]]
    at: list[int]
    heads: int
    start: int | None = None  # the decoder's first token

    def call(self, row: int, more: list[int] | None = None) -> dict[str, Any]:
        ids = torch.tensor([self.prompts[row]])
        if self.start is None:
            ids = torch.cat([ids, torch.tensor([more or []], dtype=torch.long)], 1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = torch.tensor([[self.start, *(more or [])]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": given}

    def logits(self, row: int, hooks: list[Hook], more: list[int] | None = None) -> Tensor:
        with torch.no_grad(), hooked(self.module, hooks):
            return self.module(**self.call(row, more), use_cache=False).logits[0]

    def answer(self, row: int, hooks: list[Hook]) -> Tensor:
        return self.logits(row, hooks)[self.at[row]].double()

    def difference(self, row: int, hooks: list[Hook]) -> float:
        z = self.answer(row, hooks)
        return float(z[7] - z[9])

    def path(self, layer: int, part: str = "") -> str:
        return f"{self.family.block(layer)}.{part}".rstrip(".")

    # ---- edits

    def steer(self, layer: int, vector: Tensor) -> Hook:
        return (self.path(layer), "out", lambda x: x + vector.to(x))

    def silence(self, layer: int, head: int, value: Tensor | None = None) -> Hook:
        """A head put to zero, or to its values [position, d_head]."""

        def change(x: Tensor) -> Tensor:
            d = x.shape[-1] // self.heads
            x = x.clone()
            x[..., head * d : (head + 1) * d] = 0 if value is None else value.to(x)
            return x

        return (self.path(layer, self.family.heads), "in", change)

    def seen(self, row: int, name: str, port: str = "out") -> Tensor:
        """What a module is given or returns in an unedited run."""
        found: list[Tensor] = []
        self.logits(row, [(name, port, lambda x: found.append(x.clone()) or x)])
        return found[0]

    def head_values(self, row: int, layer: int, head: int) -> Tensor:
        z = self.seen(row, self.path(layer, self.family.heads), "in")
        d = z.shape[-1] // self.heads
        return z[..., head * d : (head + 1) * d]

    # ---- techniques

    def generated(self, row: int, hooks: list[Hook], n: int) -> list[int]:
        """Greedy, everything computed again for each token."""
        said: list[int] = []
        for _ in range(n):
            said.append(int(self.logits(row, hooks, said)[-1].argmax()))
        return said

    def without_edge_to_logits(self, row: int, layer: int, last: int) -> float:
        """One MLP is silent and the branches of the blocks behind it say what they said before: only the head hears it."""
        parts = [part for part in (self.family.heads, self.family.cross, self.family.mlp) if part]
        hooks: list[Hook] = [(self.path(layer, self.family.mlp), "out", torch.zeros_like)]
        for name in (self.path(later, part) for later in range(layer + 1, last + 1) for part in parts):
            said = self.seen(row, name)
            hooks.append((name, "out", lambda x, said=said: said.clone()))  # some blocks add in place
        return self.difference(row, hooks)

    def read_early(self, row: int, layer: int, last: int) -> Tensor:
        """[vocabulary] log-probabilities of the head on the residual after a block."""
        state = self.seen(row, self.path(layer))
        return self.answer(row, [(self.path(last), "out", lambda x: state)]).log_softmax(-1)

    def gradient_x_input(self, row: int) -> Tensor:
        """[position] d logit of token 7 / d token embedding . token embedding."""
        found: list[Tensor] = []
        named = self.family.embedding
        embedding = self.module.get_submodule(named) if named else self.module.get_input_embeddings()

        def watch(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[0]

        handle = embedding.register_forward_hook(watch)
        try:
            with torch.enable_grad():
                z = self.module(**self.call(row), use_cache=False).logits[0, self.at[row], 7]
                (gradient,) = torch.autograd.grad(z, found)
        finally:
            handle.remove()
        return (gradient * found[0]).sum(-1)[0].detach().double()
