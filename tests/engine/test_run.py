"""Kept tensors and gradients are the model's own; padding does not count; a run leaves nothing behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pellucid
from pellucid import Ablate, Patch, ProjectOut, Replace, Scale, Site, Steer, metrics
from pellucid.anatomy.interfaces import AttentionInterface
from pellucid.errors import InputError, Refused, SiteError
from pellucid.model import Model
from tests.engine.bag import all_sites
from tests.engine.hand import PROMPTS, call, ids, opened
from tests.zoo import build, inputs, tokenizer
from tests.zoo.tokenizer import WORDS

SITE = "layers.1.resid_pre"


def close(a: Tensor, b: Tensor, tolerance: float = 3e-5) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- what a run gives


def test_a_run_without_keep_and_edits_gives_the_models_own_logits_to_the_bit() -> None:
    for family in ("llama", "t5", "bert"):
        model = opened(family)
        inputs = model.inputs(PROMPTS)
        with torch.no_grad():  # torch may take another kernel where it notes a graph
            own = model.module(**inputs.tensors).logits
        assert torch.equal(model.run(inputs).logits, own)


def test_kept_tensors_are_labelled_and_can_be_read_in_any_order_by_head_and_position() -> None:
    run = opened("llama").run(PROMPTS[0], keep=["layers.*.attn.pattern", "layers.0.attn.z", SITE])
    pattern = run["layers.1.attn.heads.2.pattern"]
    assert pattern.dims == ("batch", "query", "key")
    assert list(pattern.query_token.values) == ["The", "capital", "of", "France", "is"]
    assert torch.equal(run.tensor(SITE + "@'France'"), run.tensor(SITE)[:, [3]])
    assert torch.equal(run.tensor("layers.0.attn.heads.1.z@-2:"), run.tensor("layers.0.attn.z")[:, -2:, 1])
    assert torch.equal(run.tensor("blocks.0.attn.hook_z"), run.tensor("layers.0.attn.z"))


def test_what_a_head_writes_sums_to_the_attention_output() -> None:
    run = opened("llama").run(PROMPTS[0], keep=["layers.0.attn.z_out", "layers.0.attn.out"])
    heads = sum(run.tensor(f"layers.0.attn.heads.{h}.out") for h in range(4))
    assert close(heads, run.tensor("layers.0.attn.out"))  # type: ignore[arg-type]


def test_later_changes_in_place_do_not_reach_what_was_kept() -> None:
    model = opened("llama")
    run = model.run(ids(), keep=[SITE, "layers.1.resid_mid"])
    model.run(ids(), edits=[Replace(SITE, lambda x: x.zero_())])
    again = model.run(ids(), keep=[SITE, "layers.1.resid_mid"])
    for site in (SITE, "layers.1.resid_mid"):
        assert torch.equal(run.tensor(site), again.tensor(site))


def test_what_was_not_kept_is_named_with_what_was() -> None:
    run = opened("llama").run(ids(), keep=["layers.1.resid_post"])
    with pytest.raises(SiteError, match=r"'layers.1.resid_pre' was not kept .*did you mean 'layers.1.resid_post'"):
        run.tensor(SITE)
    with pytest.raises(SiteError, match="names 2 sites; ask for one"):
        run.tensor("layers.*.resid_pre")
    with pytest.raises(InputError, match="no gradients"):
        run.grad("layers.1.resid_post")


# ---- gradients


class Double(TorchFunctionMode):
    """Norms and softmaxes of many families go through float32 whatever the model's dtype; here they do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swap = {torch.float32: torch.float64}
        args = [swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


DOUBLE = ["llama", "gptj", "bert", "t5", "gemma2", "mixtral", "bloom"]
CASES = [(f, str(s)) for f in DOUBLE for s in all_sites(opened(f)) if s.layer in (None, 1) and s.stack != "encoder"]


def double(family: str) -> Model:
    with Double():  # its proofs too
        return opened(family, dtype=torch.float64, **{"experts_implementation": "eager"} if family == "mixtral" else {})


@pytest.mark.parametrize(("family", "site"), CASES)
def test_gradients_equal_finite_differences(family: str, site: str) -> None:
    model, tensors = double(family), call(family)
    bound = pellucid.metrics.as_metric(lambda z: (z[:, -1] * torch.linspace(-1, 1, z.shape[-1]).double()).sum(-1))
    if "key" in Site.parse(site).dims and "scores" in site:
        tensors = {k: v[:, :5] for k, v in tensors.items()}
    others = [Scale("layers.0.resid_post" if family != "t5" else "decoder.layers.0.resid_post", 1.1)]
    with Double():
        gradient = model.run(tensors, keep=[site], edits=others, grad_of=bound).grad(site)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1)).double()
    if "scores" in site:  # what is masked has no say
        direction = direction * (gradient != 0)

    def moved(by: float) -> Tensor:
        # the kept order of dimensions, whatever order the edit is given them in
        def function(x: Tensor) -> Tensor:
            axis = next(i for i, d in enumerate(Site.parse(site).dims) if d in ("position", "query"))
            return x + by * direction.movedim(axis, 1)

        return model.score(model.run(tensors, edits=[*others, Replace(site, function)]), bound).sum()

    step = 1e-6
    with torch.no_grad(), Double():
        slope = (moved(step) - moved(-step)) / (2 * step)
    assert abs(float(slope - (gradient * direction).sum())) <= 1e-6 * max(1.0, abs(float(slope)))


def test_an_edits_own_tensor_gets_its_gradient() -> None:
    model = double("llama")
    vector = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    for edit in (
        Steer("layers.0.resid_mid@-1", vector),
        Patch("layers.0.mlp.out@-1", vector),
        Steer("layers.1.attn.q@-1", vector[:8]),
    ):
        with Double():
            (gradient,) = torch.autograd.grad(model.run(ids(), edits=[edit]).logits[:, -1, 7].sum(), vector)
            up, down = (model.run(ids(), edits=[replace(edit, **_moved(edit, s))]) for s in (1e-6, -1e-6))
        assert abs(float((up.logits - down.logits)[:, -1, 7].sum() / 2e-6 - gradient[3])) < 1e-7
        assert float(gradient.abs().max()) > 0


def _moved(edit: Any, by: float) -> dict[str, Tensor]:
    name = "vector" if isinstance(edit, Steer) else "source"
    value = getattr(edit, name).detach().clone()
    value[3] += by
    return {name: value}


def test_gradients_need_no_trainable_parameters_and_change_none() -> None:
    module = build("gpt2")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    wanted = model.run(ids(), keep=[SITE, "layers.0.attn.q"], grad_of=metrics.logit(7))
    flags = {n: i % 3 == 0 for i, (n, _) in enumerate(module.named_parameters())}
    for n, p in module.named_parameters():
        p.requires_grad_(flags[n])
    with torch.no_grad():
        run = model.run(ids(), keep=[SITE, "layers.0.attn.q"], grad_of=metrics.logit(7))
    for site in (SITE, "layers.0.attn.q"):
        assert close(run.grad(site), wanted.grad(site))
        assert not run.tensor(site).requires_grad
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert all(p.grad is None for p in module.parameters())


def test_gradients_that_cannot_be_had_say_so() -> None:
    model = opened("llama")
    with pytest.raises(InputError, match="needs keep="):
        model.run(ids(), grad_of=metrics.logit(7))
    with pytest.raises(InputError, match="no gradient"):
        model.run(ids(), keep=[SITE], grad_of=metrics.rank(7))
    run = model.run(ids(), keep=["layers.0.attn.z_out"], grad_of=metrics.logit(7))
    with pytest.raises(SiteError, match=r"is that of 'layers.0.attn.out'|is that of 'attn.out'"):
        run.grad("layers.0.attn.heads.1.out")


def test_a_checkpointed_forward_runs_as_any_other_also_in_training_mode() -> None:
    module = build("llama")
    model = pellucid.load(module, tokenizer=tokenizer(module))
    wanted = model.run(ids(), keep=[SITE], grad_of=metrics.logit(7)).grad(SITE)
    module.gradient_checkpointing_enable()
    module.train()
    assert close(model.run(ids(), keep=[SITE], grad_of=metrics.logit(7)).grad(SITE), wanted)


# ---- padding

FAMILIES = ["llama", "gpt2", "bert", "roberta", "t5", "mixtral", "bloom", "deberta-v2", "opt", "gemma2", "gptj", "bart"]
NO_LEFT = {"bart"}  # counts positions from the first column, whatever the mask
prompts = st.lists(st.sampled_from([w[1:] for w in WORDS]), min_size=3, max_size=9).map(" ".join)


def sites_of(family: str) -> dict[str, list[str]]:
    stack = {"t5": "encoder.", "bart": "encoder."}.get(family, "")
    return {
        "keep": [f"{stack}layers.1.{part}" for part in ("resid_post", "attn.q", "attn.k", "attn.pattern", "mlp.out")],
        "edit": [
            f"{stack}layers.0.{part}"
            for part in ("resid_pre", "resid_post", "attn.out", "attn.v", "attn.heads.1", "mlp.out")
        ],
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(texts=st.lists(prompts, min_size=2, max_size=4), data=st.data())
def test_a_prompt_gives_the_same_numbers_alone_and_padded(family: str, side: str, texts: list[str], data: Any) -> None:
    model, sites = opened(family), sites_of(family)
    at = data.draw(st.sampled_from(["", "@-1", "@0", "@1:3", "@-2,0"]), "at")
    site = data.draw(st.sampled_from(sites["edit"]), "site") + at
    size = 8 if ".v" in site or "heads" in site else 32
    noise = torch.randn(2, size, generator=torch.Generator().manual_seed(5))
    edit = data.draw(
        st.sampled_from(
            [Ablate(site), Steer(site, noise[0]), Scale(site, -0.5), ProjectOut(site, noise), Patch(site, noise[1])]
        ),
        "edit",
    )
    batch = padded(model, texts, side)
    if family in NO_LEFT and side == "left" and len({len(row) for row in rows(model, texts)}) > 1:
        with pytest.raises(Refused, match="padding on the left changes"):
            model.inputs(batch)
        return
    together = model.run(batch, keep=sites["keep"], edits=[edit])
    values = model.score(together, metrics.log_probability(7))
    for b, text in enumerate(texts):
        alone = model.run(text, keep=sites["keep"], edits=[edit])
        assert close(values[b], model.score(alone, metrics.log_probability(7))[0])
        for kept in sites["keep"]:
            (one, _), (many, real) = (run.everywhere(Site.parse(kept)) for run in (alone, together))
            own = many[b][real[b]]
            own = own[..., : one.shape[-1]] if "pattern" in kept else own
            assert close(own, one[0]), kept


def rows(model: Model, texts: list[str]) -> list[list[int]]:
    return [model.tokenizer(t)["input_ids"] for t in texts]


def padded(model: Model, texts: list[str], side: str) -> Any:
    if side == "right":
        return texts
    tokens = rows(model, texts)
    longest = max(map(len, tokens))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(r)) + r for r in tokens]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in tokens]),
    }


def test_a_model_that_mixes_all_positions_refuses_prompts_of_unequal_length() -> None:
    with pytest.raises(Refused, match="padding on the right changes .* one at a time"):
        opened("fnet").run(PROMPTS)
    assert opened("fnet").run(PROMPTS[:1]).logits.shape[0] == 1


# ---- nothing is left behind


def state(module: nn.Module) -> Any:
    """Everything a run could leave on a model."""
    hooks = [
        (
            n,
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
            list(m._backward_hooks),
            "forward" in m.__dict__,
            m.training,
        )
        for n, m in module.named_modules()
    ]
    parameters = [(n, p.requires_grad, p.grad is None, p._version) for n, p in module.named_parameters()]
    return hooks, parameters, copy.deepcopy(module.config.to_dict()), AttentionInterface.get_interface


class Stop(BaseException):
    """Like a KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("error", [None, ValueError("mine"), Stop()])
@pytest.mark.parametrize("family", ["llama", "gptj", "t5", "mixtral"])
def test_nothing_is_left_on_the_model(family: str, error: BaseException | None) -> None:
    module = build(family)
    module.train()
    module.get_submodule(opened(family).anatomy.stacks[-1].blocks[0].module).eval()
    seen: list[Any] = []
    mine = module.register_forward_hook(lambda *_: seen.append("called"))
    before = state(module)
    model = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    assert state(module) == before
    prefix = model.anatomy.stacks[-1].prefix

    def function(x: Tensor) -> Tensor:
        if error is not None:
            raise error
        return x

    edits = [Replace(f"{prefix}layers.1.attn.pattern", function), Scale(f"{prefix}layers.0.mlp.out", 2.0)]
    for use in (
        lambda: model.run(call(family), keep=[f"{prefix}layers.*.attn.q"], edits=edits, grad_of=metrics.logit(7)),
        lambda: model.generate(PROMPTS[0], edits=edits, max_new_tokens=3),
        lambda: model.sweep(call(family), [edits], metrics.logit(7)),
    ):
        try:
            use()
        except (ValueError, Stop) as e:
            assert e is error
        assert state(module) == before
    seen.clear()
    module(**call(family))
    assert seen == ["called"]
    mine.remove()
