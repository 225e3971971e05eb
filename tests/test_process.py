"""Process settings and global random numbers."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_accel.models import probes
from rlhf_accel.system import process as runtime


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.random(), float(torch.rand(()))


def test_global_random_numbers_follow_all_the_numbers_given() -> None:
    runtime.reseed(1, 2, 3)
    first = drawn()
    assert drawn() != first
    runtime.reseed(1, 2, 3)
    assert drawn() == first
    for others in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2)):
        runtime.reseed(*others)
        assert not set(drawn()) & set(first), others


def test_peak_memory_holds_what_was_taken_and_given_back() -> None:
    before = runtime.peak_resident_mib()
    assert before == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, rel=0.5)
    taken = torch.ones(2**20, int(before) // 4 + 64)  # as much again as the peak, and 256 MiB
    del taken
    assert runtime.peak_resident_mib() > before + 100


def test_free_memory_is_what_the_control_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(place: str, **files: object) -> None:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / place / name.replace("__", ".")).write_text(f"{content}\n")

    monkeypatch.setattr(runtime, "_CGROUPS", tmp_path)
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path / "self")
    monkeypatch.setattr(runtime.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert runtime.free_memory() == 5000
    (tmp_path / "self").write_text("0::/job/step\n")
    group("job/step", memory__max="max", memory__current=10, memory__stat="inactive_file 5")
    assert runtime.free_memory() == 5000
    group("job", memory__max=1000, memory__current=900, memory__stat="anon 4\ninactive_file 300")
    assert runtime.free_memory() == 400
    (tmp_path / "self").write_text("5:cpu,cpuacct:/\n4:memory:/docker/1\n0::/\n")  # as seen in its own mount
    v1 = {"memory__limit_in_bytes": 700, "memory__usage_in_bytes": 650, "memory__stat": "total_inactive_file 20"}
    group("memory", **v1)
    assert runtime.free_memory() == 70


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
def test_a_kind_of_cpu_can_be_forced(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, variables: dict[str, str], expected: bool | None
) -> None:
    """None: what the CPU has."""
    for name in ("RLHF_ACCEL_CPU_BF16", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert runtime.computes_in_bf16(torch.device("cpu")) == (has_bf16 if expected is None else expected)
    assert not runtime.computes_in_bf16(torch.device("meta"))


def test_avx512_without_bf16_units_is_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports bf16 as supported by oneDNN on every CPU with AVX-512."""
    for name in ("RLHF_ACCEL_CPU_BF16", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    for of_avx512, of_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=of_avx512: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=of_amx: has)
        assert runtime.computes_in_bf16(torch.device("cpu")) == (of_avx512 or of_amx)


def rounding(bits: int, allowed: Callable[[], bool] = lambda: True) -> Callable[..., torch.Tensor]:
    """An fp32 matrix product whose factors keep so many bits, as faster units do, while it is allowed."""
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
def test_exact_products_are_told_from_rounded_ones(monkeypatch: pytest.MonkeyPatch, bits: int, arithmetic: str) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding(bits))
    assert runtime.product_arithmetic(runtime.product_error(cpu)) == arithmetic
    assert runtime.multiplies_exactly(cpu) == (arithmetic == "fp32")
    found = probes.fp32_products(cpu)
    assert found.passed == (arithmetic == "fp32") and f"are {arithmetic}:" in found.message
    assert ("run.matmul_precision=highest" in found.message) != found.passed


def test_what_products_are_is_measured_again_when_the_setting_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where "medium" means bf16 units: the answer under one setting must not stand for another."""
    setting: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", setting.append)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding(8, lambda: setting[-1] == "medium"))
    runtime.tune_process()
    assert not runtime.multiplies_exactly(torch.device("cpu"))
    runtime.tune_process("highest")
    assert runtime.multiplies_exactly(torch.device("cpu"))
