"""Models by their names on the Hub: fetched from one on this machine, and refused in a line."""

import errno
import json
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

from hrm.errors import ModelError
from hrm.hub import HubModel
from hrm.model_spec import load_model
from tests.contracts.fake_hub import ask_at, commit_of, fake_hub

NAME = "some-lab/Mixtral-8x7B.v0"
CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = tmp_path / "main"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    with fake_hub(tmp_path / "cache", monkeypatch) as made:
        made.repositories[NAME] = folder
        yield made


def refused(model, *parts):
    with pytest.raises(ModelError) as caught:
        load_model(model)
    message = str(caught.value)
    assert message.startswith("--model is ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (NAME, HubModel(NAME)),
        ("a/b@v1.0", HubModel("a/b", "v1.0")),
        ("a/b@refs/pr/3", HubModel("a/b", "refs/pr/3")),
        ("mixtral-8x7b", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("../b", None),
        ("models/config.json", None),
        ("a/b@", None),
        ("a b/c", None),
    ],
)
def test_what_names_a_model_on_the_hub(text, wanted):
    assert HubModel.named(text) == wanted


def test_a_plan_needs_the_config_alone(hub):
    spec = load_model(NAME)
    assert (spec.name, spec.num_experts, spec.hidden_size) == ("Mixtral-8x7B.v0", 4, 64)
    assert hub.names == {"config.json"}
    assert "Bearer hf_secret" in hub.tokens
    hub.fetched.clear()
    load_model(NAME)  # from the cache, where the Hub says that nothing has changed
    assert not hub.fetched


def test_a_revision_is_a_branch_or_a_commit(hub, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 3}), encoding="utf-8")
    hub.others[NAME] = other
    layers = [load_model(name).num_layers for name in (NAME, f"{NAME}@other", f"{NAME}@{commit_of(NAME, 'main')}")]
    assert layers == [2, 3, 2]
    refused(f"{NAME}@third", f"{NAME}@third", "branch, tag or commit")


def test_a_folder_of_that_name_counts_first(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = tmp_path / NAME
    here.mkdir(parents=True)
    (here / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 5}), encoding="utf-8")
    assert load_model(NAME).num_layers == 5
    assert not hub.fetched


def test_models_that_cannot_be_had(hub, monkeypatch):
    refused("some-lab/none", "'some-lab/none'", "folder here, or a model on the Hub", "HF_TOKEN")
    hub.gated.add(NAME)
    refused(NAME, "gated", f"{hub.url}/{NAME}")
    hub.gated.clear()
    (hub.repositories[NAME] / "config.json").unlink()
    refused(NAME, "must have a config.json on the Hub")
    refused("some-lab/name--with..", "must be a name that the Hub allows")
    ask_at("http://127.0.0.1:9", monkeypatch)  # where nobody listens
    refused("some-lab/other", "does not answer", "network")


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    load_model(NAME)
    monkeypatch.setattr("hrm.hub._ANSWERS_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        assert load_model(NAME).num_experts == 4, "the cache has it"
        refused("some-lab/other", "must be in", "the Hub does not answer", "check the network")


def test_offline_only_the_cache_counts(hub, monkeypatch):
    load_model(NAME)
    hub.fetched.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_model(NAME).num_layers == 2
    assert not hub.fetched
    refused("some-lab/other", "HF_HUB_OFFLINE is set", "cache")


def test_a_full_disk(hub, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    refused(NAME, "must fit the disk", "what is there is kept")


def test_the_command_line_asks_the_endpoint_of_the_environment(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "hrm", "models", NAME]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "Mixtral-8x7B.v0" in process.stdout
    assert (tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}").is_dir()
