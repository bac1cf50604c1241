"""Tiny models with their tokenizers, opened once; and the attention transformers itself returns."""

from __future__ import annotations

from functools import cache

import torch

import pellucid
from tests.zoo import build, tokenizer
from tests.zoo.build import Entry

PROMPT = "The capital of France is in Paris"
TARGET = "Rome is the"
CLASSIFIERS = {
    "bert": "BertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}


@cache
def opened(family, **config):
    module = build(family, **config)
    return pellucid.load(module, tokenizer=tokenizer(module))


@cache
def classifier(family="bert", **config):
    """A classifier of three classes; BERT's reads its first token through a pooler, GPT-2's the last."""
    entry = Entry(family, CLASSIFIERS[family], "classification")
    module = build(entry, **{"num_labels": 3, "pad_token_id": 0, **config})
    return pellucid.load(module, tokenizer=tokenizer(module))


def native(model, prompt, target=None, grad_of=None):
    """What the eager model returns as attentions, lists of [head, query, key] by name; with their gradients of a score
    of the logits."""
    inputs = model.inputs(prompt, decoder=target)
    own = model.module.config._attn_implementation
    model.module.set_attn_implementation("eager")
    try:
        with torch.set_grad_enabled(grad_of is not None):
            output = model.module(**{**inputs.tensors, "output_attentions": True})
    finally:
        model.module.set_attn_implementation(own)
    if "decoder_input_ids" in inputs.tensors:
        names = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
        found = {name: getattr(output, key) for name, key in names.items()}
    else:
        found = {"pattern": output.attentions}
    if grad_of is None:
        return {name: [a[0] for a in layers] for name, layers in found.items()}, None
    flat = [a for layers in found.values() for a in layers]
    slopes = iter(torch.autograd.grad(grad_of(output.logits), flat))
    gradients = {name: [next(slopes)[0] for _ in layers] for name, layers in found.items()}
    return {name: [a[0].detach() for a in layers] for name, layers in found.items()}, gradients
