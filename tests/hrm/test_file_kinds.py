"""Files of ours that are handed to an option which takes another kind: what they are is told, and where they go."""

import json

import pytest

from hrm.machines import compose, save_profile

MODEL = ("--model", "mixtral-8x7b")
POLICY, MACHINE = "a policy file, which goes with --policy", "a machine, which goes with --profile"
RUN, CONFIG = "a run.json, whose folder hrm validate takes", "a model's config.json, which goes with --model"


@pytest.fixture
def files(tmp_path, monkeypatch, hrm):
    """Small files of each kind, of which keys alone matter but for the machine's."""
    monkeypatch.chdir(tmp_path)
    save_profile(tmp_path / "machine.yaml", compose("1xL4"))
    plain = {
        "policy.json": {"schema": 1, "policy": {"resident_experts": [1]}, "memory_budget_bytes": {}},
        "run.json": {"schema": 1, "outcome": "completed", "versions": {}},
        "config.json": {"architectures": ["NobodysForCausalLM"], "model_type": "nobodys", "num_experts": 8},
        "machine.json": {"schema": 1, "levels": [], "accelerator": "cpu"},
    }
    for name, content in plain.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("search", *MODEL, "--profile", "policy.json"), POLICY),
        (("search", *MODEL, "--profile", "run.json"), RUN),
        (("search", *MODEL, "--profile", "config.json"), CONFIG),
        (("search", *MODEL, "--gpus", "2x./policy.json"), POLICY),
        (("search", *MODEL, "--gpus", "1xL4", "--host", "./run.json"), RUN),
        (("profiles", "./config.json"), CONFIG),
        (("simulate", "--policy", "run.json"), RUN),
        (("simulate", "--policy", "config.json"), CONFIG),
        (("simulate", "--policy", "machine.json"), MACHINE),
        (("search", "--gpus", "1xL4", "--model", "policy.json"), POLICY),
        (("search", "--gpus", "1xL4", "--model", "run.json"), RUN),
    ],
)
@pytest.mark.usefixtures("files")
def test_a_file_of_another_kind_is_told_as_what_it_is(hrm, words, told):
    code, out, err = hrm(*words)
    assert (code, out) == (2, "")
    assert f" is <{told}>: must be " in err
    assert err.endswith("; name another file\n")


@pytest.mark.usefixtures("files")
def test_a_config_of_an_unknown_family_is_a_config(hrm):
    code, _, err = hrm("search", "--gpus", "1xL4", "--model", "config.json")
    assert code == 2
    assert "config.json: model_type is 'nobodys'" in err


@pytest.mark.usefixtures("files")
def test_a_file_whose_name_looks_like_no_file_is_told_as_one(hrm, tmp_path):
    save_profile(tmp_path / "mine", compose("1xL4"))
    for words in (("profiles", "mine"), ("search", *MODEL, "--gpus", "1xL4", "--host", "mine")):
        code, _, err = hrm(*words)
        assert code == 2
        assert err.endswith("; for the file, write ./mine\n")
    code, out, _ = hrm("profiles", "./mine")
    assert (code, out) == (0, (tmp_path / "mine").read_text(encoding="utf-8"))
