"""A monitor reads what one forward pass over prompt and answer has, at every token, and acts in its row alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid import safety as sf
from pellucid.errors import InputError, PellucidError, Refused
from pellucid.safety.shifts import shifted
from tests.engine.hand import PROMPTS, opened
from tests.zoo import build, tokenizer

V = torch.randn(32, generator=torch.Generator().manual_seed(4))
FAMILIES = ["llama", "gemma3_text", "mixtral", "gpt2", "t5"]


def site(family: str, layer: int = 1) -> str:
    return ("decoder." if family == "t5" else "") + f"layers.{layer}.resid_post"


def reader(family: str) -> Any:
    width = opened(family).anatomy.stacks[-1].d_model
    return sf.Direction(site(family), torch.randn(width, generator=torch.Generator().manual_seed(4)), 0.1)


def by_hand(model: pl.Model, made: Any, row: int, read: Any) -> torch.Tensor:
    """[step] scores of one forward pass over prompt and answer, of one row alone."""
    said = torch.tensor([made.ids(row)], dtype=torch.long)
    inputs = model.inputs(PROMPTS[row])
    if "decoder" in inputs.streams:
        start = inputs.tensors["decoder_input_ids"]
        given = {k: v for k, v in inputs.tensors.items() if k != "decoder_input_ids"}
        whole = model.run({**given, "decoder_input_ids": torch.cat([start, said], 1)}, keep=read.site)
        first = start.shape[1]
    else:
        first = inputs.tensors["input_ids"].shape[1]
        whole = model.run(torch.cat([inputs.tensors["input_ids"], said], 1), keep=read.site)
    return (whole.tensor(read.site)[0].float() @ read.vector + read.offset)[first - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [True, False])
def test_scores_are_those_of_one_forward_pass_and_as_many_as_tokens(family: str, cache: bool) -> None:
    model, read = opened(family), reader(family)
    made = model.generate(PROMPTS, max_new_tokens=5, use_cache=cache, monitors=sf.Monitor(read))
    found = made.firings
    assert found.provenance.call.endswith(".firings")
    for row in range(len(PROMPTS)):
        wanted = by_hand(model, made, row, read)
        mine = found.score.values[row, 0]
        mine = mine[found.step.values >= 0][: int(made.lengths[row])]
        assert np.allclose(mine, wanted, rtol=1e-3, atol=1e-3)
        assert int((~np.isnan(found.score.values[row, 0])).sum()) == int(made.lengths[row])


def test_the_prompt_is_read_row_by_row_under_left_padding() -> None:
    model, read = opened("llama"), reader("llama")
    both = sf.Monitor(read, reads="exchange", rule="mean", name="both"), sf.Monitor(read, reads="prompt", name="prompt")
    found = model.generate(PROMPTS, max_new_tokens=4, monitors=both).firings
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, max_new_tokens=4, monitors=both).firings
        n = alone.sizes["step"] if hasattr(alone, "sizes") else alone.data.sizes["step"]
        assert np.allclose(found.statistic.values[row, :, -n:], alone.statistic.values[0], atol=1e-5, equal_nan=True)
        assert found.token.values[row, -n:].tolist() == alone.token.values[0].tolist()
        states = model.run(prompt, keep=read.site).tensor(read.site)[0]
        here = alone.statistic.sel(monitor="prompt").values[0]
        assert np.allclose(np.nanmax(here), float((states @ read.vector).max() + 0.1), atol=1e-5)


def test_every_action_does_what_it_says() -> None:
    model, read = opened("llama"), reader("llama")
    seen: list[sf.Alarm] = []

    def human(alarm: sf.Alarm) -> Any:
        seen.append(alarm)
        return "Rome"

    always = sf.Monitor(read, threshold=-1e9)
    plain = model.generate(PROMPTS, max_new_tokens=5)
    for then in (None, lambda alarm: None):
        made = model.generate(PROMPTS, max_new_tokens=5, monitors=replace(always, then=then))
        assert torch.equal(made.tokens, plain.tokens) and (made.firings.acted.values == 0).all()
    for then in (pl.Say("Rome"), human):
        made = model.generate(PROMPTS, max_new_tokens=5, monitors=replace(always, then=then))
        assert [t.strip() for t in made.texts] == ["Rome"] * 3 and set(made.ended) == {"watcher"}
    assert made.firings.done.values.tolist() == [["say"]] * 3 and len(seen) == 3
    assert seen[0].token == 0 and seen[1].prompt == PROMPTS[1]
    made = model.generate(PROMPTS, max_new_tokens=5, monitors=replace(always, then=sf.ABSTAIN))
    assert made.firings.shown.values.tolist() == ["I am not sure."] * 3  # also where five tokens cut it
    edit = pl.Steer("layers.0.resid_post", 3 * V)
    steered = model.generate(PROMPTS, max_new_tokens=5, monitors=replace(always, then=edit))
    wanted = model.generate(
        PROMPTS, max_new_tokens=5, when=lambda step: pl.Redirect([edit]) if step.index == 0 else None
    )
    assert torch.equal(steered.tokens, wanted.tokens) and not torch.equal(steered.tokens, plain.tokens)
    with pytest.raises(InputError, match="said 3"):
        model.generate(PROMPTS, max_new_tokens=2, monitors=replace(always, then=lambda alarm: 3))


def test_an_edit_of_a_monitor_stands_beside_those_the_row_has_and_a_stop_beside_it() -> None:
    model, read = opened("llama"), reader("llama")
    first, second = pl.Steer("layers.0.resid_post", 3 * V), pl.Ablate("layers.1.mlp.out")
    steer = sf.Monitor(read, threshold=-1e9, then=second, name="steer")
    made = model.generate(PROMPTS, max_new_tokens=5, edits=[first], monitors=steer)
    wanted = model.generate(
        PROMPTS, max_new_tokens=5, edits=[first], when=lambda s: pl.Redirect([first, second]) if s.index == 0 else None
    )
    assert torch.equal(made.tokens, wanted.tokens)
    stop = sf.Monitor(read, threshold=-1e9, then=pl.Stop(), name="stop")
    assert set(model.generate(PROMPTS, max_new_tokens=5, monitors=[steer, stop]).ended) == {"watcher"}


def test_readers_of_every_kind() -> None:
    from pellucid.neurons.dictionaries import Dictionary, TopK

    model = opened("llama")
    decoder = torch.nn.functional.normalize(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    dictionary = Dictionary(
        decoder.T.contiguous(), torch.zeros(12), decoder, torch.zeros(32), TopK(3), "layers.0.resid_post"
    )
    monitors = {
        "neuron": sf.Monitor("layers.0.mlp.neurons.3", name="neuron"),
        "feature": sf.Monitor(sf.Feature(dictionary, 5), name="feature"),
        "function": sf.Monitor(lambda x: x.norm(dim=-1), site="layers.1.resid_post", name="function"),
        "mean": sf.Monitor(
            [sf.Direction("layers.0.resid_post", V), sf.Direction("layers.1.resid_post", V)], name="mean"
        ),
        "words": sf.Monitor(sf.Words(lambda texts: [float(len(t)) for t in texts]), reads="exchange", name="words"),
    }
    made = model.generate(
        PROMPTS[0],
        max_new_tokens=3,
        monitors=list(monitors.values()),
        keep=["layers.*.resid_post", "layers.0.mlp.neurons"],
    )
    scores = made.firings.score.sel(step=slice(0, None))
    states = [made.tensor(f"layers.{i}.resid_post")[0] for i in (0, 1)]
    wanted = {
        "neuron": made.tensor("layers.0.mlp.neurons")[0, :, 3], "feature": dictionary.encode(states[0])[:, 5],
        "function": states[1].norm(dim=-1), "mean": (states[0] @ V + states[1] @ V) / 2,
    }  # fmt: skip
    for name, values in wanted.items():
        assert np.allclose(scores.sel(monitor=name).values[0], values, atol=1e-5), name
    text = PROMPTS[0] + model.tokenizer.decode(made.ids()[:2])
    assert scores.sel(monitor="words").values[0].tolist()[-1] == len(text)


def test_replies_that_are_there_score_as_when_they_were_written() -> None:
    model, read = opened("gpt2"), reader("gpt2")
    cases = [sf.Monitor(read, rule=sf.ema(0.5)), sf.Monitor(read, reads="exchange"), sf.Monitor(read, reads="prompt"),
             sf.Monitor(sf.Words(lambda texts: [float(len(t)) for t in texts]))]  # fmt: skip
    said = ["Rome is in Italy", "he gave a drink", "the store"]
    for monitor in cases:
        found = sf.conversation_scores(model, monitor, PROMPTS, replies=said, batch=2)
        for row, reply in enumerate(said):
            ids = model.tokenizer(reply, add_special_tokens=False)["input_ids"]
            made = model.generate(PROMPTS[row], max_new_tokens=len(ids), when=lambda s, ids=ids: pl.Say(ids) if s.index == 0 else None,
                                  monitors=monitor)  # fmt: skip
            assert made.ids() == ids
            assert np.isclose(found[row], np.nanmax(made.firings.statistic.values), atol=1e-4)


def test_an_encoder_is_read_by_a_prompt_monitor_alone() -> None:
    model = opened("bert")
    monitor = sf.Monitor(sf.Direction("layers.1.resid_post", V), reads="prompt", threshold=0.0)
    found = sf.conversation_scores(model, monitor, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert np.isclose(
            found[row],
            float((model.run(prompt, keep="layers.1.resid_post").tensor("layers.1.resid_post")[0] @ V).max()),
            atol=1e-4,
        )
    with pytest.raises(InputError, match="does not generate"):
        sf.conversation_scores(model, replace(monitor, reads="answer"), PROMPTS)
    t5 = opened("t5")
    width = t5.anatomy.stacks[0].d_model
    over = sf.Monitor(sf.Direction("encoder.layers.0.resid_post", torch.ones(width)), reads="prompt")
    together = t5.generate(PROMPTS, max_new_tokens=2, monitors=over).firings.statistic.values[:, 0, 0]
    states = [t5.run(p, keep=over.sites).tensor(over.sites[0])[0].sum(-1).max() for p in PROMPTS]
    assert np.allclose(together, states, atol=1e-4)
    with pytest.raises(InputError, match="the encoder"):
        t5.generate(PROMPTS, max_new_tokens=2, monitors=replace(over, reads="answer"))


# ---- thresholds, cascades and files


def benign(n: int) -> list[list[int]]:
    return torch.randint(5, 97, (n, 6), generator=torch.Generator().manual_seed(1)).tolist()


def test_a_calibrated_monitor_is_what_its_scores_say() -> None:
    model, read = opened("gpt2"), reader("gpt2")
    monitor = sf.Monitor(read, rule="mean", then=pl.Stop())
    with pytest.raises(InputError, match="takes 19 at least"):
        sf.calibrate(model, monitor, benign(18))
    with pytest.raises(InputError, match="no threshold"):
        model.generate(PROMPTS, monitors=monitor)
    ready = sf.calibrate(model, monitor, benign(19), max_new_tokens=3, batch=19)
    scores = sf.conversation_scores(model, monitor, benign(19), max_new_tokens=3, batch=5)
    assert np.isclose(ready.level, scores.max(), atol=1e-5) and ready.digest == model.digest and ready.threshold.n == 19
    others = benign(40)[19:]
    found = sf.evaluate(
        model, ready, others, [False] * 12 + [True] * 9, sources=["a"] * 6 + ["b"] * 15, max_new_tokens=3
    )
    own = sf.conversation_scores(model, ready, others, max_new_tokens=3)
    assert np.allclose(found.score, own) and np.isclose(found.alarms[0], (own[:12] > ready.level).mean())
    assert (
        found.source.values.tolist() == ["all", "a", "b"] and np.isnan(found.recall[1]) and int(found.recall_n[2]) == 9
    )
    assert found.alarms_high[0] > found.alarms[0] >= found.alarms_low[0]


def test_shifts_are_further_sources_of_the_same_conversations() -> None:
    model, read = opened("gpt2"), reader("gpt2")
    asked = [*PROMPTS, "he went to Rome", "Mary and John", "The store"]
    labels = [True, False] * 3
    ready = sf.calibrate(model, sf.Monitor(read, reads="prompt"), benign(19))
    ready = replace(ready, threshold=replace(ready.threshold, value=0.3))
    other = [f"{p} today" for p in asked]
    shifts = {"upper case": None, "turned": lambda p: p[::-1], "by hand": other}
    found = sf.evaluate(model, ready, asked, labels, sources=["a"] * 3 + ["b"] * 3, shifts=shifts)
    assert found.source.values.tolist() == ["all", "a", "b", "upper case", "turned", "by hand"]
    assert found.shift.values.tolist() == ["upper case", "turned", "by hand"]
    for name, said in (
        ("upper case", [p.upper() for p in asked]),
        ("turned", [p[::-1] for p in asked]),
        ("by hand", other),
    ):
        alone = sf.evaluate(model, ready, said, labels)
        at = found.data.sel(source=name)
        assert np.allclose(found.shifted_score.sel(shift=name), alone.score, atol=1e-5)
        assert float(at.alarms) == float(alone.alarms[0]) and float(at.recall_low) == float(alone.recall_low[0])
    assert (
        np.allclose(found.score, sf.conversation_scores(model, ready, asked), atol=1e-5) and int(found.alarms_n[0]) == 3
    )
    for shift in sf.SHIFTS:
        said = shifted(model, ["he went to Rome"], shift)[0]
        chat = shifted(
            model, [[{"role": "system", "content": "s"}, {"role": "user", "content": "he went to Rome"}]], shift
        )[0]
        assert (
            said != "he went to Rome" and chat[0] == {"role": "system", "content": "s"} and chat[-1]["role"] == "user"
        )
        assert chat[-1]["content"] == (said if shift != "after another turn" else "he went to Rome") and len(
            chat
        ) == 2 + 2 * (shift == "after another turn")
    for wrong, what in (
        ("shouted", "there is no shift 'shouted'"), ({"x": asked[:2]}, "gives 2 prompts for 6"), ({"a": "rot13"}, "one name"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=what):
            sf.evaluate(model, ready, asked, labels, sources=["a"] * 6, shifts=wrong)
    with pytest.raises(InputError, match="texts or chats"):
        sf.evaluate(model, ready, benign(4), [True, False] * 2, shifts="rot13")
    with pytest.raises(InputError, match="holds the mark '</s>'"):
        sf.evaluate(model, ready, ["he went </s>"] * 2, [True, False], shifts="rot13")


def test_a_cascade_reads_closely_only_whom_the_first_stage_sends() -> None:
    model, read = opened("gpt2"), reader("gpt2")
    calls: list[int] = []

    def judge(texts: list[str]) -> list[float]:
        calls.append(len(texts))
        return [float(sum(map(ord, t)) % 97) for t in texts]

    cheap, dear = sf.Monitor(read, name="cheap"), sf.Monitor(sf.Words(judge), name="dear")
    scores = sf.conversation_scores(model, cheap, benign(24), max_new_tokens=4)
    cheap = replace(cheap, threshold=float(np.median(scores)))
    cascade = sf.calibrate(model, sf.Cascade(cheap, dear), benign(24), alarms=0.2, max_new_tokens=4)
    total = sum(calls)
    assert total < 24 * 4
    made = model.generate(benign(24), max_new_tokens=4, monitors=[cheap, cascade])
    early, late = (made.firings.statistic.sel(monitor=n).values for n in ("cheap", "cascade"))
    met = np.logical_or.accumulate(early > cheap.level, 1)
    assert np.array_equal(np.isnan(late), ~met)
    texts = [[model.tokenizer.decode(made.ids(r)[:t], skip_special_tokens=True) for t in range(4)] for r in range(24)]
    wanted = [max((sum(map(ord, texts[r][t])) % 97 for t in range(4) if met[r, t]), default=-np.inf) for r in range(24)]
    mine = sf.conversation_scores(model, cascade, benign(24), max_new_tokens=4)
    assert mine.tolist() == wanted and (mine > cascade.level).mean() <= 0.2
    found = sf.compare_stages(model, cascade, benign(24), [True] * 8 + [False] * 16, max_new_tokens=4)
    assert found.stage.values.tolist() == ["first", "second", "cascade"]
    assert np.isclose(float(found.read[2]), met.sum() / (24 * 4)) and float(found.recall[2]) <= float(found.recall[1])


def test_files_belong_to_weights_and_bring_back_the_same(tmp_path: Path) -> None:
    model, read = opened("llama"), reader("llama")
    monitor = sf.Monitor(read, sf.ema(0.4), threshold=0.5, then=pl.Stop("enough"), name="saved")
    path = tmp_path / "monitor.safetensors"
    with pytest.raises(InputError, match="belongs to no weights"):
        monitor.save(path)
    for then in (
        pl.Stop("enough"),
        sf.ABSTAIN,
        None,
        [pl.Steer("layers.0.resid_post", V, 2.0)],
        pl.Redirect([pl.Ablate("layers.0.mlp.out")]),
    ):
        replace(monitor, then=then).tie(model).save(path)
        again = sf.load_monitor(model, path)
        both = [model.generate(PROMPTS, max_new_tokens=4, monitors=m) for m in (replace(monitor, then=then), again)]
        assert torch.equal(both[0].tokens, both[1].tokens)
        assert (
            np.allclose(both[0].firings.score, both[1].firings.score, atol=1e-5, equal_nan=True)
            and again.rule == monitor.rule
        )
    other = opened("gpt2")
    with pytest.raises(InputError, match="other weights"):
        sf.load_monitor(other, path)
    with pytest.raises(InputError, match="other weights"):
        other.generate(PROMPTS, monitors=again)
    with pytest.raises(InputError, match="holds no monitor"):
        pl.save_edits([], tmp_path / "edits.safetensors")
        sf.load_monitor(model, tmp_path / "edits.safetensors")
    with pytest.raises(InputError, match="is a function"):
        replace(monitor, then=lambda alarm: None).tie(model).save(path)
    bent = sf.Monitor(lambda x: (x @ V).tanh(), site="layers.1.resid_post", threshold=0.1, name="bent").tie(model)
    bent.save(path)
    with pytest.raises(InputError, match="give load_monitor"):
        sf.load_monitor(model, path)
    again = sf.load_monitor(model, path, reader=bent._readers[0])
    assert again.level == 0.1
    with pytest.raises(InputError, match="reads otherwise"):
        sf.load_monitor(model, path, reader=read)
    cascade = sf.Cascade(monitor, replace(monitor, threshold=None), threshold=0.1, then=pl.Stop()).tie(model)
    cascade.save(path)
    assert sf.load_monitor(model, path).first.level == 0.5


# ---- the unusual


def test_half_precision_an_adapter_and_no_tokenizer() -> None:
    import peft

    module = build("llama")
    bare = pl.load(module.bfloat16())
    read = sf.Direction("layers.1.resid_post", V)
    made = bare.generate([[5, 6, 7], [8, 9, 10, 11]], max_new_tokens=4, monitors=sf.Monitor(read))
    whole = bare.run([[5, 6, 7, *made.ids(0)]], keep=read.site).tensor(read.site)[0].float() @ V
    assert np.allclose(made.firings.score.values[0, 0], whole[2:-1], rtol=5e-2, atol=5e-2 * float(whole.abs().max()))
    with pytest.raises(InputError, match="without a tokenizer"):
        bare.generate([[5, 6]], monitors=sf.Monitor(sf.Words(len)))
    module = build("llama")
    adapted = pl.load(
        peft.get_peft_model(module, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)),
        tokenizer=tokenizer(module),
    )
    made = adapted.generate(PROMPTS[0], max_new_tokens=3, monitors=sf.Monitor(read))
    assert np.allclose(made.firings.score.values[0, 0], by_hand(adapted, made, 0, replace_offset(read)), atol=1e-4)


def replace_offset(read: Any) -> Any:
    return replace(read, offset=0.0)


def test_what_is_no_monitor_is_refused_in_a_sentence() -> None:
    model, read = opened("llama"), reader("llama")
    for wrong, what in (
        (lambda: sf.Monitor(V), "no reader"), (lambda: sf.Monitor(read, reads="all"), "reads="), (lambda: sf.Monitor(read, then=3), "then=3"),
        (lambda: sf.Monitor([read, sf.Words(len)]), "cascade"), (lambda: sf.Monitor(read, threshold=float("nan")), "no number"),
        (lambda: model.generate(PROMPTS, monitors=[V]), "monitors="),
        (lambda: model.generate(PROMPTS, monitors=sf.Monitor("layers.*.mlp.neurons.3")), "several sites"),
        (lambda: model.generate(PROMPTS, monitors=sf.Monitor(sf.Direction("layers.0.resid_post", torch.ones(5)))), "\\[5\\] numbers"),
        (lambda: model.generate(PROMPTS, monitors=sf.Monitor(lambda x: x / 0, site=read.site)), "for 3 tokens"),
        (lambda: sf.Cascade(sf.Monitor(read), sf.Monitor(read)), "no threshold"), (lambda: sf.conversation_scores(model, sf.Monitor(read), "one"), "a list"),
        (lambda: model.generate(PROMPTS[0]).firings, "no monitor"), (lambda: sf.conversation_scores(model, sf.Monitor(read), PROMPTS, replies=["", "a", "b"]), "empty"),
    ):  # fmt: skip
        with pytest.raises((InputError, PellucidError), match=what):
            wrong()
    with pytest.raises(Refused, match="beams"):
        model.generate(PROMPTS, num_beams=2, monitors=sf.Monitor(read))


def test_the_trace_is_a_view_with_a_line_for_each_monitor_and_its_threshold() -> None:
    from pellucid.views import kinds

    model, read = opened("llama"), reader("llama")
    found = model.generate(
        PROMPTS[0],
        max_new_tokens=4,
        monitors=[sf.Monitor(read, threshold=1.0, name="a"), sf.Monitor(read, "mean", name="b")],
    ).firings
    shown = kinds.view(found)
    assert kinds.of(shown).name == "curves" and [line.name for line in shown.lines] == ["a", "b"]
    assert [(level.name, level.y) for level in shown.levels] == [("a: threshold", 1.0)]
