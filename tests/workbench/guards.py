"""Files of monitors and vectors for a tiny model, made so that the monitor fires in the middle of the answer to `PROMPT`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import pellucid as pl

PROMPT, SITE = "The capital of France is", "layers.0.resid_post"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def monitor(model: pl.Model, prompt: str = PROMPT, at: int = 4) -> pl.safety.Monitor:
    """Fires before token `at` of the answer (counted from 0): along what the residual is there and was not before."""
    made = model.generate(prompt, max_new_tokens=at + 1, keep=[SITE])
    values = made.tensor(SITE)[0].double()  # [step, d]
    direction = torch.linalg.lstsq(
        values, torch.tensor([0.0] * at + [1.0], dtype=torch.float64)[:, None]
    ).solution.flatten()
    return pl.safety.Monitor(pl.safety.Direction(SITE, direction.float()), threshold=0.5, then=pl.Stop(), name="harm")


def files(model: pl.Model, folder: Path, sweep: bool = True) -> tuple[list[Path], list[Path]]:
    """A monitor that stops, one that says something else, and a vector with what a sweep said of it."""
    folder.mkdir(parents=True, exist_ok=True)
    stops = monitor(model).tie(model)
    says = dataclasses.replace(stops, then=pl.Say("I would rather not."), name="careful")
    vector = pl.safety.vector(model, SITE, torch.randn(model.anatomy.stacks[-1].d_model, generator=torch.Generator().manual_seed(0)), ["The city of Rome", "John gave the store"])  # fmt: skip
    vector = dataclasses.replace(vector, name="cheer")
    about = {}
    if sweep:
        sides = [("effect", 0.9, 3.0), ("effect", -0.4, 2.0)]
        rows = [
            {"site": SITE, "strength": sign * c, "effect": sides[sign < 0][1] * c, "random_low": -0.5 * c, "random_high": 0.5 * c,
             "perplexity": sides[sign < 0][2], "base_perplexity": 2.0}
            for c in (0.3, 0.6) for sign in (1, -1)
        ]  # fmt: skip
        about = {"prices": {"judge": "sentiment", "rows": rows}}
    made = [stops.save(folder / "harm.safetensors"), says.save(folder / "careful.safetensors")]
    return made, [pl.safety.save_vectors([vector], folder / "cheer.safetensors", about=about)]
