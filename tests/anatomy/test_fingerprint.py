"""The digest follows the weights: in place and out, back again, over copies, processes and kinds of tensor."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pellucid.anatomy import fingerprint
from pellucid.anatomy.fingerprint import Fingerprint, Memo, weight_digest

MAKE = (
    "import torch; from torch import nn; torch.manual_seed(0);"
    "m = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))"
)


def made() -> nn.Module:
    names: dict = {}
    exec(MAKE, names)
    return names["m"]


def test_every_single_number_counts():
    module = made()
    seen, count = {weight_digest(module)}, 0
    for parameter in module.parameters():
        for i in (0, parameter.numel() // 2, parameter.numel() - 1):
            with torch.no_grad():
                parameter.view(-1)[i] += 1e-3
            seen.add(weight_digest(module))
            count += 1
    module[3].running_mean[2] = 1.0
    seen.add(weight_digest(module))
    module[3].num_batches_tracked += 1
    assert len(seen | {weight_digest(module)}) == count + 3


def test_names_shapes_and_dtypes_count():
    module = nn.Linear(4, 4)
    turned, renamed = copy.deepcopy(module), nn.ModuleDict({"a": module})
    turned.weight = nn.Parameter(module.weight.detach().view(2, 8))
    assert len({weight_digest(m) for m in (module, turned, renamed, copy.deepcopy(module).double())}) == 4


def test_it_is_the_same_in_another_process_and_in_a_copy():
    module = made()
    code = f"{MAKE}; from pellucid.anatomy.fingerprint import weight_digest; print(weight_digest(m))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout.strip()
    own = Fingerprint(module)
    assert told == own.digest == copy.deepcopy(own).digest == pickle.loads(pickle.dumps(own)).digest
    assert copy.deepcopy(own).module is not module


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]
)
def test_it_is_the_same_however_the_numbers_lie_and_for_every_dtype(dtype, device):
    x = (torch.arange(3000.0).view(50, 60) % 7 - 3).to(dtype)
    plain, turned, moved = nn.Module(), nn.Module(), nn.Module()
    plain.register_buffer("x", x)
    turned.register_buffer("x", x.T.contiguous().T)
    moved.register_buffer("x", x.to(device))
    assert not turned.x.is_contiguous()
    assert weight_digest(plain) == weight_digest(turned) == weight_digest(moved)
    other = x.clone()
    other.view(torch.uint8)[49, -1] ^= 1
    plain.x = other
    assert weight_digest(plain) != weight_digest(turned)


def change_optimiser(m):
    m[1](torch.ones(1, 16)).sum().backward()
    torch.optim.SGD([m[1].weight], lr=0.1).step()


CHANGES = {
    "one number in place": lambda m: m[0].weight.__setitem__((3, 3), 9.0),
    "an optimiser's step": change_optimiser,
    "another parameter": lambda m: setattr(m[1], "weight", nn.Parameter(torch.ones(8, 16))),
    "another tensor behind the parameter": lambda m: setattr(m[1].weight, "data", torch.ones(8, 16)),
    "a buffer": lambda m: m[3].running_var.fill_(2.0),
    "a row through .data": lambda m: m[1].weight.data[5].zero_(),
    "a column through .data": lambda m: m[1].weight.data[:, 11].mul_(2),
    "a row through NumPy": lambda m: m[0].weight.detach().numpy()[7].fill(0),
    "a bias through .data": lambda m: m[1].bias.data.add_(1),
    "a cast": lambda m: m.double(),
    "parameters made for inference": lambda m: inference(m),
}  # fmt: skip


def inference(m):
    with torch.inference_mode():
        m[1].weight = nn.Parameter(torch.zeros(8, 16), requires_grad=False)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_and_the_old_digest_comes_back_with_the_old_weights(change):
    module = made()
    own, kept = Fingerprint(module), copy.deepcopy(module)
    before = own.digest
    grad = torch.enable_grad if change is change_optimiser else torch.no_grad
    with grad():
        change(module)
    assert own.digest == weight_digest(module) != before
    module.float()
    module[1].weight = nn.Parameter(torch.zeros(8, 16))
    module.load_state_dict(kept.state_dict())
    assert own.digest == before


def test_what_hides_from_torch_and_from_the_sample_is_seen_once_asked_to_forget():
    module = nn.Linear(64, 64, bias=False)
    own = Fingerprint(module)
    before, stamp = own.digest, own.stamp()
    module.weight.data[0, 1] = 5.0  # off the sampled diagonal, and no version tells of it: the documented limit
    assert own.digest == before and own.stamp() == stamp
    own.forget()
    assert own.digest == weight_digest(module) != before


def test_only_what_changed_is_hashed_again(monkeypatch):
    module = made()
    hashed = []
    plain = fingerprint.tensor_hash
    monkeypatch.setattr(fingerprint, "tensor_hash", lambda t: hashed.append(tuple(t.shape)) or plain(t))
    own = Fingerprint(module)
    assert own.digest == own.digest
    assert len(hashed) == len(module.state_dict())
    hashed.clear()
    with torch.no_grad():
        module[1].weight.add_(1)
    twin = Fingerprint(module, known=own)
    assert twin.digest == own.digest
    assert hashed == [(8, 16), (8, 16)]


def test_tied_weights_are_hashed_once_and_count_under_each_name(monkeypatch):
    module = nn.ModuleDict({"a": nn.Embedding(30, 8), "b": nn.Linear(8, 30, bias=False)})
    apart = weight_digest(nn.ModuleDict({"a": module["a"]}))
    module["b"].weight = module["a"].weight
    hashed = []
    plain = fingerprint.tensor_hash
    monkeypatch.setattr(fingerprint, "tensor_hash", lambda t: hashed.append(t) or plain(t))
    assert Fingerprint(module).digest not in ("", apart)
    assert len(hashed) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 70), max_size=3), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.int8]))
def test_any_one_number_of_any_shape_changes_the_hash(shape, place, dtype):
    x = torch.randint(-50, 50, shape).to(dtype)
    y = x.clone()
    y.view(-1)[place % x.numel()] += 1
    assert fingerprint.tensor_hash(x) == fingerprint.tensor_hash(x.clone()) != fingerprint.tensor_hash(y)


@pytest.mark.parametrize("scheme", ["tensor", "channel"])
def test_numbers_and_scales_of_quantised_weights_count(scheme):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def packed(x, scale):
        module = nn.Module()
        if scheme == "tensor":
            q = torch.quantize_per_tensor(x, scale, 3, torch.qint8)
        else:
            q = torch.quantize_per_channel(x, torch.full((6,), scale), torch.zeros(6), 0, torch.qint8)
        module.register_buffer("q", q)
        return weight_digest(module)

    assert packed(x, 0.1) == packed(x.clone(), 0.1)
    assert len({packed(x, 0.1), packed(-x, 0.1), packed(2 * x, 0.2)}) == 3


def test_a_memo_answers_once_and_forgets_when_a_weight_changes():
    module, asked = made(), []
    memo = Memo(module)

    def total() -> float:
        asked.append(1)
        return float(sum(p.sum() for p in module.parameters()))

    first = memo("total", total)
    assert memo("total", total) == first and len(asked) == 1
    assert memo("another", lambda: 5) == 5 and len(asked) == 1
    with torch.no_grad():
        module[1].weight.add_(1)
    assert memo("total", total) == pytest.approx(first + 128) and len(asked) == 2
    assert memo.weights.digest
    module[1].weight.data.add_(1)  # behind torch's back: the digest notices, and the memo with it
    assert memo("total", total) == pytest.approx(first + 128)
    assert memo.weights.digest == weight_digest(module)
    assert memo("total", total) == pytest.approx(first + 256)
    assert copy.deepcopy(memo)("total", lambda: "anew") == "anew"
