"""Gradients of gradients are those of explicit attention, kernels are put back, and Ross et al.'s penalty is what its algebra says."""

from __future__ import annotations

import pytest
import torch
import transformers

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError, Refused
from pellucid.tuning.data import Encoded
from pellucid.tuning.objective import Given, Pass, embeddings
from tests.tuning.test_fit import data, opened
from tests.zoo import tokenizer


def gradients(model: pl.Model, objective: tu.RightReasons) -> tuple[float, dict[str, torch.Tensor]]:
    encoded = Encoded(model, data(n=4))
    parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        seen = Pass(model, encoded.batch(range(4)), encoded, gradients=True)
        loss = objective.loss(seen, torch.Generator().manual_seed(0))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return float(loss.detach()), {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def copy(attn: str, dtype: torch.dtype = torch.float32) -> pl.Model:
    module = transformers.BertForSequenceClassification(opened("bert-class").module.config).eval()
    module.load_state_dict(opened("bert-class").module.state_dict())
    module.to(dtype).set_attn_implementation(attn)
    return pl.load(module, tokenizer=tokenizer(None))


def test_sdpa_gives_what_explicit_attention_gives_and_has_its_kernels_back() -> None:
    flags = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")]
    (_, eager), (_, sdpa) = (gradients(copy(kind), tu.RightReasons("decoy")) for kind in ("eager", "sdpa"))
    for name, g in eager.items():
        assert (g - sdpa[name]).norm() <= 1e-5 * max(float(g.norm()), 1e-3), name
    assert [
        getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")
    ] == flags


def test_a_flash_kernel_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy("sdpa")
    encoded = Encoded(model, data(n=4))
    monkeypatch.setattr(
        "pellucid.tuning.kernels.implementation", lambda model: "flash_attention_2"
    )  # no such package here
    with pytest.raises(Refused, match="flash_attention_2 has none: .*Consistency"):
        tu.RightReasons("decoy").check(model, encoded)


def test_the_published_penalty_is_that_of_the_log_odds_times_tanh_squared_and_a_share_has_no_scale() -> None:
    model = copy("eager", torch.float64)
    encoded = Encoded(model, data(n=4))
    for row in range(4):
        with torch.enable_grad():
            seen = Pass(model, encoded.batch([row]), encoded, gradients=True)
            ross, plain = (
                float(tu.RightReasons("decoy", form="absolute", of=of).loss(seen, torch.Generator()).detach())
                for of in ("log_probability_sum", "log_odds")
            )
        factor = float(torch.tanh(seen.log_odds.detach() / 2).square())
        assert ross == pytest.approx(factor * plain, rel=1e-10)
    before = [gradients(model, tu.RightReasons("decoy", form=form))[0] for form in ("share", "absolute")]
    with torch.no_grad():
        for p in model.module.classifier.parameters():
            p.mul_(10)
    after = [gradients(model, tu.RightReasons("decoy", form=form))[0] for form in ("share", "absolute")]
    assert after[0] == pytest.approx(before[0], rel=1e-9) and after[1] == pytest.approx(100 * before[1], rel=1e-9)


def test_sizes_along_their_own_direction_give_the_gradients_of_the_exact_path_under_any_kernel() -> None:
    for form in ("share", "absolute", "outside"):
        exact_loss, exact = gradients(copy("eager", torch.float64), tu.RightReasons("decoy", form=form))
        for attn in ("eager", "sdpa"):
            model = copy(attn, torch.float64)
            objective = tu.RightReasons("decoy", form=form, path="finite")
            objective.check(model, Encoded(model, data(n=4)))
            loss, finite = gradients(model, objective)
            assert loss == pytest.approx(exact_loss, rel=1e-3)
            a, b = (torch.cat([g[n].flatten().double() for n in exact if n in finite]) for g in (exact, finite))
            assert float(a @ b / (a.norm() * b.norm())) >= 0.999, (form, attn)
    with pytest.raises(InputError, match="sums signed parts"):
        tu.RightReasons("decoy", path="finite", through="integrated")


def test_integrated_gradients_add_up_to_what_the_baseline_takes_away_and_are_differentiated() -> None:
    model = copy("eager", torch.float64)
    encoded = Encoded(model, data(n=4))
    batch, drawn = encoded.batch(range(4)), torch.Generator()
    for through in ("integrated", "expected"):
        objective = tu.RightReasons("decoy", through=through, steps=48, form="outside")
        with torch.enable_grad():
            seen = Pass(model, batch, encoded, gradients=True)
            if through == "integrated":
                total = objective.attributions(seen, drawn).detach().sum((1, 2))
                base = objective._baseline(seen, drawn)
                other = Pass(model, batch, encoded, edits=[Given(embeddings(model), base)])
                assert torch.allclose(total, (seen.log_odds - other.log_odds).detach(), rtol=1e-2, atol=1e-4)
    for through in ("integrated", "expected"):  # the loss's own gradient against two losses side by side
        objective = tu.RightReasons("decoy", through=through, steps=2)
        name = "bert.encoder.layer.1.output.dense.weight"
        w = dict(model.module.named_parameters())[name]
        _, found = gradients(model, objective)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                w[3, 5] += sign * 1e-5
            ends.append(gradients(model, objective)[0])
            with torch.no_grad():
                w[3, 5] -= sign * 1e-5
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found[name][3, 5]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("through", ["integrated", "expected"])
def test_penalties_on_paths_are_those_of_texts_one_by_one(through: str) -> None:
    """Points, baselines and gradients by hand, a text at a time, through the model's own inputs_embeds."""
    model = copy("eager", torch.float64)
    encoded = Encoded(model, data(n=4))
    batch, table = encoded.batch(range(4)), model.module.get_input_embeddings()
    drawn, total = torch.Generator().manual_seed(3), torch.zeros(4, batch.ids.shape[1], 32, dtype=torch.float64)
    for k in range(2):
        donors = [int(torch.randint(4, (1,), generator=drawn)) for _ in range(4)] if through == "expected" else []
        at = torch.rand(4, 1, 1, generator=drawn) if donors else torch.full((4, 1, 1), (k + 0.5) / 2)
        for b in range(4):
            ids, n = batch.ids[b], int(batch.inputs.stream("").lengths[b])
            base = ids.clone()
            for i, place in enumerate(encoded.content[b]):
                given = encoded.content[donors[b]] if donors else []
                base[place] = batch.ids[donors[b], given[i % len(given)]] if donors else model.tokenizer.mask_token_id
            x, x0 = table(ids[:n]).detach(), table(base[:n]).detach()
            point = (x0 + at[b].double() * (x - x0)).requires_grad_()
            with torch.enable_grad():
                z = model.module(inputs_embeds=point[None]).logits[0]
                y = int(batch.answers[b])
                (g,) = torch.autograd.grad(z[y] - z[1 - y], point)
            total[b, :n] += (x - x0) * g / 2
    sizes, mask = total.square().sum(-1), batch.masks["decoy"]
    slow = (sizes * mask).sum(1) / (sizes * batch.content).sum(1).clamp_min(1e-12)  # 0 where a text is its own baseline
    for form, value in (("share", slow), ("outside", 1 - slow), ("absolute", (sizes * mask).sum(1))):
        objective = tu.RightReasons("decoy", through=through, steps=2, form=form)  # type: ignore[arg-type]
        with torch.enable_grad():
            seen = Pass(model, batch, encoded, gradients=True)
            found = float(objective.loss(seen, torch.Generator().manual_seed(3)).detach())
        assert found == pytest.approx(float(value.mean()), rel=1e-6)


def test_occlusion_is_the_divergence_of_two_predictions_written_out() -> None:
    model = copy("eager", torch.float64)
    encoded = Encoded(model, data(n=3))
    batch = encoded.batch(range(3))
    objective = tu.Consistency("rationale", by="mask")
    with torch.enable_grad():
        found = float(objective.loss(Pass(model, batch, encoded), torch.Generator()).detach())
    ids = torch.where(batch.masks["rationale"], model.tokenizer.mask_token_id, batch.ids)
    with torch.no_grad():
        p, q = (
            model.module(input_ids=i, attention_mask=batch.inputs.stream("").mask).logits.softmax(-1)
            for i in (batch.ids, ids)
        )
    both = (p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)
    assert found == pytest.approx(float(both.mean()) / 2, rel=1e-9)
