"""What does knowledge attribution over every neuron of every layer cost, in batched forward-and-backward passes?

    python -m benchmarks.knowledge [--repetitions 5]

GPT-2 small's shape (12 x 3072 neurons, random weights), a prompt of 12 tokens, 20 steps, one thread, process CPU time.
The plain pass is what the 20 steps of one layer cost without any help: 20 copies of the prompt, all logits, gradients of all
parameters; "frozen" is the same without the parameters' gradients, which attribution does not need. EleutherAI's package
needs 6.6 of the former (it runs 12 such batches).
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.circuits import gpt2
from benchmarks.clock import beside
from pellucid.neurons import knowledge_attribution

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = gpt2()
    ids = torch.randint(0, 50257, (1, 12), generator=torch.Generator().manual_seed(0))
    copies = ids.expand(STEPS, -1).contiguous()

    def plain() -> None:
        model.module(copies).logits[:, -1].softmax(-1)[:, 100].sum().backward()
        model.module.zero_grad(set_to_none=True)

    def frozen() -> None:
        embedded = model.module.get_input_embeddings()(copies).detach().requires_grad_()
        model.module.requires_grad_(False)
        p = model.module(inputs_embeds=embedded).logits[:, -1].softmax(-1)[:, 100].sum()
        torch.autograd.grad(p, embedded)
        model.module.requires_grad_(True)

    def work() -> None:
        knowledge_attribution(model, ids, 100, steps=STEPS)

    for name, pass_ in {"forward and backward": plain, "the same, parameters frozen": frozen}.items():
        print(f"{name:30s}{beside(pass_, work, options.repetitions)}", flush=True)


if __name__ == "__main__":
    main()
