"""The tests' own device: what CUDA refuses it refuses, and no wait for it goes unseen."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.executor.runtime.device_tensor import DEVICE, DeviceTensor, Wait, WithDevice, waits


@pytest.fixture(autouse=True)
def on_a_lane():
    waits.clear()
    with torch.no_grad(), WithDevice():
        yield
    waits.clear()


@pytest.fixture
def x():
    return DeviceTensor(torch.arange(12.0).view(3, 4))


HOST = torch.ones(3, 4)
NUMBERS = torch.tensor([2, 0])
REFUSED = {
    "sum": lambda x: x + HOST,
    "sum in place": lambda x: x.add_(HOST),
    "sum on the host": lambda x: HOST.clone().add_(x),
    "scalar of the device": lambda x: torch.ones(()).add_(x.sum()),
    "product": lambda x: x @ HOST.T,
    "out": lambda x: torch.mm(x, x.T, out=torch.empty(3, 3)),
    "index_select": lambda x: x.index_select(0, NUMBERS),
    "index_copy_": lambda x: x.index_copy_(0, NUMBERS, x[:2]),
    "gather": lambda x: x.gather(1, NUMBERS.view(2, 1)),
    "index on the device": lambda x: HOST[x[0, :2].long()],
    "cat": lambda x: torch.cat([x, HOST]),
    "where": lambda x: torch.where(x > 1, x, HOST),
    "fill of what is not 0-dim": lambda x: x.masked_fill_(HOST > 0, 0),
    "attention": lambda x: scaled_dot_product_attention(x[None], HOST[None], x[None]),
}


@pytest.mark.parametrize("work", REFUSED.values(), ids=list(REFUSED))
def test_tensors_of_host_and_device_are_not_mixed(x, work):
    with pytest.raises((RuntimeError, AssertionError), match=r"expected all|attention to"):
        work(x)


WAITING = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x[0, 0] > 1),
    "int": lambda x: int(x[0, 0]),
    "bound of a slice": lambda x: x[: x[0, 1].int()],
    "size": lambda x: torch.empty(x[0, 1].int()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: HOST.clone().copy_(x),
    "copy to the device": lambda x: x.copy_(HOST),
    "to": lambda _: HOST.to(DEVICE),
    "tensor": lambda _: torch.tensor([1.0], device=DEVICE),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 3],
    "mask set": lambda x: x.__setitem__(x > 3, x[0, 0]),
    "index of the host": lambda x: x[NUMBERS],
    "list as index": lambda x: x[[2, 0]],
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x[0].long().bincount(),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("work", WAITING.values(), ids=list(WAITING))
def test_waits_are_put_down(x, work):
    work(x)
    assert {(wait.module, wait.function) for wait in waits} == {(__name__, "<lambda>")}


def test_waits_name_operator_and_line(x):
    (x + 1).sum().item()
    line = test_waits_name_operator_and_line.__code__.co_firstlineno + 1
    operator = "aten._local_scalar_dense.default"
    assert waits == [Wait(operator, __name__, "test_waits_name_operator_and_line", line)]


def test_what_the_device_does_by_itself_lets_no_one_wait(x):
    numbers = torch.arange(3, device=DEVICE)
    (x * 2 + torch.tensor(1.0) - x[0, 0]).clamp_(0, 4).div_(x.new_ones(1))
    (torch.tensor(1.0) + x).masked_fill_(x > 2, 0)
    x[numbers] = x.flip(0)[numbers].sort(stable=True).values
    x[1:, :2].copy_(torch.empty_like(x[1:, :2]).zero_())
    x.copy_(HOST, non_blocking=True)
    torch.empty(3, 4).copy_(x, non_blocking=True)
    assert waits == []
    assert isinstance(numbers, DeviceTensor)
    assert numbers.device == DEVICE
    assert not numbers.is_cpu


def test_views_share_memory(x):
    half, flat = x[1:, ::2], x.view(-1)
    half.mul_(-1)
    flat[0].fill_(7)
    bits = x.view(torch.int32)
    bits[2, 3].zero_()
    wanted = [[7, 1, 2, 3], [-4, 5, -6, 7], [-8, 9, -10, 0]]
    assert x.tolist() == wanted
    assert half.data_ptr() == x.data_ptr() + 4 * x.itemsize
    assert half.tolist() == [row[::2] for row in wanted[1:]]


def test_what_is_written_is_what_comes_back(x):
    out = torch.empty(3, 3, device=DEVICE)
    assert torch.mm(x, x.T, out=out) is out
    assert out.add_(1) is out
    assert torch.equal(out.cpu(), torch.arange(12.0).view(3, 4) @ x.cpu().T + 1)
    with pytest.raises(AssertionError, match="resized"):
        torch.mm(x, x.T, out=torch.empty(0, device=DEVICE))


@pytest.mark.parametrize("make", [torch.empty_like, lambda x: x.new_empty(3), torch.empty])
def test_what_was_never_written_is_no_number(x, make):
    made = torch.empty(3, device=DEVICE) if make is torch.empty else make(x)
    assert made.isnan().all().item()
