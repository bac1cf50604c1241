"""Whatever is handed to a public function: it works, or one of pellucid's own errors says in a sentence what to do.

2,000 cases, always the same ones. More, and others:

    HYPOTHESIS_MAX=20000 pytest tests/test_fuzz.py --hypothesis-seed=7

One argument of an otherwise good call is wild, sometimes two, so that what comes after the first check is reached too.
"""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pellucid as pl
from pellucid.errors import PellucidError
from tests.zoo import build, tokenizer

CLEAN, OTHER = "The city of Paris is in France", "The city of Rome is in Italy"
LONGEST = 700  # characters of a message: what was given is quoted, its start at least


# ---- the rule


def ugly(message: str) -> str | None:
    """What is wrong with the words of an error, if anything."""
    if len(message.split()) < 3:
        return "says nothing"
    if len(message) > LONGEST:
        return f"{len(message)} characters"
    if "\n" in message:
        return "more than a line"
    found = re.search(
        r"Traceback|\bat 0x[0-9a-f]+|np\.(int|float|str|bool)_?\d*\(|<class '|\bNoneType\b|object at ", message
    )
    return f"has {found[0]!r}" if found else None


def attempt(call: Callable[[], Any]) -> None:
    """Call; AssertionError where anything but a good error of pellucid's own leaves it."""
    try:
        with warnings.catch_warnings(), pl.quiet():
            warnings.simplefilter("ignore")
            call()
    except PellucidError as error:
        fault = ugly(str(error))
        assert fault is None, f"{fault}: {error}"
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            return  # a function of the user's own
        raise AssertionError(f"{type(error).__name__} leaves the package: {error}") from error


# ---- models


@cache
def opened(family: str) -> pl.Model:
    kind = next((k for k in ("Classifier", "Without") if k in family), "")
    name = family.removesuffix(kind)
    if kind == "Classifier":
        from transformers import BertForSequenceClassification

        torch.manual_seed(0)
        module = BertForSequenceClassification(build("bert").config).eval()
        return pl.load(module, tokenizer=tokenizer(build("bert")))
    module = build(name)
    return pl.load(module, tokenizer=None if kind else tokenizer(module))


MODELS = ("gpt2", "llama", "bert", "t5", "mixtral", "bertClassifier", "gpt2Without")


# ---- values

SCRIPTS = "aZ 0.,'ßéçñøあ漢字한글नमस्ते ไทย مرحبا שלום Привет Ωμέγα ́‍🎉👩‍👩‍👧\u200b\ufeff\u2028\n\t\x00<>"
texts = st.one_of(
    st.sampled_from(
        [CLEAN, OTHER, "", " ", "\n", "\t \n", "<pad>", "<s>", "</s>", "<mask>", "<unk>", "The <mask> is", "<s><s>"]
    ),
    st.text(SCRIPTS, max_size=12),
    st.text(st.characters(), max_size=6),
    st.sampled_from(["\ud800", "a\udfffb", "\x00", "e" * 70, "\u202eabc"]),
)
numbers = st.one_of(
    st.integers(-3, 100), st.sampled_from([-1, 0, 97, 10**6, 2**31, 2**63, 2**70, -(2**63)]), st.booleans()
)
floats = st.sampled_from([0.5, -1.0, 0.0, 2.0, float("nan"), float("inf"), -float("inf"), 1e300])
odd = st.one_of(
    st.none(),
    numbers,
    floats,
    texts,
    st.sampled_from([b"bytes", object, len, {}, [], (), set(), {1, 2}, range(3), Ellipsis, 1j, object()]),
    st.sampled_from([np.int64(7), np.float32(0.5), np.bool_(True), np.str_("Paris"), np.array([5, 6]), np.array([]), np.array(["a"]), np.eye(2)]),
    st.sampled_from([torch.tensor(7), torch.tensor([5, 6, 7]), torch.tensor([]), torch.ones(2, 2), torch.zeros(1, 3, 3).long(), torch.tensor([True])]),
    st.lists(st.one_of(numbers, texts, st.none(), floats), max_size=3),
    st.tuples(texts, texts),
    st.dictionaries(st.sampled_from(["input_ids", "attention_mask", "role", "content", "x"]), st.one_of(texts, numbers, st.none()), max_size=2),
)  # fmt: skip
ids = st.lists(st.integers(5, 96), min_size=1, max_size=6)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", None, 3])
prompts = st.one_of(
    texts,
    st.lists(texts, max_size=3),
    ids,
    st.lists(ids, min_size=1, max_size=3),
    ids.map(torch.tensor),
    ids.map(lambda row: torch.tensor([row])),
    ids.map(np.array),
    st.lists(numbers, min_size=1, max_size=4),
    st.builds(lambda row, mask: {"input_ids": torch.tensor([row]), "attention_mask": mask}, ids, st.one_of(
        ids.map(lambda row: torch.ones(1, len(row)).long()), ids.map(lambda row: torch.zeros(1, len(row)).long()),
        ids.map(lambda row: torch.tensor([[i % 2 for i in row]])), st.none(), st.just([[1, 1]]), st.just("yes"),
    )),
    ids.map(lambda row: {"input_ids": [row]}),
    ids.map(lambda row: {"input_ids": row}),
    ids.map(lambda row: {"input_ids": torch.tensor([row]), "token_type_ids": torch.zeros(1, len(row)).long()}),
    ids.map(lambda row: {"inputs_embeds": torch.randn(1, len(row), 32)}),
    st.lists(st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, st.none())}), min_size=1, max_size=3),
    st.tuples(texts, texts),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=2),
    odd,
)  # fmt: skip

STACKS = ["", "", "", "", "encoder.", "decoder.", "stack0.", "middle."]
PARTS = [
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.z",
    "attn.z_out",
    "attn.scores",
    "attn.pattern",
    "attn.out",
    "mlp",
    "mlp.out",
    "mlp.neurons",
    "mlp.router",
    "mlp.experts",
    "mlp.experts.0",
    "mlp.experts.1.neurons",
    "mlp.experts.neurons.3",
    "cross.z",
    "cross.pattern",
    "attn.heads",
    "attn.heads.0",
    "attn.heads.*.z",
    "attn.heads.1:3.q",
    "attn.heads.-1.pattern",
    "attn.heads.9",
    "attn.heads.0.nothing",
    "mixer.out",
    "mlp.neurons.3",
    "mlp.neurons.*",
    "mlp.neurons.0:4",
    "mlp.neurons.999",
    "mlp.neurons.-1",
    "resid_post.7",
    "attn.hook_z",
    "hook_resid_pre",
    "attn.hook_q",
    "embed",
    "logits",
    "*",
    "attn.*",
]
NUMBERS = ["0", "1", "-1", "*", "0:1", ":", "1:0", "2", "99", "-9", "0,1", "0,9", "x", "", "1.5", "0:1:2", "１"]
AT = ["", "", "", "@-1", "@0", "@*", "@1:3", "@", "@99", "@-99", "@'Paris'", "@'nothing'", "@'", '@"Paris"', "@subject", "@1,2", "@1,99", "@:",
      "@3:1", "@@1", "@''", "@x y", "@['a']", "@0x1", "@1e3", "@\ud800", "@'\\'"]  # fmt: skip
grammatical = st.builds(
    lambda stack, n, part, at: f"{stack}layers.{n}.{part}{at}",
    st.sampled_from(STACKS), st.sampled_from(NUMBERS), st.sampled_from(PARTS), st.sampled_from(AT),
)  # fmt: skip
whole = st.builds(
    lambda stack, part, at: stack + part + at,
    st.sampled_from(STACKS),
    st.sampled_from(
        ["embed", "final_norm", "logits", "embed.tokens", "embed.positions", "blocks.0.hook_resid_post", "layers"]
    ),
    st.sampled_from(AT),
)


@st.composite
def mutated(draw: Any) -> str:
    """An address with a character or two dropped, doubled or put in."""
    text = list(draw(grammatical))
    for _ in range(draw(st.integers(1, 2))):
        i = draw(st.integers(0, max(0, len(text) - 1)))
        text[i : i + 1] = draw(
            st.sampled_from([[], [".", "."], ["*"], ["9"], ["-"], ["@"], [" "], ["é"], [":"], [","]])
        )
    return "".join(text)


sites = st.one_of(grammatical, grammatical, whole, mutated(), odd)
good_sites = st.sampled_from(
    [
        "layers.0.resid_post",
        "layers.1.attn.heads.1",
        "layers.*.mlp.out",
        "layers.0.attn.pattern",
        "layers.0.mlp.neurons.3",
        "final_norm",
    ]
)
positions = st.one_of(st.integers(-9, 9), odd)


class Arg(NamedTuple):
    """An argument: what is right there, and what somebody may give."""

    good: st.SearchStrategy[Any]
    wild: st.SearchStrategy[Any]


def mostly(good: Any, wild: Any = odd) -> Arg:
    return Arg(good, st.one_of(wild.good, wild.wild) if isinstance(wild, Arg) else wild)


@st.composite
def calling(draw: Any, function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], left: int = 2) -> Any:
    """`function`, its arguments and some of its options, at most `left` of them wild."""
    named = {i: a if isinstance(a, Arg) else Arg(a, a) for i, a in [*enumerate(arguments), *options.items()]}
    wild = draw(st.lists(st.sampled_from([*named]), min_size=1, max_size=left, unique=True)) if named else []
    given: dict[Any, Any] = {}
    for name, argument in named.items():
        if name in wild:
            given[name] = draw(argument.wild)
        elif isinstance(name, int) or draw(st.integers(0, 2)) == 0:
            given[name] = draw(argument.good)
    return function, [given.pop(i) for i in range(len(arguments))], given


vectors = st.one_of(
    st.just(torch.ones(32)), st.just(torch.ones(7)), st.just(torch.ones(32).double()), st.just(np.ones(32)), st.just([0.5] * 32),
    st.just(torch.full((32,), float("nan"))), odd,
)  # fmt: skip
E = pl.Ablate, pl.Patch, pl.Steer, pl.Scale, pl.ProjectOut, pl.Replace
somewhere = mostly(good_sites, sites)
hows = mostly(st.sampled_from(["zero", "mean", "position_mean", "resample"]))


def making(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Things that are made later, inside `attempt`."""
    return calling(function, arguments, named).map(lambda made: lambda: made[0](*made[1], **made[2]))


edits = st.one_of(
    making(pl.Ablate, somewhere, how=hows, reference=mostly(st.just(OTHER), prompts), seed=mostly(st.just(1))),
    making(pl.Patch, somewhere, mostly(st.just(OTHER), prompts), source_at=positions),
    making(pl.Patch, somewhere, vectors),
    making(pl.Steer, somewhere, vectors, strength=mostly(st.just(2.0))),
    making(pl.Scale, somewhere, st.one_of(floats, vectors)),
    making(pl.ProjectOut, somewhere, vectors),
    making(pl.Replace, somewhere, st.sampled_from([torch.zeros_like, lambda x: x[:1], lambda x: None, lambda x: x.double(), lambda x: 1 / 0, "x", None])),
)  # fmt: skip
tokens = st.one_of(
    st.sampled_from([" Paris", " Rome", "Paris", 7, 0, 96]),
    numbers,
    texts,
    st.lists(st.one_of(texts, numbers), max_size=3),
    odd,
)
M = pl.metrics
metrics = st.one_of(
    st.sampled_from([M.logit, M.probability, M.log_probability, M.log_odds, M.rank, M.cross_entropy]).flatmap(
        lambda f: making(f, tokens, position=positions)
    ),
    making(M.logit_difference, tokens, tokens, position=positions),
    making(M.probability_difference, tokens, tokens),
    making(M.sequence_log_probability, tokens, per_token=odd),
    st.sampled_from([M.class_logit, M.class_probability]).flatmap(lambda f: making(f, tokens)),
    st.sampled_from([M.kl_divergence, M.js_divergence, M.total_variation, M.top1_agreement]).flatmap(
        lambda f: making(f, mostly(st.just(torch.zeros(97))), positions=mostly(st.just((-1,))))
    ),
    odd.map(lambda value: lambda: value),
    st.sampled_from([lambda z: z[:, -1, 0], lambda z: z, lambda z: None, lambda z: z.sum(), lambda z: 3.0]).map(
        lambda f: lambda: f
    ),
)
good_metrics = st.sampled_from([M.logit(7), M.logit_difference(" Paris", " Rome"), M.probability(" Paris")]).map(
    lambda m: lambda: m
)
counts = mostly(
    st.integers(1, 3),
    st.one_of(
        st.sampled_from([-1, 0, 2.5, "3", None, True, float("nan"), np.int64(2), torch.tensor(2), [1], 1.0]), st.just(0)
    ),
)
seeds = mostly(st.just(1), st.one_of(numbers, odd))


# ---- the public functions


A, T, C, R, L, N = pl.attribution, pl.attention, pl.causal, pl.circuits, pl.lenses, pl.neurons
one = mostly(st.just(CLEAN), prompts)
target = mostly(st.sampled_from([None, " Paris", 7]), tokens)
players = mostly(
    st.sampled_from(["token", "word", "sentence"]),
    st.one_of(
        odd, st.lists(texts, max_size=2), st.lists(st.tuples(st.integers(-2, 9), st.integers(-2, 9)), max_size=2)
    ),
)
baselines = mostly(st.sampled_from([None, "mean", "mask", "pad", "zero", "remove", " the"]), odd)
asked = {"target": target, "against": mostly(st.just(None), tokens)}
played = asked | {"players": players, "baseline": baselines, "keep_special": st.sampled_from([True, False, None, "no"])}
layers = mostly(st.sampled_from([0, [0, 1], slice(0, 1)]), st.one_of(numbers, odd))
overs = mostly(
    st.sampled_from(
        ["layers.*.attn.heads.*", "layers.*", "layers.0.mlp.out", ["layers.0.mlp.out"], {"a": ["layers.1.attn.out"]}]
    ),
    sites,
)
kept = st.one_of(sites, st.lists(sites, max_size=2))

TECHNIQUES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "saliency": (A.saliency, (one,), asked | {"norm": mostly(st.just("l1")), "players": players}),
    "gradient_x_input": (A.gradient_x_input, (one,), asked | {"players": players}),
    "smoothgrad": (A.smoothgrad, (one,), asked | {"draws": counts, "noise": mostly(st.just(0.1)), "seed": seeds}),
    "integrated_gradients": (
        A.integrated_gradients, (one,),
        asked | {"baseline": baselines, "steps": mostly(st.just(2), counts), "rule": mostly(st.just("trapezoid")), "tolerance": mostly(st.just(9.0)),
                 "site": somewhere, "players": players},
    ),
    "deeplift": (A.deeplift, (one,), asked | {"baseline": baselines}),
    "relevance_propagation": (A.relevance_propagation, (one,), asked | {"rules": odd, "epsilon": odd, "sites": kept}),
    "occlusion": (A.occlusion, (one,), played | {"window": counts, "stride": counts}),
    "lime": (A.lime, (one,), played | {"draws": mostly(st.just(8), counts), "width": odd, "ridge": odd, "seed": seeds}),
    "kernel_shap": (A.kernel_shap, (one,), played | {"draws": mostly(st.just(8), counts), "seed": seeds}),
    "shapley": (A.shapley, (one,), played | {"draws": counts, "seed": seeds}),
    "exact_shapley": (A.exact_shapley, (one,), asked | {"players": mostly(st.just("sentence"), players), "baseline": baselines}),
    "partition": (A.partition, (one,), played | {"evaluations": mostly(st.just(6), counts)}),
    "reading": (
        lambda model, prompt, site, direction: A.saliency(model, prompt, A.reading(site, direction)),
        (one, st.one_of(st.just("layers.0.mlp.neurons.3@-1"), sites), mostly(st.none(), vectors)), {},
    ),
    "continuation": (
        lambda model, prompt, text, **more: A.saliency(model, prompt, A.continuation(text, **more)),
        (one, mostly(st.just(" Paris is"), odd)), {"max_new_tokens": counts, "of": mostly(st.just("logit"))},
    ),
    "label": (lambda model, prompt, name, word: A.saliency(model, prompt, A.label(name, word=word)), (one, odd, odd), {}),
    "patterns": (T.patterns, (one,), {}),
    "rollout": (T.rollout, (one,), {"residual": mostly(st.just(0.3))}),
    "flow": (T.flow, (st.just("Paris is"),), {"queries": positions, "residual": mostly(st.just(0.3))}),
    "norm_weighted": (T.norm_weighted, (one,), {}),
    "attention_gradient": (T.attention_gradient, (one,), asked),
    "relevance": (T.relevance, (one,), asked),
    "permuted_attention": (T.permuted_attention, (one,), {"over": mostly(st.just("layers.*.attn.pattern"), sites), "draws": counts, "seed": seeds}),
    "logit_lens": (L.logit_lens, (one,), {"positions": positions}),
    "head_lens": (L.head_lens, (one,), {"layers": layers, "positions": positions}),
    "direct_logit_attribution": (L.direct_logit_attribution, (one,), asked | {"by": mostly(st.just("head")), "positions": positions}),
    "patchscope": (L.patchscope, (st.just("Paris is"),), {"layers": layers, "positions": positions}),
    "ablation": (C.ablation, (mostly(st.just([CLEAN, OTHER]), prompts),), {"over": overs, "how": hows, "reference": mostly(st.just([OTHER]), prompts), "seed": seeds}),
    "patching": (
        C.patching, (one, mostly(st.just(CLEAN.replace("Paris", "Rome")), prompts)), {"over": overs, "denoise": odd}),
    "attribution_patching": (C.attribution_patching, (one, mostly(st.just(CLEAN.replace("Paris", "Rome")), prompts)), {"over": overs, "check": counts}),
    "tracing": (lambda model, prompt, subject, **more: C.tracing(model, prompt, subject=subject, **more), (one, mostly(st.just("Paris"))), {"draws": counts, "window": counts, "seed": seeds}),
    "counterfactual": (C.counterfactual, (mostly(st.just("Paris is"), one),), {"target": tokens, "positions": positions, "max_changes": counts, "candidates": mostly(st.just(2), counts), "beam": counts}),
    "edge_attribution": (lambda model, prompt, how: R.edge_attribution(model, prompt, how=how), (one, mostly(st.just("zero"), hows)), {}),
    "exact_patching": (lambda model, prompt, how: R.exact_patching(model, prompt, how=how), (st.just("Paris is"), mostly(st.just("zero"), hows)), {}),
    "knowledge_attribution": (N.knowledge_attribution, (one, target), {"steps": counts}),
    "logit_effects": (N.logit_effects, (mostly(st.just("layers.1.mlp.neurons.*"), sites),), {"top": counts}),
    "harvest": (N.harvest, (mostly(st.just([CLEAN, OTHER]), prompts), mostly(st.just(["layers.0.mlp.neurons"]), kept)), {"top": counts, "sample": counts}),
}  # fmt: skip


def technique(name: str) -> st.SearchStrategy[Any]:
    return calling(*TECHNIQUES[name])


# ---- the tests

FACTOR = int(os.environ.get("HYPOTHESIS_MAX", "2000")) / 2000


def cases(n: int) -> Any:
    return settings(
        max_examples=max(1, int(n * FACTOR)),
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


models = st.sampled_from(MODELS)
WORDS = [7, 8, 9, 10, 11]


def plain_prompt(model: str) -> Any:
    return WORDS if model.endswith("Without") else CLEAN


@cases(500)
@given(
    model=models,
    called=calling(
        None,
        (mostly(st.just(CLEAN), prompts),),
        {"decoder": mostly(st.just("Paris"), st.one_of(texts, odd)), "spans": odd},
    ),
)
def test_any_input(model: str, called: Any) -> None:
    _, prompt, options = called
    attempt(lambda: opened(model).run(*prompt, **options))


@cases(300)
@given(model=models, site=sites, keep=kept)
def test_any_site(model: str, site: Any, keep: Any) -> None:
    attempt(lambda: opened(model).sites(site))
    attempt(lambda: opened(model).run(plain_prompt(model), keep=keep))


@cases(250)
@given(model=models, edit=edits, others=st.one_of(st.none(), st.none(), odd))
def test_any_edit(model: str, edit: Any, others: Any) -> None:
    attempt(lambda: opened(model).run(plain_prompt(model), edits=[edit()] if others is None else others))


@cases(200)
@given(
    model=models,
    metric=metrics,
    options=st.one_of(st.just({}), st.fixed_dictionaries({}, optional={"memory": odd, "executor": odd})),
)
def test_any_metric(model: str, metric: Any, options: Any) -> None:
    attempt(lambda: opened(model).sweep(plain_prompt(model), [pl.Ablate("layers.0.mlp.out")], metric(), **options))


@cases(100)
@given(
    model=st.sampled_from(["gpt2", "llama", "t5", "gpt2Without", "bertClassifier"]),
    called=calling(
        None,
        (one, mostly(st.just(2), counts)),
        {
            "temperature": mostly(st.just(0.7), st.one_of(floats, odd)),
            "seed": seeds,
            "decoder": mostly(st.none()),
            "use_cache": mostly(st.booleans()),
            "edits": mostly(st.just([pl.Scale("layers.0.resid_post", 2.0)])),
        },
    ),
)
def test_any_generation(model: str, called: Any) -> None:
    _, (prompt, tokens), options = called
    attempt(lambda: opened(model).generate(prompt, max_new_tokens=tokens, **options))


@cases(650)
@given(
    model=st.sampled_from(["gpt2", "gpt2", "bert", "t5", "bertClassifier", "gpt2Without"]),
    called=st.sampled_from(sorted(TECHNIQUES)).flatmap(technique),
)
def test_any_option_of_a_technique(model: str, called: Any) -> None:
    function, arguments, options = called
    if model.endswith("Without"):
        arguments = [WORDS if isinstance(each, str) and each == CLEAN else each for each in arguments]
    attempt(lambda: function(opened(model), *arguments, **options))
