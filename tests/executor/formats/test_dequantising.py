"""What the planner says of writing packed weights out is what torch does, operator by operator."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from executor.formats import packed_in
from executor.random_weights import RandomWeights
from hrm.contract.dequantising import bytes_moved, launches
from hrm.formats import packed_format

ROWS, WIDTH = 256, 1024
NAMES = (
    *("fp8", "fp8-b128", "int8", "int4-g32", "int4-g128-f16-z", "mxfp4", "nvfp4"),
    *("int4-g128-f16-o", "int4-g128-f16-z-o", "int8-g128-f16-o"),
)


class Counting(TorchDispatchMode):
    """Counts operators that compute, and the bytes of what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage().data_ptr() for leaf in read}
        in_place = func.__name__.split(".")[0].endswith("_") or func.__name__.endswith(".out")
        is_view = not in_place and all(leaf.untyped_storage().data_ptr() in places for leaf in written)
        if not is_view and not func.__name__.startswith("empty"):
            self.launches += 1
            given_room = func.__name__ == "copy_.default" or func.__name__.endswith(".out")
            rooms = {leaf.data_ptr() for leaf in written} if given_room else set()
            reads = [leaf for leaf in read if leaf.data_ptr() not in rooms]
            self.num_bytes += sum(min(leaf.nbytes, leaf.untyped_storage().nbytes()) for leaf in (*reads, *written))
        return made


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_launches_are_those_of_torch(name: str) -> None:
    form = packed_format(name)
    assert form is not None
    packed = packed_in(form, ROWS, WIDTH, torch.zeros(form.bytes_of(ROWS, WIDTH), dtype=torch.uint8))
    RandomWeights().read_packed_into("x", packed)
    room = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    with Counting() as counted:
        packed.dequantised(room)
    moved = counted.num_bytes + room.nbytes  # the product reads them
    assert moved / room.numel() == pytest.approx(bytes_moved(form), rel=0.1)
    assert counted.launches == launches(form, room.numel())
