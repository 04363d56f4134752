"""Checkpoints from the Hub: all that a run needs and nothing else, fetched once, in as many tries as it takes."""

import json
import os
import signal
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from executor.bench.plan import BenchOptions, model_of
from executor.checkpoint import Checkpoint
from executor.download import locate
from executor.errors import CheckpointError
from executor.families import family_for
from hrm.errors import ModelError
from tests.contracts.fake_hub import fake_hub
from tests.executor.runtime.jobs import PROMPTS, line, refused, tokens_of
from tests.executor.tiny_models import edit_json, save_tiny

NAME = "some-lab/tiny-mixtral"
UNWANTED = (
    "README.md",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "original/model-00001.safetensors",
    "onnx/model.onnx",
)
WANTED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja")


@pytest.fixture(params=["60KB", "50GB"])
def hub(request, tmp_path, monkeypatch):
    folder = save_tiny("wide heads", tmp_path / "theirs", max_shard_size=request.param)
    for name in (*UNWANTED, *WANTED):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"of": name}), encoding="utf-8")
    with fake_hub(tmp_path / "cache", monkeypatch) as made:
        made.repositories[NAME] = folder
        yield made


def opened(located):
    with Checkpoint.open(located.folder, located.name) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        return arch


def test_what_is_needed_is_fetched_once(hub, monkeypatch):
    told: list[tuple[int, int]] = []
    located = locate(NAME, progress=lambda *bytes_of: told.append(bytes_of))
    assert located.name == NAME
    weights = sum(file.stat().st_size for file in located.folder.glob("*.safetensors"))
    assert told[-1] == (weights, weights)
    assert sorted(told) == told
    assert opened(located).spec.name == "tiny-mixtral"
    theirs = {file.relative_to(hub.repositories[NAME]).as_posix() for file in hub.repositories[NAME].rglob("*.*")}
    assert hub.names == theirs - set(UNWANTED)
    hub.fetched.clear()
    assert locate(NAME) == located
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(NAME) == located
    assert not hub.fetched


def test_what_was_cut_short_goes_on_where_it_ended(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # less than that of a file is not kept
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # a second before each new try
    hub.broken_after = 10_000
    opened(locate(NAME))
    assert hub.broken
    assert {(name, 10_000) for name in hub.broken} <= set(hub.fetched)


def test_an_interrupt_does_not_wait_for_the_files_under_way(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    ended = threading.Event()
    held, let_go = list[int](), list[bool]()

    def progress(done_bytes, _):
        if not ended.is_set():
            held.append(done_bytes)
            if len(held) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            let_go.append(ended.wait(60))

    with pytest.raises(KeyboardInterrupt):
        locate(NAME, progress=progress)
    assert held
    assert not let_go, "it came when files had waited for a minute"
    ended.set()
    opened(locate(NAME))  # what is left is fetched now


def test_weights_that_cannot_be_run_are_not_fetched(hub):
    config = hub.repositories[NAME] / "config.json"
    edit_json(config, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=f"{NAME}/config.json: quantization_config: quant_method is .bitsandbytes"):
        locate(NAME)
    config.write_text(json.dumps({"model_type": "none"}), encoding="utf-8")
    assert not any(name.endswith(".safetensors") for name in hub.names)


def test_a_snapshot_without_its_weights_offline(hub, monkeypatch):
    """As a plan leaves it, which fetches the config alone."""
    from hrm.model_spec import load_model

    load_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"weights is <missing>: must be in model\.safetensors"):
        opened(locate(NAME))


def test_a_benchmark_of_a_model_on_the_hub(hub):
    with ExitStack() as stack:
        (_, source, arch), _ = model_of(BenchOptions(model=NAME, num_layers=2), stack)
        assert (arch.spec.name, arch.spec.num_layers) == ("tiny-mixtral", 2)
        assert "model.embed_tokens.weight" in source.names


def test_revision_goes_with_names_on_the_hub(hub, tmp_path):
    assert locate(NAME, "main").name == f"{NAME}@main"
    for model in (f"{NAME}@main", str(tmp_path)):
        with pytest.raises(ModelError, match="--revision is 'main'"):
            locate(model, "main")


def test_a_job_of_a_model_on_the_hub(hub, run, folder, tmp_path):
    """Answers are those of the folder, and what was run is called as it was asked for."""
    (hub.repositories[NAME] / "tokenizer.json").unlink()
    lines = [line("a", PROMPTS[0])]
    wanted = tokens_of(run(lines, output="plain")[1]["a"])
    captured, done = run(lines, "--revision", "main", model=NAME)
    assert tokens_of(done["a"]) == wanted
    assert done["a"]["response"]["body"]["model"] == "tiny-mixtral"
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["model"]["folder"] == f"{NAME}@main"
    captured, _ = run(lines, model="some-lab/none", output="other", code=2)
    refused(captured, "--model is 'some-lab/none'", "folder here, or a model on the Hub")
