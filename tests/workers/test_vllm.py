"""vLLM as a reader, held against transformers: with a stand-in everywhere, with vLLM itself where it is installed (`make test-vllm`)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

import pellucid as pl
from pellucid.engine.locate import locate
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.store import ActivationStore, store_activations
from pellucid.workers.vllm import PARTS, TOP, Tape
from tests.workers.vllm_standin import LLM, stand_in

SIZES = {"vocab_size": 97, "num_hidden_layers": 3, "num_attention_heads": 2}
SAME = 1e-5  # float32: ten times what was measured
VECTOR = torch.randn(64, generator=torch.Generator().manual_seed(5)) * 3
ROWS = [torch.randint(97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 20, 3, 12)]


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pl.Model:
    config = LlamaConfig(
        **SIZES, hidden_size=64, intermediate_size=96, num_key_value_heads=1, head_dim=32, eos_token_id=3
    )
    return pl.load(saved(config, tmp_path_factory.mktemp("llama")), tokenizer=False)


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=pytest.mark.vllm)])
def fast(request: pytest.FixtureRequest, model: pl.Model) -> Iterator[pl.VLLM]:
    """A reader whose steps hold 7 tokens, so that prompts are taken apart and rows change places."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            stand_in(patch)
        elif find_spec("vllm") is None:
            pytest.skip("vLLM is not installed (make test-vllm)")
        more = {} if request.param == "stand-in" else {"max_model_len": 100, "max_num_seqs": 4}
        with pl.VLLM(max_num_batched_tokens=7, **more) as made:
            made.open(model)
            yield made


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def opened(model: pl.Model) -> Iterator[pl.VLLM]:
    """One stand-in for tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        made = pl.VLLM()
        made.open(model)
        yield made


def off(there: Tensor, here: Tensor) -> float:
    """The largest relative error of a token."""
    return float(((there - here).norm(dim=-1) / here.norm(dim=-1)).max())


def left(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}


@pytest.mark.parametrize("rows", [ROWS, left(ROWS)], ids=["right", "left"])
def test_every_site_that_is_offered_is_what_it_is_here(model: pl.Model, fast: pl.VLLM, rows: Any) -> None:
    keep = ["embed", "final_norm", *(f"layers.*.{part}" for part in PARTS)]
    here, there = model.run(rows, keep=keep), model.run(rows, keep=keep, on=fast)
    real = here.inputs.stream("").mask.bool()
    assert off(there.logits[real], here.logits[real]) < SAME
    assert len(there.sites) == 17
    for site in there.sites:
        assert off(there.tensor(site)[real], here.tensor(site)[real]) < SAME, site
    last = model.run(rows, keep=["layers.2.resid_post@-1"], on=fast, logits=False)
    assert off(last.tensor("layers.2.resid_post@-1"), here.tensor("layers.2.resid_post@-1")) < SAME
    assert last.output is None
    assert there["layers.1.mlp.out"].dims == ("batch", "position", "d_model")


def edits() -> dict[str, Any]:
    return {
        "add": pl.Steer("layers.1.resid_post", VECTOR, 0.7),
        "add at the end": pl.Steer("layers.0.resid_pre@-1", VECTOR),
        "scale": pl.Scale("layers.1.attn.out", 2.5),
        "zero": pl.Ablate("layers.0.mlp.out"),
        "set in the middle": pl.Patch("layers.1.resid_mid@1:3", VECTOR),
        "all but the first": pl.Steer("layers.0.attn.out", VECTOR, tokens="1:"),
        "project out everywhere": pl.ProjectOut("layers.*.resid_post", VECTOR),
        "clamp": pl.Clamp("layers.2.resid_post", torch.stack([VECTOR, VECTOR.flip(0)]), 2.0),
        "turn": pl.Rotate("embed", VECTOR, 20.0),
        "the last norm": pl.Steer("final_norm@0", VECTOR),
        "one stream by two names": [pl.Scale("layers.1.resid_pre", 2.0), pl.Steer("layers.0.resid_post", VECTOR)],
        "the beginning of a block": pl.Ablate("layers.2.resid_pre@1"),
        "a summand and its sum": [pl.Scale("layers.1.mlp.out", 2.0), pl.Ablate("layers.1.resid_post@1")],
    }


@pytest.mark.parametrize("name", edits())
def test_edits_reach_the_later_layers(model: pl.Model, fast: pl.VLLM, name: str) -> None:
    keep, made = ["layers.*.resid_post", "layers.*.resid_pre", "layers.*.mlp.out"], edits()[name]
    plain, here = model.run(ROWS), model.run(ROWS, keep=keep, edits=made)
    there = model.run(ROWS, keep=keep, edits=made, on=fast)
    real = here.inputs.stream("").mask.bool()
    assert off(here.logits[real], plain.logits[real]) > 0.05  # the control: it does something
    assert off(there.logits[real], here.logits[real]) < SAME
    for site in there.sites:
        assert float((there.tensor(site)[real] - here.tensor(site)[real]).abs().max()) < 10 * SAME, (
            site
        )  # zeros among them
    assert torch.equal(model.run(ROWS, on=fast).logits, model.run(ROWS, on=fast).logits)  # and nothing of it is left


@pytest.mark.parametrize("name", ["add", "add at the end", "all but the first", "scale", None])
def test_what_is_written_under_edits_is_what_is_written_here(model: pl.Model, fast: pl.VLLM, name: str | None) -> None:
    made = [edits()[name]] if name else []
    here, there = (model.generate(ROWS, max_new_tokens=9, edits=made, on=on) for on in (None, fast))
    for row in range(len(ROWS)):
        assert there.ids(row) == here.ids(row)
    assert torch.allclose(there.log_probabilities, here.log_probabilities, atol=1e-4, equal_nan=True)
    assert (there.texts, there.ended, there.labels) == (here.texts, here.ended, here.labels)
    assert there.result.data.log_probability.shape == there.tokens.shape


def test_a_row_ends_with_its_mark(model: pl.Model, fast: pl.VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.generate(ROWS, max_new_tokens=6)
    monkeypatch.setattr(model.module.generation_config, "eos_token_id", [plain.ids(1)[2], 5000])
    here, there = model.generate(ROWS, max_new_tokens=6), model.generate(ROWS, max_new_tokens=6, on=fast)
    assert there.ended == here.ended
    assert "eos" in there.ended
    assert torch.equal(there.lengths, here.lengths)
    assert [there.ids(row) for row in range(4)] == [here.ids(row) for row in range(4)]


def test_draws_are_of_the_distribution_here(model: pl.Model, fast: pl.VLLM) -> None:
    def drawn(seed: int, n: int) -> Tensor:
        told = {"max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "num_return_sequences": n}
        return model.generate([ROWS[0]], seed=seed, on=fast, **told).tokens[:, 0]

    assert len({tuple(drawn(seed, 8).tolist()) for seed in range(3)}) > 1
    state = torch.get_rng_state()
    assert torch.equal(drawn(1, 8), drawn(1, 8))
    assert torch.equal(torch.get_rng_state(), state)
    n = 100 if "stand-in" in fast.name else 2000
    wanted = model.run([ROWS[0]]).logits[0, -1].softmax(-1)
    share = drawn(7, n).bincount(minlength=97) / n
    assert float((share - wanted).abs().max()) < 4 * float((wanted.max() / n) ** 0.5)


def test_a_corpus_is_stored_as_it_is_here(model: pl.Model, fast: pl.VLLM, tmp_path: Path) -> None:
    sites = ["layers.1.resid_post", "layers.2.mlp.out"]
    here = store_activations(model, ROWS * 2, sites, tmp_path / "here", dtype=torch.float32, shard_rows=40)
    there = store_activations(
        model, ROWS * 2, sites, tmp_path / "there", dtype=torch.float32, shard_rows=40, batch=3, on=fast
    )
    for column in ("tokens", "prompts", "positions"):
        assert torch.equal(
            *(torch.cat([s.shards(column, [n]) for n in range(len(s.index.shards))]) for s in (here, there))
        )
    for site in sites:
        assert (
            off(*(torch.cat([s.shards(site, [n]) for n in range(len(s.index.shards))]) for s in (there, here))) < SAME
        )
    assert there.index.corpus["reader"] == fast.name
    with pytest.raises(InputError, match="was stored with other ways to read a corpus"):
        store_activations(model, ROWS * 2, sites, tmp_path / "there", dtype=torch.float32, shard_rows=40, batch=3)
    with pytest.raises(Refused, match="leave compute= out"):
        store_activations(model, ROWS, sites, tmp_path / "other", compute=torch.bfloat16, on=fast)
    with pl.on(fast):
        inside = store_activations(model, ROWS[:1], sites, tmp_path / "inside")
    assert isinstance(inside, ActivationStore) and inside.index.corpus["reader"] == fast.name


def test_what_it_does_not_do_is_refused_by_name(model: pl.Model, fast: pl.VLLM) -> None:
    metric = pl.metrics.logit_difference(3, 5)
    source = model.run(ROWS, keep="layers.0.resid_post")
    moving = VECTOR.clone().requires_grad_()
    asked: dict[str, Any] = {
        "'layers.0.attn.heads.1' is not read by vLLM: it offers embed, final_norm": {"keep": "layers.0.attn.heads.1"},
        "'layers.0.mlp.neurons' is not read": {"keep": "layers.0.mlp.neurons"},
        "'layers.0.mlp.neurons.3' is not read": {"edits": pl.Ablate("layers.0.mlp.neurons.3")},
        "Patch at 'layers.0.resid_post' looks at more than a token": {"edits": pl.Patch("layers.0.resid_post", source)},
        "Ablate at 'embed' looks at more than a token": {"edits": pl.Ablate("embed", "mean")},
        "Replace at 'embed' looks at more": {"edits": pl.Replace("embed", torch.neg)},
        r"another vector for each row or position \(\[4, 1, 64\]\)": {
            "edits": pl.Steer("embed", VECTOR.expand(4, 1, 64))
        },
        "without gradients": {"edits": pl.Steer("embed", moving)},
        "computes without gradients": {"keep": "embed", "grad_of": metric},
    }
    for said, options in asked.items():
        with pytest.raises(Refused, match=said):
            model.run(ROWS, on=fast, **options)
    written: dict[str, Any] = {
        "keep= is not had": {"keep": "embed"},
        "stop= is not had": {"stop": 7},
        "monitors= is not had": {"monitors": [object()]},
        "has a condition": {"edits": pl.Steer("embed", VECTOR, when=lambda step: True)},
        "generating with num_beams= ": {"num_beams": 2},
        "generating with no_repeat_ngram_size= ": {"no_repeat_ngram_size": 2},
    }
    for said, options in written.items():
        with pytest.raises(Refused, match=said):
            model.generate(ROWS, on=fast, **options)
    with pytest.raises(Refused, match="it does no sweep"), pl.on(fast):
        model.sweep(ROWS[:1], [pl.Ablate("layers.0.mlp.out")], metric)
    with pytest.raises(Refused, match=r"does no .*: leave on= out"), pl.on(fast):
        pl.neurons.harvest(model, ROWS, "layers.0.mlp.neurons.*")
    with pytest.raises(InputError, match="vLLM does not take prompt 0, of 120 tokens"):
        model.run([[5] * 120], on=fast)
    with pytest.raises(InputError, match="shares out the pieces of longer work"):
        model.run(ROWS, on=pl.Processes(1))
    with pl.on(fast):  # a run of the block is one there, and says so where it cannot be
        assert off(model.run(ROWS[:1]).logits, model.run(ROWS[:1], on=pl.Here()).logits) < SAME
        with pytest.raises(Refused, match="not read by vLLM"):
            model.run(ROWS, keep="layers.0.attn.pattern")


def test_models_that_it_cannot_open_are_refused(model: pl.Model, standing: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory = pl.load(LlamaForCausalLM(model.module.config), tokenizer=False)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    t5.save_pretrained(tmp_path / "t5")
    for other in (memory, model.changed(pl.changed.Copied(("model.norm.weight",)))):
        with pytest.raises(Refused, match=r"save it \(module.save_pretrained\) and open the folder"):
            other.run(ROWS, on=pl.VLLM())
    with pytest.raises(Refused, match="no causal language model of one stack"):
        pl.load(tmp_path / "t5", tokenizer=False).run(ROWS, on=pl.VLLM())
    with pytest.raises(InputError, match="takes no enforce_eager="):
        pl.VLLM(enforce_eager=False)
    with pytest.raises(InputError, match="modules='ours': expected one of"):
        pl.VLLM(modules="ours")  # type: ignore[arg-type]


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pellucid.workers.vllm.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'pellucid\[vllm\]'"):
        pl.VLLM()


def test_it_leaves_this_process_as_it_was(model: pl.Model, standing: None) -> None:
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    wanted = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    threads = torch.set_num_threads
    with pl.VLLM(modules="vllm") as fast:
        fast.open(model)
        assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert torch.set_num_threads is threads
    told = LLM.opened[-1]
    assert told["enforce_eager"] and not told["enable_prefix_caching"] and not told["trust_remote_code"]
    assert (told["load_format"], told["dtype"], told["skip_tokenizer_init"]) == ("safetensors", "float32", True)


def test_classes_that_its_back_end_rewrites_are_given_back(
    model: pl.Model, standing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(model.module.model)
    before = kind.__bases__, kind.__init__, model.run(ROWS[:1]).logits

    def opened(self: Any, **options: Any) -> None:
        class Compiled:
            pass

        kind.__call__ = lambda *args, **more: None  # type: ignore[method-assign]
        kind.__init__ = lambda *args, **more: None  # type: ignore[method-assign,assignment]
        kind.__bases__ = (*kind.__bases__, Compiled)
        raise ValueError("it came no further")

    monkeypatch.setattr(LLM, "__init__", opened)
    with pytest.raises(Refused, match=r"vllm: it does not open there \(it came no further\); transformers: "):
        pl.VLLM().open(model)
    assert (kind.__bases__, kind.__init__) == before[:2]
    assert torch.equal(model.run(ROWS[:1]).logits, before[2])


def louder(made: Any) -> None:
    with torch.no_grad():
        made.layers[1].mlp.like.down_proj.weight.mul_(1.05)


def unscaled(made: Any) -> None:
    """Its attention writes half, and the layer makes up for it: all is equal but what the attention writes."""
    made.layers[1].self_attn.register_forward_hook(lambda m, args, out: out / 2)
    plain = made.layers[1].second.forward
    made.layers[1].second.forward = lambda h, residual: plain(h * 2, residual)


def deaf(made: Any) -> None:
    """What an attention writes is used before hooks see it: an edit there changes nothing."""
    attention, second = made.layers[1].self_attn, made.layers[1].second
    plain, seen = attention.forward, []
    attention.forward = lambda **given: seen.append(plain(**given)) or seen[-1].clone()
    second.register_forward_pre_hook(lambda m, args: (seen.pop(), args[1]))


def test_damage_is_found_and_named(model: pl.Model, standing: None) -> None:
    with pytest.raises(
        Refused, match=r"vllm: its logits are off by .* above 0\.001, on the probe; transformers: it does not open"
    ):
        pl.VLLM(wrong=louder).open(model)
    assert pl.VLLM(wrong=louder, tolerance=1.0).open(model)  # the tolerance is what decides
    fast = pl.VLLM(wrong=unscaled)
    assert off(model.run(ROWS[:1], keep="layers.1.resid_mid", on=fast).logits, model.run(ROWS[:1]).logits) < SAME
    with pytest.raises(
        Refused, match=r"'layers.1.attn.out' is not read by vLLM: none of its tensors is this one .*nearest is off by"
    ):
        model.run(ROWS, keep="layers.1.attn.out", on=fast)
    fast = pl.VLLM(wrong=deaf)
    assert len(model.run(ROWS, keep="layers.*.attn.out", on=fast).sites) == 3
    with pytest.raises(Refused, match=r"'layers.1.attn.out' is read by vLLM, but not edited: .* off by"):
        model.run(ROWS, edits=pl.Ablate("layers.1.attn.out"), on=fast)


def test_hooks_that_are_skipped_are_counted(model: pl.Model, standing: None) -> None:
    fast = pl.VLLM()
    engine = fast.open(model)
    port = next(p for p in engine.ports.values() if p.module.endswith("self_attn"))
    layer = engine.module.get_submodule(port.module.rpartition(".")[0])
    attention = layer.self_attn
    del layer._modules["self_attn"]
    layer.self_attn = attention.forward  # as a graph would call it
    engine.module.add_module("kept", attention)
    engine.ports = {t: p if p != port else type(p)("kept", p.side, p.keys) for t, p in engine.ports.items()}
    with pytest.raises(
        PellucidError, match=r"the hook on 'kept' was met by 0 of 44 tokens.*compiled graphs skip hooks"
    ):
        model.run(ROWS, keep="layers.*.attn.out", on=fast)
    with pytest.raises(PellucidError, match="our hooks saw 0 of 3 tokens"):
        Tape([[1, 2, 3]], {TOP}).check()


def test_rows_that_are_packed_otherwise_are_found(model: pl.Model, opened: pl.VLLM, standing: None) -> None:
    runner = opened.open(model).runner
    handle = runner.model.register_forward_pre_hook(lambda *a: runner.input_batch.req_ids.reverse())
    with pytest.raises(PellucidError, match="vLLM's packed tokens are not those of the prompts"):
        model.run(ROWS, on=opened)
    handle.remove()


def test_an_interrupted_call_leaves_nothing_in_the_engine(
    model: pl.Model, standing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = pl.VLLM()
    engine = fast.open(model).llm.llm_engine
    monkeypatch.setattr(engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.run(ROWS, on=fast)
    assert sorted(engine.aborted) == ["0", "1", "2", "3"]
    assert not engine.has_unfinished_requests()  # and a new one is opened, since a step was not ended
    assert off(model.run(ROWS[:1], on=fast).logits, model.run(ROWS[:1]).logits) < SAME


def test_a_reader_is_for_one_model_as_it_was_opened(model: pl.Model, standing: None, tmp_path: Path) -> None:
    other = pl.load(model.source["source"], tokenizer=False)
    fast = pl.VLLM(max_num_batched_tokens=50)
    assert repr(fast) == "pl.VLLM(max_num_batched_tokens=50)"
    assert fast.open(model) is fast.open(other)  # the same weights
    with torch.no_grad():
        other.module.model.norm.weight.add_(1)
    with pytest.raises(Refused, match="holds other weights than"):
        other.run(ROWS, on=fast)
    fast.close()
    with pytest.raises(Refused, match="its logits are off by"):
        other.run(ROWS, on=fast)


# ---- vLLM alone


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make test-vllm)")
@pytest.mark.parametrize(
    ("family", "modules"), [("gpt2", "auto"), ("qwen3", "auto"), ("llama", "transformers"), ("qwen3", "bfloat16")]
)
def test_other_families_and_the_other_back_end(tmp_path: Path, family: str, modules: Any) -> None:
    configs: dict[str, Any] = {
        "gpt2": lambda: GPT2Config(
            vocab_size=97, n_embd=64, n_layer=3, n_head=2, n_positions=128, eos_token_id=3, bos_token_id=3
        ),
        "qwen3": lambda: Qwen3Config(**SIZES, hidden_size=64, intermediate_size=96, num_key_value_heads=1, head_dim=32),
        "llama": lambda: LlamaConfig(**SIZES, hidden_size=64, intermediate_size=96, num_key_value_heads=1, head_dim=32),
    }
    half, model = modules == "bfloat16", pl.load(saved(configs[family](), tmp_path), tokenizer=False)
    if half:
        model, modules = pl.load(tmp_path, tokenizer=False, dtype=torch.bfloat16), "auto"
    kind: type[PreTrainedModel] = type(model.module)
    slack = 0.05 if half else SAME
    with pl.VLLM(modules=modules, max_num_batched_tokens=16, max_num_seqs=4, max_model_len=64) as fast:
        engine = fast.open(model)
        assert not engine.unlike
        middle = {locate(model.anatomy, site).tap for site in model.sites("layers.*.resid_mid")}
        assert set(engine.uneditable) <= middle  # which no module of some hands on
        keep = [f"layers.*.{part}" for part in PARTS]
        for made in ([], [pl.Steer("layers.1.resid_post@-1", VECTOR), pl.Scale("layers.0.attn.out", 2.0)]):
            here, there = model.run(ROWS, keep=keep, edits=made), model.run(ROWS, keep=keep, edits=made, on=fast)
            real = here.inputs.stream("").mask.bool()
            assert off(there.logits[real].float(), here.logits[real].float()) < slack
            for site in there.sites:
                assert off(there.tensor(site)[real].float(), here.tensor(site)[real].float()) < slack, site
        again = kind(model.module.config)  # its classes are what they were
        assert sys.modules[kind.__module__].__dict__[kind.__name__] is type(again)
        print(family, modules, "logits off by", off(there.logits[real].float(), here.logits[real].float()))
