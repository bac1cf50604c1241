"""Which nodes does this model have, and which of them hear which?

Read off the anatomy. In a block, attention and mixers read the residual the block was given; cross-attention
reads it with what attention has added, and the keys and values of cross-attention read the end of the encoder;
the MLP reads it with all of this, unless the block is parallel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.structure import Block, Stack
from pellucid.circuits.graph import Graph, Reader, Source, Split
from pellucid.engine.inputs import Inputs
from pellucid.errors import InputError, Refused

PARTS = ("attn", "mixer", "cross", "mlp")  # in the order they add to the stream


def graph_of(anatomy: Anatomy, split: Split | None = None, tables: Sequence[str] = ()) -> Graph:
    """The graph of a model, nodes not parted by position yet; `tables` are the embedding's parts.

    Refused where the residual stream is not made of heads, MLPs and mixers alone (several streams, scaled
    residuals, heads that do not write independently).
    """
    split = split or Split()
    stacks = stacks_of(anatomy)
    neurons = _neurons(anatomy, split)
    sources: list[Source] = []
    readers: list[Reader] = []
    depth, encoder = 0, 0
    for stack in stacks:
        first = len(sources)
        names = [f"embed.{t}" for t in tables] if split.embedding == "parts" else ["embed"]
        sources += [Source(f"{stack.prefix}{n}", "embed", stack=stack.name) for n in names]
        for block in stack.blocks:
            check(stack, block)
            before = len(sources)
            for part in parts(block):
                feeds = before if part in ("attn", "mixer") or not sequential(block) else len(sources)
                name = f"{stack.prefix}layers.{block.index}.{part}"
                at = {"layer": block.index, "stack": stack.name, "depth": depth}
                if part in ("mlp", "mixer"):
                    readers.append(Reader(name, part, feeds, first=first, **at))  # type: ignore[arg-type]
                    sources.append(Source(name, part, **at))  # type: ignore[arg-type]
                    sources += [
                        Source(f"{name}.neurons.{n}", "neuron", unit=n, **at)  # type: ignore[arg-type]
                        for n in (neurons.get((stack.name, block.index), ()) if part == "mlp" else ())
                    ]
                    continue
                attention = block.attentions[part]
                share = attention.heads // attention.kv_heads
                for kind in "qkv":
                    units = attention.heads if kind == "q" else attention.kv_heads
                    where = "heads" if kind == "q" or share == 1 else "kv_heads"
                    heard = (0, encoder) if part == "cross" and kind != "q" else (first, feeds)
                    readers += [
                        Reader(f"{name}.{where}.{u}.{kind}", kind, heard[1], unit=u, part=part, first=heard[0], **at)  # type: ignore[arg-type]
                        for u in range(units)
                    ]
                sources += [
                    Source(f"{name}.heads.{h}", "head", unit=h, kv=h // share, part=part, **at)  # type: ignore[arg-type]
                    for h in range(attention.heads)
                ]
            depth += 1
        encoder = len(sources)
    last = stacks[-1]
    readers.append(
        Reader("logits", "logits", len(sources), len(last.blocks), stack=last.name, first=first, depth=depth)
    )
    return Graph(tuple(sources), tuple(readers), split)


def stacks_of(anatomy: Anatomy) -> tuple[Stack, ...]:
    """One stack, or an encoder and the decoder that attends to it. Refused otherwise."""
    stacks = anatomy.stacks
    if not stacks or not all(s.blocks for s in stacks):
        raise Refused("circuits need blocks that hand one residual stream along, and none were found in this model")
    if len(stacks) > 2 or (len(stacks) == 2 and not any("cross" in parts(b) for b in stacks[1].blocks)):
        names = ", ".join(repr(s.name) for s in stacks)
        raise Refused(
            f"circuits know one stack, or an encoder and a decoder that attends to it; this model has {names}"
        )
    if len({s.d_model for s in stacks}) > 1:
        raise Refused("circuits need one width of residual; encoder and decoder of this model differ in theirs")
    return stacks


def parts(block: Block) -> list[str]:
    """What the block adds to the stream, in order."""
    added = {t.source.removesuffix(".out") for s in block.states for t in s.terms}
    return [p for p in PARTS if p in added]


def sequential(block: Block) -> bool:
    """Whether later parts read what earlier ones wrote (and not, in parallel, what the block was given)."""
    return "resid_mid" in block.taps or len(block.states) > 1


def check(stack: Stack, block: Block) -> None:
    """Refused unless the block adds its heads, its MLP and its mixer to the stream, and nothing else."""
    where = f"{stack.prefix}layers.{block.index}"
    if block.unmapped:
        raise Refused(f"circuits need all attention on the map; in {where} {block.unmapped[0]}")
    added = parts(block)
    needed = [
        "resid_pre",
        "resid_post",
        *(f"{p}.out" for p in added),
        *(f"{p}.z_out" for p in added if p in ("attn", "cross")),
    ]
    for part in needed:
        if part not in block.taps:
            why = block.refused.get(part, block.refused.get(part.partition(".")[0], block.refused.get("resid")))
            raise Refused(
                f"circuits need {part!r} of {where}, which this model does not give: {why or 'it is not on the map'}"
            )
    if not added:
        raise Refused(f"circuits need to know what {where} adds to the residual stream; its form is {block.form!r}")
    for i, state in enumerate(block.states):
        base = "in" if i == 0 else f"state {i - 1}"
        terms = {t.source: t for t in state.terms}
        extra = set(terms) - {base} - {f"{p}.out" for p in PARTS}
        if extra or any(t.carried for t in terms.values()):
            raise Refused(
                f"circuits know heads, MLPs and mixers; {where} also adds {', '.join(sorted(extra)) or 'mixed streams'}"
            )
        if base not in terms or isinstance(terms[base].coefficient, Tensor) or terms[base].coefficient != 1.0:
            raise Refused(f"circuits need a residual stream that is carried unchanged; {where} scales or drops it")
        if (state.norm_in is None) != (state.norm_out is None):
            raise Refused(
                f"circuits need to meet the residual before and after its norm; in {where} one side is missing"
            )
    if len(block.states) > 1 and any(s.norm_in is None for s in block.states):
        raise Refused(f"circuits need every state of a post-norm block to have its norm; {where} is {block.form}")


def _neurons(anatomy: Anatomy, split: Split) -> dict[tuple[str, int], list[int]]:
    """(stack, layer) -> the neurons that are sources of their own. InputError for those the model does not have."""
    found: dict[tuple[str, int], list[int]] = {}
    blocks = {f"{s.prefix}layers.{b.index}": (s, b) for s in anatomy.stacks for b in s.blocks}
    for name in split.neurons:
        match = re.fullmatch(
            r"(.*layers\.\d+)\.mlp\.neurons\.(\d+)", re.sub(r"^m?(\d+)\.n?(?=\d+$)", r"layers.\1.mlp.neurons.", name)
        )
        if match is None or match[1] not in blocks:
            raise InputError(f"{name!r} is no neuron of this model: expected a site such as 'layers.0.mlp.neurons.17'")
        stack, block = blocks[match[1]]
        size, n = block.sizes.get("neuron", 0), int(match[2])
        if "mlp.neurons" not in block.taps or block.mlps["mlp"].linear is None:
            raise Refused(
                f"the MLP of {match[1]} cannot be split into neurons: {block.refused.get('mlp.neurons', 'they are not on the map')}"
            )
        if n >= size:
            raise InputError(f"{name!r} is no neuron of this model: {match[1]} has 0 to {size - 1}")
        mine = found.setdefault((stack.name, block.index), [])
        if n in mine:
            raise InputError(f"the neuron {name!r} is named twice")
        mine.append(n)
    return found


def places(inputs: Inputs, positions: Sequence[str]) -> Tensor:
    """[batch, position] which of some addresses each position belongs to; none of them: len(positions), the rest.

    InputError where two of them name the same position.
    """
    stream = inputs.stream("")
    found = torch.full(stream.ids.shape, len(positions))
    for i, at in enumerate(positions):
        columns = stream.find(int(at) if re.fullmatch(r"-?\d+", at) else at)
        if columns is None:
            raise InputError(f"'@{at}' is every position: expected some, such as -1 or a span of the prompts")
        rows = torch.arange(len(columns))[:, None]
        taken = found[rows, columns.cpu()]
        if bool((taken < len(positions)).any()):
            both = positions[int(taken.min())]
            raise InputError(f"'@{both}' and '@{at}' name the same position of a prompt: positions must not overlap")
        found[rows, columns.cpu()] = i
    return found
