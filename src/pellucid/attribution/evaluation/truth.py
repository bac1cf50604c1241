"""Do methods find the tokens that are known to be responsible?

Four classifiers are built whose rule is known because every weight was set by hand. Each reads a text of filler words for
two marker words; the last token asks, one attention head per marker finds it wherever it stands (and takes next to nothing
where it is not there), and an MLP makes the answer of a = [first marker is there] and b = [second]:

    marker        a
    conjunction   a and b         nothing without both
    disjunction   a or b          each would do without the other, so removing one alone changes nothing
    exclusive     a xor b         told apart from texts with one of them: with both the class is 0

In all but the first both markers are there and both are responsible. No kind of method gets all four: gradients see
nothing of a decision that is settled, leave-one-out nothing of a disjunction that is satisfied twice; and of an exclusive
or with both, where v(both) = v(none), Shapley values are zero: what one marker adds alone it takes away beside the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.agreement import mean_over_prompts
from pellucid.attribution.evaluation.data import average_precision
from pellucid.attribution.evaluation.scores import (
    RANDOM,
    Method,
    Scores,
    explain,
    methods_named,
    random_attribution,
    read_scores,
)
from pellucid.attribution.players import Players
from pellucid.errors import Refused
from pellucid.model import Model, load
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

RULES = ("marker", "conjunction", "disjunction", "exclusive")
MARKERS = ("ruby", "jade")
FILLERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SPECIAL = ("<pad>", "<ask>", "<unk>", "<mask>")
D, E, LENGTH = 24, 12, 10  # width, width of a head, words in a text
ONE, SEEN, ANSWER = 0, 2, 4  # axes of the residual: constant, the markers (two), what the heads found (two) ...
FOCUS, SLOPE = 10.0, 8.0  # a head puts e^10 on its marker for 1 elsewhere; how steeply the MLP decides
NOTHING = 0.01  # a score of less, where answers differ by 4, is the remainder of a quadrature or a softmax


@technique
def known_truth(
    methods: Mapping[str, Method] | Sequence[str] | None = None,
    *,
    rules: Sequence[str] = RULES,
    texts: int = 20,
    seed: int = 0,
) -> Result:
    """Score methods, and random scores, against the tokens known to be responsible.

    Gives `value` [rule, technique, measure] and its 95 % bootstrap interval over texts: precision among as many top tokens as
    are responsible, average precision (both by the size of scores, as a token may speak against a class; scores of less
    than a hundredth of a logit count as nothing), and the share of the scores' size on the responsible tokens. A method that is refused has NaN.
    """
    chosen = methods_named(methods)
    found = np.array([[_on_rule(rule, name, chosen, texts, seed) for name in (*chosen, RANDOM)] for rule in rules])
    by_text = np.moveaxis(found, 2, 0)  # [text, rule, method, measure]
    low, high = interval(by_text, seed)
    dims = ("rule", "technique", "measure")
    data = xr.Dataset(
        {"value": (dims, mean_over_prompts(by_text)), "low": (dims, low), "high": (dims, high)},
        coords={
            "rule": list(rules),
            "technique": [*chosen, RANDOM],
            "measure": ["precision", "average precision", "mass"],
        },
        attrs={"texts": texts},
    )
    return Result(data, kind="known truth", title="Methods on models whose reasons are known")


def _on_rule(rule: str, name: str, methods: Mapping[str, Method], texts: int, seed: int) -> list[list[float]]:
    """[text][measure]"""
    model, rng = programmed(rule), np.random.default_rng(seed)
    made = []
    for n in range(texts):
        text, responsible = sentence(rule, rng)
        case = Case.of(model, text, answer(rule))
        parts = Players.of(case)
        try:
            result: Scores = (
                random_attribution(model, text, answer(rule), seed=seed + n)
                if name == RANDOM
                else explain(methods[name], model, text, answer(rule), None, "token")
            )
        except Refused:
            made.append([float("nan")] * 3)
            continue
        size = np.abs(read_scores(case, parts, result))
        size[size < NOTHING] = 0.0
        truth = np.isin(np.arange(len(size)), responsible)
        top = np.argsort(-size, kind="stable")[: len(responsible)]
        top = top[size[top] > 0]
        total = float(size.sum())
        mass = float(size[truth].sum()) / total if total > 0 else float("nan")
        made.append([float(truth[top].sum()) / len(responsible), average_precision(size, truth), mass])
    return made


def answer(rule: str) -> int:
    """The class a text of `sentence` has."""
    return 0 if rule == "exclusive" else 1


def sentence(rule: str, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A text with the markers the rule asks for among fillers, and where they stand."""
    words = rng.choice(FILLERS, LENGTH).tolist()
    here = MARKERS[:1] if rule == "marker" else MARKERS
    places = rng.choice(LENGTH, len(here), replace=False)
    for place, marker in zip(places, here, strict=True):
        words[place] = marker
    return " ".join(words), sorted(int(p) for p in places)


def programmed(rule: str) -> Model:
    """The classifier of a rule, opened: classes 0 and 1, each with a logit of 0 or 4."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(MARKERS) + len(FILLERS), n_positions=32, n_embd=D, n_layer=1, n_head=2, n_inner=2,
        activation_function="relu", num_labels=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    module = GPT2ForSequenceClassification(config).eval()
    block = module.transformer.h[0]
    block.ln_1, block.ln_2, module.transformer.ln_f = nn.Identity(), nn.Identity(), nn.Identity()
    first = len(SPECIAL)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        w = module.transformer.wte.weight
        w[SPECIAL.index("<ask>"), ONE] = 1.0
        for i in range(len(MARKERS)):
            w[first + i, SEEN + i] = 1.0
        for i in range(len(FILLERS)):  # on axes nobody reads
            w[first + len(MARKERS) + i, 8 + i] = 1.0
        for head in range(2):
            block.attn.c_attn.weight[ONE, head * E] = FOCUS * E**0.5  # the last token asks ...
            block.attn.c_attn.weight[SEEN + head, D + head * E] = 1.0  # ... where the marker is ...
            block.attn.c_attn.weight[SEEN + head, 2 * D + head * E] = 1.0  # ... and takes 1 from there
            block.attn.c_proj.weight[head * E, ANSWER + head] = 1.0
        _decide(rule, block.mlp, module.score.weight)
    return load(module, tokenizer=_tokenizer())


def _decide(rule: str, mlp: Any, score: torch.Tensor) -> None:
    """The answer, 0 to 1, on axis ANSWER + 2, a clipped ramp: relu(s x - t) - relu(s x - t - 1) of x = a + b or a."""
    out = ANSWER + 2
    mlp.c_fc.weight[ANSWER, :] = SLOPE
    if rule != "marker":
        mlp.c_fc.weight[ANSWER + 1, :] = SLOPE
    start = 0.5 if rule in ("marker", "disjunction") else 1.5
    mlp.c_fc.bias[:] = -SLOPE * start + 0.5
    mlp.c_fc.bias[1] -= 1.0
    mlp.c_proj.weight[0, out], mlp.c_proj.weight[1, out] = 1.0, -1.0
    if rule == "exclusive":  # a + b - 2 (a and b)
        score[1, ANSWER], score[1, ANSWER + 1], score[1, out] = 4.0, 4.0, -8.0
    else:
        score[1, out] = 4.0
    score[0] = -score[1]
    score[0, ONE] = 4.0


def _tokenizer() -> Any:
    """One token per word, and the one that asks at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *MARKERS, *FILLERS]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="$A <ask>", special_tokens=[("<ask>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<ask>", unk_token="<unk>", mask_token="<mask>"
    )
