"""One cell of the matrix: a technique on a family's model under a condition, by pellucid and by hand."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import pellucid as pl
from pellucid.errors import PellucidError
from tests.zoo import build, tokenizer

from .hand import FAMILIES, Hand

CLEAN = ["The city of Paris is in France", "Mary went to Rome and he gave John a drink"]
OTHER = ["The city of Rome is in France", "Mary went to Italy and he gave John a drink"]
MASKED = ("bert", "roberta", "deberta-v2")
CONDITIONS = ("plain", "padded", "left-padded", "bf16", "frozen", "no tokenizer", "LoRA", "8-bit", "GGUF")
TOLERANCE = {"bf16": 3e-2, "8-bit": 6e-2}  # of the largest logit; elsewhere 2e-4
DIFFERENCE = pl.metrics.logit_difference(7, 9)


class Subject:
    """A model under a condition: pellucid's, the module that the hooks go on, and what both are given."""

    def __init__(self, name: str, condition: str) -> None:
        self.name, self.condition, self.family = name, condition, FAMILIES[name]
        _, reference = made(name, condition)
        self.model = opened(name, condition)
        plain = tokenizer(build(name) if name in MASKED or name in ("t5", "bart") else None)
        self.tokenizer = self.model.tokenizer if condition == "GGUF" else plain
        self.module = reference
        self.masked = name in MASKED
        self.several = 2 if "padded" in condition else 1

    def ids(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer(self.text(each))["input_ids"] for each in texts[: self.several]]

    def text(self, text: str) -> str:
        if self.condition == "GGUF":
            return text.replace("Rome", "Padua")  # its tokenizer goes by letters, and a pair must be of one length
        words = text.split()
        return " ".join([*words[:2], "<mask>", *words[3:]]) if self.masked else text

    def given(self, texts: list[str]) -> Any:
        """The prompts as pellucid is given them under this condition."""
        rows = self.ids(texts)
        if self.condition == "left-padded":
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
            return {
                "input_ids": ids,
                "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
            }
        if self.condition == "no tokenizer":
            return rows
        texts = [self.text(each) for each in texts[: self.several]]
        return texts if len(texts) > 1 else texts[0]

    def hand(self, texts: list[str]) -> Hand:
        rows = self.ids(texts)
        encoder_decoder = self.family.stack != ""
        at = [row.index(3) if self.masked else -1 for row in rows]
        config = self.module.config
        start = config.decoder_start_token_id if encoder_decoder else None
        if encoder_decoder and start is None:
            start = config.bos_token_id
        heads = getattr(config, "num_attention_heads", None) or config.n_head
        heads = getattr(config, "decoder_attention_heads", heads) if encoder_decoder else heads
        return Hand(self.family, self.module, rows, at, heads, start)

    def site(self, text: str) -> str:
        return self.family.stack + text

    @property
    def attending(self) -> list[int]:
        """The blocks with attention: all but those that mix in another way."""
        return [n for n in range(2) if has(self.module, f"{self.family.block(n)}.{self.family.heads}")]


def has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


# ---- models

logging.getLogger("bitsandbytes.autograd._functions").setLevel(
    logging.ERROR
)  # "inputs will be cast": a line per product


def built(name: str, condition: str) -> Any:
    return build(name, dtype=torch.bfloat16 if condition == "bf16" else torch.float32)


@cache
def made(name: str, condition: str) -> tuple[Any, Any]:
    """The module that is opened, and the one the hooks go on: of an adapted one its twin with the adapters merged."""
    if condition in ("plain", "padded", "left-padded"):
        condition = "plain"
    module = built(name, condition)
    if condition in ("frozen", "no tokenizer"):
        return module.requires_grad_(False), module
    if condition == "LoRA":
        return with_adapters(module)
    if condition == "GGUF":
        return from_file(name)
    if condition == "8-bit":
        return quantised(module), module
    return module, module


def with_adapters(module: Any) -> tuple[Any, Any]:
    """Random LoRA on every projection, and the same weights merged."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(module, config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    return adapted, merged


def quantised(module: Any) -> Any:
    """Every linear map of the blocks as bitsandbytes' 8-bit one."""
    import bitsandbytes as bnb

    for name, linear in list(module.named_modules()):
        if (type(linear) is nn.Linear and ".0." in name) or (type(linear) is nn.Linear and ".1." in name):
            new = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            new.weight = bnb.nn.Int8Params(linear.weight.data, has_fp16_weights=False, requires_grad=False)
            if linear.bias is not None:
                new.bias = linear.bias
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, new.to("cpu"))
    if not any(isinstance(each, bnb.nn.Linear8bitLt) for each in module.modules()):
        raise LookupError("it has no nn.Linear to quantise")
    return module.requires_grad_(False)


def from_file(name: str) -> tuple[Any, Any]:
    """The path of a GGUF file, and its module as transformers alone reads it."""
    from tests.anatomy.test_gguf import written

    if name != "llama":
        raise LookupError("no tiny file is written for it")
    path = written(Path(tempfile.mkdtemp()) / "tiny.gguf")
    return path, transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@cache
def opened(name: str, condition: str) -> pl.Model:
    if condition in ("padded", "left-padded"):
        return opened(name, "plain")
    if condition == "no tokenizer":
        return pl.load(made(name, condition)[0])
    module = made(name, condition)[0]
    if condition == "GGUF":
        return pl.load(str(module))
    return pl.load(module, tokenizer=tokenizer(build(name)))


# ---- techniques: what pellucid says and what the hooks say

Pair = tuple[Any, Any]


def vector() -> Tensor:
    return torch.linspace(-0.5, 0.5, 32)


def edits_of(s: Subject) -> list[Any]:
    layer = s.attending[-1]
    return [pl.Steer(s.site("layers.0.resid_post"), vector()), pl.Ablate(s.site(f"layers.{layer}.attn.heads.1"))]


def hooks_of(s: Subject, hand: Hand) -> list[Any]:
    return [hand.steer(0, vector()), hand.silence(s.attending[-1], 1)]


def run_with_edits(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    run = s.model.run(s.given(CLEAN), edits=edits_of(s))
    got = [rows[real.bool()] for rows, real in zip(run.logits, run.inputs.stream("").mask, strict=True)]
    wanted = [hand.logits(i, hooks_of(s, hand)) for i in range(s.several)]
    return torch.cat(got), torch.cat(wanted)


def generate_with_edits(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    made = s.model.generate(
        s.given(CLEAN), edits=edits_of(s), max_new_tokens=5, temperature=0.0
    )  # the last may be forced
    wanted = [hand.generated(i, hooks_of(s, hand), 4) for i in range(s.several)]
    got = [made.ids(i)[:4] for i in range(s.several)] if hasattr(made, "ids") else made.tokens.tolist()
    ends = {2}
    cut = lambda row: [t for i, t in enumerate(row) if not ends & set(row[:i])]  # noqa: E731
    return [cut(list(r)) for r in got], [cut(r) for r in wanted]


def sweep(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    units = [(layer, head) for layer in s.attending for head in range(hand.heads)]
    at = hand.at[0]
    metric = pl.metrics.logit_difference(7, 9, position=at)
    variants = [pl.Ablate(s.site(f"layers.{layer}.attn.heads.{head}")) for layer, head in units]
    swept = s.model.sweep(s.given(CLEAN), variants, metric)
    wanted = [[hand.difference(i, [hand.silence(*u)]) for i in range(s.several)] for u in units]
    return swept.values, torch.tensor(wanted)


def patching(s: Subject) -> Pair:
    clean, other = s.hand(CLEAN), s.hand(OTHER)
    layer = s.attending[-1]
    found = pl.causal.patching(
        s.model, s.given(CLEAN), s.given(OTHER), over=s.site(f"layers.{layer}.attn.heads.*"), metric=DIFFERENCE
    ).data
    wanted = [
        [other.difference(i, [other.silence(layer, h, clean.head_values(i, layer, h))]) for h in range(clean.heads)]
        for i in range(s.several)
    ]
    value = found["value"]
    if "prompt" in value.dims:
        value = value.transpose("prompt", ...)
    return np.ravel(value.values), np.ravel(wanted)


def gradient(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    prompt = s.given(CLEAN)
    data = pl.attribution.gradient_x_input(s.model, prompt, 7).data
    got, wanted = [], []
    for i in range(s.several):
        one = data.isel(prompt=i) if "prompt" in data.dims else data
        by_hand = hand.gradient_x_input(i).numpy()
        values, special = (one[name].values[: len(by_hand)] for name in ("attribution", "special"))
        assert (~special).any()
        got.append(values[~special])
        wanted.append(by_hand[~special])
    return np.concatenate(got), np.concatenate(wanted)


def lens(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    found = pl.lenses.logit_lens(s.model, s.given(CLEAN), positions=hand.at[0], top=3).data
    found = found.isel(layer=[int(np.flatnonzero(found["layer"].values == n)[0]) for n in range(2)])
    got = (
        found["probability"].values.reshape(-1, 2, 3) if s.several > 1 else found["probability"].values.reshape(1, 2, 3)
    )
    wanted = [[hand.read_early(i, n, 1).exp().topk(3).values.tolist() for n in range(2)] for i in range(s.several)]
    return got, np.array(wanted)


def circuit(s: Subject) -> Pair:
    hand = s.hand(CLEAN)
    stack = s.family.stack
    scores = pl.circuits.exact_patching(
        s.model, s.given(CLEAN), DIFFERENCE, how="zero", edges=[f"{stack}layers.0.mlp->logits"]
    )
    each = scores.result.data["each"].sel(source=f"{stack}layers.0.mlp", reader="logits").values.ravel()
    wanted = [hand.without_edge_to_logits(i, 0, 1) - hand.difference(i, []) for i in range(s.several)]
    return each, np.array(wanted)


TECHNIQUES: dict[str, Callable[[Subject], Pair]] = {
    "run": run_with_edits,
    "generate": generate_with_edits,
    "sweep": sweep,
    "patching": patching,
    "gradient": gradient,
    "lens": lens,
    "circuit": circuit,
}


def agrees(got: Any, wanted: Any, tolerance: float) -> str | None:
    """None, or how far the two are apart; numbers may differ by `tolerance`."""
    if isinstance(got, list):
        return None if got == wanted else f"{got} is not {wanted}"
    got, wanted = (
        torch.as_tensor(np.asarray(x.detach().float().cpu() if isinstance(x, Tensor) else x)).double()
        for x in (got, wanted)
    )
    if got.shape != wanted.shape:
        return f"{list(got.shape)} is not {list(wanted.shape)}"
    off = float((got - wanted).abs().max())
    return None if off <= tolerance else f"off by {off:.1e}"


def cells(name: str, condition: str) -> dict[str, str]:
    """What each technique does there: "equal", "refused: SENTENCE", or what went wrong."""
    try:
        subject = Subject(name, condition)
    except LookupError as error:
        return dict.fromkeys(TECHNIQUES, f"not there: {error}")
    except PellucidError as error:
        return dict.fromkeys(TECHNIQUES, f"refused: {error}")
    found: dict[str, str] = {}
    guard = torch.no_grad() if condition == "frozen" else torch.enable_grad()
    hand = subject.hand(CLEAN)
    allowed = TOLERANCE.get(condition, 2e-4) * max(1.0, float(hand.logits(0, []).abs().max()))
    for technique, both in TECHNIQUES.items():
        try:
            with guard, pl.quiet():
                fault = agrees(*both(subject), allowed)
            found[technique] = "equal" if fault is None else f"WRONG: {fault}"
        except PellucidError as error:
            found[technique] = f"refused: {error}"
        except Exception as error:
            found[technique] = f"RAW: {type(error).__name__}: {error}"
    return found
