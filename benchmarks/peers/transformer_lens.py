"""TransformerLens: `TransformerBridge`, its activation patching, its cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from workloads import Shape

library = "transformer-lens"

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn.q": "attn.hook_q",
    "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v",
    "attn.pattern": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "attn.out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp.neurons": "mlp.hook_post",
    "mlp.out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


class Peer:
    note = "generic_activation_patch, run_with_hooks, run_with_cache"
    every_layer, in_place = False, True

    def __init__(self, module: nn.Module, tokenizer: Any, shape: Shape) -> None:
        self.shape = shape
        self.bridge = TransformerBridge.boot_transformers("local", hf_model=module, tokenizer=tokenizer)

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        residuals = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.shape.layers)]
        _, cache = self.bridge.run_with_cache(clean, names_filter=residuals)
        for layer in layers:
            rows = pd.DataFrame([(layer, p) for p in range(corrupted.shape[1])], columns=["layer", "pos"])
            yield patching.generic_activation_patch(
                self.bridge,
                corrupted,
                cache,
                lambda logits: self.shape.metric(logits)[0],
                patching.layer_pos_patch_setter,
                "resid_pre",
                index_df=rows,
            )

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        def remove(z: Tensor, hook: Any, head: int) -> Tensor:
            z[:, :, head] = 0
            return z

        for layer in layers:
            name = f"blocks.{layer}.attn.hook_z"
            runs = [
                self.bridge.run_with_hooks(prompts, fwd_hooks=[(name, partial(remove, head=head))])
                for head in range(self.shape.heads)
            ]
            yield torch.stack([self.shape.metric(logits) for logits in runs])

    def keep(self, ids: Tensor) -> dict[str, Tensor]:
        layers = range(self.shape.layers)
        names = {f"layers.{n}.{site}": f"blocks.{n}.{hook}" for n in layers for site, hook in HOOKS.items()}
        _, cache = self.bridge.run_with_cache(ids, names_filter=list(names.values()))
        return {site: cache[name] for site, name in names.items()}

    def forward(self, ids: Tensor) -> Tensor:
        return self.bridge(ids)

    def steer(self, ids: Tensor, layer: int, vector: Tensor, max_new_tokens: int, do_sample: bool) -> Tensor:
        def add(x: Tensor, hook: Any) -> Tensor:
            return x + vector

        with self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            return self.bridge.generate(
                ids,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )[0]
