"""A small treebank, written for the tests, and a tiny model to read it with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pellucid as pl
from pellucid.probing import Examples, Features, Spans
from tests.zoo.tokenizer import tokenizer

CONLLU = """\
# sent_id = 1
# text = Mary can't sing.
1\tMary\tMary\tPROPN\tNNP\t_\t4\tnsubj\t_\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\tMD\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod:neg\t_\t_
4\tsing\tsing\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
4.1\tghost\tghost\tX\t_\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_
2\tcat\tcat\tNOUN\tNN\t_\t3\tnsubj\t_\t_
3\tslept\tsleep\tVERB\tVBD\t_\t0\troot\t_\t_
"""


def tiny() -> pl.Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    return pl.load(module, tokenizer=tokenizer(module))


def drawn(texts: int = 60, words: int = 5, d: int = 12, classes: int = 3, seed: int = 0) -> tuple[Features, Examples]:
    """Features of three layers on which labels are: not there, there, there twice as strongly. The classes differ in the
    first two directions; word types say nothing about them."""
    rng = np.random.default_rng(seed)
    spans = Spans.words([[f"w{rng.integers(25)}" for _ in range(words)] for _ in range(texts)])
    y = rng.integers(classes, size=len(spans))
    angle = 2 * np.pi * y / classes
    signal = np.zeros((len(spans), d))
    signal[:, 0], signal[:, 1] = np.cos(angle), np.sin(angle)
    layers = [rng.normal(size=signal.shape) + strength * signal for strength in (0, 2, 4)]
    sites = ("embed", "layers.0.resid_post", "layers.1.resid_post")
    features = Features(torch.tensor(np.stack(layers), dtype=torch.float32), sites, spans, "drawn", None, "mean")
    return features, Examples(spans, [f"c{c}" for c in y])
