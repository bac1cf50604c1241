"""Every text model type of the installed transformers: built, opened, proven, as far as `known.py` says."""

from __future__ import annotations

import pytest
import torch

from .build import Entry, build, model_types
from .examine import examine
from .inputs import inputs
from .known import KNOWN_FAILURES, LACKS, ONLY_IN, REFUSED
from .quirks import NOT_IN_BFLOAT16, QUIRKS, UNBUILDABLE
from .tokenizer import tokenizer

TYPES = {entry.model_type for entry in model_types()}
BUILDABLE = [entry for entry in model_types() if entry.model_type not in UNBUILDABLE]

pytestmark = pytest.mark.zoo
every_type = pytest.mark.parametrize("entry", BUILDABLE, ids=lambda entry: entry.model_type)


@every_type
def test_a_tiny_model_takes_any_batch_and_length_and_repeats_itself(entry: Entry) -> None:
    module = build(entry)
    for batch, length in ((2, 12), (3, 9), (1, 7)):
        with torch.no_grad():
            first, second = (
                module(**inputs(module, batch=batch, length=length), return_dict=False)[0] for _ in range(2)
            )
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)


@every_type
def test_exactly_the_known_proofs_fail(entry: Entry) -> None:
    failing = examine(entry).failing
    assert failing.keys() == KNOWN_FAILURES.get(entry.model_type, {}).keys(), failing


def test_at_least_240_model_types_are_completely_proven() -> None:
    assert len(BUILDABLE) - len(KNOWN_FAILURES) >= 240


@pytest.mark.parametrize("model_type", sorted(UNBUILDABLE))
def test_what_is_listed_as_unbuildable_cannot_be_built_or_run_alone(model_type: str) -> None:
    with pytest.raises(
        (ImportError, ValueError), match=r"timm|detectron2|layer types producing a cache|shared_kv_states"
    ):
        module = build(model_type)
        module(**inputs(module, batch=2, length=5))


def test_every_name_in_the_lists_is_a_model_type() -> None:
    listed = {t for types in (*LACKS.values(), *ONLY_IN.values()) for t in types}
    named = {*UNBUILDABLE, *KNOWN_FAILURES, *REFUSED, *NOT_IN_BFLOAT16, *listed}
    assert named <= TYPES


def test_every_quirk_has_a_reason() -> None:
    assert all(quirk.why and quirk.config for quirk in QUIRKS.values())


def test_the_seed_decides_the_weights_in_any_dtype_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (
        build("llama", seed=1),
        build("llama", seed=1, dtype=torch.bfloat16),
        build("llama", seed=2),
    )
    for name, weight in one.state_dict().items():
        assert torch.equal(weight.bfloat16(), same.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_of_the_tokenizer_are_words_and_letters_with_offsets() -> None:
    encoded = tokenizer()("The capital of Peru", return_offsets_mapping=True)
    assert encoded["offset_mapping"][:3] == [(0, 3), (3, 11), (11, 14)]
    assert tokenizer().decode(encoded["input_ids"]) == "The capital of Peru"
    assert len(tokenizer()) == 97


@pytest.mark.parametrize(("model_type", "ids"), [("bert", [1, 19, 2]), ("t5", [19, 2]), ("gpt2", [19])])
def test_the_tokenizer_closes_texts_as_the_family_does(model_type: str, ids: list[int]) -> None:
    assert tokenizer(build(model_type))("Rome")["input_ids"] == ids
