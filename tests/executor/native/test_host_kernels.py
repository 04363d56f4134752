"""What is handed to the profile is what runs."""

import pytest
import torch

from executor import native
from executor.model.host_kernels import host_kernels
from hrm.contract.host_kernels import installed_kernels
from hrm.machines import compose
from hrm.profiling.machine import ProfileOptions, profile_machine
from tests.executor.native.support import PATHS
from tests.hrm.profiling.fakes import small_sizes


def test_torch_alone_is_not_handed_in():
    with native.using(None):
        assert host_kernels() is None


def test_they_fuse_what_plans_of_machines_that_nobody_measured_take_to_be_fused():
    kernels = host_kernels()
    assert kernels is None or kernels.fuses_operators == compose("1xT4").host.processor.fuses_operators


def test_hrm_profile_finds_the_installed_kernels():
    with native.using(None):
        assert installed_kernels() is None
    assert installed_kernels() == host_kernels()


@pytest.mark.parametrize("path", PATHS)
def test_a_profile_is_of_the_kernels(path):
    with native.using(native.Kernels(path)), small_sizes():
        kernels = host_kernels()
        assert kernels is not None
        profile = profile_machine(
            ProfileOptions("cpu", quick=True, dtypes=("float32",), budget_s=0.05, kernels=kernels)
        )
    processor = profile.levels[0].processor
    assert processor.attention_request_s is None  # a batch is one call
    assert processor.fuses_operators  # so are a layer's experts (test_launches)
    assert profile.environment["kernels"] == kernels.name
    assert kernels.name in processor.compute_flops_per_s["float32"].planned.note


@pytest.mark.parametrize("path", PATHS)
def test_products_are_right(path):
    torch.manual_seed(0)
    x, weight, out = torch.randn(5, 40), torch.randn(7, 40), torch.empty(5, 7)
    with native.using(native.Kernels(path)):
        kernels = host_kernels()
        assert kernels is not None
        kernels.multiply(x, weight, out)
    torch.testing.assert_close(out, x @ weight.T)
