"""An address names what is there, or says why nothing is; edits and sites print as the code that makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.engine.locate import expand
from pellucid.errors import InputError, Refused, SiteError
from pellucid.model import Model
from tests.engine.hand import PROMPTS, ids, opened

WAYS: dict[str, Callable[[Model, str], Any]] = {
    "sites": lambda model, address: model.sites(address),
    "keep": lambda model, address: model.run(PROMPTS[0], keep=[address]),
    "edits": lambda model, address: model.run(PROMPTS[0], edits=[pl.Ablate(address)]),
    "sweep": lambda model, address: model.plan(PROMPTS[0], [pl.Ablate(address)], pl.metrics.logit(7)),
    "generate": lambda model, address: model.generate(PROMPTS[0], edits=[pl.Ablate(address)], max_new_tokens=1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("family", "address", "reason"),
    [
        ("mixtral", "layers.*.mlp.neurons.*", "mlp.neurons"),
        ("mixtral", "layers.0.mlp.neurons.*", "mlp.neurons"),
        ("mixtral", "layers.*.mlp.neurons.-1", "mlp.neurons"),
        ("llama", "layers.*.mlp.experts.*.out", "mlp.experts"),
        ("llama", "layers.*.cross.heads.*", "cross"),
        ("llama", "layers.7:9.resid_post", "'7:9' names no layer; this model has 2"),
        ("llama", "layers.*.attn.heads.9:", "'9:' names no head; this model has 4"),
        ("mamba", "layers.*.attn.heads.*", "attn"),
    ],
)
def test_an_address_that_names_nothing_is_an_error_with_the_blocks_reason(
    way: str, family: str, address: str, reason: str
) -> None:
    with pytest.raises((SiteError, Refused)) as caught:
        WAYS[way](opened(family), address)
    assert reason in str(caught.value)


def test_layers_without_the_site_are_passed_over_where_others_have_it() -> None:
    model = opened("jamba")  # some layers attend, others do not
    having = [b.index for b in model.anatomy.stacks[0].blocks if "attn.z" in b.taps]
    assert 0 < len(having) < len(model.anatomy.stacks[0].blocks)
    assert [s.layer for s in expand(model.anatomy, "layers.*.attn.z")] == having
    assert {s.layer for s in expand(model.anatomy, "layers.*.attn.heads.0")} == set(having)


def test_queries_before_the_rotation_are_refused_by_name() -> None:
    for name in "qk":
        with pytest.raises(SiteError, match=rf"before the rotation .* write 'layers\.3\.attn\.{name}'"):
            pl.Site.parse(f"blocks.3.attn.hook_{name}")
        assert pl.Site.parse(f"blocks.3.attn.hook_rot_{name}") == pl.Site.parse(f"layers.3.attn.{name}")
    with pytest.raises(SiteError, match=r"write 'decoder\.layers\.0\.attn\.q'"):
        pl.Site.parse("decoder.blocks.0.attn.hook_q@-1")


def test_what_hook_rot_q_names_makes_the_scores() -> None:
    run = opened("llama").run(
        ids(), keep=["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k", "layers.1.attn.scores"]
    )
    q, k = run.tensor("layers.1.attn.q"), run.tensor("layers.1.attn.k")
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:]).tril().bool()
    assert torch.allclose(scores[..., seen], run.tensor("layers.1.attn.scores")[..., seen], atol=1e-5)


def test_numpys_numbers_are_numbers() -> None:
    model = opened("llama")
    site = pl.Site("resid_post", np.int64(1), at=np.int64(-1))  # type: ignore[arg-type]
    assert (str(site), repr(site)) == ("layers.1.resid_post@-1", "pl.Site.parse('layers.1.resid_post@-1')")
    row = ids()[0]
    for given in (row.numpy(), row.numpy()[None], list(row.numpy()), [row.numpy()], [list(row.numpy())]):
        assert torch.equal(model.inputs(given).tensors["input_ids"], row[None])
    assert torch.equal(model.run(given, keep=[site]).tensor(site), model.run(row, keep=[str(site)]).tensor(str(site)))
    with pytest.raises(InputError) as caught:
        model.sweep(ids(), [pl.Ablate("layers.0.mlp.out")], pl.metrics.logit(7, position=np.int64(99)))
    assert "99" in str(caught.value) and "int64" not in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "pl.Ablate('layers.9.attn.heads.9')",
        "pl.Ablate('layers.9.attn.heads.9', how='resample', reference='The capital', seed=3)",
        "pl.Patch('layers.1.resid_post@-1', source=['a', 'b'], source_at=2)",
        "pl.Scale('decoder.layers.0.cross.pattern', factor=0.5)",
    ],
)
def test_an_edit_prints_as_the_code_that_makes_it(code: str) -> None:
    assert repr(eval(code)) == code


def test_what_cannot_be_written_is_described() -> None:
    steer = pl.Steer("layers.1.resid_post", torch.ones(3), 4.0)
    assert repr(steer) == "Steer('layers.1.resid_post', vector=<tensor [3]>, strength=4.0)"
    replace = pl.Replace("layers.1.resid_post", torch.neg, when=lambda step: step.index > 2)
    assert repr(replace) == "Replace('layers.1.resid_post', function=<neg>, when=<lambda>)"


def test_generating_does_not_ask_for_padding_it_would_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    monkeypatch.setitem(model._padding.known, "left", None)  # as a model that cannot be padded on the left
    with pytest.raises(Refused, match="changes .* real tokens: generate for prompts of unequal length one at a time"):
        model.generate(PROMPTS, max_new_tokens=2)
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
    with pytest.raises(Refused, match="pad on the right, or run prompts of unequal length one at a time"):
        model.run({"input_ids": ids, "attention_mask": (ids > 0).long()})


def test_a_star_in_the_place_of_parts_names_all_that_is_there() -> None:
    llama, jamba = opened("llama"), opened("jamba")
    parts = ["q", "k", "v", "z", "z_out", "scores", "pattern", "out"]
    both = {f"layers.{i}.attn.{p}@-1" for i in range(2) for p in parts}
    assert {str(s) for s in llama.sites("layers.*.attn.*@-1")} == both
    assert {str(s) for s in llama.sites("layers.1.attn.heads.2.*")} == {f"layers.1.attn.heads.2.{p}" for p in parts}
    assert {str(s) for s in llama.sites("layers.0.resid_*")} == {f"layers.0.resid_{p}" for p in ("pre", "mid", "post")}
    assert {str(s) for s in llama.sites("layers.*.mlp.*")} == {
        f"layers.{i}.mlp.{p}" for i in range(2) for p in ("out", "neurons")
    }
    everything = llama.run(PROMPTS[0], keep="*")
    taps = {f"layers.{b.index}.{part}" for b in llama.anatomy.stacks[0].blocks for part in b.taps}
    kept = {str(s) for s in everything.sites}
    assert taps <= kept and {"embed", "embed.tokens", "final_norm"} <= kept and "logits" not in kept
    for site in kept:
        torch.testing.assert_close(everything.tensor(site), llama.run(PROMPTS[0], keep=[site]).tensor(site))
    assert {s.layer for s in jamba.sites("layers.*.attn.*")} < {s.layer for s in jamba.sites("layers.*.*")}


@pytest.mark.parametrize("address", ["layers.*.atn.*", "layers.0.*x", "x*", "layers.9.attn.*", "layers.*.cross.*"])
def test_a_star_that_names_nothing_is_an_error(address: str) -> None:
    with pytest.raises((SiteError, Refused)) as caught:
        opened("llama").sites(address)
    assert len(str(caught.value)) < 400
    with pytest.raises(SiteError):  # edits name one part
        pl.Ablate("layers.*.attn.*")
