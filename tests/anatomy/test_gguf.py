"""A GGUF file is parsed once and kept: the copy is the file, bit for bit, is an ordinary checkpoint, and is never half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import pellucid as pl
from pellucid.anatomy import gguf as copies

gguf = pytest.importorskip("gguf")
D, HEADS, LAYERS, INNER = 32, 4, 2, 64
IDS = torch.tensor([[5, 9, 3, 7]])


def written(path: Path, seed: int = 0) -> Path:
    """A tiny Llama with a tokenizer of bytes, quantised to eight bits."""
    rng = np.random.default_rng(seed)
    chars = [*map(chr, range(33, 127)), "Ġ", "Ċ", "<s>", "</s>"]
    tokens = [*chars, "th", "he", "the"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny")
    for name, value in {
        "context_length": 64, "embedding_length": D, "block_count": LAYERS, "feed_forward_length": INNER,
        "head_count": HEADS, "head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "rope_dimension_count": D // HEADS, "vocab_size": len(tokens),
    }.items():  # fmt: skip
        getattr(out, f"add_{name}")(value)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
    out.add_token_merges(["t h", "h e", "th e"])
    out.add_bos_token_id(tokens.index("<s>"))
    out.add_eos_token_id(tokens.index("</s>"))
    out.add_pad_token_id(tokens.index("</s>"))
    kind = gguf.GGMLQuantizationType.Q8_0

    def matrix(name: str, *shape: int) -> None:
        packed = gguf.quants.quantize(rng.normal(0, 0.2, shape).astype(np.float32), kind)
        out.add_tensor(f"{name}.weight", packed, raw_dtype=kind)

    matrix("token_embd", len(tokens), D)
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", D, D)
        for name, shape in {"ffn_gate": (INNER, D), "ffn_up": (INNER, D), "ffn_down": (D, INNER)}.items():
            matrix(f"blk.{i}.{name}", *shape)
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{i}.{name}.weight", np.ones(D, np.float32))
    out.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for step in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        step()
    return path


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PELLUCID_CACHE", str(tmp_path / "cache"))
    return written(tmp_path / "tiny.gguf")


def native(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


def test_a_file_opened_twice_is_parsed_once_and_gives_transformers_logits_to_the_bit(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, tokenizer = native(file), transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    reads: list[Any] = []
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", type("Counted", (reader,), {"__init__": lambda self, *a: (reads.append(a), reader.__init__(self, *a))[1]}))  # fmt: skip
    for _ in range(2):
        model = pl.load(file)
        assert torch.equal(logits(model.module), logits(truth))
        assert model.tokenizer("the thing")["input_ids"] == tokenizer("the thing")["input_ids"]
        assert model.name == str(file) and model.loaded.dtype == torch.float32
    assert len(reads) == 1


def test_what_was_opened_from_a_file_is_saved_and_opens_in_plain_transformers(file: Path, tmp_path: Path) -> None:
    for keeping in (str(tmp_path / "cache"), ""):
        os.environ["PELLUCID_CACHE"] = keeping
        model = pl.load(file)
        model.module.save_pretrained(tmp_path / "saved")
        model.tokenizer.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again), logits(native(file)))
        reopened = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert reopened("the hat")["input_ids"] == model.tokenizer("the hat")["input_ids"]


@pytest.mark.parametrize("damage", ["cut", "one byte", "no list", "interrupted"])
def test_a_copy_that_is_not_whole_is_not_used(file: Path, damage: str) -> None:
    truth = logits(pl.load(file).module)
    folder = copies.place(file)
    assert folder is not None
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "one byte":
        content = bytearray(weights.read_bytes())
        content[-50] ^= 64
        weights.write_bytes(content)
    elif damage == "no list":
        (folder / copies.ABOUT).unlink()
    else:
        folder.rename(folder.with_name(".part-1"))
    assert torch.equal(logits(pl.load(file).module), truth)
    assert copies.kept(folder) is not None


def test_another_file_in_the_same_place_has_a_copy_of_its_own(file: Path) -> None:
    first = logits(pl.load(file).module)
    time = file.stat().st_mtime_ns
    written(file, seed=1)
    os.utime(file, ns=(time, time))  # of the same size and time: what tells them apart is the content
    second = logits(pl.load(file).module)
    assert not torch.equal(first, second) and torch.equal(second, logits(native(file)))


def test_a_place_that_cannot_be_written_to_keeps_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PELLUCID_CACHE", str(file / "below a file"))
    assert torch.equal(logits(pl.load(file).module), logits(native(file)))
