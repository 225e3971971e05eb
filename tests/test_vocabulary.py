"""Logits in fp32 over layers in half precision: the product, its gradients, and every kind of model that has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlhf_accel.models import vocabulary
from rlhf_accel.models.vocabulary import Fp32LogitsLinear, has_fp32_logits, with_fp32_logits

BF16 = torch.bfloat16


def fp32_logits(layer: nn.Linear) -> nn.Linear:
    layer = copy.deepcopy(layer)
    layer.__class__ = Fp32LogitsLinear
    return layer


def near_minus_100(bias: bool = False) -> tuple[nn.Linear, torch.Tensor]:
    """A layer and its input, whose outputs are a few units around -100."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 700, bias=bias), torch.randn(2, 3, 16)
    with torch.no_grad():
        layer.weight[:, 0] = -10 + 0.3 * torch.randn(700)
    x[..., 0] = 10.0
    return layer, x


@pytest.fixture
def exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("slices", [False, True])
def test_outputs_are_those_of_fp32_where_half_precision_rounds_them_to_halves(autocast, slices, monkeypatch) -> None:
    """Over weights in bf16, and of weights in fp32 under autocast, which takes no factor in bf16."""
    monkeypatch.setattr(vocabulary, "_SLICE", 16 * 300 if slices else 2**21)
    layer, x = near_minus_100(bias=True)
    if not autocast:
        layer, x = layer.to(BF16), x.to(BF16)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        plain, ours = layer(x), fp32_logits(layer)(x)
    assert plain.dtype == BF16 and float((plain - exact).abs().max()) > 0.2
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", ["all", "input", "weights"])
def test_gradients_are_those_of_the_plain_layer(autocast: bool, trained: str) -> None:
    """With the same dtypes, and rounded as they are without it."""
    plain, x = near_minus_100(bias=True)
    plain, x = (plain, x) if autocast else (plain.to(BF16), x.to(BF16))
    grad, found = torch.randn(2, 3, 700), []
    for layer in (plain, fp32_logits(plain)):
        layer.requires_grad_(trained != "input")
        layer.zero_grad()
        inputs = x.clone().requires_grad_(trained != "weights")
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            outputs = layer(inputs)
        outputs.float().backward(grad)
        found.append([inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(other.float(), one.float(), rtol=2e-2, atol=5e-2)


def test_fp32_and_fp64_are_the_plain_layers_to_the_last_bit() -> None:
    layer, x = near_minus_100(bias=True)
    for dtype in (torch.float32, torch.float64):
        layer, x = layer.to(dtype), x.to(dtype)
        assert fp32_logits(layer)(x).equal(layer(x))


@pytest.mark.parametrize("kind", ["plain", "adapter on the vocabulary", "saved vocabulary"])
def test_a_models_logits_are_fp32(kind: str, llama_folder) -> None:
    """With tied embeddings."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=BF16).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not has_fp32_logits(model)
    with_fp32_logits(model)
    if kind == "adapter on the vocabulary":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    elif kind == "saved vocabulary":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert has_fp32_logits(model)
    logits = model(input_ids=torch.arange(5, 9)[None]).logits
    assert logits.dtype == torch.float32 and not logits.equal(logits.to(BF16).float())
    logits.sum().backward()


def test_other_kinds_of_vocabulary_layers_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Scaled(4, 8)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    with_fp32_logits(model)
    assert type(model.head) is Scaled and not has_fp32_logits(model)


def test_a_frozen_layer_costs_no_product_for_its_gradient() -> None:
    """As in LoRA, where that product is as large as the forward pass."""
    layer, x = near_minus_100()
    layer = fp32_logits(layer.to(BF16)).requires_grad_(False)
    outputs = layer(x.to(BF16).requires_grad_())
    with FlopCounterMode(display=False) as counter:
        outputs.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 16 * 700
