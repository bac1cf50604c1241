"""A changed model shares what is untouched, is proven where it is touched, and leaves the old one bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pellucid
from pellucid.anatomy.fingerprint import weight_digest
from pellucid.changed import Added, Change, Copied, Exchanged, Replaced, applied, slots, twin
from pellucid.controls import Shuffled
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.results import Result
from tests.engine.hand import PROMPTS, opened
from tests.zoo import build, inputs, tokenizer

# family -> a matrix in the middle of it, and whether its embedding is the unembedding too
MATRICES = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "gpt2": "transformer.h.1.mlp.c_proj.weight",  # Conv1D: [in, out]
    "bert": "bert.encoder.layer.0.output.dense.weight",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wo.weight",
    "bart": "model.encoder.layers.0.fc2.weight",
    "mixtral": "model.layers.1.mlp.experts.down_proj",  # fused experts: [expert, out, in]
}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(*slot) for name, slot in slots(module).items()}


def drawn(model: Model, name: str, seed: int = 0) -> Tensor:
    old = tensors(model.module)[name]
    return torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)).to(old) / 3


def low_rank(model: Model, name: str, rank: int = 2) -> Added:
    *many, rows, columns = tensors(model.module)[name].shape
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*many, *shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return Added(name, left, right)


def native(model: Model, prompt: str = PROMPTS[0]) -> Tensor:
    with torch.no_grad():
        return model.module(**model.inputs(prompt).tensors).logits


# ---- sharing, undo, digest


@pytest.mark.parametrize("family", MATRICES)
def test_a_changed_model_shares_every_other_tensor_and_the_old_one_keeps_every_bit(family):
    old, name = opened(family), MATRICES[family]
    kept = {n: t.clone() for n, t in tensors(old.module).items()}
    digest, before = old.digest, native(old)
    change = Replaced(name, drawn(old, name))
    new = old.changed(change)
    ours, theirs = tensors(new.module), tensors(old.module)
    assert ours.keys() == theirs.keys()
    assert {n for n in ours if ours[n].data_ptr() != theirs[n].data_ptr()} == {name}
    assert torch.equal(ours[name], change.tensor)
    assert all(torch.equal(theirs[n], t) for n, t in kept.items())
    assert not set(map(id, new.module.modules())) & set(map(id, old.module.modules()))
    assert torch.equal(native(old), before) and old.digest == digest
    assert not torch.allclose(native(new), before)
    assert new.digest == weight_digest(new.module) != digest
    assert new.changed(Replaced(name, kept[name])).digest == digest  # the weights come back, and their digest
    assert new.anatomy.complete == old.anatomy.complete
    assert [(p.name, p.holds) for p in new.anatomy.proofs] == [(p.name, p.holds) for p in old.anatomy.proofs]


@pytest.mark.parametrize("family", MATRICES)
def test_runs_and_generation_are_those_of_a_module_with_the_same_weights(family):
    """Every way to run: kept sites, a cache, a sweep; the reference is a deep copy written to in place."""
    old, name = opened(family), MATRICES[family]
    change = low_rank(old, name)
    new = old.changed([change, Added(name, change.left, -2 * change.right)])
    module = copy.deepcopy(old.module)
    with torch.no_grad():
        where = tensors(module)[name]
        where.copy_((where.double() - change.left.double() @ change.right.double()).float())
    reference = pellucid.load(module, tokenizer=old.tokenizer, probe=old.anatomy.inputs)
    site = "encoder.layers.*.resid_post" if family in ("t5", "bart") else "layers.*.resid_post"
    ours, theirs = new.run(PROMPTS[0], keep=site), reference.run(PROMPTS[0], keep=site)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    for each in ours.sites:
        torch.testing.assert_close(ours.tensor(each), theirs.tensor(each), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(native(new), native(reference), atol=1e-5, rtol=1e-5)
    if family != "bert":
        for use_cache in (True, False):
            said = new.generate(PROMPTS[:2], max_new_tokens=6, use_cache=use_cache)
            assert torch.equal(said.tokens, reference.generate(PROMPTS[:2], max_new_tokens=6, use_cache=False).tokens)


def test_the_map_of_the_new_model_runs_the_new_modules():
    """Steps of the head and of paths close over modules: those must be the new tree's."""
    old = opened("llama")
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        new = old.changed(Replaced(name, drawn(old, name)))
        assert new.anatomy.complete
        final = new.run(PROMPTS[0], keep="layers.-1.resid_post").tensor("layers.-1.resid_post")
        for step in new.anatomy.head.steps:
            final = step(final)
        torch.testing.assert_close(final, native(new), atol=1e-5, rtol=1e-5)


def test_changes_stack_in_order_and_any_of_them_can_be_left_out():
    old = opened("gpt2")
    one = low_rank(old, MATRICES["gpt2"])
    two = Replaced("transformer.ln_f.bias", torch.ones(32))
    three = Added(MATRICES["gpt2"], one.left[:, :1], one.right[:1])
    every = old.changed(one).changed([two, three])
    assert every.loaded.changes == (one, two, three)
    assert every.digest == old.changed([one, two, three]).digest
    back = Replaced("transformer.ln_f.bias", tensors(old.module)["transformer.ln_f.bias"])
    assert old.changed([one, three]).digest == every.changed(back).digest
    assert old.changed([]).digest == old.digest
    for word in ("Added(transformer.h.1.mlp.c_proj.weight)", "1 more"):
        assert word in every.name and word in repr(every)
    assert every.named == old.named and old.loaded.changes == ()


def test_the_provenance_of_a_result_tells_the_change():
    old = opened("llama")
    new = old.changed(Replaced("model.norm.weight", torch.ones(32)))
    about = [pellucid.lenses.logit_lens(m, PROMPTS[0]).provenance for m in (old, new)]
    assert about[0].digest == old.digest != about[1].digest == new.digest
    assert "Replaced(model.norm.weight)" in about[1].model and "Replaced" not in about[0].model


def test_the_program_of_a_result_makes_the_change_again(tmp_path, monkeypatch):
    old = opened("llama")
    change = low_rank(old, MATRICES["llama"])
    new = old.changed([change, Shuffled(1, keep=(MATRICES["llama"],))])
    found = pellucid.lenses.logit_lens(new, PROMPTS[0])
    monkeypatch.chdir(tmp_path)
    found.save("result.zip")
    space: dict[str, Any] = {"module": old.module, "tokenizer": old.tokenizer}
    exec(Result.load("result.zip").provenance.code(), space)
    assert space["model"].digest == new.digest
    for name in found.data:
        if found.data[name].dtype.kind == "f":
            np.testing.assert_allclose(space["result"].data[name], found.data[name], atol=1e-6)


def test_changes_are_values_that_print_and_compare():
    x = torch.arange(6.0).view(2, 3)
    one, two = Replaced("a.weight", x), Replaced("a.weight", x.clone())
    assert one == two and hash(one) == hash(two) and len({one, two}) == 1
    assert one != Replaced("a.weight", x + 1) and one != Replaced("b.weight", x) and one != Added("a.weight", x, x.T)
    assert repr(one).startswith("Replaced(parameter='a.weight', tensor=<float32[2, 3] ")
    assert one.settings().keys() == {"parameter", "tensor"}
    again = Added(**Added("w", x, x.T, part=(1,), ties="apart").settings())
    assert again == Added("w", x, x.T, part=(1,), ties="apart")
    with pytest.raises(AttributeError):
        one.parameter = "b"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99)), max_size=6))
def test_whatever_is_changed_the_last_change_of_a_parameter_counts_and_nothing_else_moves(picks):
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    names = [n for n, _ in module.named_parameters()]
    kept = copy.deepcopy(module.state_dict())
    changes = [Replaced(names[i], torch.full_like(module.get_parameter(names[i]), float(v))) for i, v in picks]
    new = applied(module, changes)
    last = {names[i]: float(v) for i, v in picks}
    for name in names:
        assert torch.equal(module.state_dict()[name], kept[name])
        if name in last:
            assert bool((new.get_parameter(name) == last[name]).all())
        else:
            assert new.get_parameter(name).data_ptr() == module.get_parameter(name).data_ptr()


# ---- every kind of weight


def test_experts_are_changed_one_by_one():
    old, name = opened("mixtral"), MATRICES["mixtral"]
    w = tensors(old.module)[name]
    left, right = torch.randn(w.shape[1], 1), torch.randn(1, w.shape[2])
    new = tensors(old.changed(Added(name, left, right, part=(2,))).module)[name]
    assert [i for i in range(len(w)) if not torch.equal(new[i], w[i])] == [2]
    torch.testing.assert_close(new[2], w[2] + left @ right)


def test_bfloat16_is_rounded_once_and_frozen_weights_stay_frozen():
    module = build("llama").bfloat16().requires_grad_(False)
    old = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    change = low_rank(old, MATRICES["llama"])
    new = tensors(old.changed(change).module)[MATRICES["llama"]]
    w = tensors(module)[MATRICES["llama"]]
    assert torch.equal(new, (w.double() + change.left.double() @ change.right.double()).bfloat16())
    assert not any(p.requires_grad for p in old.changed(change).module.parameters())
    assert old.changed(Replaced(MATRICES["llama"], w.float())).digest == old.digest


def test_gradients_and_freezing_are_each_models_own():
    old = opened("llama")
    new = old.changed(Copied((MATRICES["llama"],)))
    new.module.requires_grad_(False)
    mine = tensors(new.module)[MATRICES["llama"]].requires_grad_()
    new.module(**new.inputs(PROMPTS[0]).tensors).logits.sum().backward()
    before = old.digest
    torch.optim.SGD([mine], lr=0.1).step()
    assert all(p.requires_grad and p.grad is None for p in old.module.parameters())
    assert old.digest == before == weight_digest(old.module) != new.digest


def test_a_change_in_place_of_a_shared_tensor_shows_in_both_digests():
    module = copy.deepcopy(build("llama"))
    old = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    new = old.changed(Replaced("model.norm.weight", torch.ones(32) * 2))
    before = old.digest, new.digest
    with torch.no_grad():
        module.lm_head.weight[3, 3] += 1
    assert old.digest != before[0] and new.digest == weight_digest(new.module) != before[1]


class Adapted(nn.Module):
    """LoRA (Hu et al. 2021) as peft lays it out: the frozen layer inside, its low-rank addition beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
def test_lora_weights_are_changed_like_others(part):
    module = copy.deepcopy(build("llama"))
    module.model.layers[1].mlp.down_proj = Adapted(module.model.layers[1].mlp.down_proj)
    old = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    name = f"model.layers.1.mlp.down_proj.{part}.weight"
    new = old.changed(Replaced(name, drawn(old, name)))
    assert new.anatomy.complete == old.anatomy.complete and float((native(new) - native(old)).abs().max()) > 1e-4
    ours, theirs = tensors(new.module), tensors(old.module)
    assert {n for n in ours if ours[n].data_ptr() != theirs[n].data_ptr()} == {name}
    assert ours[name].requires_grad == (part != "base_layer")


def test_a_model_from_a_gguf_file_is_changed_and_cheap_to_prove(smollm2):
    name = "model.layers.6.mlp.down_proj.weight"
    change = low_rank(smollm2, name, 1)
    new = smollm2.changed(change)
    assert new.anatomy.complete and new.digest != smollm2.digest
    shared = [n for n, t in tensors(new.module).items() if t.data_ptr() == tensors(smollm2.module)[n].data_ptr()]
    assert set(tensors(new.module)) - set(shared) == {name}
    assert "Added(model.layers.6.mlp.down_proj.weight)" in repr(new)


def test_quantised_and_offloaded_and_absent_parameters_are_refused_by_name():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, device="meta"))
    module.register_parameter("packed", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(Refused, match=r"packed cannot be changed: it is quantised.*Parameter of int8"):
        applied(module, [Replaced("packed", torch.zeros(4))])
    with pytest.raises(Refused, match="1.weight cannot be changed: it is offloaded"):
        applied(module, [Replaced("1.weight", torch.zeros(4, 4))])
    with pytest.raises(InputError, match="no parameter '0.weights'; did you mean '0.weight'"):
        applied(module, [Replaced("0.weights", torch.zeros(4, 3))])
    with pytest.raises(InputError, match=r"0.weight is \[4, 3\], and its new value is \[3, 4\]"):
        applied(module, [Replaced("0.weight", torch.zeros(3, 4))])
    with pytest.raises(InputError, match=r"left @ right is \[3, 4\], and 0.weight is \[4, 3\]"):
        applied(module, [Added("0.weight", torch.zeros(3, 1), torch.zeros(1, 4))])
    with pytest.raises(InputError, match="do not multiply"):
        applied(module, [Added("0.weight", torch.zeros(4, 2), torch.zeros(1, 3))])
    with pytest.raises(InputError, match="expected changes"):
        applied(module, [("0.weight", torch.zeros(4, 3))])


# ---- tied weights


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_one_side_of_a_tie_is_refused_unless_it_is_said_what_becomes_of_the_other(family):
    module = build(family)
    embedding = next(n for n, t in tensors(module).items() if t is module.get_input_embeddings().weight)
    ties = {n for n, t in tensors(module).items() if t is tensors(module)[embedding]}
    assert len(ties) > 1
    old = opened(family)
    other = drawn(old, embedding)
    with pytest.raises(Refused, match="pass ties='together'") as refusal:
        old.changed(Replaced(embedding, other))
    assert all(name in str(refusal.value) for name in ties)
    together = old.changed(Replaced(embedding, other, ties="together"))
    assert together.anatomy.complete and len({id(tensors(together.module)[n]) for n in ties}) == 1
    unembedding = next(n for n, (m, _) in slots(module).items() if m is module.get_output_embeddings())
    apart = old.changed(Replaced(unembedding, other, ties="apart"))
    assert torch.equal(tensors(apart.module)[unembedding], other)
    assert torch.equal(apart.module.get_input_embeddings().weight, module.get_input_embeddings().weight)
    assert tensors(old.module)[embedding] is tensors(old.module)[unembedding]
    for new in (together, apart):
        reference = copy.deepcopy(module)
        head = reference.get_output_embeddings()
        if new is apart:
            head.weight = nn.Parameter(head.weight.detach().clone())
        with torch.no_grad():
            head.weight.copy_(other)
            expected = reference(**old.inputs(PROMPTS[0]).tensors).logits
        torch.testing.assert_close(native(new), expected)


def test_a_module_that_is_listed_twice_is_no_tie():
    shared = nn.Linear(2, 2)
    module = nn.ModuleList([shared, shared])
    new = applied(module, [Replaced("1.weight", torch.ones(2, 2))])
    assert new[0] is new[1] and torch.equal(new[0].weight, torch.ones(2, 2))
    assert applied(module, [Exchanged("0", nn.Linear(2, 3))])[1].out_features == 3


# ---- proofs


@dataclass(frozen=True, eq=False, repr=False)
class Sabotaged(Change):
    """A module that adds something of its own to what it returns, in a tree that looks the same."""

    module: str

    def apply(self, tree: nn.Module) -> None:
        owner = tree.get_submodule(self.module)
        owner.weight = nn.Parameter(owner.weight.detach().clone())  # the touch
        plain = owner.forward
        owner.forward = lambda x: plain(x) + x.roll(1, 1).sum(-1, keepdim=True)


def test_a_proof_fails_on_a_touched_module_that_is_sabotaged_and_names_its_block():
    new = opened("llama").changed(Sabotaged("model.layers.1.mlp.down_proj"))
    failed = {p.name: p.detail for p in new.anatomy.proofs if p.holds is False}
    assert "neurons" in failed and "layers.1" in failed["neurons"]
    assert "proofs failed" in repr(new)
    assert opened("llama").anatomy.complete
    with pytest.raises(Refused, match="neurons"):
        new.run(PROMPTS[0], keep="layers.1.mlp.neurons")
    new.run(PROMPTS[0], keep="layers.0.mlp.neurons")


def test_weights_that_are_no_numbers_are_not_proven():
    name = MATRICES["llama"]
    new = opened("llama").changed(Replaced(name, drawn(opened("llama"), name) * float("nan")))
    assert not new.anatomy.complete


def test_only_what_was_touched_is_proven_again_unless_the_structure_changed(monkeypatch):
    from pellucid.anatomy import opening

    asked: list[Any] = []
    plain: Callable[..., Any] = opening.touched
    monkeypatch.setattr(opening, "touched", lambda *args: asked.append(plain(*args)) or asked[-1])
    old = opened("llama")
    old.changed(Replaced("model.layers.1.input_layernorm.weight", torch.ones(32)))
    old.changed(Replaced("lm_head.weight", drawn(old, "lm_head.weight")))
    old.changed(Copied())
    old.changed(Exchanged("model.layers.0.mlp.act_fn", nn.Tanh()))
    everything = {("", b.index) for b in old.anatomy.stacks[0].blocks}
    assert asked == [{("", 1)}, set(), everything, None]


def test_an_exchanged_module_is_a_twin_of_the_given_one():
    old = opened("llama")
    by = nn.Tanh()
    new = old.changed(Exchanged("model.layers.0.mlp.act_fn", by))
    assert (
        isinstance(new.module.model.layers[0].mlp.act_fn, nn.Tanh) and new.module.model.layers[0].mlp.act_fn is not by
    )
    assert new.anatomy.complete and float((native(new) - native(old)).abs().max()) > 1e-4
    with pytest.raises(InputError, match="no module 'model.layers.9'"):
        old.changed(Exchanged("model.layers.9", by))


def test_a_twin_keeps_what_hangs_on_parameters_and_modes():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    module[0].weight.note = "kept"
    module[0].plain = torch.ones(2)
    new = twin(module)
    assert new.training and new[0].weight.note == "kept" and new[0].plain.data_ptr() == module[0].plain.data_ptr()


# ---- what was fitted belongs to weights


def test_what_was_fitted_is_refused_on_changed_weights_and_in_place_changes_count():
    module = copy.deepcopy(build("llama"))
    old = pellucid.load(module, tokenizer=tokenizer(module), probe=inputs(module))
    texts = ["Mary went to the store", "John of Rome gave a drink"] * 4
    lens = pellucid.lenses.TunedLens(tokens=40, context=8).fit(old, texts)
    harvest = pellucid.neurons.harvest(old, texts)
    new = old.changed(Replaced("model.norm.weight", torch.full((32,), 2.0)))
    for fitted in (lens, harvest):
        fitted.check(old)
        with pytest.raises(InputError, match="belongs to other weights"):
            fitted.check(new)
    kept = module.model.norm.weight.detach().clone()
    with torch.no_grad():
        module.model.norm.weight.mul_(2)
    for fitted in (lens, harvest):
        with pytest.raises(InputError, match="belongs to other weights"):
            fitted.check(old)
    with torch.no_grad():
        module.model.norm.weight.copy_(kept)
    for fitted in (lens, harvest):
        fitted.check(old)
