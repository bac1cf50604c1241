"""Penalties in trainers that are not ours: transformers' own and, where it is installed, trl's SFT and DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError
from tests.tuning.test_trainer import Norms, arguments
from tests.zoo import build, tokenizer

SITE = "layers.0.resid_post"
TEXTS = ["he is in Rome", "Mary is in Paris", "he is in Paris and Italy", "Mary is in the city of Rome"] * 2


def quiet(family: str) -> Any:
    """Without dropout: these trainers put models into training mode."""
    module = build(family)
    for each in module.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.0
    return module


def reader(seed: int = 0) -> tu.Direction:
    drawn = torch.Generator().manual_seed(seed)
    return tu.Direction.standardised(SITE, torch.randn(32, generator=drawn), torch.randn(20, 32, generator=drawn))


def rows() -> list[dict[str, Any]]:
    tok = tokenizer(build("gpt2"))
    made = tok(TEXTS, padding=True)
    return [
        {"input_ids": i, "attention_mask": m, "labels": [t if k else -100 for t, k in zip(i, m, strict=True)]}
        for i, m in zip(made["input_ids"], made["attention_mask"], strict=True)
    ]


def score(module: Any) -> float:
    model = pl.load(module, tokenizer=tokenizer(module))
    return float(sum(tu.reward(model, reader())([""] * 0 + ["he"] * len(TEXTS), [t[2:] for t in TEXTS])))


def test_a_penalty_weighs_the_same_however_the_batch_is_split_and_weight_zero_is_the_trainer_itself(
    tmp_path: Path,
) -> None:
    norms = []
    for batch, times in ((8, 1), (2, 4)):
        seen = Norms()
        made = tu.with_internals(transformers.Trainer, tu.ProbePenalty(reader(), weight=30.0))
        made(quiet("gpt2"), arguments(tmp_path, batch, times), train_dataset=rows(), callbacks=[seen]).train()
        norms += seen.found
    plain = Norms()
    transformers.Trainer(quiet("gpt2"), arguments(tmp_path, 8, 1), train_dataset=rows(), callbacks=[plain]).train()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] != pytest.approx(plain.found[0], rel=1e-3)
    zero = Norms()
    made = tu.with_internals(transformers.Trainer, tu.ProbePenalty(reader(), weight=0.0))
    made(quiet("gpt2"), arguments(tmp_path, 8, 1), train_dataset=rows(), callbacks=[zero]).train()
    assert zero.found == plain.found


def test_the_gradient_is_that_of_the_penalty_written_out(tmp_path: Path) -> None:
    class Grads(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = []
    for base in (
        transformers.Trainer,
        tu.with_internals(transformers.Trainer, tu.ProbePenalty(reader(), weight=2.0, where="completion")),
    ):
        kept, module = Grads(), quiet("gpt2")
        base(module, arguments(tmp_path, 8, 1), train_dataset=rows(), callbacks=[kept]).train()
        found.append(kept.found)
    module, name = build("gpt2").eval(), "transformer.h.0.mlp.c_proj.weight"
    with torch.enable_grad():
        given = {k: torch.tensor([r[k] for r in rows()]) for k in ("input_ids", "attention_mask")}
        h = module(**given, output_hidden_states=True).hidden_states[1]
        mask = given["attention_mask"][..., None].float()
        own = reader()
        z = (h * mask).sum(1) / mask.sum(1) @ own.vector
        states = own.states @ own.vector
        loss = 2 * ((z - states.mean()) / states.std()).square().mean()
        (g,) = torch.autograd.grad(loss, [dict(module.named_parameters())[name]])
    assert torch.allclose(found[1][name] - found[0][name], g, atol=1e-5 * float(g.abs().max()) + 1e-7)
    with pytest.raises(InputError, match="use tuning.trainer"):
        tu.with_internals(transformers.Trainer, tu.Consistency("decoy"))


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl(kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install 'pellucid[trl]')")
    datasets = pytest.importorskip("datasets")
    tok = tokenizer(build("llama"))
    tok.eos_token = tok.eos_token or "[SEP]"
    data = (
        {"prompt": [t[: t.index(" ")] for t in TEXTS], "completion": [t[t.index(" ") :] for t in TEXTS]}
        if kind == "SFT"
        else {"prompt": ["he"] * 8, "chosen": [" is in Rome"] * 8, "rejected": [" is in Paris"] * 8}
    )
    found, after = [], {}
    for weight, batch, times, steps in ((3.0, 4, 1, 1), (3.0, 2, 2, 1), (0.0, 4, 1, 6), (30.0, 4, 1, 6)):
        base = tu.with_internals(getattr(trl, f"{kind}Trainer"), tu.ProbePenalty(reader(), form="raise", weight=weight))
        args = getattr(trl, f"{kind}Config")(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=times, max_steps=steps, use_cpu=True, bf16=False,
            report_to=[], disable_tqdm=True, logging_steps=1, max_grad_norm=0.0, save_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        norms, module = Norms(), quiet("llama")
        more = {"ref_model": quiet("llama")} if kind == "DPO" else {}
        made = base(
            module, args=args, train_dataset=datasets.Dataset.from_dict(data), processing_class=tok, callbacks=[norms], **more
        )  # fmt: skip
        made.train()
        found.append(norms.found[0])
        after[weight] = score(module)
        assert weight == 0 or any("ProbePenalty" in k for log in made.state.log_history for k in log)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert after[30.0] > after[0.0] + 1
