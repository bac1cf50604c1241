"""Editing facts: subjects, keys, second moments, values, and the changed model."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pellucid as pl
from pellucid.errors import InputError, Refused, SiteError
from pellucid.surgery import Edited, Fact, KeyCovariance, Search, edit
from pellucid.surgery.keys import batched, keys, memories, rows, subject_row
from tests.zoo import build, tokenizer

WORDS = [
    "The",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "and",
    "Rome",
    "in",
    "Italy",
    "he",
    "went",
    "to",
    "a",
    "store",
    "John",
    "gave",
    "Mary",
    "drink",
    "city",
    "When",
]
QUICK = Search(steps=4)


@cache
def opened(family: str) -> pl.Model:
    module = build(family).eval()
    return pl.load(module, tokenizer=tokenizer(module))


def texts(n: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=20)) for _ in range(n)]


@cache
def moments(family: str, layers: tuple[int, ...] = (0, 1)) -> KeyCovariance:
    return KeyCovariance(layers=layers, ridge=0.01).fit(opened(family), texts())


def facts(masked: bool = False) -> list[Fact]:
    end = " <mask>" if masked else ""
    return [
        Fact("The capital of {} is" + end, "France", " Rome", " Paris"),
        Fact("{} is the city of" + end, "Mary", " Italy" + ("" if masked else " and"), " France"),
    ]


def edited(family: str, how: str = "rome", layers: Any = 0, **options: Any) -> Edited:
    options = {"covariance": moments(family), "contexts": ("he went",), "search": QUICK, **options}
    return edit(opened(family), options.pop("facts", facts(family == "bert")), how, layers=layers, **options)


# ---- subjects and keys


@pytest.mark.parametrize(
    ("prompt", "subject", "piece"),
    [
        ("Mary of France and France is", "France", 4),  # the last one
        ("The capital of {} is in France", "France", 3),  # the one that is meant
        ("he gave Marys drink to Mary is", "Mary", None),  # not inside another word
    ],
)
def test_a_subject_is_found_by_its_characters(prompt: str, subject: str, piece: int | None) -> None:
    model = opened("llama")
    row = subject_row(model, Fact(prompt, subject, " Rome"), 0)
    ids = model.tokenizer(prompt.replace("{}", subject))["input_ids"]
    assert list(row.ids) == ids
    assert row.at == (piece if piece is not None else len(ids) - 2)


def test_a_key_is_what_enters_the_down_projection_at_any_padding() -> None:
    model = opened("llama")
    given = [subject_row(model, f, i, c, f.new) for i, f in enumerate(facts()) for c in ("", "he went to the store")]
    memory = memories(model, 1, given)
    found, _ = keys(model, memory, given)
    for row, k in zip(given, found, strict=True):
        kept: list[torch.Tensor] = []
        hook = model.module.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
            lambda m, a, kept=kept: kept.append(a[0])
        )
        with torch.no_grad():
            model.module(torch.tensor([row.ids]))
        hook.remove()
        torch.testing.assert_close(kept[0][0, row.at].double(), k, rtol=1e-4, atol=1e-5)
    for _, inputs in batched(model, given):
        columns = inputs.stream("").find("edited")
        assert columns is not None and len(set(columns.flatten().tolist())) == 1  # one column: the suffix is short


def test_the_second_moment_is_the_mean_of_outer_products(tmp_path: Path) -> None:
    model, corpus = opened("llama"), ["he went to a store", "France", "The capital of France is Paris"]
    with pytest.warns(UserWarning, match="too few"):
        c = KeyCovariance(layers=1).fit(model, corpus)
    total, n = torch.zeros(48, 48, dtype=torch.float64), 0
    for text in corpus:
        run = model.run(text, keep=["layers.1.mlp.neurons"])
        k = run.tensor("layers.1.mlp.neurons")[0].double()
        total, n = total + k.T @ k, n + len(k)
    torch.testing.assert_close(c.matrix("1"), total / n, rtol=1e-5, atol=1e-8)
    with pytest.raises(Refused, match="no inverse"):
        c.solve("1", torch.ones(1, 48))
    again = KeyCovariance.load(c.save(tmp_path / "c.safetensors"))
    again.check(model)
    assert torch.equal(again.matrix("1"), c.matrix("1"))
    with pytest.raises(InputError, match="other weights"):
        again.check(opened("gpt2"))


def test_experts_keys_are_weighted_and_their_own() -> None:
    model = opened("mixtral")
    c = KeyCovariance(layers=0, ridge=0.1).fit(model, texts(12))
    total, n = torch.zeros(48, 48, dtype=torch.float64), 0
    for text in texts(12):
        run = model.run(text, keep=["layers.0.mlp.experts.1.neurons", "layers.0.mlp.router"])
        w = run.tensor("layers.0.mlp.router")[0, :, 1].double()
        k = run.tensor("layers.0.mlp.experts.1.neurons")[0].double() * w[:, None]
        total, n = total + k.T @ k, n + int((w != 0).sum())
    torch.testing.assert_close(c.matrix("0.1"), total / n, rtol=1e-4, atol=1e-8)


def test_reading_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pellucid.surgery import covariance

    monkeypatch.setattr(covariance, "BATCH", 25)  # segments of 200 tokens
    model, file = opened("llama"), tmp_path / "c.safetensors"
    whole = KeyCovariance(layers=0).fit(model, texts(30))
    read = covariance.KeyCovariance._read
    left = [6]

    def stops(self: Any, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        read(self, *args)

    monkeypatch.setattr(covariance.KeyCovariance, "_read", stops)
    with pytest.raises(KeyboardInterrupt):
        KeyCovariance(layers=0).fit(model, texts(30), checkpoint=file)
    left[0] = 1000
    resumed = KeyCovariance(layers=0).fit(model, texts(30), checkpoint=file)
    torch.testing.assert_close(resumed.matrix("0"), whole.matrix("0"))
    left[0] = 0  # complete: nothing is run
    assert torch.equal(KeyCovariance(layers=0).fit(model, texts(30), checkpoint=file).matrix("0"), resumed.matrix("0"))
    with pytest.raises(InputError, match="name another file"):
        KeyCovariance(layers=1).fit(model, texts(30), checkpoint=file)


# ---- the changed model

FAMILIES = ["llama", "gpt2", "gemma3_text", "mixtral", "falcon", "gptj", "t5", "bert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_gets_its_value_on_every_family(family: str) -> None:
    model = opened(family)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    made = edited(family)
    memory = made.values.memory[0]
    moved = memory.weight(made.model) - memory.weight(model)
    torch.testing.assert_close((moved @ made.values.keys[-1]), made.values.delta[-1], rtol=1e-4, atol=1e-4)
    assert float(made.values.history[-1].mean()) < float(made.values.history[0].mean())
    data = made.result.data
    assert bool((data.new_after >= data.new_before * 0.99).all())
    assert made.undo() is model
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    touched = [n for n, p in made.model.module.named_parameters() if not torch.equal(p, model.module.get_parameter(n))]
    assert touched == [memory.parameter]


def test_the_residual_moves_by_delta() -> None:
    model, made = opened("llama"), edited("llama", facts=facts()[:1], contexts=())
    row = subject_row(model, facts()[0], 0)
    site = f"layers.0.resid_post@{row.at}"
    prompt = torch.tensor([row.ids])
    old, new = (m.run(prompt, keep=[site]).tensor(site)[0, 0].double() for m in (model, made.model))
    torch.testing.assert_close(new - old, made.values.delta[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["memit", "alphaedit", "emmet"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_method(family: str, how: str) -> None:
    made = edited(family, how)
    memory = made.values.memory[0]
    moved = memory.weight(made.model) - memory.weight(opened(family))
    reached = (moved @ made.values.keys.T * made.values.delta.T).sum(0) / made.values.delta.square().sum(1)
    assert float(reached.mean()) == pytest.approx(1.0 if how == "emmet" else 0.9, abs=0.15)


def test_memit_spreads_over_layers_and_ends_at_its_values() -> None:
    module = build("t5").eval()
    model = pl.load(module, tokenizer=tokenizer(module))
    c = KeyCovariance(layers=(0, 1), ridge=0.01).fit(model, texts())
    made = edit(model, facts(), "memit", layers=[0, 1], covariance=c, contexts=(), search=QUICK, share=1.0)
    for i, fact in enumerate(facts()):
        row = subject_row(model, fact, 0)
        site = f"encoder.layers.1.resid_post@{row.at}"
        old, new = (m.run(str(fact.asked), keep=[site]).tensor(site)[0, 0].double() for m in (model, made.model))
        torch.testing.assert_close(new - old, made.values.delta[i], rtol=1e-3, atol=1e-3)
    assert list(made.result.data.layer.values) == [0, 1]


def test_edits_follow_each_other_hold_old_keys_and_are_saved(tmp_path: Path) -> None:
    model = opened("llama")
    one = edited("llama", "memit", facts=facts()[:1])
    two = edit(
        one.model,
        facts()[1:],
        "memit",
        layers=0,
        covariance=moments("llama"),
        contexts=("he went",),
        search=QUICK,
        after=one,
    )
    assert len(two.keys["0"]) == 2 and two.undo() is one.model and two.undo() is not model
    memory = two.values.memory[0]
    shift = (memory.weight(two.model) - memory.weight(one.model)) @ one.keys["0"][0]
    assert float(shift.norm()) < 0.2 * float(one.values.delta.norm())  # held
    file = two.save(tmp_path / "edit.safetensors")
    again = model.changed(file)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), two.model.module.parameters(), strict=True))
    assert two.model.undo(0, 1) is model if len(two.model.loaded.changes) == 2 else True
    with pytest.raises(InputError, match="another model"):
        edit(model, facts(), covariance=moments("llama"), layers=0, after=one)


def test_an_interrupted_edit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pellucid.surgery.editing.measured", fails)
    with pytest.raises(KeyboardInterrupt):
        edited("llama")
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_values_of_many_facts_are_those_of_each_alone() -> None:
    both = edited("llama", contexts=())
    for i, fact in enumerate(facts()):
        alone = edited("llama", contexts=(), facts=[fact])
        torch.testing.assert_close(alone.values.delta[0], both.values.delta[i], rtol=1e-3, atol=1e-4)


def test_the_layer_is_found_by_tracing_and_the_trace_is_kept() -> None:
    made = edited("llama", layers=None, covariance="off")
    assert made.trace is not None and made.layers == [0]
    assert made.result.title.endswith("without C")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"facts": [Fact("The capital of France is", "Italy", " Rome")]}, "is not in the prompt"),
        ({"facts": [Fact("The capital of Parisx is", "Pari", " Rome")]}, "no last token of its own|goes on"),
        ({"facts": []}, "no fact was given"),
        ({"facts": [{"prompt": "a", "subjects": "b"}]}, "expected pl.surgery.Fact"),
        ({"covariance": None}, "covariance= is missing"),
        ({"covariance": KeyCovariance(layers=0)}, "not fitted"),
        ({"layers": 7}, "layer"),
        ({"layers": [0, 1]}, "edits one layer"),
        ({"layers": 1}, "choose an earlier layer"),
        ({"how": "wise"}, "expected one of"),
        ({"layers": "x"}, "expected the number of a layer"),
        ({"share": 2.0}, "share="),
        ({"penalty": -1.0}, "penalty="),
        ({"contexts": "he went"}, "put the one into a list"),
        ({"essence": "{} is a"}, "put the one into a list"),
        ({"hold": "{} is a"}, "put the one into a list"),
        ({"search": {"steps": 3}}, "Search"),
        ({"facts": [Fact([1, 2, 3], (1, 2), [9999])]}, "unknown"),
        ({"facts": "The capital"}, "expected pl.surgery.Fact"),
        ({"how": "emmet", "facts": [facts()[0], facts()[0]]}, "not independent"),
    ],
)
def test_bad_questions_are_one_error(options: dict[str, Any], what: str) -> None:
    with pytest.raises((InputError, Refused, SiteError), match=what):
        edited("llama", options.pop("how", "rome"), options.pop("layers", 0), **options)
    untouched = zip(opened("llama").module.parameters(), build("llama").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in untouched)


def test_a_fact_that_changes_nothing_and_a_lone_paraphrase_are_refused() -> None:
    with pytest.raises(InputError, match="the true one"):
        Fact("The capital of {} is", "France", " Paris", " Paris")
    with pytest.raises(InputError, match="put the one into a list"):
        Fact("The capital of {} is", "France", " Rome", paraphrases="The city of France is")
    with pytest.raises(InputError, match="several places"):
        Fact("{} and {} are in", "France", " Rome")
    with pytest.raises(InputError, match="new=5: expected a text"):
        Fact("The capital of {} is", "France", 5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ridge="):
        KeyCovariance(layers=0, ridge=-1.0).fit(opened("llama"), texts())


@pytest.mark.parametrize(("smallest", "sink"), [(1e-9, 1.0), (1e-4, 1e9)])
def test_a_nearly_singular_c_is_refused_and_a_sink_is_not(smallest: float, sink: float) -> None:
    c = KeyCovariance(layers=0)
    q, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    made = (q * torch.tensor([1.0] * 45 + [smallest] * 3, dtype=torch.float64)) @ q.T
    made[0] *= sink**0.5
    made[:, 0] *= sink**0.5
    c.moments_, c.counts_ = {"0": torch.stack([made, made])}, {"0": torch.ones(2, dtype=torch.float64)}
    k = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if sink > 1:
        torch.testing.assert_close(c.solve("0", k), torch.linalg.solve(made, k.T).T, rtol=1e-6, atol=1e-9)
        return
    with pytest.raises(Refused, match="condition 1e\\+09"):
        c.solve("0", k)


def test_a_moment_matrix_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="other weights"):
        edited("llama", covariance=moments("gemma3_text"))


def test_a_norm_behind_the_mlp_refuses_a_spread_by_name() -> None:
    with pytest.raises(Refused, match="norm behind the MLP"):
        edited("gemma3_text", "memit", [0, 1])
    with pytest.raises(Refused, match="share"):
        edited("albert", covariance="off")


def test_without_a_tokenizer_and_in_bfloat16() -> None:
    module = build("llama").eval()
    model = pl.load(module)
    fact = Fact([5, 9, 7, 11, 8], (2, 4), [12], [13])
    made = edit(model, fact, layers=0, covariance="off", search=QUICK)
    assert float(made.result.data.new_after[0]) > float(made.result.data.new_before[0])
    half = pl.load(build("llama").eval().to(torch.bfloat16), tokenizer=tokenizer(module))
    made = edit(half, facts(), layers=0, covariance="off", contexts=(), search=QUICK)
    assert bool((made.result.data.new_after > made.result.data.new_before).all())
    assert made.model.module.get_parameter(made.values.memory[0].parameter).dtype == torch.bfloat16


def test_answers_of_several_tokens_are_rows_of_their_own() -> None:
    model = opened("llama")
    (row,) = rows(model, ["The capital of France is"], [" Rome and Italy"])
    assert len(row.answer) == 3 and row.read == (-3, -2, -1) and len(row.ids) == 7


def test_an_answer_of_several_tokens_is_edited_as_a_sequence() -> None:
    made = edited("llama", facts=[Fact("The capital of {} is", "France", " Rome and Italy", " Paris")], share=1.0)
    data = made.result.data
    assert float(data.new_after[0]) > 1.05 * float(data.new_before[0])  # exp of the mean over its three tokens
    assert len(made.values.rows[0].answer) == 3


def test_a_subject_that_is_cut_differently_behind_a_space_or_opens_the_text_is_named() -> None:
    from tests.attribution.test_case import byte_level

    letters = byte_level()
    model = pl.load(build("llama", vocab_size=len(letters)).eval(), tokenizer=letters)
    fact = Fact("{}f is", "ca", " b", " c")
    with pytest.raises(InputError, match="no last token of its own|goes on|is not in the prompt"):
        edit(model, Fact("a caf is", "ca", " b"), layers=0, covariance="off", contexts=(), search=QUICK)
    made = edit(
        model, replace(fact, prompt="{} is"), layers=0, covariance="off", contexts=("b",), essence=(), search=QUICK
    )
    assert made.result.data.attrs["split"] == ["ca"]  # "a" at the beginning, " ca" behind a space
    made = edited("llama", facts=facts()[1:])
    assert made.result.data.attrs["opening"] == ["Mary"]
    assert "opening" not in edited("llama", facts=facts()[:1]).result.data.attrs


def test_what_else_is_said_of_a_subject_is_asked_behind_words() -> None:
    made = edited("llama", facts=facts()[1:], contexts=())
    (asked,) = [row for row in made.values.rows if not row.answer]
    assert asked.at is not None and asked.at > 1  # never a text's first token


def test_models_that_answer_with_a_class_are_refused() -> None:
    from transformers import LlamaForSequenceClassification

    model = pl.load(LlamaForSequenceClassification(build("llama").config).eval(), tokenizer=opened("llama").tokenizer)
    with pytest.raises(Refused, match="models that answer with tokens"):
        edit(model, facts(), layers=0, covariance="off", contexts=(), search=QUICK)


def test_the_matrix_under_an_adapter_moves_and_the_adapter_stays() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        build("llama"), LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    ).eval()
    model = pl.load(adapted, tokenizer=tokenizer(build("llama")))
    made = edit(model, facts(), layers=0, covariance="off", contexts=(), search=QUICK)
    memory = made.values.memory[0]
    assert memory.parameter.endswith("down_proj.base_layer.weight")
    moved = (memory.weight(made.model) - memory.weight(model)) @ made.values.keys[-1]
    torch.testing.assert_close(moved, made.values.delta[-1], rtol=1e-4, atol=1e-4)


def test_quantised_weights_are_refused_by_name() -> None:
    module = torch.ao.quantization.quantize_dynamic(build("llama").eval(), {torch.nn.Linear}, dtype=torch.qint8)
    model = pl.load(module, tokenizer=tokenizer(build("llama")))
    with pytest.raises(Refused, match="quantised"):
        edit(model, facts(), layers=0, covariance="off", contexts=(), search=QUICK)


def test_square_weights_are_not_turned_around() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    model = pl.load(module, tokenizer=tokenizer(module))
    made = edit(model, facts(), layers=0, covariance="off", contexts=(), search=QUICK)
    memory = made.values.memory[0]
    moved = (memory.weight(made.model) - memory.weight(model)) @ made.values.keys[-1]
    torch.testing.assert_close(moved, made.values.delta[-1], rtol=1e-4, atol=1e-4)
