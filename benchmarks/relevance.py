"""What does relevance propagation cost, in forward-and-backward passes of the plain module to its embeddings?

    python -m benchmarks.relevance [--repetitions 15] [--tokens 32]

Shapes of GPT-2 small and of a Llama of the same size, random weights, one thread, process CPU time, each call between two
plain passes: the logit of one token at the last position, only that position unembedded, and its gradient by the
embeddings. "whole call" is `relevance_propagation` as a user calls it, "with every layer" also keeps the relevance of all
residual streams and heads.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pellucid as pl
from benchmarks.clock import beside
from pellucid.attribution.relevance import relevance_propagation
from tests.zoo.tokenizer import tokenizer

ANSWER = 37


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config())


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=4, tie_word_embeddings=True,
        )
    )  # fmt: skip


def plain(module: Any, ids: torch.Tensor) -> None:
    embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
    logits = module(inputs_embeds=embedded, logits_to_keep=1, use_cache=False).logits
    torch.autograd.grad(logits[0, -1, ANSWER], embedded)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relevance")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("in plain forward-and-backward passes: median [lowest, highest]")
    for name, make in {"GPT-2 small": gpt2, "Llama, 124M": llama}.items():
        torch.manual_seed(0)
        module = make().eval()
        model = pl.load(module, tokenizer=tokenizer())
        ids = torch.randint(100, 40000, (1, options.tokens))
        layers = ["layers.*.resid_post", "layers.*.attn.z"]
        for title, extra in {"whole call": {}, "with every layer": {"at": layers}}.items():
            call = partial(relevance_propagation, model, ids, ANSWER, **extra)
            call()  # the rules of a model are found once
            print(f"{name:12s} {title:18s}{beside(partial(plain, module, ids), call, options.repetitions)}", flush=True)


if __name__ == "__main__":
    main()
