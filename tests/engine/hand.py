"""Tiny models, and edits written by hand: plain torch hooks and copies of a family's attention, nothing of pellucid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pellucid
from pellucid.model import Model
from tests.zoo import build, inputs, tokenizer

Change = Callable[[Tensor], Tensor]
PROMPTS = ["The capital of France is", "Mary went to the store and gave John a drink", "John of Rome"]


@cache
def opened(model_type: str, **options: Any) -> Model:
    """A zoo model with its tokenizer, opened once for all tests (which must leave it as it is)."""
    module = build(model_type, **options)
    return pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))


def ids(batch: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(5, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def call(model_type: str, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass, for encoder-decoders too."""
    tensors = {"input_ids": ids(batch, length, seed)}
    return tensors | ({"decoder_input_ids": ids(batch, length - 2, seed + 9)} if model_type in ("t5", "bart") else {})


# block: where its modules are. Each site: a module inside the block, and whether the site is what it is given ("in") or
# what it returns ("out"). `mid`: "carried" where the block adds attention to its input without a module for the sum.
DECODER = {
    "resid_pre": ("", "in"), "resid_mid": "carried", "resid_post": ("", "out"), "attn.out": ("self_attn", "out"),
    "attn.z_out": ("self_attn.o_proj", "in"), "mlp.out": ("mlp", "out"), "mlp.neurons": ("mlp.down_proj", "in"),
}  # fmt: skip
POST_NORM = {
    "resid_pre": ("", "in"), "resid_mid": ("attention.output.LayerNorm", "out"), "resid_post": ("", "out"),
    "attn.out": ("attention.output.dense", "out"), "attn.z_out": ("attention.output.dense", "in"),
    "mlp.out": ("output.dense", "out"), "mlp.neurons": ("output.dense", "in"),
}  # fmt: skip
FALCON = {
    "resid_pre": ("", "in"), "resid_post": ("", "out"), "attn.out": ("self_attention.dense", "out"),
    "attn.z_out": ("self_attention.dense", "in"), "mlp.out": ("mlp.dense_4h_to_h", "out"),
    "mlp.neurons": ("mlp.dense_4h_to_h", "in"),
}  # fmt: skip
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", DECODER),
    "mixtral": ("model.layers", {k: v for k, v in DECODER.items() if k != "mlp.neurons"}),
    "gemma2": (
        "model.layers",
        DECODER | {"attn.out": ("post_attention_layernorm", "out"), "mlp.out": ("post_feedforward_layernorm", "out")},
    ),
    "gpt2": (
        "transformer.h",
        DECODER
        | {"attn.out": ("attn", "out"), "attn.z_out": ("attn.c_proj", "in"), "mlp.neurons": ("mlp.c_proj", "in")},
    ),
    "gptj": (
        "transformer.h",
        {
            "resid_pre": ("", "in"), "resid_post": ("", "out"), "attn.out": ("attn", "out"), "mlp.out": ("mlp", "out"),
            "attn.z_out": ("attn.out_proj", "in"), "mlp.neurons": ("mlp.fc_out", "in"),
        },
    ),
    "falcon": ("transformer.h", FALCON),
    "bloom": ("transformer.h", FALCON | {"resid_mid": "carried"}),
    "bert": ("bert.encoder.layer", POST_NORM),
    "deberta-v2": ("deberta.encoder.layer", POST_NORM),
    "t5": (
        "decoder.block",
        {
            "resid_pre": ("", "in"), "resid_post": ("", "out"), "attn.out": ("layer.0.SelfAttention.o", "out"),
            "attn.z_out": ("layer.0.SelfAttention.o", "in"), "cross.out": ("layer.1.EncDecAttention.o", "out"),
            "cross.z_out": ("layer.1.EncDecAttention.o", "in"), "mlp.out": ("layer.2.DenseReluDense.wo", "out"),
            "resid_mid": ("layer.1", "out"), "mlp.neurons": ("layer.2.DenseReluDense.wo", "in"),
        },
    ),
}  # fmt: skip
SITES = [(family, part) for family, (_, places) in PLACES.items() for part in places]


@contextmanager
def hooked(module: nn.Module, port: str, change: Change) -> Iterator[None]:
    """Change what a module is given or returns (its first tensor), with a plain torch hook."""

    def before(_: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(before) if port == "in" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def run_by_hand(family: str, layer: int, part: str, change: Change, tensors: dict[str, Tensor]) -> Tensor:
    """Logits of the plain module with `change` [batch, position, d] -> same at one site, by hooks alone."""
    module, (blocks, places) = opened(family).module, PLACES[family]
    block = module.get_submodule(f"{blocks}.{layer}")
    with ExitStack() as stack, torch.no_grad():
        if places[part] == "carried":
            seen: list[Tensor] = []

            def carry(out: Tensor) -> Tensor:
                mid = seen[-1] + out
                return change(mid) - seen[-1]

            stack.enter_context(hooked(block, "in", lambda x: seen.append(x) or x))
            path, port = places["attn.out"]
            stack.enter_context(hooked(block.get_submodule(path), port, carry))
        else:
            path, port = places[part]
            stack.enter_context(hooked(block.get_submodule(path), port, change))
        return module(**tensors).logits


def attention_by_hand(port: str, change: Change, target: nn.Module) -> Callable[..., Any]:
    """An eager attention function, written out, with `change` on one port of the target module.

    `change` is given q, k, v and z as [batch, position, head, e], scores and pattern as [batch, head, query, key].
    """

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None,
        position_bias: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        def met(name: str, x: Tensor) -> Tensor:
            if name != port or module is not target:
                return x
            return change(x.transpose(1, 2)).transpose(1, 2) if name in "qkvz" else change(x)

        q, k, v = met("q", query), met("k", key), met("v", value)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        for extra in (position_bias, attention_mask):
            scores = scores if extra is None else scores + extra
        pattern = met("pattern", met("scores", scores).softmax(-1))
        return met("z", pattern @ v).transpose(1, 2), pattern

    return attend


def with_attention(
    monkeypatch: pytest.MonkeyPatch, family: str, path: str, port: str, change: Change, tensors: dict[str, Tensor]
) -> Tensor:
    """Logits of an eager twin of the family's model whose attention at `path` is the hand-written one."""
    twin = build(family, attn="eager")
    code = __import__(type(twin).__module__, fromlist=["x"])
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(code, "eager_attention_forward", attention_by_hand(port, change, twin.get_submodule(path)))
        return twin(**tensors).logits
