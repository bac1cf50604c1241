"""Control vectors go out and come back bit for bit; what is in the weights gives the logits of the edits; the rest is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pellucid as pl
from pellucid.errors import InputError, Refused
from pellucid.safety import Vector, ablate_direction, export_gguf, import_vectors, in_weights, save_vectors
from tests.safety.test_steering import PROMPTS, fitted, opened

gguf = pytest.importorskip("gguf")


def test_a_gguf_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path: Any) -> None:
    model = opened("llama")
    vectors = [fitted("llama").at(i) for i in (1, 2)]
    path = export_gguf(model, vectors, tmp_path / "v.gguf", strength=0.4)
    reader = gguf.GGUFReader(str(path))
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and len(t.shape) == 1 for t in reader.tensors)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    for tensor, v in zip(reader.tensors, vectors, strict=True):
        assert np.array_equal(tensor.data, (v.direction * (0.4 * v.unit)).numpy())
    back = import_vectors(model, path)
    assert [v.site for v in back] == ["layers.1.resid_post", "layers.2.resid_post"] and back[0].digest == model.digest
    for v, own in zip(back, vectors, strict=True):
        a, b = (model.run(PROMPTS, edits=[e]).logits for e in (v.edit(1.0, tokens=":"), own.edit(0.4, tokens=":")))
        assert torch.allclose(a, b, atol=1e-5)
    # and only that block: as llama.cpp, to the output of block N at every position, by a plain hook
    raw = torch.as_tensor(np.array(reader.tensors[0].data))
    hook = model.module.get_submodule("model.layers.1").register_forward_hook(
        lambda m, a, out: (out[0] + raw, *out[1:]) if isinstance(out, tuple) else out + raw
    )
    by_hand = model.module(**model.inputs(PROMPTS).tensors).logits
    hook.remove()
    real = model.inputs(PROMPTS).stream("").mask.bool()
    assert torch.allclose(
        model.run(PROMPTS, edits=[back[0].edit(1.0, tokens=":")]).logits[real], by_hand[real], atol=1e-5
    )


def _gguf(path: Any, tensors: dict[str, np.ndarray]) -> Any:
    writer = gguf.GGUFWriter(str(path), "controlvector")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_of_others_are_untied_and_wrong_ones_refused(tmp_path: Any) -> None:
    model, d = opened("llama"), opened("llama").anatomy.stacks[0].d_model
    ones = np.ones(d, dtype=np.float32)
    found = import_vectors(model, _gguf(tmp_path / "a.gguf", {"direction.2": ones}))
    assert found[0].digest == "" and found[0].unit == pytest.approx(d**0.5) and found[0].site == "layers.2.resid_post"
    assert (
        import_vectors(model, _gguf(tmp_path / "s.gguf", {"direction.2": ones}), shift=-1)[0].site
        == "layers.1.resid_post"
    )
    plain = tmp_path / "p.safetensors"
    save_file({"layers.1": torch.ones(d), "2": torch.ones(d)}, str(plain))
    assert [v.site for v in import_vectors(model, plain)] == ["layers.2.resid_post", "layers.1.resid_post"]
    own = save_vectors([fitted("llama").at(1)], tmp_path / "o.safetensors")
    assert torch.equal(import_vectors(model, own)[0].direction, fitted("llama").at(1).direction)
    export_gguf(model, [fitted("llama").at(1)], tmp_path / "t.gguf")
    cases: list[tuple[Any, str]] = [
        (lambda: import_vectors(opened("gpt2"), tmp_path / "t.gguf"), "other weights|wide"),
        (lambda: import_vectors(model, _gguf(tmp_path / "b.gguf", {"direction.1": ones[:-1]})), "wide"),
        (lambda: import_vectors(model, _gguf(tmp_path / "c.gguf", {"direction.0": ones})), "block 0"),
        (lambda: import_vectors(model, _gguf(tmp_path / "d.gguf", {"direction.9": ones})), "no block"),
        (lambda: import_vectors(model, _gguf(tmp_path / "e.gguf", {"direction.1": ones.astype(np.float16)})), "F32"),
        (lambda: import_vectors(model, _gguf(tmp_path / "f.gguf", {"other.1": ones})), "no control vector"),
        (lambda: import_vectors(model, tmp_path / "none.safetensors"), "no file of vectors"),
        (lambda: import_vectors(model, tmp_path / "none.gguf"), "no GGUF file"),
        (lambda: export_gguf(model, [fitted("llama").at(0)], tmp_path / "g.gguf"), "block 0"),
        (lambda: export_gguf(model, [Vector("embed", torch.ones(d))], tmp_path / "g.gguf"), "no output"),
        (lambda: export_gguf(model, [fitted("llama").at(1)] * 2, tmp_path / "g.gguf"), "add them up"),
    ]
    for call, said in cases:
        with pytest.raises(InputError, match=said):
            call()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_projection_in_the_weights_is_directional_ablation_everywhere(family: str) -> None:
    model, v = opened(family), fitted(family).at(1)
    before = model.digest
    made = in_weights(model, v, form="project")
    edits = ablate_direction(
        model,
        Vector(v.site, v.direction, first=torch.ones_like(v.direction) - v.direction * v.direction.sum()),
        everywhere=True,
    )
    for prompts in (PROMPTS, PROMPTS[:1]):
        a, b = model.run(prompts, edits=edits), made.run(prompts, keep=["layers.2.resid_post"])
        real = b.inputs.stream("").mask.bool()
        assert torch.allclose(a.logits[real], b.logits[real], atol=1e-4)
        assert float(v(b.tensor("layers.2.resid_post"))[real].abs().max()) < 1e-3
    assert made.digest != before == model.digest and made.generate(PROMPTS, max_new_tokens=3).tokens.shape[0] == 2
    with pytest.raises(InputError, match="other weights"):
        made.run(PROMPTS, edits=[v.edit()])


def test_a_vector_in_a_bias_is_the_vector_added_at_every_token() -> None:
    model, v = opened("gpt2"), fitted("gpt2").at(1)
    made = in_weights(model, v, 0.5)
    edited, changed = model.run(PROMPTS, edits=[v.edit(0.5, tokens=":")]), made.run(PROMPTS)
    real = changed.inputs.stream("").mask.bool()
    assert torch.allclose(edited.logits[real], changed.logits[real], atol=1e-4)


def test_what_has_no_place_in_the_weights_is_refused_by_name() -> None:
    for family, form, said in (
        ("llama", "add", "no bias"), ("gemma3_text", "project", "norm or gate stands behind"), ("mixtral", "add", "no bias"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=said):
            in_weights(opened(family), fitted(family).at(1), form=form)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="form='turn'"):
        in_weights(opened("llama"), fitted("llama").at(1), form="turn")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="of a decoder"):
        in_weights(
            opened("t5"), Vector("decoder.layers.0.resid_post", torch.ones(opened("t5").anatomy.stacks[-1].d_model))
        )


def test_an_adapter_is_steered_and_its_wrapped_weights_are_refused_or_right() -> None:
    peft = pytest.importorskip("peft")
    from tests.zoo import build, tokenizer

    module = build("llama", layers=3)
    wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    model = pl.load(wrapped, tokenizer=tokenizer(module))
    v = (
        pl.safety.Contrast(sites="layers.1.resid_post")
        .fit(model, PROMPTS * 2 + ["a", "b"], [f"{p} a" for p in PROMPTS] + ["c d", "e f"])
        .at(1)
    )
    assert not torch.allclose(model.run(PROMPTS, edits=[v.edit(1.0)]).logits, model.run(PROMPTS).logits)
    with pytest.raises(Refused):
        in_weights(model, v, form="project")
