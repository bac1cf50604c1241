"""EasyEdit's own ROME, from its search to its edit, beside ours on the same facts: without C, which is its default, and with our C.

    python -m benchmarks.facts_easyedit CLONE --data DIR --moments FILE [--facts 6]

Of a clone of zjunlp/EasyEdit only `easyeditor/models/rome` and what it imports are loaded (the package itself asks for more than this machine
installs), with the settings of its hparams/ROME/llama-7b.yaml; our two contexts stand for its twenty prefixes (cost), and its second moment is
ours where it is on. Each fact is edited alone; both are judged by `scoreboard`'s measures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from benchmarks.facts import LAYER, Bench, means
from pellucid.surgery.editing import _Solver
from pellucid.surgery.scoreboard import _judged

MEASURES = ("efficacy", "efficacy exact", "paraphrase", "paraphrase exact", "neighbourhood", "neighbourhood kept", "neighbourhood KL", "text KL")  # fmt: skip


def rome(clone: Path) -> Any:
    """Their `rome_main`, without the package around it and without the data sets of its statistics."""
    for name in ("easyeditor", "easyeditor.models", "easyeditor.util"):
        made = types.ModuleType(name)
        made.__path__ = [str(clone.joinpath(*name.split(".")))]
        sys.modules[name] = made
    stub: Any = types.ModuleType("easyeditor.models.rome.layer_stats")
    stub.layer_stats = None
    sys.modules[stub.__name__] = stub
    sys.path.insert(0, str(clone))
    return importlib.import_module("easyeditor.models.rome.rome_main")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path)
    parser.add_argument("--facts", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    theirs = rome(given.clone)
    with pl.quiet():
        bench = Bench(given.data, given.moments, 24, float("inf"))
        values, texts = bench.edited().values, bench.held_out()[:3]
        # as many of each relation
        facts = [f for i in range(given.facts) for f in (bench.facts[(0, 7, 16)[i % 3] + i // 3],)]
        covariance = bench.covariance()
    inverse = torch.linalg.inv(covariance.matrix(str(LAYER))).float()
    compute_u: Any = importlib.import_module("easyeditor.models.rome.compute_u")
    compute_u.get_inv_cov = lambda *a, **k: inverse
    module, weight = bench.model.module, bench.model.module.get_parameter(values.memory[0].parameter)
    theirs.get_context_templates = lambda *_: ["{}", *(f"{c.strip().rstrip('.')}. {{}}" for c in bench.contexts)]
    about = settings(theirs, given.clone, len(bench.model.layers))
    found: dict[str, list[dict[str, float]]] = {}
    for f in facts:
        i = bench.facts.index(f)
        _, plain, text, _ = _judged(bench.model, [f], texts=texts, tokens=2048)
        for name, c in (("without C", False), ("with C", True)):
            left, right, _ = _Solver("rome", covariance if c else "off", None, None, 0.8, 1)(
                values.memory[0].name, values.keys[i : i + 1], values.delta[i : i + 1], None
            )
            request = {"prompt": f.prompt, "subject": f.subject, "target_new": str(f.new).strip()}
            with contextlib.redirect_stdout(io.StringIO()):
                about.mom2_adjustment = c
                ((u, v),) = theirs.execute_rome(module, bench.model.tokenizer, request, about).values()
            other = torch.outer(u, v)
            for who, moved in (("ours", left @ right), ("EasyEdit", other if other.shape == weight.shape else other.T)):
                with bench.moved(values.memory[0], moved.detach()):
                    found.setdefault(f"{who}, {name}", []).append(
                        means(_judged(bench.model, [f], plain, text, texts, 2048)[0])
                    )
        print(f.asked, {k: {m: round(v[-1][m], 2) for m in MEASURES} for k, v in found.items()}, flush=True)
    for name, rows in found.items():
        print(f"{name}, {len(rows)} facts:", {m: round(float(np.mean([r[m] for r in rows])), 3) for m in MEASURES}, flush=True)  # fmt: skip


def settings(theirs: Any, clone: Path, layers: int) -> Any:
    made = theirs.ROMEHyperParams.from_hparams(str(clone / "hparams" / "ROME" / "llama-7b.yaml"))
    made.layers, made.v_loss_layer, made.device = [LAYER], layers - 1, "cpu"
    return made


if __name__ == "__main__":
    main()
