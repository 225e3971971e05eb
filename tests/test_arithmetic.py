"""Native and emulated bf16, exact and rounded products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_accel.models import probes
from rlhf_accel.system.arithmetic import (
    casts_kept,
    computes_in_bf16,
    multiplies_exactly,
    product_arithmetic,
    product_error,
    unused_device,
)
from rlhf_accel.system.process import tune_process


@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, None),
        ({"RLHF_ACCEL_CPU_BF16": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}, True),
        ({"RLHF_ACCEL_CPU_BF16": "0"}, False),
    ],
)
def test_the_kind_of_cpu_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, variables: dict[str, str], expected: bool | None
) -> None:
    """An expected None stands for the detected kind."""
    for name in ("RLHF_ACCEL_CPU_BF16", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert computes_in_bf16(torch.device("cpu")) == (has_bf16 if expected is None else expected)
    assert not computes_in_bf16(torch.device("meta"))


def test_avx512_without_bf16_units_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports bf16 as supported by oneDNN on every CPU with AVX-512."""
    for name in ("RLHF_ACCEL_CPU_BF16", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    for of_avx512, of_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=of_avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=of_amx: has)
        assert computes_in_bf16(torch.device("cpu")) == (of_avx512 or of_amx)


def rounding(bits: int, allowed: Callable[[], bool] = lambda: True) -> Callable[..., torch.Tensor]:
    """An fp32 matrix product that rounds its factors to this many bits, as faster units do, while that is allowed."""
    exact = torch.Tensor.__matmul__

    def rounded(number: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(number)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and allowed():
            left, right = rounded(left), rounded(right)
        return exact(left, right)

    return product


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize(("bits", "arithmetic"), [(24, "fp32"), (11, "TF32"), (8, "bf16")])
def test_rounded_products_are_recognized(monkeypatch: pytest.MonkeyPatch, bits: int, arithmetic: str) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding(bits))
    assert product_arithmetic(product_error(cpu)) == arithmetic
    assert multiplies_exactly(cpu) == (arithmetic == "fp32")
    found = probes.fp32_products(cpu)
    assert found.passed == (arithmetic == "fp32") and f"are {arithmetic}:" in found.message
    assert ("run.matmul_precision=highest" in found.message) != found.passed


def test_products_are_measured_again_when_the_setting_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "medium" selects bf16 units: the result for one setting must not be reused for another."""
    setting: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", setting.append)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding(8, lambda: setting[-1] == "medium"))
    tune_process()
    assert not multiplies_exactly(torch.device("cpu"))
    tune_process("highest")
    assert multiplies_exactly(torch.device("cpu"))


class Casts(TorchDispatchMode):
    """Counts casts of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == (4, 4)
        return func(*args, **(kwargs or {}))


def test_a_frozen_weight_is_cast_once_and_is_frozen_afterwards() -> None:
    layer = torch.nn.Linear(4, 4).requires_grad_(False)
    found = {}
    for kept in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            with casts_kept(layer if kept else torch.nn.Module()):
                results = [layer(torch.ones(1, 4)) for _ in range(3)]
            found[kept] = casts.count
        assert not any(result.requires_grad for result in results)
    assert found == {False: 3, True: 1}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_what_is_trained_or_is_no_fp32_stays_as_it_is_after_an_error() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16().requires_grad_(False)])
    with pytest.raises(ZeroDivisionError), casts_kept(layers):
        assert not layers[1].weight.requires_grad
        raise ZeroDivisionError
    assert layers[0].weight.requires_grad and not layers[1].weight.requires_grad


@pytest.mark.parametrize("has_cuda", [True, False])
def test_a_device_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert unused_device() is None
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    if has_cuda:
        assert unused_device() is None
    else:
        assert "an XPU device, which is not used" in str(unused_device())
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert "an MPS device" in str(unused_device())
