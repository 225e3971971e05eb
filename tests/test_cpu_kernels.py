"""The faster matrix products of a CPU give the results of plain ones, for every kind and state of a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models.vocabulary import Fp32LogitsLinear
from rlhf_accel.rollout.drawing import SamplingSettings
from rlhf_accel.rollout.sampling import sample, uniforms
from tests.conftest import TEXTS

pytestmark = [
    pytest.mark.skipif(not kernels.has_onednn(), reason="this torch has no oneDNN"),
    pytest.mark.cpu_kinds,
]


class Layers(nn.Module):
    """A plain layer, one with a bias, GPT-2's kind, and one that is too small for packing."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(256, 512, bias=False)
        self.biased = nn.Linear(512, 256)
        self.conv = Conv1D(512, 256)
        self.small = nn.Linear(512, 8)

    def forward(self, x):
        return self.small(self.conv(self.biased(self.plain(x).relu())))


def quickened(layer: nn.Linear) -> nn.Linear:
    layer = copy.deepcopy(layer)
    kernels.quicken(layer)
    assert type(layer) is kernels.VocabularyLinear
    return layer


@pytest.mark.parametrize("shape", [(256,), (1, 256), (3, 1, 256), (2, 5, 256), (0, 256)])
def test_packed_layers_give_the_outputs_of_plain_ones(shape) -> None:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(*shape)
    with torch.no_grad():
        plain = model(x)
        with kernels.packed(model, 3):
            inside = model(x)
            assert [name for name, layer in model.named_children() if "forward" in vars(layer)] == [
                "plain",
                "biased",
                "conv",
            ]
        assert not any("forward" in vars(layer) for layer in model.modules())
    torch.testing.assert_close(inside, plain, rtol=0, atol=1e-5)


def test_packed_bytes_are_those_of_the_copies() -> None:
    model = Layers()
    with kernels.packed(model, 3):
        copies = [layer.forward.keywords["weight"] for layer in (model.plain, model.biased, model.conv)]
    assert kernels.packed_bytes(model) == 4 * sum(copy.numel() for copy in copies) == 3 * 4 * 256 * 512
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.packed_bytes(model) == 0


def test_packed_weights_are_those_of_now() -> None:
    model, x = Layers(), torch.ones(2, 256)
    with torch.no_grad(), kernels.packed(model, 2):
        before = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        with kernels.packed(model, 2):
            after = model(x)
        torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before)


def test_an_exception_leaves_plain_layers_behind() -> None:
    model = Layers()
    with pytest.raises(KeyError), kernels.packed(model, 1):
        raise KeyError
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_layers_with_a_forward_of_their_own_keep_it() -> None:
    """A second context inside the first, a hook of another library, and a layer that does more than multiply."""

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2, x

    model, x = Layers(), torch.ones(2, 256)
    hooked = model.biased.forward = lambda x, linear=model.biased: nn.functional.linear(x, linear.weight) - 1
    model.router = Router(256, 512)
    with torch.no_grad():
        plain = model(x)
        with kernels.packed(model, 2):
            with kernels.packed(model, 2):
                assert "forward" not in vars(model.router)
            assert "forward" in vars(model.plain)
            torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-4)
    assert model.biased.forward is hooked and "forward" not in vars(model.plain)


def test_other_dtypes_and_autocast_use_plain_layers() -> None:
    half = Layers().bfloat16()
    with kernels.packed(half, 1):
        assert not any("forward" in vars(layer) for layer in half.modules())
    model = Layers()
    with torch.autocast("cpu", dtype=torch.bfloat16), kernels.packed(model, 1):
        assert not any("forward" in vars(layer) for layer in model.modules())
        layer = quickened(model.plain)
        assert layer(torch.ones(2, 256)).equal(Fp32LogitsLinear.forward(layer, torch.ones(2, 256)))
    cut = Layers()
    cut.plain.weight.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
    with kernels.packed(cut, 1):
        assert "forward" not in vars(cut.plain) and "forward" in vars(cut.biased)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", ["both", "input", "weight"])
def test_the_vocabulary_layer_has_the_gradients_of_the_plain_one(bias: bool, trained: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 700, bias=bias)
    ours = quickened(plain)
    grad = torch.randn(2, 3, 700)
    found = []
    for layer in (plain, ours):
        x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1), requires_grad=trained != "weight")
        layer.requires_grad_(trained != "input")
        output = layer(x)
        output.backward(grad)
        found.append([output.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_quickened_layer_has_weights_of_its_own() -> None:
    layer = quickened(nn.Linear(8, 16))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.zero_()
    assert (other(torch.ones(1, 8)) == other.bias).all()
    assert not torch.allclose(layer(torch.ones(1, 8)), layer.bias)


def test_only_plain_linear_layers_are_quickened() -> None:
    for layer in (Conv1D(4, 4), nn.Identity(), nn.Embedding(4, 4)):
        kind = type(layer)
        kernels.quicken(layer)
        assert type(layer) is kind


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("lora", [False, True])
def test_greedy_decoding_writes_the_same_tokens(kind, lora, request, monkeypatch) -> None:
    """Also with adapters, whose base layers are packed and whose own are too small."""
    monkeypatch.setattr(kernels, "_WORTH_PACKING", 1)  # the tiny model's layers
    folder = request.getfixturevalue(f"{kind}_folder")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kernels.quicken(model.get_output_embeddings())
    if lora:
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
        model = get_peft_model(model, settings).eval()
    queries = torch.randint(5, 50, (4, 6), generator=torch.Generator().manual_seed(len(TEXTS)))
    mask = torch.ones_like(queries, dtype=torch.bool)

    def written():
        settings = SamplingSettings(max_new_tokens=12, top_k=1)
        ended = lambda responses: torch.zeros(4, dtype=torch.bool)  # noqa: E731
        return sample(model, queries, mask, uniforms(0, 1, range(4), 12), settings, pad_id=0, ended=ended)

    plain = written()
    with kernels.packed(model, 4):
        packed = [layer for layer in model.modules() if "forward" in vars(layer)]
        quick = written()
    assert len(packed) > 4
    assert len(set(plain.responses.flatten().tolist())) > 4, "a model that repeats itself is a weak test"
    assert quick.responses.equal(plain.responses)
    torch.testing.assert_close(quick.logprobs, plain.logprobs, rtol=0, atol=1e-4)
