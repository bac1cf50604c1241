"""Does SmolLM2 use part of speech: what becomes of its next-token predictions once it is erased at a layer?

    python examples/probing_amnesic.py --data FOLDER [--model MODEL] [--sentences 300] [--layers 4,14,24]

FOLDER holds a Universal Dependencies treebank (*dev.conllu). At each layer part of speech is erased from every token of
held-out texts by LEACE and by INLP, and random subspaces of the same ranks are, which is the control.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pellucid
from pellucid.probing import Treebank, amnesic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--layers", default="4,14,24")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    file = next(iter(sorted(options.data.glob("*dev.conllu"))), None)
    if file is None:
        parser.error(f"{options.data} holds no *dev.conllu")
    examples = Treebank.read(file, options.sentences, words=(4, 30)).tags()
    for layer in options.layers.split(","):
        found = amnesic(model, examples, f"layers.{layer}.resid_post")
        print(
            f"\nlayer {layer}: the probe reads part of speech with {found['own_probe'].item():.3f} (most frequent class "
            f"{found['majority'].item():.3f}); loss of the text {found['own_loss'].item():.3f} nats per token"
        )
        for i, name in enumerate(found.eraser.values):
            here = found.data.isel(eraser=i)
            print(
                f"  {name:16s} rank {int(here['rank'].item()):3d}: probe {here.probe.item():.3f}, "
                f"KL {here.kl.item():.4f} [{here.low.item():.4f}, {here.high.item():.4f}], "
                f"loss {here.loss.item():.3f}, same likeliest token {here.agreement.item():.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
