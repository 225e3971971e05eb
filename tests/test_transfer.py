"""Copies to and from a GPU; what they do on one is in tests/device/."""

import torch

from rlhf_accel.system.transfer import to_device, to_host


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
    assert to_host([tensor])[0] is tensor
    assert to_host([]) == []


def test_another_device_than_a_gpu_gets_a_plain_copy() -> None:
    assert to_device(torch.arange(3), torch.device("meta")).device.type == "meta"
