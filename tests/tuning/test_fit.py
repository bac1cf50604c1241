"""The frame: what a fit promises for every objective, on tiny models of five kinds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pellucid as pl
from pellucid import tuning as tu
from pellucid.errors import InputError, PellucidError, Refused
from tests.zoo import build, tokenizer

WORDS = ["Paris", "Rome", "France", "Italy", "city", "capital", "store", "drink"]
CLASSES = {"num_labels": 2, "pad_token_id": 0}


@cache
def opened(family: str, attn: str | None = None) -> pl.Model:
    if family == "bert-class":
        config = build("bert").config
        torch.manual_seed(0)
        module = transformers.BertForSequenceClassification(config).eval()
    elif family == "deberta-class":
        config = build("deberta-v2").config
        torch.manual_seed(0)
        module = transformers.DebertaV2ForSequenceClassification(config).eval()
    elif family == "lora":
        import peft

        base = build("llama")
        torch.manual_seed(0)
        module = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    else:
        module = build(family, attn=attn)
    return pl.load(module, tokenizer=tokenizer(build(family) if family in ("t5",) else None))


def data(labels: bool | str = True, n: int = 8, reverse: bool = False) -> tu.Rationales:
    """The first word tells the label; the third is called the reason."""
    drawn = torch.Generator().manual_seed(1)
    texts, ys = [], []
    for i in range(n):
        a, b, c = (WORDS[int(k)] for k in torch.randint(len(WORDS), (3,), generator=drawn))
        y = i % 2
        texts.append(f"{'he' if y ^ reverse else 'Mary'} is {a} in {b}" + (f" and {c}" if i % 3 else ""))
        ys.append(y)
    given: Any = ys if labels is True else [" Paris" if y else " Rome to" for y in ys] if labels == "text" else None
    decoy = [text.split()[0] for text in texts]
    return tu.Rationales(texts, given, {"decoy": decoy, "rationale": [text.split()[2] for text in texts]})


KINDS = {"bert-class": True, "deberta-class": True, "gpt2": None, "lora": "text", "t5": "text"}
QUICK: Any = {"seeds": (0,), "steps": 3, "batch": 4, "learning_rate": 1e-2}
OBJECTIVES = [
    tu.Consistency("decoy", by="random"),
    tu.Consistency("decoy"),
    tu.RightReasons("decoy"),
    tu.RightReasons("rationale", form="outside", through="expected", steps=1),
]


def spaced() -> pl.Model:
    """A tokenizer that drops the space between words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "he": 1, "is": 2, "in": 3, "Rome": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return pl.load(
        opened("bert-class").module,
        tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]"),
    )


def weights(model: pl.Model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_is_tuned_and_left_as_it_was(family: str) -> None:
    model, given = opened(family), data(KINDS[family])
    before = weights(model)
    made = tu.fit(model, given, [OBJECTIVES[0], OBJECTIVES[2], OBJECTIVES[3]], control=False, **QUICK)
    assert equal(before, weights(model)) and not made.changed
    assert not equal(before, weights(made.model))
    after = made.result.data["after"].sel(arm="objective").values
    assert len(after) == 3 and torch.isfinite(torch.tensor(after)).all()


def test_the_arms_and_what_is_said_of_them() -> None:
    made = tu.fit(
        opened("bert-class"),
        data(),
        tu.Consistency("decoy"),
        shifts={"reversed": data(reverse=True)},
        **QUICK | {"seeds": (0, 1)},
    )
    found = made.result.data
    assert found["arm"].values.tolist() == ["plain", "objective", "control", "augmented"]
    assert found["accuracy_by_seed"].shape == (4, 2, 2) and found["split"].values.tolist() == [
        "training texts",
        "reversed",
    ]
    assert (found["low"] <= found["accuracy"]).all() and (found["accuracy"] <= found["high"]).all()
    assert float(found["cost"].sel(arm="plain")) == 1.0 and "x the cost" in made.result.title
    assert made.control is not None and made.control.digest != made.model.digest
    names: dict[str, Any] = {"module": opened("bert-class").module, "tokenizer": opened("bert-class").tokenizer}
    exec(made.result.provenance.code(), names)
    assert names["result"].data["accuracy_by_seed"].equals(found["accuracy_by_seed"])
    assert pl.results.Result.load(made.result.save(Path("/tmp/pellucid-tuning.zip"))) == made.result


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{getattr(o, 'through', '')}")
def test_weight_zero_is_plain_training_bit_for_bit(objective: tu.Objective) -> None:
    made = tu.fit(opened("bert-class"), data(), 0.0 * objective, control=False, **QUICK)
    assert equal(weights(made.arms["plain"]), weights(made.arms["objective"]))


def test_four_passes_of_four_are_one_of_sixteen() -> None:
    once, often = (tu.fit(opened("bert-class"), data(n=16), tu.Consistency("rationale", by="mask"), control=False, accumulate=k,
                          seeds=(0,), steps=1, batch=16, learning_rate=1e-3, clip=None) for k in (1, 4))  # fmt: skip
    start = weights(opened("bert-class"))
    for name, a in weights(once.model).items():
        b = weights(often.model)[name]
        assert torch.allclose(a, b, atol=2e-5), name
        assert a.dtype != torch.float32 or a.numel() < 64 or not torch.equal(a, start[name])


def test_an_interrupted_fit_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tu.fit(opened("bert-class"), data(), tu.Consistency("decoy"), control=False, **QUICK)
    calls = 0
    own = tu.Consistency.loss

    def interrupted(self: Any, seen: Any, generator: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls == 4:  # once for the measure before training, then in the third step
            raise KeyboardInterrupt
        return own(self, seen, generator)

    monkeypatch.setattr(tu.Consistency, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tu.fit(opened("bert-class"), data(), tu.Consistency("decoy"), control=False, checkpoint=tmp_path, **QUICK)
    monkeypatch.undo()
    again = tu.fit(opened("bert-class"), data(), tu.Consistency("decoy"), control=False, checkpoint=tmp_path, **QUICK)
    assert equal(weights(whole.model), weights(again.model))
    with pytest.raises(InputError, match="another fit"):
        tu.fit(
            opened("bert-class"),
            data(reverse=True),
            tu.Consistency("decoy"),
            control=False,
            checkpoint=tmp_path,
            **QUICK,
        )


def test_an_arm_that_never_left_the_constant_is_untrained() -> None:
    made = tu.fit(
        opened("bert-class"), data(), tu.Consistency("decoy"), control=False, **QUICK | {"learning_rate": 0.0}
    )
    assert made.result.data["untrained"].all() and "ntrained" in made.result.title


def test_a_loss_that_is_no_number_stops_and_the_last_good_weights_are_kept() -> None:
    at = [2]

    class Broken(tu.Objective):
        def loss(self, seen: Any, generator: Any) -> Any:
            return seen.logits.sum() * float("nan" if seen.batch.step == at[0] else 1)

    with pytest.raises(tu.Diverged, match="Broken is nan at step 2") as caught:
        tu.fit(opened("bert-class"), data(), Broken(), control=False, **QUICK)
    at[0] = 99
    one = tu.fit(opened("bert-class"), data(), Broken(), control=False, **QUICK | {"steps": 1})
    assert equal(weights(caught.value.model), weights(one.model))  # those of step 1, at which all were numbers
    far = QUICK | {"learning_rate": 1e30}
    with pytest.raises(tu.Diverged, match="is nan at step 1") as caught:  # weights that one step threw far away
        tu.fit(opened("bert-class"), data(), (), **far)
    assert equal(weights(caught.value.model), weights(opened("bert-class")))


def test_an_objective_that_trains_nothing_is_said() -> None:
    class Nothing(tu.Objective):
        def loss(self, seen: Any, generator: Any) -> Any:
            return seen.logits.sum() * 0

    with pytest.warns(UserWarning, match="Nothing was exactly 0 for 3 steps"):
        tu.fit(opened("bert-class"), data(), Nothing(), control=False, **QUICK)


def test_only_what_is_chosen_changes_weight_decay_included() -> None:
    model = opened("bert-class")
    for only in (
        1,
        tu.Only(heads={0: [1]}, head=False),
        tu.Only(neurons={1: [0, 3]}),
        tu.Only(names=["bert.pooler.dense.weight"], head=False),
    ):
        made = tu.fit(model, data(), (), layers=only, weight_decay=0.5, **QUICK)
        assert not made.changed
        moved = [k for k, v in weights(model).items() if not torch.equal(v, weights(made.model)[k])]
        assert moved
        if only == 1:
            assert all(".layer.1." in k or "pooler" in k or "classifier" in k for k in moved)
        elif only.heads:  # the head's own rows and columns, found out, not named
            d = 32 // model.module.config.num_attention_heads
            change = (
                weights(made.model)["bert.encoder.layer.0.attention.self.query.weight"]
                - weights(model)["bert.encoder.layer.0.attention.self.query.weight"]
            ) != 0
            assert change[d : 2 * d].any() and not change[:d].any() and not change[2 * d :].any()
            change = (
                weights(made.model)["bert.encoder.layer.0.attention.output.dense.weight"]
                - weights(model)["bert.encoder.layer.0.attention.output.dense.weight"]
            ) != 0
            assert change[:, d : 2 * d].all() and not change[:, :d].any() and not change[:, 2 * d :].any()
        elif only.neurons:
            change = (
                weights(made.model)["bert.encoder.layer.1.intermediate.dense.weight"]
                - weights(model)["bert.encoder.layer.1.intermediate.dense.weight"]
            ) != 0
            assert change.any(1).nonzero().flatten().tolist() == [0, 3]


def test_bad_input_has_one_clear_error_each() -> None:
    model, given = opened("bert-class"), data()
    cases: list[tuple[type[PellucidError], str, Any]] = [
        (InputError, "none of that name", lambda: tu.fit(model, given, tu.Consistency("typo"), **QUICK)),
        (InputError, "nothing to learn from", lambda: tu.fit(model, tu.Rationales(given.texts, given.labels, {"decoy": [None] * 8}), tu.Consistency("decoy"), **QUICK)),
        (InputError, "of text 0: 'elephant' is not in it", lambda: tu.fit(model, tu.Rationales(given.texts, given.labels, {"decoy": ["elephant"] * 8}), (), **QUICK)),
        (InputError, "of text 0: no token stands for characters .* nearest tokens are 'is'", lambda: tu.fit(spaced(), tu.Rationales(["he is in Rome"] * 2, [0, 1], {"decoy": [(5, 6)] * 2}), (), **QUICK)),
        (InputError, "vanishes as the model gets sure", lambda: tu.RightReasons("decoy", of="probability")),  # type: ignore[arg-type]
        (InputError, "layers by number, slice or list", lambda: tu.fit(model, given, (), layers="all", **QUICK)),
        (InputError, "is a mask of 3 tokens, and the text has", lambda: tu.fit(model, tu.Rationales(["he is"] * 2, [0, 1], {"decoy": [torch.ones(3).bool()] * 2}), (), **QUICK)),
        (InputError, "is a file: name a folder", lambda: tu.fit(model, given, (), checkpoint=__file__, **QUICK)),
        (InputError, "there is no layer 9", lambda: tu.fit(model, given, (), layers=[9], **QUICK)),
        (InputError, "one for each text", lambda: tu.Rationales(["a"], [0, 1])),
        (InputError, "is no class", lambda: tu.fit(model, tu.Rationales(["he is", "Mary is"], [0, 7]), (), **QUICK)),
        (Refused, "task='classification'", lambda: tu.fit(opened("bert"), given, (), **QUICK)),
    ]  # fmt: skip
    for kind, said, call in cases:
        with pytest.raises(kind, match=said):
            call()
    module = build("gpt2")
    for p in module.parameters():
        p.requires_grad_(False)
    frozen = pl.load(module, tokenizer=tokenizer(module))
    with pytest.raises(InputError, match="every parameter of this model is frozen"):
        tu.fit(frozen, data(None), (), **QUICK)
    with pytest.raises(InputError, match="was asked to train"):
        tu.fit(frozen, data(None), (), layers=[0], **QUICK)


def test_under_autocast_and_in_bfloat16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        made = tu.fit(
            opened("bert-class"),
            data(),
            [tu.Consistency("decoy"), tu.RightReasons("rationale", form="outside")],
            control=False,
            **QUICK,
        )
    assert torch.isfinite(torch.tensor(made.result.data["after"].values)).all()
    half = pl.load(build("gpt2", dtype=torch.bfloat16), tokenizer=tokenizer(None))
    made = tu.fit(half, data(None), tu.RightReasons("decoy"), control=False, **QUICK)
    assert next(made.model.module.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(torch.tensor(made.result.data["after"].values)).all()


@pytest.mark.parametrize("family", ["bert-class", "lora", "t5"])
def test_a_tuned_model_is_kept_with_the_edits_it_is_run_under(family: str, tmp_path: Path) -> None:
    model, given = opened(family), data(KINDS[family])
    made = tu.fit(model, given, [tu.SparseAttention("sparsemax"), tu.TopNeurons(5)], control=False, **QUICK)
    again, edits = tu.load_tuned(model, made.save(tmp_path / "kept"))
    prompts: Any = {"decoder": "Rome"} if family == "t5" else {}
    prompt = model.inputs(["he is in Rome"], **prompts)
    old, new = (m.run(prompt, edits=e).logits for m, e in ((made.model, made.edits), (again, edits)))
    assert torch.equal(old, new) and not torch.equal(old, again.run(prompt).logits)
    assert again.digest == made.model.digest
    if family != "bert-class":  # they generate under their edits
        told = [
            m.generate("he is", edits=list(e), max_new_tokens=3).texts
            for m, e in ((made.model, made.edits), (again, edits))
        ]
        assert told[0] == told[1]
    with pytest.raises(InputError, match="holds no tuned model"):
        tu.load_tuned(model, tmp_path)
    with pytest.raises(InputError):
        tu.load_tuned(made.model, tmp_path / "kept")  # another model's weights
