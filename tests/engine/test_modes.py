"""What a user has set (gradients, inference mode, frozen weights, training mode) changes no run, and is theirs again after it."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pellucid as pl
from pellucid.anatomy.modes import evaluating
from pellucid.errors import InputError, SiteError
from tests.zoo import build, tokenizer

PROMPT = ["The capital of France is", "he is in Rome"]
SITE = "layers.0.resid_post"
DIFFERENCE = pl.metrics.logit_difference(" Paris", " Rome")


def opened(family: str = "llama", change: Callable[[nn.Module], Any] = lambda m: m) -> pl.Model:
    module = build(family)
    change(module)
    return pl.load(module, tokenizer=tokenizer(module))


def state(module: nn.Module) -> list[Any]:
    flags = [(n, m.training) for n, m in module.named_modules()]
    return [flags, [(n, p.requires_grad, p.grad, p._version) for n, p in module.named_parameters()]]


# ---- no graph unless asked


def test_a_run_keeps_no_graph_unless_it_is_asked_for() -> None:
    model = opened()
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.module.parameters())
    run = model.run(PROMPT, keep=[SITE], edits=[pl.Scale("layers.1.mlp.out", 0.5)])
    assert not run.logits.requires_grad and not run.tensor(SITE).requires_grad
    asked = model.run(PROMPT, keep=[SITE], grad=True)
    weight = model.module.lm_head.weight
    slope = torch.autograd.grad(asked.logits[0, -1, 7], weight)[0]
    assert torch.allclose(slope[7], model.run(PROMPT, keep=["final_norm"]).tensor("final_norm")[0, -1], atol=1e-5)
    assert asked.tensor(SITE).requires_grad and weight.grad is None


def test_an_edit_that_requires_grad_asks_for_a_graph_where_gradients_are_on() -> None:
    model, vector = opened(), torch.zeros(32, requires_grad=True)
    edits = [pl.Steer(f"{SITE}@-1", vector)]
    logits = model.run(PROMPT, edits=edits).logits
    (slope,) = torch.autograd.grad(logits[:, -1, 7].sum(), vector)
    kept = model.run(PROMPT[0], keep=[f"{SITE}@-1"], grad_of=lambda x: x[:, -1, 7]).grad(f"{SITE}@-1")[0, 0]
    other = model.run(PROMPT[1], keep=[f"{SITE}@-1"], grad_of=lambda x: x[:, -1, 7]).grad(f"{SITE}@-1")[0, 0]
    row = model.run(PROMPT, keep=[f"{SITE}@-1"], grad_of=lambda x: x[:, -1, 7]).grad(f"{SITE}@-1")[:, 0].sum(0)
    assert torch.allclose(slope, row, atol=1e-6) and kept.shape == other.shape
    with torch.no_grad():
        assert not model.run(PROMPT, edits=edits).logits.requires_grad
        assert model.run(PROMPT, edits=edits, grad=True).logits.requires_grad


def test_components_keep_a_graph_of_residuals_that_require_grad_only() -> None:
    model = opened()
    resid = model.run(PROMPT[0], keep=["layers.0.resid_pre"]).tensor("layers.0.resid_pre")
    assert not model.layers[0](resid).requires_grad
    assert model.layers[0](resid.clone().requires_grad_()).requires_grad


# ---- what a run holds on to


def held(make: Callable[[], Any]) -> int:
    """Bytes of the storages that live because of what `make` returns."""
    gc.collect()
    before = _storages()
    kept = make()
    gc.collect()
    size = sum(n for place, n in _storages().items() if place not in before)
    del kept
    return size


def _storages() -> dict[int, int]:
    found = [
        x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)
    ]  # not those that others pretend with
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found if x.layout == torch.strided}


@pytest.mark.parametrize("site", [f"{SITE}@-1", "layers.1.mlp.neurons.3", "layers.1.attn.heads.0.z@2:4"])
def test_a_kept_vector_holds_little_more_than_itself(site: str) -> None:
    model = opened()
    inputs = model.inputs(["The city of Paris is in France and Mary went to the store"] * 4)
    model.run(inputs, keep=[site])  # positions are found once per batch
    with torch.no_grad():
        plain = held(lambda: model.module(**inputs.tensors))
    size = model.run(inputs, keep=[site]).tensor(site).nbytes
    assert held(lambda: model.run(inputs, keep=[site])) - plain <= 1.2 * size
    run = held(lambda: model.run(inputs, keep=[site], logits=False))
    assert run <= 1.2 * size


def test_what_is_kept_in_parts_reads_as_it_did_whole() -> None:
    model = opened()
    whole = model.run(
        PROMPT, keep=["layers.0.attn.z", SITE, "layers.1.attn.pattern", "layers.0.attn.heads.0.out"], grad_of=DIFFERENCE
    )
    some = [
        "layers.0.attn.heads.1.z",
        f"{SITE}@-1",
        f"{SITE}@0:2",
        "layers.1.attn.heads.0.pattern@1",
        "layers.0.attn.heads.0.out@-1",
    ]
    for options in ({}, {"grad_of": DIFFERENCE}):
        run = model.run(PROMPT, keep=some, **options)
        for site in [*some, f"{SITE}@1", "layers.0.attn.heads.1.z@-2"]:
            assert torch.equal(run.tensor(site), whole.tensor(site)), site
            if options and not site.endswith("out@-1"):
                assert torch.equal(run.grad(site), whole.grad(site)), site
    with pytest.raises(SiteError, match="was not kept in this run"):
        run.tensor(SITE)


def test_a_part_of_a_run_can_be_patched_in_but_has_no_mean() -> None:
    model = opened()
    part, whole = (model.run(PROMPT, keep=[s]) for s in (f"{SITE}@-1", SITE))
    other = ["he gave a drink to", "Mary went to the store"][:2]
    wanted = model.run(PROMPT, edits=[pl.Scale("embed", 0.5), pl.Patch(f"{SITE}@-1", whole)]).logits
    assert torch.equal(model.run(PROMPT, edits=[pl.Scale("embed", 0.5), pl.Patch(f"{SITE}@-1", part)]).logits, wanted)
    with pytest.raises(SiteError, match="was not kept"):
        model.run(other, edits=[pl.Ablate(f"{SITE}@-1", how="mean", reference=part)])


def test_a_run_can_end_at_its_last_site() -> None:
    model = opened()
    edits = [pl.Scale("layers.0.attn.out", 0.5)]
    whole, early = (model.run(PROMPT, keep=[SITE], edits=edits, logits=each) for each in (True, False))
    assert torch.equal(whole.tensor(SITE), early.tensor(SITE)) and early.edits == tuple(edits)
    calls: list[Any] = []
    hook = model.module.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.run(PROMPT, keep=[SITE], logits=False)
    hook.remove()
    assert not calls
    with pytest.raises(InputError, match="it has no logits"):
        early.logits  # noqa: B018
    x = model.run(PROMPT, keep=[SITE], logits=False, grad=True).tensor(SITE)
    assert torch.equal(x, model.run(PROMPT, keep=[SITE]).tensor(SITE)) and x.requires_grad
    for wrong in ({}, {"keep": [SITE], "grad_of": DIFFERENCE}):
        with pytest.raises(InputError, match="logits=False"):
            model.run(PROMPT, logits=False, **wrong)


# ---- evaluation mode


def test_training_mode_changes_no_number_and_is_restored_module_by_module() -> None:
    def dropping(module: nn.Module) -> None:
        for m in module.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.5

    still, moving = opened("gpt2", dropping), opened("gpt2", dropping)
    moving.module.train()
    moving.module.transformer.h[0].eval()
    before = state(moving.module)
    resid = still.run(PROMPT[0], keep=[SITE]).tensor(SITE)
    for use in (
        lambda m: m.run(PROMPT, keep=[SITE], grad_of=DIFFERENCE).grad(SITE),
        lambda m: m.run(PROMPT).logits,
        lambda m: m.run(PROMPT, grad=True).logits.detach(),
        lambda m: m.sweep(PROMPT, [pl.Ablate("layers.0.mlp.out")], DIFFERENCE).values,
        lambda m: m.generate(PROMPT[0], max_new_tokens=5).tokens,
        lambda m: m.layers[0:2](resid),
        lambda m: m.layers[1].attn.heads[0].weights.OV,
        lambda m: torch.tensor(pl.attribution.saliency(m, PROMPT[0]).values),
        lambda m: torch.tensor(pl.causal.ablation(m, PROMPT[0], metric=DIFFERENCE).data.effect.values),
        lambda m: torch.tensor(pl.lenses.logit_lens(m, PROMPT[0]).values),
    ):
        assert torch.equal(use(moving), use(still))
        assert state(moving.module) == before


def test_the_last_of_several_threads_restores_the_modes() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with evaluating(module):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with evaluating(module):
        thread.start()
        inside.wait(10)
    assert not module.training
    leave.set()
    thread.join()
    assert [m.training for m in module.modules()] == [True, True, False]


# ---- frozen weights, no_grad, inference mode


def pairs(model: pl.Model) -> Any:
    text = "The city of Paris is in France"
    return pl.tasks.Prompts.from_pairs(
        [text] * 2, [text.replace("Paris", "Rome")] * 2, [" Paris"] * 2, [" Rome"] * 2, model.tokenizer
    )


def values(result: Any) -> Tensor:
    kept = getattr(result, "result", result)
    data = kept.data
    data = data if hasattr(data, "data_vars") is False else data[next(iter(data.data_vars))]
    return torch.as_tensor(data.values.astype(float))


def aligned(model: pl.Model) -> Tensor:
    return model.run(PROMPT, keep=[SITE], grad_of=DIFFERENCE).grad(SITE)


TEXTS = [*PROMPT, "Mary and John went to the store", "he gave a drink to Mary"]
GRADIENTS: dict[str, Callable[[pl.Model], Tensor]] = {
    "grad_of": aligned,
    "saliency": lambda m: values(pl.attribution.saliency(m, PROMPT[0], " Paris")),
    "integrated gradients": lambda m: values(pl.attribution.integrated_gradients(m, PROMPT[0], " Paris", steps=4)),
    "deeplift": lambda m: values(pl.attribution.deeplift(m, PROMPT[0], " Paris")),
    "relevance": lambda m: values(pl.attribution.relevance_propagation(m, PROMPT[0], " Paris")),
    "attention gradients": lambda m: values(pl.attention.attention_gradient(m, PROMPT[0], " Paris")),
    "attribution patching": lambda m: values(pl.causal.attribution_patching(m, pairs(m), check=0)),
    "mediation": lambda m: values(pl.causal.mediation(m, pairs(m))),
    "edge attribution": lambda m: values(pl.circuits.edge_attribution(m, pairs(m), how="resample")),
    "edge attribution by integration": lambda m: values(
        pl.circuits.edge_attribution(m, pairs(m), how="resample", method="eap-ig-inputs", steps=2)
    ),
    "exact patching": lambda m: values(pl.circuits.exact_patching(m, pairs(m), how="zero")),
    "pruning": lambda m: pl.circuits.Pruning(steps=2).fit(m, pairs(m), how="resample").mask_,
    "direct logit attribution": lambda m: values(pl.lenses.direct_logit_attribution(m, PROMPT[0], " Paris")),
    "tuned lens": lambda m: pl.lenses.TunedLens(tokens=40, context=8, batch=2).fit(m, TEXTS * 3).weights_[SITE],
    "knowledge attribution": lambda m: values(pl.neurons.knowledge_attribution(m, PROMPT[0], " Paris", steps=2)),
    "activating inputs": lambda m: values(
        pl.neurons.activating_inputs(m, "layers.0.mlp.neurons.1", length=3, steps=1, restarts=1)
    ),
    "slopes of edited runs": lambda m: m.run(
        PROMPT, edits=[pl.Steer(SITE, torch.ones(32))], keep=["layers.1.mlp.out"], grad_of=DIFFERENCE
    ).grad("layers.1.mlp.out"),
}


@contextlib.contextmanager
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    model = opened("gpt2")
    with pl.quiet():
        return {name: use(model) for name, use in GRADIENTS.items()}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(
    "way", ["frozen", "no_grad", "inference_mode", "made in inference mode", "everything in inference mode"]
)
def test_gradients_do_not_depend_on_the_users_flags(name: str, way: str, wanted: dict[str, Tensor]) -> None:
    inference = "inference" in way
    with torch.inference_mode("made" in way or "everything" in way):
        module = build("gpt2")
        module.requires_grad_(way != "frozen")
        if "everything" in way:
            model = pl.load(module, tokenizer=tokenizer(module))
    if "everything" not in way:
        model = pl.load(module, tokenizer=tokenizer(module))
    before = state(model.module)
    modes = (
        torch.no_grad() if way == "no_grad" else
        torch.inference_mode() if inference and "made" not in way else contextlib.nullcontext()
    )  # fmt: skip
    with modes, pl.quiet():
        found = GRADIENTS[name](model)
    assert torch.allclose(found.double(), wanted[name].double(), atol=1e-6, equal_nan=True)
    assert state(model.module) == before


def test_vectors_made_in_inference_mode_are_used_as_any_other() -> None:
    model = opened()
    with torch.inference_mode():
        vector, ids = torch.ones(32), torch.tensor([[7, 8, 9]])
    options = {"keep": ["layers.1.resid_post"], "grad_of": pl.metrics.logit(7)}
    one = model.run(ids, edits=[pl.Scale(SITE, vector * 2), pl.ProjectOut(SITE, vector)], **options)
    two = model.run(
        [[7, 8, 9]], edits=[pl.Scale(SITE, torch.ones(32) * 2), pl.ProjectOut(SITE, torch.ones(32))], **options
    )
    assert torch.equal(one.grad("layers.1.resid_post"), two.grad("layers.1.resid_post"))
