"""Does what was installed work? Run where only the wheel is: scripts/dist.sh does.

Nothing but the package, its dependencies and matplotlib: a tiny model of random weights is opened, run, swept, explained and shown; the
command answers; the doctests of the modules that need no trained model pass.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def light() -> None:
    import pellucid

    heavy = {"torch", "transformers", "matplotlib", "fastapi"} & set(sys.modules)
    assert not heavy, f"importing pellucid loads {heavy}"
    assert "site-packages" in (pellucid.__file__ or ""), pellucid.__file__


def works() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import pellucid as pl

    torch.manual_seed(0)
    model = pl.load(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)).eval())
    assert model.anatomy.refusals == {}, model.anatomy.refusals
    ids = torch.tensor([[3, 14, 15, 9, 2]])
    heads = [pl.Ablate(site) for site in model.sites("layers.*.attn.heads.*")]
    metric = pl.metrics.logit(7)
    swept = model.sweep(ids, heads, metric)
    alone = [float(model.score(model.run(ids, edits=[head]), metric)) for head in heads]
    assert torch.allclose(torch.tensor(swept.values).squeeze(), torch.tensor(alone), atol=1e-5)
    result = pl.attribution.gradient_x_input(model, ids, 7)
    with tempfile.TemporaryDirectory() as folder:
        again = pl.results.Result.load(result.save(Path(folder) / "result.zip"))
        assert again == result
        page = result.save_html(Path(folder) / "view.html").read_text(encoding="utf-8")
        assert "data-pellucid" in page and len(page) > 50_000  # with the views' script, built without Node


def answers() -> None:
    command = Path(sys.executable).with_name("pellucid")
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("pellucid "), said
    wrong = subprocess.run([command, "anatomy", "no/such/model"], capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) <= 2, (wrong.returncode, wrong.stderr)


def doctests() -> None:
    import pytest

    import pellucid

    folder = Path(pellucid.__file__).parent
    tried = [
        folder / name
        for name in ("anatomy", "engine", "results.py", "metrics.py", "statistics.py", "changed.py", "views")
    ]
    needing = (
        "documents.py",
        "hosts.py",
        "report.py",
        "widgets.py",
    )  # examples on a model, which tests/examples.py has
    code = pytest.main(["-q", *(f"--ignore={folder / 'views' / name}" for name in needing), "-p", "no:cacheprovider", "--doctest-modules", "--doctest-ignore-import-errors",
                        "-o", "doctest_optionflags=ELLIPSIS NORMALIZE_WHITESPACE", *map(str, tried)])  # fmt: skip
    assert code == 0, f"doctests: exit code {code}"


for check in (light, works, answers, doctests):
    check()
    print(f"{check.__name__}: well", flush=True)
