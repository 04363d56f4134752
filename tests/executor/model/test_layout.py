import pytest
import torch

from executor.model.layout import FfnWeights, dense_tensors, dense_views, expert_views, experts_in, head_views
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.formats import FORMATS
from hrm.layers import DenseFfn, Layer, places
from hrm.model_spec import BUILT_IN_MODELS, load_model
from tests.executor.tiny_models import tiny_arch

SPEC = tiny_arch(head_dim=6).spec
ROUTED = SPEC.layers[0]
DENSE = Layer(mixer=ROUTED.mixer, ffn=(DenseFfn(hidden_size=16, intermediate_size=20),))


def tensors_of(weights):
    """All tensors, those of its blocks included."""
    for name in weights.__dataclass_fields__:
        value = getattr(weights, name)
        if value is not None:
            yield from [value] if isinstance(value, torch.Tensor) else tensors_of(value)


@pytest.mark.parametrize(
    ("views", "of", "size", "shapes"),
    [
        (dense_views, ROUTED, ROUTED.dense_parameters, [(16,), (48, 16), (16, 24), (16,), (4, 16)]),
        (dense_views, DENSE, DENSE.parameters, [(16,), (48, 16), (16, 24), (16,), (40, 16), (16, 20)]),
        (expert_views, ROUTED, SPEC.expert_parameters, [(48, 16), (16, 24)]),
        (head_views, SPEC, SPEC.head_parameters, [(16,), (50, 16)]),
    ],
)
def test_views_cover_the_vector_in_order(views, of, size, shapes):
    flat = torch.arange(size, dtype=torch.float32)
    parts = list(tensors_of(views(of, flat)))
    assert [tuple(part.shape) for part in parts] == shapes
    assert torch.equal(torch.cat([part.flatten() for part in parts]), flat)
    assert parts[0].data_ptr() == flat.data_ptr()


def test_a_layer_without_experts_has_none():
    assert isinstance(dense_views(DENSE, torch.zeros(DENSE.parameters)).ffn, FfnWeights)
    assert experts_in(DENSE, torch.zeros(0), 0).each == ()


def test_parts_are_all_rows_of_a_matrix_that_joins_several():
    joined = {tensor.name: tensor for layer in (ROUTED, DENSE) for tensor in layer.tensors if tensor.parts}
    assert joined.keys() == {"qkv", "w13", "dense_w13"}
    assert joined["qkv"].parts == (24, 12, 12)
    assert all(sum(tensor.parts) == tensor.shape[0] for tensor in joined.values())


def test_a_vector_of_another_size_is_our_mistake():
    with pytest.raises(AssertionError):
        head_views(SPEC, torch.zeros(SPEC.head_parameters + 1))


@pytest.mark.parametrize("name", [name for name in BUILT_IN_MODELS if load_model(name).family in EXECUTED_FAMILIES])
def test_matrices_are_aligned(name):
    """Products on a GPU are slow where they are not, and single elements may lie beside them."""
    for layer in load_model(name).layer_kinds():
        tensors = dense_tensors(layer)
        starts, _ = places(tensors, FORMATS["bfloat16"])
        assert not [each.name for each, at in zip(tensors, starts, strict=True) if len(each.shape) > 1 and at % 16]
