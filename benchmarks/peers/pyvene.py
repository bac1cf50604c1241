"""pyvene: an `IntervenableModel` per layer, with stored source representations; one run at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyvene
import torch
from torch import Tensor, nn
from workloads import Shape

library = "pyvene"

COMPONENTS = {
    "resid_pre": "block_input",
    "attn.q": "query_output",
    "attn.k": "key_output",
    "attn.v": "value_output",
    "attn.z": "attention_value_output",
    "attn.out": "attention_output",
    "resid_mid": "transformer.h[%d].ln_2.input",
    "mlp.neurons": "mlp_activation",
    "mlp.out": "mlp_output",
    "resid_post": "block_output",
}


class Peer:
    note = "source representations reused; no pattern (its component never fires on this transformers)"
    every_layer, in_place = False, False

    def __init__(self, module: nn.Module, tokenizer: Any, shape: Shape) -> None:
        self.module, self.shape = module, shape
        self.plain = pyvene.IntervenableModel([], model=module)
        self.collectors: dict[int, tuple[list[str], Any]] = {}  # by length: made once, as one would

    def patch(self, clean: Tensor, corrupted: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        layers = list(layers)
        length = clean.shape[1]
        collector = self._model([_collected(n, "block_input", length) for n in layers])
        (_, residuals), _ = collector({"input_ids": clean}, unit_locations={"base": list(range(length))})
        for layer, residual in zip(layers, residuals, strict=True):
            patched = self._model(
                {"layer": layer, "component": "block_input", "intervention_type": pyvene.VanillaIntervention}
            )
            row = []
            for position in range(length):
                source = {patched.sorted_keys[0]: residual[:, position : position + 1]}
                _, output = patched(
                    {"input_ids": corrupted}, unit_locations={"base": position}, source_representations=source
                )
                row.append(self.shape.metric(output))
            yield torch.cat(row)

    def ablate(self, prompts: Tensor, layers: Iterable[int]) -> Iterator[Tensor]:
        kind = {"component": "head_attention_value_output", "unit": "h"}
        for layer in layers:
            ablated = self._model({"layer": layer, "intervention_type": pyvene.ZeroIntervention, **kind})
            row = []
            for head in range(self.shape.heads):
                _, output = ablated({"input_ids": prompts}, unit_locations={"base": head})
                row.append(self.shape.metric(output))
            yield torch.stack(row)

    def keep(self, ids: Tensor) -> dict[str, Tensor]:
        length = ids.shape[1]
        if length not in self.collectors:
            sites = [(n, site) for n in range(self.shape.layers) for site in COMPONENTS]
            wanted = [_collected(n, COMPONENTS[site], length) for n, site in sites]
            self.collectors[length] = [f"layers.{n}.{site}" for n, site in sites], self._model(wanted)
        names, collector = self.collectors[length]
        (_, kept), _ = collector({"input_ids": ids}, unit_locations={"base": list(range(length))})
        return dict(zip(names, kept, strict=True))

    def forward(self, ids: Tensor) -> Tensor:
        return self.plain({"input_ids": ids})[0][0]

    def steer(self, ids: Tensor, layer: int, vector: Tensor, **options: Any) -> Tensor:
        add = pyvene.AdditionIntervention(source_representation=vector, embed_dim=len(vector))
        steered = self._model({"layer": layer, "component": "block_output", "intervention": add})
        return steered.generate({"input_ids": ids}, intervene_on_prompt=True, **options)[1][0]

    def _model(self, config: Any) -> Any:
        return pyvene.IntervenableModel(config, model=self.module)


def _collected(layer: int, component: str, length: int) -> dict[str, Any]:
    # without the number of units the values of later positions are silently dropped
    kind = {"intervention_type": pyvene.CollectIntervention, "max_number_of_units": length}
    place = {"component": component % layer} if "%" in component else {"layer": layer, "component": component}
    return place | kind
