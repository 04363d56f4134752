"""Tensors of a device that is none: as strict as CUDA's, and they tell when they stall the host.

A DeviceTensor says that it lies on a card and computes on the CPU. It refuses to be mixed with
tensors of the host where CUDA would, and whatever lets the host wait until the device has come to
it is put down in `waits`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

DEVICE: Final = torch.device("cuda", 99)  # which no machine has
OURS: Final = ("executor.", "tests.")
COPIES: Final = ("aten::copy_", "aten::_to_copy")
INDEXING: Final = ("aten::index", "aten::index_put", "aten::index_put_")
UNWRITTEN: Final = ("aten::new_empty", "aten::empty_like")  # are no numbers, lest one reads them
EMPTY: Final = torch.empty
MASKS: Final = (torch.bool, torch.uint8)
PLAIN: Final = {int, float, bool, type(None)}  # what else operators are given, most of the time
# Functions of torch's that are done otherwise, whatever they are given; others only where they name the device.
OTHERWISE: Final = {scaled_dot_product_attention, Tensor.__getitem__, Tensor.to}
# Of operators that return to the host what the device has computed, be it only a size.
TELLING: Final = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True, slots=True)
class Wait:
    """An operator that lets the host wait for the device, and the line of ours that calls it."""

    operator: str
    module: str
    function: str
    line: int


waits: list[Wait] = []


class DeviceTensor(Tensor):
    """A tensor of the device with the data of `inner`, which lies on the CPU.

    To C++ it lies on the meta device, whose guard every build of torch has.
    """

    inner: Tensor
    device: torch.device = DEVICE
    is_cuda: bool = True
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __new__(cls, inner: Tensor) -> Self:
        assert inner.is_cpu
        make: Any = torch.Tensor._make_wrapper_subclass
        made = make(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        named, facts = kwargs or {}, _facts(func)
        if facts.name == "aten::_foreach_copy_":  # between devices one by one, as CUDA does
            for target, source in zip(*args[:2], strict=True):
                target.copy_(source, *args[2:], **named)
            return None
        given = list[Tensor]()
        inner_args = [_inner(x, given) for x in args]
        inner_named = {name: _inner(x, given) for name, x in named.items()} if named else {}
        device = named.get("device")
        to_host = device is not None and torch.device(device).type == "cpu"
        crosses = to_host or any(type(x) is not DeviceTensor for x in given)
        if crosses and not _may_cross(facts, args, given):
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, but some are on the cpu")
        if _stalls(facts, args, named, crosses=crosses):
            _put_down(str(func))
        if device is not None:
            inner_named["device"] = "cpu"
        result = func(*inner_args, **inner_named)
        if to_host:
            return result
        if facts.name in UNWRITTEN:
            result.untyped_storage().fill_(0xFF)
        if facts.writes:
            assert all(x.shape == _data(x).shape for x in given), f"{func} resized a tensor"
        return _mapped(lambda x: _on_device(x, given), result)


class Facts(NamedTuple):
    """What an operator's schema and tags say of it."""

    name: str
    pointwise: bool
    writes: bool
    tells: bool


@cache
def _facts(func: Any) -> Facts:
    pointwise, tells = torch.Tag.pointwise in func.tags, not TELLING.isdisjoint(func.tags)
    return Facts(func._schema.name, pointwise, func._schema.is_mutable, tells)


def _may_cross(of: Facts, args: Sequence[Any], given: Sequence[Tensor]) -> bool:
    """Whether CUDA has the operator with some of its tensors on the host."""
    if of.name in INDEXING:  # it moves indices by itself
        return not args[0].is_cpu
    if of.pointwise:  # scalars go with the launch
        return not (of.writes and given[0].is_cpu) and all(x.ndim == 0 for x in given if x.is_cpu)
    return of.name in COPIES


def _stalls(of: Facts, args: Sequence[Any], named: Mapping[str, Any], *, crosses: bool) -> bool:
    if of.name in COPIES:
        third = args[2] if len(args) > 2 else False
        return crosses and not named.get("non_blocking", third)
    if of.name in INDEXING:
        return any(x.is_cpu or x.dtype in MASKS for x in args[1] if x is not None)
    return of.tells


def _put_down(operator: str) -> None:
    frame = sys._getframe(1)
    while (module := frame.f_globals["__name__"]) == __name__ or not module.startswith(OURS):
        assert frame.f_back is not None, "called by none of ours"
        frame = frame.f_back
    waits.append(Wait(operator, module, frame.f_code.co_name, frame.f_lineno))


class WithDevice(TorchFunctionMode):
    """In the thread that enters it, tensors can be made on the device."""

    def __torch_function__(self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func not in OTHERWISE and "device" not in named:  # nearly always
            return func(*args, **named)
        if func is scaled_dot_product_attention:  # one kernel, which reads nothing of the host's
            on_host = [x for x in args if isinstance(x, Tensor) and x.is_cpu]
            assert all(isinstance(x, CausalBias) for x in on_host), "attention to the host's memory"
            return on_device(func)(*args, **named)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return args[0][torch.tensor(args[1])]  # C++ would make that on the meta device
        if func is Tensor.to and any(isinstance(x, torch.device) and x == DEVICE for x in args):
            _put_down("aten::_to_copy")
            return DeviceTensor(args[0].clone())
        if not named.get("device") or torch.device(named["device"]) != DEVICE:
            return func(*args, **named)
        if func is torch.tensor:
            _put_down("tensor")
        made = func(*args, **{**named, "device": "cpu"})
        if func is EMPTY:
            made.untyped_storage().fill_(0xFF)
        return DeviceTensor(made)


def on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of the device's own, which lets no one wait, if it is called with its tensors."""

    @wraps(kernel)
    def compute(*args: Any, **named: Any) -> Any:
        inner_named = {name: _inner(x, []) for name, x in named.items()}
        return _mapped(DeviceTensor, kernel(*_inner(args, []), **inner_named))

    return compute


def _data(x: Tensor) -> Tensor:
    return x.inner if isinstance(x, DeviceTensor) else x


def _inner(tree: Any, given: list[Tensor]) -> Any:
    """Data in place of DeviceTensors; adds all tensors to `given`."""
    kind = type(tree)
    if kind is DeviceTensor:
        given.append(tree)
        return tree.inner
    if kind in PLAIN:
        return tree
    if isinstance(tree, Tensor):
        assert tree.is_cpu, "made by C++, which knows no such device"
        given.append(tree)
        return tree
    if isinstance(tree, tuple | list):
        return [_inner(x, given) for x in tree]
    return tree


def _on_device(result: Tensor, given: Sequence[Tensor]) -> Tensor:
    """What was written is what comes back, and all else is new."""
    for x in given:
        if _data(x) is result:
            return x
    return DeviceTensor(result)


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        return [_mapped(change, x) for x in tree]
    return tree
