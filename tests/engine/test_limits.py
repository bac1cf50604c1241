"""How long a prompt may be: measured, and held against the longest prompt that the native model runs."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.corpus import Corpus
from pellucid.engine.limits import check_length, limit
from pellucid.errors import InputError
from tests.engine.hand import opened
from tests.zoo import build, tokenizer

FAMILIES = ["gpt2", "bert", "roberta", "opt", "mpnet", "longformer", "gptj", "mpt", "bart", "marian"]
RUN_ON = ["llama", "falcon", "t5", "xglm", "m2m_100", "deberta-v2"]


def runs(module: torch.nn.Module, length: int) -> bool:
    """Whether transformers runs so long a prompt, alone."""
    ids = torch.tensor([[5, 6] * length])[:, :length]
    call = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if module.config.is_encoder_decoder else {})
    try:
        with torch.no_grad():
            module.eval()(**call)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def fits(module: torch.nn.Module, length: int, stack: str) -> bool:
    try:
        check_length(module, length, stack)
    except InputError as error:
        assert f"{length} tokens but the model's context holds" in str(error)
        return False
    return True


@pytest.mark.parametrize("family", [*FAMILIES, *RUN_ON])
def test_a_prompt_is_too_long_where_the_native_model_says_so(family: str) -> None:
    module = build(family)
    stack = "encoder" if module.config.is_encoder_decoder else ""
    for length in (20, 61, 62, 63, 64, 65, 66, 90):
        assert fits(module, length, stack) == runs(module, length), length
    assert fits(build(family), 90, stack) == (family in RUN_ON)  # whatever was asked before


def test_the_limit_is_the_table_and_none_where_there_is_none() -> None:
    assert limit(build("roberta")) == 63  # of its 64 rows the first is padding's
    assert limit(build("llama")) is None
    bart = build("bart")
    assert limit(bart, "encoder") == limit(bart, "decoder") == 64


def test_one_error_before_work_starts() -> None:
    model = opened("gpt2")
    with pytest.raises(InputError, match="65 tokens but the model's context holds 64: shorten the prompt, or give"):
        model.run([[5, 6] * 32 + [7]])
    with pytest.raises(InputError, match="max_new_tokens=5 at most"):
        model.generate([[5, 6] * 30], max_new_tokens=40)
    long = [5, 6] * 40
    assert torch.equal(model.run(model.inputs([long], truncate="left")).logits, model.run([long[-64:]]).logits)


def test_a_corpus_reads_rows_as_long_as_the_model_holds() -> None:
    module = build("roberta")
    model = pl.load(module, tokenizer=tokenizer(module))
    rows = list(Corpus([" ".join(["the city of"] * 40)], long="windows").rows(model))
    assert max(len(row.ids) for row in rows) == limit(module)
