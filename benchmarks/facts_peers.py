"""The released code of MEMIT, EMMET and AlphaEdit on the values that ours found: are the changes of W the same?

    python -m benchmarks.facts_peers --data DIR --moments FILE [--memit CLONE] [--emmet CLONE] [--alphaedit CLONE]

Clones of kmeng01/memit, scalable-model-editing/unified-model-editing and jianghoucheng/AlphaEdit, run from a copy in which only "cuda" is
"cpu". They are given our values as their cache of z, our second moment as their statistics, and bare prompts as contexts; everything
else (finding the subject, keys, moves, the closed form) is theirs. Printed: |theirs - ours| / |ours| of the change, of the keys' new
values.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pellucid as pl
from benchmarks.facts import LAYER, Bench
from pellucid.surgery import Search
from pellucid.surgery.keys import subject_row
from pellucid.surgery.solvers import update
from pellucid.surgery.values import residuals

FACTS = 12
PENALTY = 15_000.0  # MEMIT's in its paper; of EMMET 1 and .1, of AlphaEdit 2e-2 and 10


@contextlib.contextmanager
def released(clone: Path) -> Iterator[Path]:
    """The modules of a clone, on the CPU, imported from a copy and forgotten afterwards."""
    before, names = list(sys.path), set(sys.modules)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for file in [*clone.rglob("*.py"), clone / "globals.yml"]:
            target = Path(folder) / file.relative_to(clone)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text(encoding="utf-8").replace('"cuda"', '"cpu"').replace(".cuda()", ".cpu()")
            target.write_text(text, encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield Path(folder)
        finally:
            sys.path[:] = before
            for name in set(sys.modules) - names:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]


def settings(clone: Path, name: str, **more: Any) -> dict[str, Any]:
    """Their settings for another model, with the names of this one's modules."""
    about = json.loads(next((clone / "hparams" / name).glob("*gpt2-xl*.json")).read_text())
    return about | {
        "layers": [LAYER], "rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
    } | more  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--moments", type=Path)
    for peer in ("memit", "emmet", "alphaedit"):
        parser.add_argument(f"--{peer}", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with pl.quiet():
        bench = Bench(given.data, given.moments, 24, float("inf"))
        facts = bench.many()[:FACTS]
        values = bench.found("many", facts, (), Search(steps=12))
        memory, c = values.memory[0], bench.covariance().matrix(str(LAYER))
        h = residuals(bench.model, LAYER, [subject_row(bench.model, f, i) for i, f in enumerate(facts)])
    requests = [
        {"case_id": i, "prompt": f.prompt, "subject": f.subject, "target_new": {"str": f.new}}
        for i, f in enumerate(facts)
    ]
    weight = bench.model.module.get_parameter(memory.parameter)

    def compared(name: str, theirs: torch.Tensor, ours: tuple[torch.Tensor, torch.Tensor]) -> None:
        left, right = ours
        mine = left @ right
        moved = (theirs.double() - mine) @ values.keys.T
        print(
            f"{name}: |theirs - ours| / |ours| {float((theirs.double() - mine).norm() / mine.norm()):.1e}, of the keys' values "
            f"{float(moved.norm() / (mine @ values.keys.T).norm()):.1e}", flush=True
        )  # fmt: skip

    for name, clone in (("memit", given.memit), ("emmet", given.emmet), ("alphaedit", given.alphaedit)):
        if clone is None:
            continue
        with released(clone) as folder, contextlib.redirect_stdout(io.StringIO()):
            short = {"memit": "memit", "emmet": "emmet", "alphaedit": "AlphaEdit"}[name]
            module = importlib.import_module(f"{short}.{short}_main")
            how = importlib.import_module(f"{short}.{short}_hparams")
            about = settings(
                clone, {"memit": "MEMIT", "emmet": "EMMET", "alphaedit": "AlphaEdit"}[name],
                **{"memit": {"mom2_update_weight": PENALTY}, "emmet": {"mom2_update_weight": 1}, "alphaedit": {}}[name],
            )  # fmt: skip
            hparams = next(getattr(how, n) for n in dir(how) if n.endswith("HyperParams") and n != "HyperParams")(
                **about
            )
            for i, z in enumerate(h + values.delta):
                np.savez(folder / f"z{i}.npz", v_star=z.float().numpy())
            cache = str(folder / "z{2}.npz")
            module.get_context_templates = lambda model, tok: [["{}"]]
            got = (c.float(), None) if name == "emmet" else c.float()
            module.get_cov = lambda *a, got=got, **k: got
            before = weight.detach().clone()
            if name == "alphaedit":
                size, vectors = torch.linalg.eigh(c)
                free = vectors[:, size < hparams.nullspace_threshold]
                module.apply_AlphaEdit_to_model(
                    bench.model.module, bench.model.tokenizer, requests, hparams, cache_template=cache,
                    cache_c=torch.zeros(1, *c.shape), P=(free @ free.T).float()[None],
                )  # fmt: skip
                theirs = weight.detach() - before
                with torch.no_grad():
                    weight.copy_(before)
            else:
                deltas = getattr(module, f"execute_{name}")(
                    bench.model.module, bench.model.tokenizer, requests, hparams, cache_template=cache
                )
                (found,) = deltas.values()
                theirs = (found[0] @ found[1].T).T
            assert torch.equal(weight.detach(), before)
        if name == "alphaedit":
            ours = update(values.keys, values.delta, lambda k, v=free: k @ v @ v.T, penalty=float(hparams.L2))
        else:
            penalty = PENALTY if name == "memit" else float(getattr(hparams, "emmet_lambda", 0.0))
            ours = update(values.keys, values.delta, lambda k: bench.covariance().solve(str(LAYER), k), penalty=penalty)
        compared(name, theirs, ours[:2])


if __name__ == "__main__":
    main()
