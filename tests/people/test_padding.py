"""Padding is no word: A4, A14, A24."""

from __future__ import annotations

import pytest
import torch

import pellucid as pl
from pellucid.errors import PellucidError
from tests.zoo import build, tokenizer

from .cases import CLEAN, LONG, close, opened


def left_padded(texts: list[str]) -> torch.Tensor:
    rows = [tokenizer()(t)["input_ids"] for t in texts]
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(r)) + r for r in rows])


def test_a_mask_is_not_invented_for_ids_that_came_without_one() -> None:
    """A4: padded ids without a mask generate what each prompt generates alone, or are refused."""
    model = opened("llama")
    alone = [model.generate(text, max_new_tokens=4, temperature=0.0).ids(0) for text in (LONG, "The city")]
    native = (
        build("llama")
        .generate(
            torch.tensor([tokenizer()("The city")["input_ids"]]), max_new_tokens=4, do_sample=False, pad_token_id=0
        )[0, -4:]
        .tolist()
    )
    assert alone[1][:4] == native[: len(alone[1])]
    try:
        made = model.generate(left_padded([LONG, "The city"]), max_new_tokens=4, temperature=0.0)
    except PellucidError:
        return
    assert [made.ids(0), made.ids(1)] == alone


def test_tensors_that_belong_together_are_reordered_together() -> None:
    """A14: a right-padded batch with token types generates what each row generates alone."""
    module = build("gpt2")
    model = pl.load(module, tokenizer=tokenizer())
    rows = [tokenizer()(t)["input_ids"] for t in (LONG, "The city")]
    longest = len(rows[0])
    batch = {
        "input_ids": torch.tensor([r + [0] * (longest - len(r)) for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows]),
        "token_type_ids": torch.tensor([[5] * len(r) + [0] * (longest - len(r)) for r in rows]),
    }
    wanted = []
    for row in rows:
        ids, kinds = torch.tensor([row]), torch.full((1, len(row)), 5)
        with torch.no_grad():
            for _ in range(4):
                z = module(input_ids=ids, token_type_ids=kinds).logits[0, -1]
                ids = torch.cat([ids, z.argmax()[None, None]], 1)
                kinds = torch.cat([kinds, kinds[:, -1:]], 1)
        wanted.append(ids[0, len(row) :].tolist())
    try:
        made = model.generate(batch, max_new_tokens=4, temperature=0.0)
    except PellucidError:
        return
    for i in range(2):
        said = made.ids(i)
        assert said == wanted[i][: len(said)] and (len(said) == 4 or 2 in said)


def test_a_mean_over_positions_counts_tokens_not_columns() -> None:
    """A24: under left padding the mean at a position is over the prompts' own positions."""
    model, site = opened("llama"), "layers.0.mlp.out"
    ids = left_padded([LONG, CLEAN])
    mask = (ids != 0).long()
    values = [
        model.run([row[m.bool()].tolist()], keep=[site]).tensor(site)[0] for row, m in zip(ids, mask, strict=True)
    ]
    run = model.run({"input_ids": ids, "attention_mask": mask}, edits=[pl.Ablate(site, "position_mean")], keep=[site])
    got = run.tensor(site)
    short = min(map(len, values))
    wanted = torch.stack([v[:short] for v in values]).mean(0)
    for b in range(2):
        assert close(got[b][mask[b].bool()][:short], wanted)


def test_the_padding_of_a_decoder_is_checked() -> None:
    """A24: an encoder-decoder's decoder texts of unequal length score as each alone."""
    model = opened("bart")
    texts, said = [CLEAN, CLEAN], ["Paris is the capital", "Rome"]
    metric = pl.metrics.logit_difference(7, 9)
    alone = [float(model.score(model.run(t, decoder=d), metric)) for t, d in zip(texts, said, strict=True)]
    try:
        both = model.score(model.run(texts, decoder=said), metric).tolist()
    except PellucidError:
        return
    assert both == pytest.approx(alone, abs=1e-4)
