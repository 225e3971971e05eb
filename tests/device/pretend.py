"""A pretended CUDA device on CPU-only torch: tensors that say cuda:0 to Python and to C++, and compute on the CPU.

torch's C++ needs a device guard and CUDA's hooks before autograd, `.to("cuda")`, and autocast take such tensors; a
CPU-only build has neither, so `guard.cpp` registers ones that do nothing. torch asks for the hooks once, while it is
imported: this module loads the library before torch, so it belongs into a process of its own.

A tensor of the device is a wrapper whose C++ device and keys are CUDA's, so that autocast uses CUDA's lists of
operators. A dispatch mode unwraps it, checks devices, computes on the CPU, and wraps the result. `torch.cuda` is
stubbed. Modes belong to a thread: tensors of the device in another thread raise.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

LIBRARY = "PRETENDED_DEVICE"  # the variable of the environment that names the built guard

assert "torch" not in sys.modules, "import tests.device.pretend before torch"
ctypes.CDLL(os.environ[LIBRARY])

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # before the stubs: it sorts the functions of torch.cuda by identity
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from tests.device.plans import FROM_DEVICE, FROM_LATER, READ, TO_DEVICE, TO_LATER  # noqa: E402

CUDA, CPU, aten = torch.device("cuda", 0), torch.device("cpu"), torch.ops.aten

_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
# Operators that take a number from a CPU tensor without dimensions, beside those that are pointwise.
_TAKES_NUMBERS = {
    *("aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_", "aten::index_fill", "aten::index_fill_"),
    *("aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::where", "aten::lift_fresh"),
}


class OnDevice(Tensor):
    """A tensor of the pretended device; `held` is the CPU tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=CUDA
        )
        made.held = real
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Where it exists, `Module.to` swaps tensors instead of setting `.data`, which would keep the class."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> OnDevice:
        return OnDevice(inner["held"])

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()  # torch refuses it for subclasses

    def storage(self) -> Any:
        return self.held.storage()  # its pointer tells which weights are tied when a model is saved

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the pretended device outside of it, or in another thread")


class Device(TorchDispatchMode):
    """While entered, "cuda" works, and `counts` has what was read and copied, by (phase, kind, operator, place).

    The place is the innermost line of the package, with that of a library below it. `noise` makes a product differ as
    if kernels of other shapes summed in another order: its standard deviation as a share of the sum of sizes, by the
    shapes alone, so that the same product is the same each time. fp32 sums in another order on a CPU differ by 2**-27.
    """

    def __init__(self, *, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.phase = "outside"
        self.counts: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
        self.casts: collections.Counter[str] = collections.Counter()  # of weights to another dtype, by phase
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def counted_as(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.is_pinned.default:
            return getattr(args[0], "_pinned", False)
        if func is aten._pin_memory.default:
            return _pinned(args[0])
        kwargs.pop("pin_memory", None)  # the CPU's memory is all there is
        tensors = list(_tensors((args, kwargs)))
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        here = torch.device(asked).type == "cuda" if asked is not None else bool(ours)
        if not ours and not here:
            return func(*args, **kwargs)
        self._check(func, args, kwargs, [x for x in tensors if not isinstance(x, OnDevice)])
        real_args, real_kwargs = _unwrapped(args), _unwrapped(kwargs)
        if asked is not None:
            real_kwargs["device"] = asked if torch.device(asked).type == "meta" else CPU
        out = self._compute(func, real_args, real_kwargs)
        if func in _READS or not here:
            return out  # to the CPU: a copy, never a view
        made: dict[int, OnDevice] = {}
        out = tree_map(lambda x: made.setdefault(id(x), OnDevice(x)) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if _aliases(func) else out

    def _check(self, func: Any, args: Any, kwargs: Any, others: list[Tensor]) -> None:
        """Count what is read or copied, and raise where the devices of the arguments do not go together."""
        name = func._schema.name
        if func.namespace == "mkldnn":
            raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend")
        if name in ("aten::set_", "aten::resize_"):
            raise NotImplementedError(f"{name}: the wrapper would keep the old shape")
        if name in ("aten::_to_copy", "aten::copy_"):
            self._count_copy(name, args, kwargs)
            return
        if name in _INDEXED:
            others = self._count_index(name, args, others)
        elif _depends_on_data(func):
            self.count(READ, name)
        if others and not name.endswith("_like") and not name.startswith("aten::new_"):  # these read only the shape
            _refuse_mixed(func, args, others)

    def _count_copy(self, name: str, args: Any, kwargs: Any) -> None:
        in_place = name == "aten::copy_"
        source, target = (args[1], args[0]) if in_place else (args[0], None)
        asked = kwargs.get("device")
        is_ours = isinstance(source, OnDevice)
        if source.numel() == 0:
            return
        to_ours = isinstance(target, OnDevice) if in_place else is_ours if asked is None else _is_cuda(asked)
        waits_not = bool(args[2] if in_place and len(args) > 2 else kwargs.get("non_blocking", False))
        if is_ours and to_ours and not in_place and isinstance(source, torch.nn.Parameter):
            self.casts[self.phase] += 1
        elif is_ours and not to_ours:
            self.count(FROM_LATER if waits_not else FROM_DEVICE, name)
        elif to_ours and not is_ours:
            self.count(TO_LATER if waits_not and getattr(source, "_pinned", False) else TO_DEVICE, name)

    def _count_index(self, name: str, args: Any, others: list[Tensor]) -> list[Tensor]:
        """The other tensors without the indices, which may be on the CPU."""
        indices = [index for index in args[1] if index is not None]
        if isinstance(args[0], OnDevice):
            for index in indices:
                if not isinstance(index, OnDevice):
                    self.count(TO_DEVICE, f"{name} by an index on the CPU")
            others = [x for x in others if not any(x is index for index in indices)]
        fills = name != "aten::index" and args[2].numel() == 1 and not isinstance(args[2], OnDevice)
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not fills:
            self.count(READ, f"{name} by a mask")
        return others

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        result: torch.dtype | None = None  # None: that of the factors
        if func is aten.mm.dtype:  # half factors with an fp32 result, which the CPU's does not know
            (*factors, result), func = args, aten.mm.default
            args = tuple(factor.to(result) for factor in factors)
        if name in ("aten::_softmax", "aten::_log_softmax") and args[2]:  # half to float, which the CPU's does not know
            return func(args[0].float(), args[1], False)
        if self.noise and name in _PRODUCTS and args[0].is_floating_point():
            *bias, left, right = [x.float() for x in args if isinstance(x, Tensor)]
            sizes = left.abs() @ right.abs()
            order = torch.Generator().manual_seed(hash((left.shape, right.shape)) % 2**62)
            summed = left @ right + torch.randn(sizes.shape, generator=order) * sizes * self.noise
            return (sum(bias) + summed).to(result or args[0].dtype)
        return func(*args, **kwargs)

    def count(self, kind: str, operator: str) -> None:
        self.counts[(self.phase, kind, operator.removeprefix("aten::"), _place())] += 1

    def __enter__(self) -> Device:
        enter = self._stack.enter_context
        for name, stub in _stubs(self).items():
            enter(_replaced(torch.cuda, name, stub))
        enter(_replaced(torch.version, "cuda", "pretended"))
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(…, device="cuda") goes past every mode
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        enter(torch.autograd.set_multithreading_enabled(False))
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stack.close()


@functools.cache
def _aliases(func: Any) -> bool:
    """Whether a result may be, or be a view of, an argument."""
    return bool(func.is_view or func._schema.is_mutable or any(out.alias_info for out in func._schema.returns))


@functools.cache
def _depends_on_data(func: Any) -> bool:
    return func in _READS or bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in the arguments of an operator: tuples, lists, and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    if isinstance(value, (tuple, list)):
        return type(value)([_unwrapped(item) for item in value])
    return {key: _unwrapped(item) for key, item in value.items()} if isinstance(value, dict) else value


def _refuse_mixed(func: Any, args: Any, others: list[Tensor]) -> None:
    """Raise as a GPU does if one of the `others`, on the CPU, is more than a number that the operator takes."""
    name = func._schema.name
    takes_numbers = torch.Tag.pointwise in func.tags or name in _TAKES_NUMBERS
    pairs = zip(args, func._schema.arguments, strict=False)
    changed = [x for x, declared in pairs if declared.alias_info and declared.alias_info.is_write]
    bad = [x for x in others if x.dim() > 0 or not takes_numbers or any(x is y for y in changed)]
    if bad:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}, cpu {tuple(bad[0].shape)} {bad[0].dtype}; at {_place()})"
        )


def _is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy._pinned = True  # type: ignore[attr-defined]  # of this tensor, not of its views
    return copy


def _place() -> str:
    """The innermost line of the package, and below it that of a library other than torch, if any."""
    frame, below = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "/rlhf_accel/" in path:
            return f"{path.rpartition('/rlhf_accel/')[2]}:{frame.f_lineno}" + (f" < {below}" if below else "")
        if "site-packages" in path and "/torch/" not in path and "/jaxtyping/" not in path:
            below = below or f"{path.partition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return below or "?"


def _stubs(device: Device) -> dict[str, Any]:
    """What `torch.cuda` says while the device is entered."""
    properties = types.SimpleNamespace(
        name="Pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, gcnArchName=""
    )

    def nothing(*_: Any, **__: Any) -> None:
        """Done."""

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def waits(*_: Any) -> None:
        device.count(READ, "synchronize")

    class Event:
        def __init__(self, **_: Any) -> None:
            self.record = nothing
            self.synchronize = waits

    stream = types.SimpleNamespace(synchronize=waits, wait_stream=nothing, record_event=nothing, cuda_stream=0)
    done = ("set_device", "_lazy_init", "init", "_lazy_call", "manual_seed", "manual_seed_all", "set_rng_state")
    done += ("reset_peak_memory_stats", "empty_cache", "ipc_collect")
    says = {
        **{"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True},
        **{"_is_in_bad_fork": False, "get_device_name": "Pretended", "get_device_capability": (9, 0)},
        **{"get_device_properties": properties, "get_arch_list": ["sm_90"], "is_bf16_supported": True},
        **{"mem_get_info": (70 << 30, 80 << 30), "memory_allocated": 1 << 30, "max_memory_allocated": 2 << 30},
        **{"memory_reserved": 3 << 30, "max_memory_reserved": 3 << 30, "memory_stats": {}},
        **{"is_current_stream_capturing": False, "current_stream": stream, "_exchange_device": 0},
        **{"_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8)},
    }
    stubs: dict[str, Any] = dict.fromkeys(done, nothing) | {name: always(value) for name, value in says.items()}
    return {**stubs, "_initialized": True, "synchronize": waits, "Event": Event}


_ABSENT = object()


@contextlib.contextmanager
def _replaced(module: Any, name: str, stub: Any) -> Iterator[None]:
    before = getattr(module, name, _ABSENT)
    setattr(module, name, stub)
    try:
        yield
    finally:
        setattr(module, name, before) if before is not _ABSENT else delattr(module, name)
