import json

import pytest
import torch
from safetensors.torch import load_file

from executor.checkpoint import Checkpoint
from executor.families import FAMILIES, family_for
from executor.model import GroupedQuery, Norm, NormKind, Reach, Router
from executor.model.layout import dense_tensors, expert_tensors
from hrm.errors import ModelError
from hrm.model_spec import BUILT_IN_MODELS
from tests.executor.tiny_models import DBRX

SOME_LAYERS = 8  # have all kinds of any model; it is a matter of seconds to name the tensors of sixty


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def mixtral(tiny_folders):
    return config_of(tiny_folders["wide heads"])


@pytest.fixture
def dbrx(tiny_folders):
    return config_of(tiny_folders[DBRX])


def architecture(config):
    return family_for(config, "config.json").architecture(config, "config.json")


def refused(config, *parts):
    with pytest.raises(ModelError) as caught:
        architecture(config)
    for part in parts:
        assert part in str(caught.value)


def test_mixtral_config(mixtral):
    arch = architecture(mixtral)
    assert arch.final_norm == Norm(kind=NormKind.RMS, eps=1e-5)
    (maths,) = set(arch.layers)
    assert isinstance(maths.mixer, GroupedQuery)
    assert (maths.mixer.norm, maths.ffn.norm) == (arch.final_norm, arch.final_norm)
    assert (maths.mixer.clip, maths.ffn.router, arch.max_position_embeddings) == (None, Router(norm=1.0), 256)
    assert theta_of(arch) == pytest.approx(10_000.0)
    assert (arch.bos_token_id, arch.eos_token_ids) == (1, (2,))


def test_dbrx_config(dbrx):
    arch = architecture(dbrx)
    assert arch.final_norm == Norm(kind=NormKind.LAYER, eps=1e-5)
    (maths,) = set(arch.layers)
    assert isinstance(maths.mixer, GroupedQuery)
    assert (maths.mixer.norm, maths.ffn.norm) == (arch.final_norm, arch.final_norm)
    assert (maths.mixer.clip, maths.ffn.router, arch.max_position_embeddings) == (0.7, Router(norm=2.0), 256)
    assert theta_of(arch) == pytest.approx(10_000.0)
    dbrx["ffn_config"]["moe_normalize_expert_weights"] = None
    assert architecture(dbrx).layers[0].ffn.router.norm is None


def theta_of(arch):
    """The base of which the second of n frequencies is the power -1/n."""
    frequencies = arch.layers[0].mixer.rotary.frequencies
    return frequencies[1] ** -len(frequencies)


def test_rope_theta_where_published_configs_have_it(mixtral, dbrx):
    del mixtral["rope_parameters"]
    assert theta_of(architecture(mixtral)) == pytest.approx(1e6)
    assert theta_of(architecture({**mixtral, "rope_theta": 5e4, "rope_scaling": None})) == pytest.approx(5e4)
    del dbrx["rope_parameters"]
    dbrx["attn_config"]["rope_theta"] = 5e5
    assert theta_of(architecture(dbrx)) == pytest.approx(5e5)


def test_scaled_positions_that_are_unknown_are_refused(mixtral, dbrx):
    for config in (mixtral, dbrx):
        refused({**config, "rope_scaling": {"type": "warped", "factor": 2.0}}, "rope_scaling: type", "'warped'", "yarn")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
        ({"sliding_window": "wide"}, ("sliding_window", "'wide'")),
        ({"rope_parameters": None, "rope_theta": 0}, ("rope_theta", "0", "positive")),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps", "'small'", "positive")),
        ({"max_position_embeddings": True}, ("max_position_embeddings",)),
        ({"head_dim": 7}, ("head_dim", "7", "even")),
        ({"eos_token_id": "end"}, ("eos_token_id", "'end'", "token id")),
        ({"hidden_act": ["silu"]}, ("hidden_act", "['silu']")),
        ({"max_position_embeddings": float("inf")}, ("max_position_embeddings", "inf")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ({"hidden_size": None}, ("hidden_size", "<missing>")),
        ({"model_type": None}, ("model_type", "<missing>")),
        ({"model_type": ["dbrx"]}, ("model_type", "['dbrx']")),
    ],
)
def test_mixtral_configs_refused(mixtral, changes, parts):
    refused({**mixtral, **changes}, "config.json: ", *parts)


@pytest.mark.parametrize(
    ("section", "changes", "parts"),
    [
        ("ffn_config", {"ffn_act_fn": {"name": "relu"}}, ("ffn_act_fn", "'relu'")),
        ("ffn_config", {"moe_normalize_expert_weights": -1}, ("moe_normalize_expert_weights",)),
        ("attn_config", {"clip_qkv": 0}, ("clip_qkv", "0", "positive")),
        ("attn_config", {"kv_n_heads": 3}, ("num_kv_heads", "3")),
    ],
)
def test_dbrx_configs_refused(dbrx, section, changes, parts):
    refused({**dbrx, section: {**dbrx[section], **changes}}, *parts)


def test_dbrx_heads_must_divide_its_width(dbrx):
    refused({**dbrx, "d_model": 34}, "n_heads", "34")


def test_window_over_all_positions_is_no_window(mixtral):
    assert architecture({**mixtral, "sliding_window": 256}).reaches == (Reach(),)
    assert architecture({**mixtral, "sliding_window": 255}).reaches == (Reach(255),)


def test_expected_tensors_are_exactly_those_saved(tiny_folder):
    arch = architecture(config_of(tiny_folder))
    expected = FAMILIES[arch.spec.family].expected_tensors(arch)
    stored = load_file(tiny_folder / "model.safetensors")
    assert expected == {name: (tuple(tensor.shape), None) for name, tensor in stored.items()}


@pytest.mark.parametrize("name", [spec.name for spec in BUILT_IN_MODELS.values() if spec.family in FAMILIES])
def test_expected_tensors_add_up_to_the_parameters(name):
    spec = BUILT_IN_MODELS[name]
    spec = spec.with_layers(spec.layers[:SOME_LAYERS])
    assert set(spec.layers) == set(BUILT_IN_MODELS[name].layers)
    family = FAMILIES[spec.family]
    arch = family.published_architecture(spec)
    expected = family.expected_tensors(arch).values()
    assert sum(torch.Size(each.shape).numel() for each in expected) == spec.parameters


def test_no_more_tensors_are_expected_than_tell_that_some_are_missing(tiny_folder):
    """A config may ask for a hundred million experts, of which its checkpoint has four."""
    config, stored = config_of(tiny_folder), load_file(tiny_folder / "model.safetensors")
    many = 10**8
    of_dbrx = {"ffn_config": {**config.get("ffn_config", {}), "moe_num_experts": many}}
    asked = {**config, **(of_dbrx if "ffn_config" in config else {"num_local_experts": many})}
    arch = architecture(asked)
    expected = FAMILIES[arch.spec.family].expected_tensors(arch, stored.keys())
    assert len(expected) <= len(stored) + 3


def test_loads_fill_every_element_in_the_dtype_asked_for(tiny_folder):
    with Checkpoint.open(tiny_folder) as checkpoint:
        family = family_for(checkpoint.config, "config.json")
        arch = family.architecture(checkpoint.config, "config.json")
        spec = arch.spec
        flats = [
            torch.full((size,), torch.nan, dtype=torch.bfloat16)
            for size in (spec.layers[0].dense_parameters, spec.expert_parameters, spec.head_parameters)
        ]
        family.load(checkpoint, spec, dense_tensors(spec.layers[1]), flats[0], 1)
        family.load(checkpoint, spec, expert_tensors(spec.layers[1]), flats[1], 1, 2)
        family.load(checkpoint, spec, spec.head_tensors, flats[2])
        embedding = torch.full((spec.embedding_parameters,), torch.nan)
        family.load(checkpoint, spec, spec.embedding_tensors, embedding)
    assert not any(tensor.isnan().any() for tensor in (*flats, embedding))
    tied = torch.equal(flats[2][spec.hidden_size :], embedding.to(torch.bfloat16))
    assert tied == spec.tied_embeddings
