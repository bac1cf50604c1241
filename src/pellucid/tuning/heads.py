"""A classifier made of a model without a head: its token vectors, pooled, and one linear layer on them.

Mean pooling counts real tokens only. The head is drawn normal with deviation .02 from `seed`, biases 0, as BERT's are; the
trunk is the model's own module, shared, and is copied when it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from pellucid.changed import twin
from pellucid.errors import InputError, among
from pellucid.model import Model, load

Pooling = Literal["mean", "cls", "last"]


class PooledForSequenceClassification(PreTrainedModel):
    """A trunk, pooled, and a linear layer."""

    def __init__(self, trunk: Any, classes: Sequence[str], pooling: Pooling, seed: int) -> None:
        config = type(trunk.config).from_dict(trunk.config.to_dict())
        config._attn_implementation = trunk.config._attn_implementation
        config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
        nn.Module.__init__(self)
        self.config, self.pooling = config, pooling
        self.trunk = trunk
        weight = next(p for p in trunk.parameters() if p.is_floating_point())
        self.classifier = nn.Linear(config.get_text_config().hidden_size, len(classes)).to(weight)
        with torch.no_grad():
            drawn = torch.randn(self.classifier.weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
            self.classifier.weight.copy_(drawn)
            self.classifier.bias.zero_()

    def get_input_embeddings(self) -> Any:
        return self.trunk.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        h = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = torch.ones(h.shape[:2]) if attention_mask is None else attention_mask
        mask = mask.to(h)
        if self.pooling == "mean":
            pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            places = torch.arange(h.shape[1], device=h.device) * mask
            at = mask.argmax(1) if self.pooling == "cls" else places.argmax(1)
            pooled = h[torch.arange(len(h), device=h.device), at]
        return SequenceClassifierOutput(logits=self.classifier(pooled))


def classifier(model: Model, names: Sequence[str], *, pooling: Pooling = "mean", seed: int = 0) -> Model:
    """A classifier of texts with classes `names` on a model without a head; the head is random.

    `pooling`: "mean" over real tokens, "cls" (the first) or "last". InputError for a model that has a head, or fewer than two names.

    >>> classifier(encoder, ["negative", "positive"])
    <Model PooledForSequenceClassification: PooledForSequenceClassification, 2 layers, ...>
    """
    if model.anatomy.answering.meaning != "vectors" or len(model.anatomy.stacks) > 1:
        raise InputError(f"{model.name} is no encoder without a head: open one with task='base'")
    if len(names) < 2 or not among(pooling, Pooling):
        raise InputError(
            f"names={list(names)}, pooling={pooling!r}: expected two classes or more, and one of {', '.join(get_args(Pooling))}"
        )
    return load(
        PooledForSequenceClassification(twin(model.module), list(names), pooling, seed), tokenizer=model.tokenizer
    )
