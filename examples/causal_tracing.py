"""Where does SmolLM2 keep the Eiffel Tower? Prints the trace of one fact, the sites that carry it and the window curve.

    python examples/causal_tracing.py [--model MODEL] [--samples 10] [--subject TEXT]

The clean pattern: MLPs at the subject, up to the middle layers; then attention of late layers at the prompt's last token.
The subject's site is the token that completes the name (" E|iffel"), not the " Tower" after it, which adds nothing: with
--subject Eiffel it is the subject's last token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import pellucid
from pellucid.causal.tracing import tracing, window_curve
from pellucid.results import Result

PROMPT, ANSWER = "The Eiffel Tower is located in the city of", " Paris"


def strongest(result: Result, part: str) -> str:
    effect = result.effect.sel(part=part)
    layer, position = np.unravel_index(int(effect.values.argmax()), effect.shape)
    at = {"part": part, "layer": layer, "position": position}
    low, high = (float(result[name].sel(at)) for name in ("low", "high"))
    return (
        f"{part:10} layer {layer:2}, token {str(result.token.values[position])!r}: "
        f"{float(effect[layer, position]):.3f} [{low:.3f}, {high:.3f}]"
    )


def picture(result: Result, part: str) -> str:
    """Layers down, tokens across, the share of the total effect in percent."""
    share = (100 * result.share.sel(part=part)).round().astype(int)
    head = "      " + " ".join(f"{str(t).strip()[:7]:>7}" for t in result.token.values)
    return "\n".join([f"{part}, % of the total effect", head] + [
        f"{layer:5} " + " ".join(f"{int(x):7}" for x in row) for layer, row in enumerate(share.values)
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--subject", default="The Eiffel Tower")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from scripts.demo_model import smollm2

    model = pellucid.load(options.model or smollm2())
    subject, samples = options.subject, options.samples
    result = tracing(model, PROMPT, ANSWER, subject=subject, samples=samples)
    clean, corrupted = result["clean"].item(), result["corrupted"].item()
    print(f"p({ANSWER!r}): clean {clean:.3f}, corrupted {corrupted:.3f}, total effect {float(result.total_effect):.3f}")
    for part in result.part.values:
        print(strongest(result, str(part)))
    for part in result.part.values:
        print("\n" + picture(result, str(part)))
    for part, at, name in (("mlp.out", None, "subject's last token"), ("attn.out", -1, "last token")):
        curve = window_curve(model, PROMPT, ANSWER, subject=options.subject, part=part, at=at, samples=options.samples)
        print(f"\n{part} at the {name}: window -> largest effect (layer)")
        for window in curve.window.values:
            row = curve.effect.sel(window=window)
            print(f"  {int(window):3} -> {float(row.max()):.3f} (layer {int(row.values.argmax())})")


if __name__ == "__main__":
    main()
