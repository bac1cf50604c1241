"""Is our remix the model that mergekit writes from the same recipe? Tensor by tensor, and logit by logit.

    python -m benchmarks.surgery_mergekit        (needs mergekit: pip install mergekit, in an environment of its own)

Two tiny Llamas of four layers, the recipe's YAML given to both: a slice of each, a layer twice, layers left out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
import yaml

import pellucid as pl
from tests.zoo import build, tokenizer

RECIPES = {
    "halves": [("a", 0, 2), ("b", 2, 4)],
    "a layer twice": [("a", 0, 2), ("a", 1, 4)],
    "fewer, and from both": [("a", 0, 1), ("b", 1, 2), ("a", 3, 4)],
}


def main() -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            module = build("llama", layers=4)
            if name == "b":  # another snapshot: every matrix moved
                with torch.no_grad():
                    for p in module.parameters():
                        p.add_(0.1 * torch.randn_like(p))
            module.save_pretrained(f"{folder}/{name}")
            tokenizer(module).save_pretrained(f"{folder}/{name}")
            models[name] = pl.load(module, tokenizer=tokenizer(module))
        for title, slices in RECIPES.items():
            recipe = pl.surgery.Recipe(tuple(slices))
            ours = pl.surgery.remix(models, recipe.yaml())
            given = yaml.safe_load(recipe.yaml()) | {"dtype": "float32"}
            for each in given["slices"]:
                each["sources"][0]["model"] = f"{folder}/{each['sources'][0]['model']}"
            out = Path(folder) / title.replace(" ", "_")
            run_merge(MergeConfiguration.model_validate(given), str(out), MergeOptions(copy_tokenizer=False, quiet=True))  # fmt: skip
            theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
            mine, other = ours.module.state_dict(), theirs.state_dict()
            equal = sum(torch.equal(mine[k], other[k]) for k in mine.keys() & other.keys())
            ids = torch.arange(3, 12)[None]
            with torch.no_grad():
                gap = float((ours.module(ids).logits - theirs(ids).logits).abs().max())
            print(f"{title}: {len(recipe.layers)} layers; {equal} of {len(mine.keys() | other.keys())} tensors equal; logits apart by {gap:.0e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
