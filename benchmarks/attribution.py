"""What does attribution cost, as a ratio to the passes of the plain module that it cannot do without?

    python -m benchmarks.attribution [--repetitions 5] [--tokens 32] [--only integrated|games|sequence] [--peers]

Shapes of GPT-2 small and BERT base (a classifier) with seeded random weights, one thread, process CPU time. The limit is
measured just before and after every call, batched as well as it goes, with only the attributed logit unembedded:

    integrated  50 forward-and-backward passes to the embeddings; then the steps it takes to come as near to completeness
                as Captum's default 50 do
    games       as many batched forward passes as the method asks for variants, 200 of them
    sequence    integrated gradients, 20 steps, of each of 12 generated tokens: forward and backward passes over the
                growing prompt, token by token

Captum runs at its defaults (one sample a call where it perturbs) and, where it can, batched. SHAP and Inseq are measured
where they are installed: run this file with the interpreter of an environment that has them. These load nothing.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import pellucid as pl
from benchmarks.clock import beside
from pellucid.attribution import (
    continuation,
    integrated_gradients,
    kernel_shap,
    lime,
    shapley,
)
from tests.zoo.tokenizer import tokenizer

ANSWER, BATCH = {"GPT-2 small": 37, "BERT base": 1}, 20
Work = Callable[[], Any]


@cache
def opened(name: str) -> pl.Model:
    torch.manual_seed(0)
    if name == "GPT-2 small":
        module: Any = GPT2LMHeadModel(GPT2Config())
    else:
        module = BertForSequenceClassification(BertConfig(num_labels=2))
    return pl.load(module.eval(), tokenizer=tokenizer())


def score(name: str, **inputs: Any) -> torch.Tensor:
    """[row] the logit that is attributed."""
    module = opened(name).module
    if name == "BERT base":
        return module(**inputs).logits[:, ANSWER[name]]
    return module(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, ANSWER[name]]


def forwards(name: str, ids: torch.Tensor, n: int) -> Work:
    def work() -> None:
        with torch.no_grad():
            for rows in torch.arange(n).split(BATCH):
                score(name, input_ids=ids.expand(len(rows), -1))

    return work


def passes(name: str, ids: torch.Tensor, n: int) -> Work:
    """Forward and backward to the embeddings."""
    embedding = opened(name).module.get_input_embeddings()

    def work() -> None:
        for rows in torch.arange(n).split(BATCH):
            x = embedding(ids.expand(len(rows), -1)).detach().requires_grad_()
            torch.autograd.grad(score(name, inputs_embeds=x).sum(), x)

    return work


# ---- integrated gradients


def integrated(name: str, ids: torch.Tensor, repetitions: int, with_peers: bool) -> None:
    from captum.attr import IntegratedGradients

    model, answer = opened(name), ANSWER[name]
    embedding = model.module.get_input_embeddings()
    x, start = embedding(ids).detach(), embedding(torch.full_like(ids, 5)).detach()
    baseline = torch.full((ids.shape[1],), 5)
    method = IntegratedGradients(lambda e: score(name, inputs_embeds=e))
    captum = partial(method.attribute, x, start, n_steps=50, internal_batch_size=BATCH, return_convergence_delta=True)
    ours = partial(integrated_gradients, model, ids, answer, baseline=baseline, steps=50, tolerance=1e9)
    limit = passes(name, ids, 50)
    print(f"  pellucid, 50 steps        {beside(limit, ours, repetitions)} of 50 forward-and-backward passes")
    if with_peers:
        print(f"  Captum, 50 steps          {beside(limit, captum, repetitions)}")
    theirs = abs(float(captum()[1]))
    change = abs(float(score(name, inputs_embeds=x) - score(name, inputs_embeds=start)))
    noise = 1e-6 * max(abs(float(score(name, inputs_embeds=x))), abs(float(score(name, inputs_embeds=start))))
    print(f"  completeness gap of Captum's 50 steps: {theirs:.1e} of a change of {change:.2g} (rounding: {noise:.0e})")
    for steps in range(2, 51):
        found = integrated_gradients(model, ids, answer, baseline=baseline, steps=steps, tolerance=1e9)
        if abs(float(found.gap)) <= max(theirs, noise):
            work = partial(integrated_gradients, model, ids, answer, baseline=baseline, steps=steps, tolerance=1e9)
            print(f"  pellucid reaches it with {steps} steps: {beside(limit, work, repetitions)} of the 50 passes")
            break
    found = integrated_gradients(model, ids, answer, baseline=baseline)
    print(f"  pellucid's default: {int(found.steps)} steps, gap {abs(float(found.gap)):.1e}")


# ---- games


def games(name: str, ids: torch.Tensor, repetitions: int, with_peers: bool) -> None:
    model, answer, n = opened(name), ANSWER[name], ids.shape[1]
    same: dict[str, Any] = {"baseline": torch.full((n,), 5), "progress": False}
    permutations = 2 * round(200 / (n - 1) / 2)
    cases: dict[str, Callable[..., Any]] = {
        f"shapley, {permutations} orders": partial(shapley, draws=permutations),
        "lime, 200 samples": partial(lime, draws=200),
        "kernel_shap, 200 samples": partial(kernel_shap, draws=200),
    }
    for title, method in cases.items():
        runs = int(method(model, ids, answer, **same).evaluations)
        work = partial(method, model, ids, answer, **same)
        print(f"  {title:26s}{beside(forwards(name, ids, runs), work, repetitions)} of {runs} batched forward passes")
    if with_peers:
        peers(name, ids, repetitions, permutations)


def peers(name: str, ids: torch.Tensor, repetitions: int, permutations: int) -> None:
    from captum.attr import KernelShap, Lime, ShapleyValueSampling

    def f(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return score(name, input_ids=rows)

    n, there = ids.shape[1], torch.full_like(ids, 5)
    limit, few = forwards(name, ids, 200), max(1, repetitions // 2)
    for batch in (1, BATCH):
        same = {"baselines": there, "perturbations_per_eval": batch}
        for title, work in {
            "ShapleyValueSampling": partial(ShapleyValueSampling(f).attribute, ids, n_samples=permutations, **same),
            "Lime": partial(Lime(f).attribute, ids, n_samples=200, **same),
            "KernelShap": partial(KernelShap(f).attribute, ids, n_samples=200, **same),
        }.items():
            runs = 200 if title != "ShapleyValueSampling" else permutations * n
            as_many = limit if runs == 200 else forwards(name, ids, runs)
            print(f"  Captum {title}, {batch} a call: {beside(as_many, work, few)} of {runs}")
    if find_spec("shap"):
        print(f"  SHAP partition: {beside(limit, partial(shap_partition, f, ids), few)} of 200")


def shap_partition(f: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> None:
    import shap

    masker = shap.maskers.Partition(np.full((1, ids.shape[1]), 5), max_samples=1, clustering=_balanced(ids.shape[1]))

    def values(rows: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [f(torch.tensor(part).long()).numpy() for part in np.array_split(rows, -(-len(rows) // BATCH))]
        )

    shap.PartitionExplainer(values, masker)(ids.numpy(), max_evals=200, silent=True)


def _balanced(n: int) -> np.ndarray:
    """A balanced tree of neighbours, as rows of (left, right, distance, size)."""
    level, rows = [(i, 1) for i in range(n)], list[tuple[float, ...]]()
    while len(level) > 1:
        joined = []
        for a, b in zip(level[::2], level[1::2], strict=False):
            rows.append((a[0], b[0], len(rows) + 1.0, a[1] + b[1]))
            joined.append((n + len(rows) - 1, a[1] + b[1]))
        level = joined + ([level[-1]] if len(level) % 2 else [])
    return np.array(rows)


# ---- sequences


def sequence(ids: torch.Tensor, repetitions: int, with_peers: bool, steps: int = 20, said: int = 12) -> None:
    name = "GPT-2 small"
    model = opened(name)
    embedding = model.module.get_input_embeddings()
    generated = model.generate(ids, max_new_tokens=said).tokens[0]
    whole = torch.cat([ids[0], generated])

    def loop() -> None:
        for n in range(len(ids[0]), len(whole)):
            x = embedding(whole[:n].expand(steps, -1)).detach().requires_grad_()
            z = model.module(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1]
            torch.autograd.grad(z.softmax(-1)[:, whole[n]].sum(), x)

    target = continuation(max_new_tokens=said, of="probability")
    baseline = torch.zeros(len(whole) - 1, dtype=torch.long)  # the unknown token, as in Inseq
    ours = partial(integrated_gradients, model, ids, target, baseline=baseline, steps=steps, tolerance=1e9)
    generate = partial(model.generate, ids, max_new_tokens=said)
    print(f"  pellucid, generation included: {beside(loop, ours, repetitions)} of {said} x {steps} passes")
    print(f"  generation alone:              {beside(loop, generate, repetitions)}")
    if with_peers and find_spec("inseq"):
        print(
            f"  Inseq (tokens given):          {beside(loop, inseq_work(model, ids, generated, steps), max(1, repetitions // 2))}"
        )


def inseq_work(model: pl.Model, ids: torch.Tensor, generated: torch.Tensor, steps: int) -> Work:
    """Inseq's integrated gradients of given tokens; it reads texts, so the texts are words that are one token each."""
    import tempfile

    import inseq
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(2, model.module.config.vocab_size)} | {"<unk>": 0, "<eos>": 1}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<unk>", eos_token="<eos>", unk_token="<unk>")
    directory = tempfile.mkdtemp()
    model.module.save_pretrained(directory)
    words.save_pretrained(directory)
    loaded = inseq.load_model(directory, "integrated_gradients", device="cpu")
    prompt = " ".join(f"w{int(i)}" for i in ids[0])
    text = prompt + " " + " ".join(f"w{int(i)}" for i in generated)
    return partial(
        loaded.attribute,
        prompt,
        text,
        n_steps=steps,
        internal_batch_size=steps,
        show_progress=False,
        pretty_progress=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", choices=["integrated", "games", "sequence"])
    parser.add_argument("--peers", action="store_true", help="Captum too, and SHAP and Inseq where they are installed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(100, 20000, (1, options.tokens), generator=generator)
    for name in ANSWER:
        for part in (integrated, games):
            if options.only in (None, part.__name__):
                print(f"{name}, {options.tokens} tokens: {part.__name__}", flush=True)
                part(name, ids, options.repetitions, options.peers)
    if options.only in (None, "sequence"):
        print(f"GPT-2 small, {options.tokens} tokens: sequence", flush=True)
        sequence(ids, options.repetitions, options.peers)


if __name__ == "__main__":
    main()
