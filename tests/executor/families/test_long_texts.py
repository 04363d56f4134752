"""Models whose rotations are others for long texts give the tokens of transformers, short and long ones mixed."""

from dataclasses import replace

import pytest

from executor.checks import check_request
from executor.errors import JobError
from executor.families import family_for
from tests.executor.families.grouped import EXPERTS
from tests.executor.families.tiny import SIZES, causal, save
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts

FIRST, MAX_TOKENS = 24, 4
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [3.0, 5.0, 7.0, 9.0],
    "attention_factor": 1.2,
}
POLICIES = {
    "attention on the cpu": {"attention": CPU},
    "split prompts": {"attention": GPU, "prefill_chunk_tokens": 9, "prefix_buffer_tokens": 40},
}


def model(first: int):
    """The same weights, whichever texts are short."""
    return causal("qwen3_moe", **EXPERTS, rope_parameters={**LONGROPE, "original_max_position_embeddings": first})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    return save(model(FIRST), folder / "as it is"), save(model(1), folder / "all long")


@pytest.mark.parametrize("name", POLICIES)
def test_long_and_short_texts_give_the_tokens_of_transformers(saved, name):
    """Transformers decides by how long a text is so far, we by how long it may get."""
    as_it_is, all_long = saved
    prompts = [*random_prompts(11), [*range(3, 3 + FIRST + 1 - MAX_TOKENS)]]  # the last just stays short
    policy = make_policy(SIZES["num_hidden_layers"], batch_size=6, **POLICIES[name])
    with generator(as_it_is.folder, policy) as made:
        done = generate(made, requests(prompts, max_tokens=MAX_TOKENS, ignore_eos=True))
    differs: dict[str, bool] = {}
    for i, prompt in enumerate(prompts):
        theirs, if_all_long = (model.greedy([prompt], MAX_TOKENS)[0] for model in (as_it_is, all_long))
        short = len(prompt) + MAX_TOKENS - 1 <= FIRST
        kind = "short" if short else "long" if len(prompt) > FIRST else "becomes long"
        assert done[f"request-{i}"].tokens == (if_all_long if kind == "becomes long" else theirs)
        differs[kind] = differs.get(kind, False) or theirs != if_all_long
    assert differs == {"short": True, "becomes long": True, "long": False}


def test_a_model_of_fewer_layers_has_as_many_for_long_texts(saved):
    arch = architecture(saved[0].folder)
    fewer = replace(arch, spec=arch.spec.with_layers(arch.spec.layers[:2]), layers=arch.layers[:2])
    assert fewer.for_positions(FIRST).layers == arch.layers[:2]
    assert fewer.for_positions(FIRST + 1).layers == arch.for_positions(FIRST + 1).layers[:2] != arch.layers[:2]


def test_rotations_that_differ_for_every_length_end_texts_and_say_so():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = {**SIZES, **EXPERTS, "model_type": "qwen3_moe", "max_position_embeddings": 32, "rope_scaling": rope}
    arch = family_for(config, "config.json").architecture(config, "config.json")
    (request,) = requests([[*range(3, 33)]], max_tokens=3)
    with pytest.raises(JobError, match="within the model's 32 positions, as dynamic scaling"):
        check_request(request, arch, make_policy(3))
