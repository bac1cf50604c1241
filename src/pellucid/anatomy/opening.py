"""Open a model: probe it once, find its map, prove it, and take off the map what could not be proven."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import discovery
from pellucid.anatomy.answering import LOGITS, answering, detects
from pellucid.anatomy.attending import attention_ops, where
from pellucid.anatomy.checks import error
from pellucid.anatomy.heads import given_decoder, reads_both_ends
from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.modes import accepted_by, running, thaw, uncompiled, unmixed
from pellucid.anatomy.proofs import Prover, refused_parts
from pellucid.anatomy.spans import Span
from pellucid.anatomy.structure import Proof, Stack, Unembedding
from pellucid.anatomy.trace import Call, Op, Trace
from pellucid.anatomy.unembedding import find_head
from pellucid.anatomy.wiretap import tapped
from pellucid.errors import LoadError, PellucidError

BATCH, LENGTHS = 2, (11, 7, 13, 17, 19, 23, 29)


def open_module(module: nn.Module, inputs: Mapping[str, Any] | None = None, known: Anatomy | None = None) -> Anatomy:
    """The proven anatomy of a loaded transformers model.

    `inputs` are keyword arguments of its forward for the probe (batch first, at least two rows); by default
    random token ids. The module is left as it was, its training mode included; only weights that were made in inference
    mode, through which torch takes no gradients, become ordinary tensors on the same memory.

    `known` is the anatomy of a module that this one is a twin of with other weights. The map is found anew (one
    traced pass); where it is the same, and all of the old one was proven, only what other weights can break is
    proven again, in four passes: that blocks with a changed tensor are what their weights say (residual, attention,
    projection, neurons, experts), that blocks hand over to one another, and the logits and the unembedding. How
    tokens and heads are kept apart (heads, position-wise, reads, ablation, causality) follows from the code.
    """
    with running(module), uncompiled(module), unmixed():
        thaw(module)
        return _open(module, dict(inputs) if inputs is not None else probe(module), known)


def _open(module: nn.Module, inputs: dict[str, Any], known: Anatomy | None = None) -> Anatomy:
    batch = min(v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 1)
    t, output = first_pass(module, inputs)
    found = discovery.find_stacks(t, batch)
    has_head = any(getattr(output, k, None) is not None for k in LOGITS)
    head: Unembedding | None = None
    for stack, spans in reversed(found) if has_head else ():
        tap = stack.blocks[-1].taps.get("resid_post")
        if tap is not None:
            head = find_head(t, spans[-1].made, spans[-1].end, main_output(output), tap.layout, batch)
        if head is not None:
            found.append(found.pop(found.index((stack, spans))))  # the stack that the head reads comes last
            break
    first = {"decoder": "decoder_input_ids"}
    stacks = tuple(
        replace(s, embeds=discovery.embeddings(t, inputs.get(first.get(s.name, "input_ids"), inputs.get("input_ids"))))
        for s, _ in found
    )
    meaning = answering(module, output)
    covered, elsewhere = coverage(t, [span for _, spans in found for span in spans])
    del t, found
    only = None if known is None else touched(known, module, stacks)
    prover = Prover(module, lambda: module(**inputs), main_output, stacks, head, batch, has_head, only)
    proofs = [covered, *prover.prove()]
    if known is None or only is None:
        causal: Mapping[str, bool | None] = causality(module, inputs, stacks, prover)
    else:
        proofs = [as_before(new, old) for new, old in zip(proofs, known.proofs, strict=True)]
        causal = {s.name: s.causal for s in known.stacks}
    stacks = tuple(
        replace(
            s,
            blocks=tuple(refused_parts(b, prover.failed.get((s.name, b.index), {})) for b in s.blocks),
            causal=causal.get(s.name),
        )
        for s in stacks
    )
    routes = {a.route for s in stacks for b in s.blocks for a in b.attentions.values()}
    return Anatomy(
        module, stacks, head, proofs, refusals(stacks, proofs) | elsewhere, inputs,
        " + ".join(sorted(routes)) or "no attention", meaning,
    )  # fmt: skip


def first_pass(module: nn.Module, inputs: dict[str, Any]) -> tuple[Trace, Any]:
    """The traced pass of the probe. LoadError for whatever the module's own forward raises."""
    try:
        return discovery.trace(module, inputs)
    except PellucidError:
        raise
    except Exception as error:
        given = ", ".join(
            f"{k} {list(v.shape)}" if isinstance(v, Tensor) else f"{k} {type(v).__name__}" for k, v in inputs.items()
        )
        why = textwrap.shorten(" ".join(str(error).split()), 200) or type(error).__name__
        raise LoadError(
            f"{type(module).__name__} does not run on the probe it was given ({given}): {why}; pass probe= with the "
            "arguments of its forward, two rows or more"
        ) from error


def touched(known: Anatomy, module: nn.Module, stacks: tuple[Stack, ...]) -> set[tuple[str, int]] | None:
    """The blocks of a twin that have a tensor of their own, as (stack, index); None where all must be proven: the
    modules or the map are others, or not all of the old map was proven.
    """
    kinds = [[(n, type(m)) for n, m in x.named_modules(remove_duplicate=False)] for x in (known.module, module)]
    shapes = [
        [[(b.module, b.nth, b.form, b.taps, b.refused) for b in s.blocks] for s in x] for x in (known.stacks, stacks)
    ]
    whole = all(b.whole for s in stacks for b in s.blocks)
    if not (known.complete and whole and kinds[0] == kinds[1] and shapes[0] == shapes[1]):
        return None
    old, new = ({name: _address(t) for name, t in tensors(x)} for x in (known.module, module))
    changed = [name for name, where in new.items() if old.get(name) != where]
    return {
        (s.name, b.index) for s in stacks for b in s.blocks if any(name.startswith(f"{b.module}.") for name in changed)
    }


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, by every name they go by."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _address(t: Tensor) -> Any:
    return t.data_ptr(), t.shape, t.dtype, t.device


def as_before(new: Proof, old: Proof) -> Proof:
    """What a proof about some blocks says together with what was proven of the others."""
    if new.holds is False or old.holds is None:
        return new
    if new.holds is None:
        return old
    return replace(new, error=None if new.error is None else max(new.error, old.error or 0.0))


def coverage(t: Trace, spans: list[Span]) -> tuple[Proof, dict[str, str]]:
    """Every listed module that attends is (part of) a block; attention elsewhere (a bridge, a pooler) has no
    sites.
    """
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    listed = {child for m in t.root.modules() if isinstance(m, containers) for child in m.children()}
    missed, elsewhere = [], {}
    for op in attention_ops(t, 0, len(t.ops)):
        if any(s.start <= op.index < s.end for s in spans):
            continue
        elsewhere[where(t, op)] = "attention outside the stacks of blocks; it is not mapped"
        if any(call.module in listed for call in enclosing(op)):
            missed.append(where(t, op))
    detail = "blocks that are not mapped: " + ", ".join(missed[:3]) if missed else "every block that attends is mapped"
    return Proof("coverage", not missed, None, detail), elsewhere


def enclosing(op: Op) -> Iterator[Call]:
    call = op.call
    while call is not None:
        yield call
        call = call.parent


def causality(module: nn.Module, inputs: dict[str, Any], stacks: tuple[Stack, ...], prover: Prover) -> dict[str, bool]:
    """Stack -> whether earlier residuals stay the same when the last token that goes in is another."""
    own = {s.name: "decoder_input_ids" if s.name == "decoder" else "input_ids" for s in stacks}
    found: dict[str, bool] = {}
    at = -2 if reads_both_ends(module) else -1  # the last one ends the text there, and has to
    for key in {k if k in inputs else next(iter(inputs)) for k in own.values()}:
        ids = inputs[key]
        if ids.is_floating_point() or ids.ndim != 2 or ids.shape[1] < 3:
            continue
        changed = ids.clone()
        changed[:, at] = torch.where(ids[:, at] == ids[:, 0], ids[:, 1], ids[:, 0])
        taps = {
            b.taps["resid_post"]: s.name
            for s in stacks
            for b in s.blocks
            if "resid_post" in b.taps and (own[s.name] == key or own[s.name] not in inputs)
        }
        values, _ = tapped(module, taps, prover.batch, partial(module, **{**inputs, key: changed}))
        for tap, name in taps.items():
            same = tap in values and _same(values[tap][:, :at], prover.values[tap][:, :at], prover)
            found[name] = found.get(name, True) and same
    return found


def _same(a: Tensor, b: Tensor, prover: Prover) -> bool:
    """Whether two runs agree. One token's word to another is often less than the tolerance of half precision, but it
    reaches nearly every number; noise (experts in other batches, kernels that add in another order) moves few of them."""
    return error(a, b) <= prover.tolerance and not (prover.half and float((a != b).float().mean()) > 0.5)


def probe(module: Any) -> dict[str, Any]:
    """Random token ids (the same every time) in the form the model's forward takes them.

    Their lengths are no other size of the model, so that no dimension is mistaken for another.
    """
    config = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    sizes = {value for value in text.to_dict().values() if isinstance(value, int)}
    length, target_length = _lengths(sizes, getattr(text, "max_position_embeddings", None))

    def ids(length: int) -> Tensor:
        low = min(10, text.vocab_size // 4)
        return torch.randint(low, text.vocab_size - low, (BATCH, length), generator=generator).to(device)

    inputs: dict[str, Any] = {"input_ids": ids(length)}
    accepted = accepted_by(module)
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if reads_both_ends(module):
        inputs["input_ids"] = ended(inputs["input_ids"], getattr(config, "eos_token_id", None))
        inputs["decoder_input_ids"] = given_decoder(module, inputs["input_ids"])
    elif getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(target_length)
    return inputs


def ended(ids: Tensor, eos: Any) -> Tensor:
    """Rows with the token that ends a text at their ends, and nowhere else: classifiers of whole texts read there."""
    eos = eos[0] if isinstance(eos, list) else eos
    if not isinstance(eos, int):
        return ids
    ids = torch.where(ids == eos, ids + 1, ids)
    ids[:, -1] = eos
    return ids


def _lengths(sizes: set[int], limit: Any) -> tuple[int, int]:
    """Two lengths that the model's context holds, no other size of it if that can be had.

    >>> _lengths({11, 64}, None), _lengths({2, 5, 6}, 6)
    ((7, 13), (4, 3))
    """
    limit = limit if isinstance(limit, int) and limit > 1 else max(LENGTHS)
    short = range(min(limit, max(LENGTHS)), 1, -1)
    found = [n for n in (*LENGTHS, *short) if n <= limit]
    found = [n for n in dict.fromkeys(found) if n not in sizes] + found + found
    return found[0], found[1]


def main_output(output: Any) -> Tensor:
    """The logits, or the last hidden state of a model without a head; of a span its start and end, side by side."""
    if getattr(output, "start_logits", None) is not None and getattr(output, "end_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], -1)
    for key in (*LOGITS, "last_hidden_state"):
        value = getattr(output, key, None)
        if value is not None:
            return value[..., None] if detects(output) else value
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def refusals(stacks: tuple[Stack, ...], proofs: list[Proof]) -> dict[str, str]:
    """Site pattern -> reason, blocks with the same reason gathered: `layers.0,2,4.mlp.neurons`."""
    gathered: dict[tuple[str, str, str], list[int]] = {}
    for stack in stacks:
        for block in stack.blocks:
            for part, why in block.refused.items():
                gathered.setdefault((stack.prefix, part, why), []).append(block.index)
    sizes = {s.prefix: len(s.blocks) for s in stacks}
    found = {}
    for (prefix, part, why), blocks in gathered.items():
        which = "*" if len(blocks) == sizes[prefix] else ",".join(map(str, blocks))
        found[f"{prefix}layers.{which}.{part}"] = why
    head = next((p for p in proofs if p.name == "unembedding" and not p.holds), None)
    if head is not None:
        found["head"] = head.detail or "the head's proof failed"
    return found
