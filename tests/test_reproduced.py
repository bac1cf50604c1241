"""From a saved result alone, its program gives the same numbers: every public technique, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pellucid as pl
from pellucid.results import Result
from tests.test_vocabulary import PUBLIC
from tests.zoo import build, tokenizer

CLEAN, OTHER = "The city of Paris is in France", "The city of Rome is in Italy"
TEXTS = [
    "The capital of France is Paris",
    "Mary and John went to the store",
    "he gave a drink to Mary",
    "he is in Rome",
]
FACT = "The capital of France is in the city of"
DIFFERENCE = pl.metrics.logit_difference(" Paris", " Rome")


@cache
def opened(family: str, layers: int = 2) -> pl.Model:
    module = build(family, layers=layers)
    return pl.load(module, tokenizer=tokenizer(module))


def gpt2() -> pl.Model:
    return opened("gpt2")


def pairs(model: pl.Model) -> Any:
    return pl.tasks.Prompts.from_pairs(
        [CLEAN] * 2, [CLEAN.replace("Paris", "Rome")] * 2, [" Paris"] * 2, [" Rome"] * 2, model.tokenizer
    )


NEW = pl.surgery.Fact("The capital of {} is", "France", " Rome", " Paris")


def rewritten() -> Any:
    return pl.surgery.edit(gpt2(), NEW, covariance="off", layers=0, contexts=0, search=pl.surgery.Search(steps=2))


@cache
def dictionary() -> Any:
    from pellucid.neurons.dictionaries import Dictionary, TopK

    decoder = torch.nn.functional.normalize(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    return Dictionary(decoder.T.contiguous(), torch.zeros(12), decoder, torch.zeros(32), TopK(3), "layers.0.resid_post")


@cache
def harvest() -> Any:
    return pl.neurons.harvest(gpt2(), TEXTS * 2, ["layers.0.mlp.neurons"], top=4, sample=16)


@cache
def steering() -> Any:
    return pl.safety.Contrast(sites="layers.1.resid_post").fit(gpt2(), TEXTS, [f"{t} a" for t in TEXTS])


def halves() -> dict[str, pl.Model]:
    bias = "transformer.h.0.mlp.c_proj.bias"
    return {str(i): gpt2().changed(pl.changed.Replaced(bias, i * torch.ones(32))) for i in (1, 2)}


@cache
def tuned() -> Any:
    return L.TunedLens(tokens=60, context=8).fit(gpt2(), TEXTS * 4)


@cache
def future() -> Any:
    return L.FutureLens(tokens=60, context=8).fit(gpt2(), TEXTS * 4)


@cache
def scores() -> Any:
    return R.edge_attribution(gpt2(), pairs(gpt2()), how="resample")


def monitor() -> Any:
    return pl.safety.Monitor(
        pl.safety.Direction("layers.1.resid_post", torch.linspace(-1, 1, 32)), pl.safety.ema(0.4), threshold=0.0
    )


def words() -> Any:
    spans = pl.probing.Spans.words([text.split() for text in TEXTS * 6])
    return pl.probing.Examples(
        spans, ["upper" if spans.surface(i)[0].isupper() else "lower" for i in range(len(spans))]
    )


@cache
def classifier(name: str = "") -> pl.Model:
    """BERT with two classes; one of another name has other weights."""
    from tests.tuning.test_fit import opened as one

    model = one("bert-class")
    if name:
        model = model.changed(pl.changed.Replaced("bert.encoder.layer.0.output.dense.bias", torch.ones(32)))
    return model


HE = [True, False, True, False] * 4


def labelled() -> Any:
    texts = ["he is in Paris", "Rome is in Italy", "he gave a drink", "Mary went to the store"] * 4
    return pl.tuning.Rationales(texts, [0, 1, 0, 1] * 4, {"decoy": [text.split()[0] for text in texts]})


def parsed() -> Any:
    return pl.probing.Treebank.parse("""1\tThe\t_\tDET\t_\t_\t2\tdet\t_\t_
2\tcity\t_\tNOUN\t_\t_\t0\troot\t_\t_
3\tof\t_\tADP\t_\t_\t4\tcase\t_\t_
4\tParis\t_\tPROPN\t_\t_\t2\tnmod\t_\t_
""")


A, T, C, R, L, P, N = pl.attribution, pl.attention, pl.causal, pl.circuits, pl.lenses, pl.probing, pl.neurons
CALLS: dict[str, Callable[[], Any]] = {
    "attention.head_relations": lambda: T.head_relations(gpt2(), parsed().sentences, least=1),
    "attention.uniform_attention": lambda: T.uniform_attention(
        classifier(), TEXTS, [0, 1, 1, 0], TEXTS, [0, 1, 1, 0], epochs=1
    ),
    "tuning.frontier": lambda: pl.tuning.frontier(
        classifier(), labelled(), pl.tuning.Consistency("decoy"), weights=[1.0], seeds=[0], steps=2, batch=4
    ),
    "tuning.evasion": lambda: pl.tuning.evasion(
        classifier(), classifier("further"), labelled(), HE,
        pl.tuning.direction(classifier(), labelled(), HE, "layers.0.resid_post"),
    ),
    "tuning.parts_off": lambda: pl.tuning.parts_off(
        gpt2(), pl.tuning.Rationales(TEXTS, properties={"topic": ["a", *"b" * (len(TEXTS) - 1)]}), "topic", {"a": pl.tuning.Only(neurons={0: [0, 1]})}
    ),
    "tuning.weight_sparsity": lambda: pl.tuning.weight_sparsity(gpt2(), pl.tuning.Rationales(TEXTS), shares=[0.5], steps=1, batch=2),
    "tuning.sparsity": lambda: pl.tuning.sparsity(gpt2(), pl.tuning.Rationales(TEXTS), keep=2),
    **{
        f"attribution.{name}": lambda name=name, options=options: getattr(A, name)(gpt2(), CLEAN, **options)
        for name, options in {
            "saliency": {"target": " Paris", "norm": "l1"},
            "gradient_x_input": {"players": "word"},
            "smoothgrad": {"draws": 3, "seed": 1},
            "integrated_gradients": {"target": " Paris", "against": " Rome", "steps": 4, "baseline": "mean"},
            "expected_gradients": {"references": TEXTS[:2], "draws": 4},
            "deeplift": {"baseline": "mean"},
            "occlusion": {"window": 2, "target": " Paris"},
            "lime": {"draws": 20},
            "kernel_shap": {"draws": 20, "target": A.continuation(" Paris is")},
            "shapley": {"draws": 2, "target": pl.metrics.log_odds(" Paris")},
            "exact_shapley": {"players": "word"},
            "owen": {"draws": 2},
            "partition": {"evaluations": 30},
            "relevance_propagation": {"target": " Paris"},
        }.items()
    },
    "attribution of a reading": lambda: A.saliency(gpt2(), CLEAN, A.reading("layers.1.mlp.neurons.3@-1")),
    "attribution of ids": lambda: A.saliency(gpt2(), gpt2().tokenizer(CLEAN)["input_ids"], 7),
    "attribution in an encoder-decoder": lambda: A.saliency(opened("t5"), CLEAN, decoder="Paris is"),
    "attribution of a class": lambda: A.saliency(opened("bert"), "The city of <mask> is", " Paris"),
    "attribution.word_importance": lambda: A.word_importance(gpt2(), [*TEXTS, CLEAN, OTHER], batch=4, seed=1),
    "attribution.evaluation.faithfulness": lambda: A.evaluation.faithfulness(
        gpt2(), CLEAN, {"saliency": A.saliency(gpt2(), CLEAN, " Paris")}, " Paris", draws=2
    ),
    "attribution.evaluation.random_attribution": lambda: A.evaluation.random_attribution(gpt2(), CLEAN, seed=3),
    "attention.patterns": lambda: T.patterns(gpt2(), CLEAN),
    "attention.patterns under edits": lambda: T.patterns(
        gpt2(), CLEAN, edits=[pl.Steer("layers.0.resid_post@-1", torch.linspace(0, 1, 32), 2.0)]
    ),
    "attention.rollout": lambda: T.rollout(gpt2(), CLEAN, residual=0.3),
    "attention.flow": lambda: T.flow(gpt2(), CLEAN),
    "attention.norm_weighted": lambda: T.norm_weighted(gpt2(), CLEAN),
    "attention.attention_gradient": lambda: T.attention_gradient(gpt2(), CLEAN, " Paris", against=" Rome"),
    "attention.gradient_weighted": lambda: T.gradient_weighted(gpt2(), CLEAN),
    "attention.relevance": lambda: T.relevance(gpt2(), CLEAN, " Paris"),
    "attention.value_zeroing": lambda: T.value_zeroing(gpt2(), CLEAN, edits=[pl.Ablate("layers.0.attn.heads.1")]),
    "attention.permuted_attention": lambda: T.permuted_attention(gpt2(), CLEAN, draws=3),
    "attention.head_summaries": lambda: T.head_summaries(gpt2(), TEXTS),
    "attention.head_clusters": lambda: T.head_clusters(gpt2(), TEXTS, draws=2),
    "attention.attention_erasure": lambda: T.attention_erasure(gpt2(), TEXTS, points=4, draws=2),
    "attention.adversarial_training": lambda: T.adversarial_training(gpt2(), TEXTS, TEXTS[:2], strengths=[1.0], batch=4),
    "attention.attention_diagnostic": lambda: T.attention_diagnostic(
        gpt2(), TEXTS * 2, [0, 1] * 4, TEXTS, [0, 1, 1, 0], epochs=2, seeds=2
    ),
    "attribution.evaluation.label_randomisation": lambda: A.evaluation.label_randomisation(
        gpt2(), gpt2().changed(pl.changed.Replaced("transformer.h.0.mlp.c_proj.bias", torch.ones(32))), TEXTS[:2], " Paris",
        methods=["saliency"],
    ),
    "attention.attention_correlation": lambda: T.attention_correlation(gpt2(), TEXTS),
    "attribution.evaluation.agreement": lambda: A.evaluation.agreement({"a": [np.arange(4.0)], "b": [np.arange(4.0)[::-1]]}, k=2),
    "attribution.evaluation.compare": lambda: A.evaluation.compare(
        gpt2(), TEXTS[:2], methods=["saliency", "occlusion"], metrics=["comprehensiveness"], seed=1
    ),
    "attribution.evaluation.distribution_shift": lambda: A.evaluation.distribution_shift(gpt2(), TEXTS * 4, seed=1),
    "attribution.evaluation.implementation_invariance": lambda: A.evaluation.implementation_invariance(
        gpt2(), TEXTS[:2], methods=["saliency"], seed=1
    ),
    "attribution.evaluation.known_truth": lambda: A.evaluation.known_truth(["occlusion"], rules=("marker",), texts=2, seed=1),
    "attribution.evaluation.target_randomisation": lambda: A.evaluation.target_randomisation(
        gpt2(), TEXTS[:2], methods=["saliency"], draws=2
    ),
    "attribution.evaluation.weight_randomisation": lambda: A.evaluation.weight_randomisation(
        gpt2(), TEXTS[:2], methods=["saliency"], seed=1
    ),
    "safety.honesty": lambda: pl.safety.honesty(
        gpt2(),
        [(FACT, " Paris", " Rome"), ("she is in", " Rome", " France"), ("Mary and", " John", " Paris"), ("he is", " in", " a")],
        pl.safety.Vector("layers.1.resid_post", torch.linspace(-1, 1, 32)), pressures=[],
    ),
    "safety.audit": lambda: pl.safety.audit(
        gpt2(), [f"{a} is in {b}" for a in ("Paris", "Rome", "Mary", "John", "he", "she", "the dog", "the cat") for b in ("France", "Italy")],
        [True, False] * 8, draws=2, split=2, tokens=1,
    ),
    "safety.evaluate": lambda: pl.safety.evaluate(
        gpt2(), monitor(), TEXTS, [True, False] * 2, replies=TEXTS, sources=["a"] * 2 + ["b"] * 2
    ),
    "safety.compare_stages": lambda: pl.safety.compare_stages(
        gpt2(), pl.safety.Cascade(monitor(), monitor()), TEXTS, [True, False] * 2, max_new_tokens=3
    ),
    "safety.abstain": lambda: pl.safety.abstain(gpt2(), TEXTS, [" Paris", "T", "F", "A"], score="margin", draws=3),
    "safety.semantic_entropy": lambda: pl.safety.semantic_entropy(gpt2(), TEXTS[:2], draws=3, max_new_tokens=2),
    "firings of a monitor": lambda: gpt2().generate(CLEAN, max_new_tokens=3, monitors=monitor()).firings,
    "surgery.layer_importance": lambda: pl.surgery.layer_importance(
        gpt2(), TEXTS[:3], {"seven": (TEXTS[:2], pl.metrics.logit(7))}, parts=["layer", "mlp"], seed=1
    ),
    "surgery.stitching": lambda: pl.surgery.stitching(
        gpt2(), gpt2(), TEXTS * 4, after=[0], into=[1], kinds=["identity", "ridge"], controls=["permuted"], held_out=40
    ),
    "surgery.Stitch.penalty": lambda: pl.surgery.Stitch("ridge", after=0, into=1).fit(gpt2(), gpt2(), TEXTS * 2).penalty(gpt2(), gpt2(), TEXTS),
    "safety.strengths": lambda: pl.safety.strengths(
        gpt2(), steering().at(1), TEXTS, DIFFERENCE, strengths=(0.3,), draws=1, texts=TEXTS[:1], max_new_tokens=2
    ),
    "surgery.scoreboard": lambda: pl.surgery.scoreboard(rewritten(), TEXTS[:2], controls=("without C",), max_new_tokens=2),
    "surgery.KeyCovariance.adequacy": lambda: pl.surgery.KeyCovariance(layers=0, ridge=0.1).fit(gpt2(), TEXTS * 4).adequacy(),
    "surgery.traced_again": lambda: pl.surgery.traced_again(rewritten(), draws=1),
    "surgery.editing_by_layer": lambda: pl.surgery.editing_by_layer(
        gpt2(), NEW, covariance="off", search=pl.surgery.Search(steps=2), contexts=0
    ),
    "surgery.removal": lambda: pl.surgery.removal(
        gpt2(), TEXTS[:3], {"seven": (CLEAN, pl.metrics.logit(7))}, most=1, layers=[0, 1], draws=2, seed=1
    ),
    "surgery.edit": lambda: pl.surgery.edit(
        gpt2(), NEW, covariance="off", layers=0, contexts=1,
        search=pl.surgery.Search(steps=2),
    ).result,
    "surgery.similarity": lambda: pl.surgery.similarity(gpt2(), gpt2(), TEXTS * 2, k=2, draws=1),
    "surgery.exits": lambda: pl.surgery.exits(gpt2(), TEXTS, [pl.surgery.Exit("margin", 0.02, layers=(0,))], context=8),
    "surgery.calibrate": lambda: pl.surgery.calibrate(gpt2(), TEXTS * 2, pl.surgery.Exit("stable", layers=(0,)), delta=0.5, context=8),
    "surgery.ensemble": lambda: pl.surgery.ensemble(gpt2(), halves(), TEXTS, layers=0, context=8, draws=1),
    "surgery.chosen_variants": lambda: pl.surgery.chosen_variants(gpt2(), halves(), CLEAN, layers=0, route="random", seed=1),
    "surgery.splice": lambda: pl.surgery.splice(gpt2(), CLEAN, CLEAN.replace("Paris", "Rome"), metric=DIFFERENCE),
    "causal.patching": lambda: C.patching(gpt2(), pairs(gpt2())),
    "causal.patching with several metrics": lambda: C.patching(
        gpt2(), CLEAN, CLEAN.replace("Paris", "Rome"), over=["layers.0.mlp.out@-1"], metric={"a": DIFFERENCE, "b": pl.metrics.logit(7)}
    ),
    "causal.ablation": lambda: C.ablation(gpt2(), TEXTS, metric=pl.metrics.logit(" Paris"), how="mean", reference=TEXTS[:2]),
    "causal.model_difference": lambda: C.model_difference(
        gpt2(), TEXTS[:2], gpt2().changed(pl.changed.Replaced("transformer.h.0.mlp.c_proj.bias", torch.ones(32)))
    ),
    "causal.attribution_patching": lambda: C.attribution_patching(gpt2(), pairs(gpt2()), check=2),
    "causal.path_patching": lambda: C.path_patching(
        gpt2(), pairs(gpt2()), over="layers.0.attn.heads.*", receivers=["layers.1.attn.heads.0.q"]
    ),
    "causal.edge_ablation": lambda: C.edge_ablation(
        gpt2(), TEXTS[0], over=["layers.0.mlp.out"], receivers=["layers.1.mlp.out"], how="zero", metric=pl.metrics.logit(7)
    ),
    "causal.tracing": lambda: C.tracing(gpt2(), FACT, subject="capital of France", draws=2, window=1),
    "causal.window_curve": lambda: C.window_curve(gpt2(), FACT, subject="capital of France", windows=(1, 2), draws=2),
    "causal.mediation": lambda: C.mediation(gpt2(), pairs(gpt2())),
    "causal.concentration": lambda: C.concentration(C.mediation(gpt2(), pairs(gpt2()))),
    "causal.interaction": lambda: C.interaction(gpt2(), pairs(gpt2()), k=2, pool=4, draws=2),
    "causal.counterfactual": lambda: C.counterfactual(gpt2(), CLEAN, max_changes=1, candidates=4, beam=1),
    "circuits.edge_attribution": lambda: R.edge_attribution(gpt2(), pairs(gpt2()), how="resample"),
    "circuits.exact_patching": lambda: R.exact_patching(gpt2(), pairs(gpt2()), how="zero"),
    "circuits.faithfulness_curve": lambda: R.faithfulness_curve(
        gpt2(), scores(), pairs(gpt2()), how="resample", sizes=(0.1, 0.5)
    ),
    "circuits.judge": lambda: R.judge(
        gpt2(), scores().circuit(8), pairs(gpt2()), how="resample", draws=2, screen=2
    ),
    "circuits.EdgeScores.tested": lambda: scores().tested(),
    "circuits.stability": lambda: R.stability(scores(), 5, draws=5),
    "circuits.head_roles": lambda: R.head_roles(gpt2(), draws=2, length=8),
    "lenses.logit_lens": lambda: L.logit_lens(gpt2(), CLEAN, positions=[-1, -2]),
    "lenses.backward_lens": lambda: L.backward_lens(gpt2(), CLEAN, " Rome"),
    "lenses.head_lens": lambda: L.head_lens(gpt2(), CLEAN, layers=[0]),
    "lenses.direct_logit_attribution": lambda: L.direct_logit_attribution(gpt2(), CLEAN, " Paris", against=" Rome", by="head"),
    "lenses.decoder_lens": lambda: L.decoder_lens(opened("t5"), CLEAN, max_new_tokens=3),
    "lenses.patchscope": lambda: L.patchscope(gpt2(), CLEAN),
    "lenses.prediction_depth": lambda: L.prediction_depth(L.logit_lens(gpt2(), CLEAN)),
    "lenses.lens_quality": lambda: L.lens_quality(
        gpt2(), TEXTS * 4, tuned(), tokens=60, context=8
    ),
    "lenses.FutureLens.read": lambda: future().read(gpt2(), CLEAN),
    "lenses.FutureLens.score": lambda: future().score(gpt2(), TEXTS * 4, tokens=40, context=8),
    "lenses.logit_lens through a tuned one": lambda: L.logit_lens(gpt2(), CLEAN, through=tuned()),
    "lenses.causal_basis": lambda: L.causal_basis(gpt2(), TEXTS, "layers.0.resid_post", size=2, steps=3, states=8, restarts=1),
    "neurons.logit_effects": lambda: N.logit_effects(gpt2(), "layers.1.mlp.neurons.*", top=3),
    "neurons.crowding": lambda: N.crowding(gpt2()),
    "neurons.knowledge_attribution": lambda: N.knowledge_attribution(gpt2(), FACT, " Paris", steps=3),
    "neurons.knowledge_effect": lambda: N.knowledge_effect(gpt2(), FACT, " Paris", ["layers.0.mlp.neurons.3"], draws=2),
    "neurons.knowledge_neurons": lambda: N.knowledge_neurons(N.knowledge_attribution(gpt2(), FACT, " Paris", steps=3)),
    "neurons.neuron_selectivity": lambda: N.neuron_selectivity(
        gpt2(), TEXTS * 4, [(i, 0, 2) for i in range(16)], ["a", "b"] * 8, draws=3
    ),
    "neurons.compositional": lambda: N.compositional(
        np.random.default_rng(0).random((80, 3)), N.Concepts.labels(["A", "B", "C", "D"] * 20)
    ),
    "neurons.neuron_page": lambda: N.neuron_page(gpt2(), harvest(), "layers.0.mlp.neurons.1", contexts=2),
    "neurons.activating_inputs": lambda: N.activating_inputs(gpt2(), "layers.0.mlp.neurons.1", length=3, steps=2, restarts=1),
    "neurons.toy_model": lambda: N.toy_model([0.5], features=4, hidden=2, steps=5, batch=8),
    "neurons.unit_clusters": lambda: N.unit_clusters(N.UnitVectors.activations(harvest()), draws=2),
    "neurons.dictionaries.dictionary_quality": lambda: N.dictionaries.dictionary_quality(
        gpt2(), dictionary(), TEXTS * 4, tokens=40, context=8, batch=2
    ),
    "neurons.dictionaries.Dictionary.features": lambda: dictionary().features(gpt2(), CLEAN),
    "probing.probe": lambda: P.probe(gpt2(), words()),
    "probing.selectivity": lambda: P.selectivity(gpt2(), words()),
    "probing.beside_random": lambda: P.beside_random(gpt2(), words()),
    "probing.online_code": lambda: P.online_code(gpt2(), words(), fractions=(0.25, 0.5, 1.0), seeds=1),
    "probing.variational_code": lambda: P.variational_code(gpt2(), words(), steps=3),
    "probing.edge_probing": lambda: P.edge_probing(gpt2(), words(), seeds=1),
    "probing.amnesic": lambda: P.amnesic(gpt2(), words(), "layers.0.resid_post", draws=1),
    "probing.ProbeTraces.trace": lambda: P.ProbeTraces().fit(gpt2(), words()).trace(gpt2(), CLEAN),
    "probing.roc": lambda: P.roc(np.arange(12.0) % 5, np.arange(12) % 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_program_of_a_saved_result_gives_its_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pl.quiet():
        result = CALLS[name]()
        kept = getattr(result, "result", result)
        assert isinstance(kept, Result)
        monkeypatch.chdir(tmp_path)
        result.save("result.zip")
        loaded = type(result).load("result.zip")
        assert getattr(loaded, "result", loaded) == kept
        provenance = Result.load("result.zip").provenance
        assert set(provenance.free) <= {"module", "tokenizer"}, provenance.free
        families = [m for m in (gpt2(), opened("t5"), opened("bert"), classifier()) if m.digest == provenance.digest]
        names: dict[str, Any] = {"module": families[0].module, "tokenizer": families[0].tokenizer} if families else {}
        exec(provenance.code(), names)
    again = getattr(names["result"], "result", names["result"])
    if name == "tuning.frontier":  # its cost is measured in seconds
        again, kept = (
            Result(x.data.drop_vars("cost"), kind=x.kind, title=x.title, provenance=x.provenance) for x in (again, kept)
        )
    assert again.allclose(kept, atol=1e-6)
    assert again.provenance.call == kept.provenance.call


def test_every_public_technique_is_tried() -> None:
    """Those not above are named here, with why."""
    beside = {
        **dict.fromkeys(("causal.alignment_search", "causal.interchange", "causal.mitigation", "circuits.test"),
                        "tests/circuits/test_record.py"),
        **dict.fromkeys(("probing.questions", "probing.structural"), "tests/probing/test_record.py"),
        "attention.adversarial_attention": "tests/attribution/test_record.py",
        # they measure time
        **dict.fromkeys(("surgery.generate_early", "surgery.draft_and_verify"), "tests/surgery/test_exits.py"),
        "neurons.score_descriptions": "tests/neurons/test_programs.py",
        "tuning.interventions": "",  # not made again yet: it trains
        "tuning.reason_tests": "tests/tuning/test_explained.py",
    }  # fmt: skip
    missing = {
        address.removeprefix("pl.")
        for address, function in PUBLIC.items()
        if "Result" in str(getattr(function, "__annotations__", {}).get("return", "")) and "." in address
    } - {name.partition(" ")[0] for name in CALLS}
    assert missing == set(beside)
    for name, file in beside.items():
        assert not file or name.rpartition(".")[2] in Path(file).read_text(), name
