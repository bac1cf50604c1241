"""Are dictionaries of other tools read as those tools use them? The tools write a folder, both encode and decode.

    pip install dictionary-learning eai-sparsify --no-deps; pip install einops natsort simple-parsing nnsight
    python -m benchmarks.dictionary_formats

Prints the largest difference of reconstructions, relative to their size, for each class of each tool.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from dictionary_learning import dictionary as plain
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

from pellucid.neurons.dictionaries import Dictionary

D, N, K = 32, 128, 8


def kinds() -> dict[str, Any]:
    """A dictionary of every class, its parameters drawn."""
    made = {
        "AutoEncoder": plain.AutoEncoder(D, N),
        "AutoEncoderNew": plain.AutoEncoderNew(D, N),
        "GatedAutoEncoder": plain.GatedAutoEncoder(D, N),
        "JumpReluAutoEncoder": plain.JumpReluAutoEncoder(D, N),
        "AutoEncoderTopK": AutoEncoderTopK(D, N, K),
        "BatchTopKSAE": BatchTopKSAE(D, N, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, N, K, [N // 4, N - N // 4]),
        "sparsify": SparseCoder(D, SparseCoderConfig(num_latents=N, k=K)),
    }
    torch.manual_seed(0)
    for one in made.values():
        for parameter in one.parameters():
            parameter.data = torch.randn_like(parameter) / 3
        if getattr(one, "threshold", None) is not None and not isinstance(one.threshold, torch.nn.Parameter):
            one.threshold.fill_(0.4)
    return made


def main() -> None:
    x = torch.randn(200, D)
    with tempfile.TemporaryDirectory() as folder:
        for name, theirs in kinds().items():
            path = Path(folder) / name / "layers.2"
            path.mkdir(parents=True)
            if name == "sparsify":
                theirs.save_to_disk(path)
                expected = theirs.decode(*theirs.encode(x)[:2])
            else:
                torch.save(theirs.state_dict(), path / "ae.pt")
                (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K, "lm_name": "m"}}))
                expected = theirs.decode(theirs.encode(x))
            ours = Dictionary.load(path)
            gap = (ours.decode(ours.encode(x)) - expected).norm() / expected.norm()
            print(f"{name:24} {ours.site:24} {float(gap):.1e}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
