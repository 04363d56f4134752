import pytest
import torch

from executor.model import dense_views, expert_views, head_views
from tests.executor.tiny_models import tiny_arch

SPEC = tiny_arch(head_dim=6).spec


@pytest.mark.parametrize(
    ("views", "size", "shapes"),
    [
        (dense_views, SPEC.dense_parameters, [(16,), (48, 16), (16, 24), (16,), (4, 16)]),
        (expert_views, SPEC.expert_parameters, [(48, 16), (16, 24)]),
        (head_views, SPEC.head_parameters, [(16,), (50, 16)]),
    ],
)
def test_views_cover_the_vector_in_order(views, size, shapes):
    flat = torch.arange(size)
    weights = views(SPEC, flat)
    parts = [getattr(weights, name) for name in weights.__dataclass_fields__]
    assert [tuple(part.shape) for part in parts] == shapes
    assert torch.equal(torch.cat([part.flatten() for part in parts]), flat)
    assert parts[0].data_ptr() == flat.data_ptr()


def test_a_vector_of_another_size_is_our_mistake():
    with pytest.raises(AssertionError):
        dense_views(SPEC, torch.zeros(SPEC.dense_parameters + 1))
