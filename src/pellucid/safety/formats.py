"""Steering vectors in other programs' files, and in the weights.

GGUF control vectors (repeng's `export_gguf`, read by llama.cpp): tensors `direction.N`, one-dimensional F32, added to the output of
block N counted from 0 at every position. llama.cpp cannot express block 0, reads no metadata, and its strength is a plain factor;
so ours fold the strength in (an exported file is meant for strength 1), say unit, operation and the digest of the weights in keys of their own,
and exporters that number otherwise are the user's to know (`shift=`). safetensors: one tensor a block, named with its number.

In the weights (Arditi et al. 2024, "weight orthogonalization"): W' = (I - u u^T) W for every map that writes to the residual stream
projects u out at every token; a vector that is added at every token is a bias, where the block's last projection has one. Both are proven: the
changed model's logits are those of the edits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.frozen import affine
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Attention, Mlp
from pellucid.anatomy.weights import inputs_first, is_packed
from pellucid.changed import Change, Replaced
from pellucid.engine.edits import Edit
from pellucid.errors import InputError, Refused
from pellucid.model import Model
from pellucid.safety.vector import Vector, ablate_direction, load_vectors, steer

_UNPLAIN = "{} is no plain weight of the stream (quantised, or inside an adapter): open it unquantised, adapters merged"
CLOSE = 1e-4  # of the largest logit


def export_gguf(model: Model, vectors: Sequence[Vector], path: str | Path, *, strength: float = 0.15) -> Path:
    """Write a GGUF control vector whose factor 1 is `strength` here. InputError for a vector that is at no block's output, or at block 0.

    >>> export_gguf(model, [contrast.at(12)], "happy.gguf", strength=.15)
    PosixPath('happy.gguf')
    """
    import gguf

    blocks: dict[int, np.ndarray] = {}
    for v in vectors:
        v.check(model)
        site = Site.parse(v.site)
        decodes = len(model.anatomy.stacks) == 1 and model.anatomy.stacks[0].causal
        if site.part != "resid_post" or not isinstance(site.layer, int) or site.stack or not decodes:
            raise InputError(
                f"{v.site!r} is no output of a decoder's block: a GGUF control vector has only such as layers.12.resid_post"
            )
        if site.layer == 0:
            raise InputError(
                "a GGUF control vector cannot steer block 0: llama.cpp reads from direction.1 on; take a later layer"
            )
        if site.layer in blocks:
            raise InputError(f"two vectors at {v.site!r}: llama.cpp would add them up; give one for each layer")
        blocks[site.layer] = (v.direction * (strength * v.unit)).numpy().astype(np.float32)
    if not blocks:
        raise InputError("there is no vector to write")
    writer = gguf.GGUFWriter(str(path), "controlvector")
    writer.add_string("controlvector.model_hint", str(getattr(model.module.config, "model_type", "")))
    writer.add_uint32("controlvector.layer_count", len(blocks))
    writer.add_string("pellucid.digest", model.digest)
    writer.add_string("pellucid.operation", "add")
    writer.add_array("pellucid.units", [float(v.unit) for v in vectors])
    for layer in sorted(blocks):
        writer.add_tensor(f"direction.{layer}", blocks[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def import_vectors(model: Model, path: str | Path, *, shift: int = 0) -> list[Vector]:
    """The vectors of a GGUF control vector, or of a safetensors file (ours, or one tensor a block, `12` or `layers.12`).

    Their edits at strength 1 are what the file says (`unit` is each one's length). `shift` is added to the file's numbers: -1 where it counts blocks
    from 1. A file that names other weights is refused; one that names none gives vectors with digest "", tied to none.
    InputError for another width than the model's, a number that is no block, or a tensor that is no vector.
    """
    if str(path).endswith(".gguf"):
        found, digest = _read_gguf(path)
    else:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                if "pellucid_vectors" in (file.metadata() or {}):
                    own = load_vectors(path)
                    for vector in own:
                        vector.check(model)
                    return own
                found, digest = {name: file.get_tensor(name).float() for name in file.keys()}, ""  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{str(path)!r} is no file of vectors: expected .gguf or .safetensors") from error
    stack, made = model.anatomy.stacks[-1], []
    for name, values in found.items():
        numbers = re.findall(r"\d+", name)
        layer = int(numbers[-1]) + shift if numbers else -1
        if not 0 <= layer < len(stack.blocks):
            raise InputError(
                f"{name!r} of {str(path)!r} is no block of {model.name}, which has 0 to {len(stack.blocks) - 1}: say shift="
            )
        if str(path).endswith(".gguf") and int(numbers[-1]) == 0:
            raise InputError(
                f"{str(path)!r} names block 0, which llama.cpp cannot steer: whoever wrote it counts otherwise"
            )
        if values.shape != (stack.d_model,):
            raise InputError(f"{name!r} is {list(values.shape)}: {model.name} is {stack.d_model} wide")
        made.append(
            Vector(f"{stack.prefix}layers.{layer}.resid_post", values, float(values.norm()), None, digest, name)
        )
    for vector in made:
        vector.check(model)
    if not made:
        raise InputError(f"{str(path)!r} holds no vectors")
    return made


def _read_gguf(path: str | Path) -> tuple[dict[str, Tensor], str]:
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no GGUF file") from error
    found = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("direction."):
            if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
                raise InputError(f"{tensor.name!r} is {tensor.tensor_type.name}: a control vector holds F32")
            found[tensor.name] = torch.as_tensor(np.array(tensor.data))
    if not found:
        raise InputError(f"{str(path)!r} is no control vector: it has no tensor direction.N")
    known: Any = reader.fields.get("pellucid.digest")
    return found, "" if known is None else str(known.contents())


# ---- in the weights


def in_weights(
    model: Model, vectors: Vector | Sequence[Vector], strength: float = 0.15, *, form: Literal["add", "project"] = "add"
) -> Model:
    """The model with vectors in its weights: added at every token, or projected out of everything that writes to the stream.

    What the edits would do at every token, the first too; a direction that shares the first token's residual had better be `spared()`.
    Refused where the architecture has no place for it (no bias, a norm behind the projection), by name.

    >>> in_weights(model, contrast.at(12).spared(), form="project")
    <Model LlamaForCausalLM + ...: LlamaForCausalLM, 24 layers, ...>
    """
    given = [vectors] if isinstance(vectors, Vector) else list(vectors)
    for v in given:
        v.check(model)
    if len(model.anatomy.stacks) > 1 or any(Site.parse(v.site).part != "resid_post" for v in given):
        raise Refused("vectors go into the weights of a decoder, at outputs of blocks")
    edits: list[Edit]
    if form == "add":
        edits = steer(given, strength, tokens=":")
        changes = [_bias(model, v, strength * v.unit) for v in given]
    elif form == "project":
        edits = [replace(e, tokens=":") for e in ablate_direction(model, given)]
        changes = _projected(model, torch.linalg.qr(torch.stack([v.direction.double() for v in given]).T)[0])
    else:
        raise InputError(f"form={form!r}: expected 'add' or 'project'")
    made = model.changed(changes)
    inputs = {k: v for k, v in model.anatomy.inputs.items() if isinstance(v, Tensor)}
    wanted, found = (m.run(inputs, edits=e).logits.float() for m, e in ((model, edits), (made, [])))
    off = float((wanted - found).abs().max()) / max(1.0, float(wanted.abs().max()))
    allowed = CLOSE if next(model.module.parameters()).dtype == torch.float32 else 0.05
    if not off <= allowed:
        raise Refused(
            f"in the weights of {model.name} this is not what the edits do (logits differ by {off:.2g}): steer while it runs"
        )
    return made


def _bias(model: Model, v: Vector, size: float) -> Change:
    """The vector added to the bias of what writes last to its block's output."""
    site = Site.parse(v.site)
    block = model.anatomy.stacks[-1].blocks[int(site.layer or 0)]
    for mlp in block.mlps.values():
        if mlp.linear is None or mlp.path is None or mlp.path.onward:
            continue
        module, name = model.module.get_submodule(mlp.linear.module), f"{mlp.linear.module}.bias"
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and bias.shape == v.direction.shape:
            more = size * v.direction.double() / block.taps[f"{mlp.part}.out"].layout.scale
            return Replaced(name, (bias.detach().double().cpu() + more).to(bias))
    raise Refused(
        f"block {site.layer} of {model.name} has no bias that reaches its output as it is: steer it while it runs, or project out"
    )


def _projected(model: Model, u: Tensor) -> list[Change]:
    """(I - u u^T) on every weight that writes to the stream, u [d, k] orthonormal; which ones are found on the map."""
    stack, changes = model.anatomy.stacks[-1], []
    for i, block in enumerate(stack.blocks):
        parts: list[Attention | Mlp] = [*block.attentions.values(), *block.mlps.values()]
        for part in parts:
            experts = getattr(part, "experts", None)
            if experts is not None:
                module = model.module.get_submodule(experts.module)
                axis = 2 if module.is_transposed else 1
                changes += _off(model, f"{experts.module}.down_proj", u, axis)
                changes += _off(model, f"{experts.module}.down_proj_bias", u, 1) if module.has_bias else []
                continue
            if part.linear is None or part.path is None:
                raise Refused(
                    f"what {part.part} of block {i} writes is no single linear map: ablate the direction while it runs"
                )
            module, name = model.module.get_submodule(part.linear.module), part.linear.module
            if part.path.onward is None or any(
                not affine(step, torch.randn(2, 3, stack.d_model)) for _, step in part.path.onward
            ):
                raise Refused(
                    f"a norm or gate stands behind {name}, so a projection of its weights is none of the stream: ablate while it runs"
                )
            if is_packed(module) or "weight" not in module._parameters:
                raise Refused(_UNPLAIN.format(f"{name}.weight"))
            changes += _off(model, f"{name}.weight", u, int(inputs_first(module, part.linear.shape)))
            changes += _off(model, f"{name}.bias", u, 0) if getattr(module, "bias", None) is not None else []
    for tap in stack.embeds.values():
        changes += _off(model, f"{tap.module}.weight", u, 1, ties="apart")
    return changes


def _off(model: Model, name: str, u: Tensor, axis: int, ties: Any = "refuse") -> list[Change]:
    """A parameter without its part along u in one axis. Refused where it is no plain tensor of the stream's width."""
    module, _, own = name.rpartition(".")
    weight = model.module.get_submodule(module)._parameters.get(own)
    if weight is None or not weight.is_floating_point() or weight.ndim <= axis or weight.shape[axis] != len(u):
        raise Refused(_UNPLAIN.format(name))
    w = weight.detach().double().cpu().movedim(axis, -1)
    return [Replaced(name, (w - (w @ u) @ u.T).movedim(-1, axis).to(weight), ties=ties)]
