"""Perplexity by the executor against that by transformers, and which texts are measured."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from executor.demo import MODEL_DIR, PROMPTS
from executor.demo.formats import row
from executor.errors import CheckpointError, JobError
from executor.quantise import What
from executor.quantise.perplexity import WINDOW_TOKENS, perplexity, texts_of
from executor.sampling import SamplingParams, choose, log_probabilities
from hrm.errors import HrmError
from hrm.formats import SCALED_KV_FORMATS
from tests.executor.kv_reference import quantise_as
from tests.executor.tiny_models import edit_json, random_prompts, transformers_logits


def test_it_is_that_of_transformers(tiny_folders, tmp_path) -> None:
    folder = shutil.copytree(tiny_folders["wide heads"], tmp_path / "model")
    edit_json(folder / "config.json", dtype="float32")
    texts = [tuple(text) for text in random_prompts(7, longest=30, seed=3) if len(text) > 1]
    nats = 0.0
    for text in texts:
        logprobs = transformers_logits(folder, list(text)).log_softmax(-1)
        nats -= sum(logprobs[place, token].item() for place, token in enumerate(text[1:]))
    found = perplexity(folder, texts)
    assert found.tokens == sum(map(len, texts)) - len(texts)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.value == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)


@pytest.mark.parametrize("form", SCALED_KV_FORMATS)
def test_with_a_quantised_cache_it_is_that_of_transformers_with_one(form, tiny_folders, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(tiny_folders["wide heads"], tmp_path / "model")
    edit_json(folder / "config.json", dtype="float32")
    texts = [tuple(text) for text in random_prompts(4, longest=30, seed=3) if len(text) > 1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantise_as(form, model, monkeypatch)
    nats = 0.0
    for text in texts:
        with torch.inference_mode():
            logprobs = model(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        nats -= sum(logprobs[place, token].item() for place, token in enumerate(text[1:]))
    assert perplexity(folder, texts, kv_format=form).nats == pytest.approx(nats, rel=1e-4)
    assert perplexity(folder, texts).nats != pytest.approx(nats, rel=1e-4)


def test_forced_tokens_are_taken_whatever_is_probable() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, 1.0], [0.0, torch.nan, 1.0]])
    params = [SamplingParams(forced=(2, 0), temperature=temperature, max_tokens=3) for temperature in (0.0, 1.5, 0.0)]
    assert choose(logits, params, [0, 1, 0]) == [2, 0, -1]
    assert choose(logits[:1], params[:1], [2]) == [1]
    told = log_probabilities(logits, [2, 0], [0, 1])
    assert told == pytest.approx([logits[0].log_softmax(-1)[2].item(), logits[0].log_softmax(-1)[0].item()])


def test_a_text_is_cut_into_windows_and_each_begins_as_the_tokenizer_begins_texts(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 100)
    texts = texts_of(tmp_path / "text.txt", MODEL_DIR)
    assert len(texts) > 1
    assert {len(text) for text in texts[:-1]} == {WINDOW_TOKENS}
    assert {text[0] for text in texts} == {1}
    assert all(1 not in text[1:] for text in texts)


def test_prompts_of_a_job_are_texts(tmp_path) -> None:
    lines = [{"custom_id": str(n), "body": {"prompt": prompt}} for n, prompt in enumerate(["And God said", [5, 6, 7]])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = texts_of(tmp_path / "a.jsonl", MODEL_DIR)
    assert (first[0], second) == (1, (5, 6, 7))


@pytest.mark.parametrize(
    ("name", "content", "told", "error"),
    [
        ("a.txt", "", "no tokens", JobError),
        ("a.txt", b"\xff\xfe\x00", "UTF-8", JobError),
        ("a.jsonl", '{"custom_id": "a", "body": {}}\n', "prompt", JobError),
        ("a.jsonl", '{"custom_id": "a", "body": {"prompt": [5]}}\n', "no tokens", JobError),
        ("missing.txt", None, "No such file", JobError),
    ],
)
def test_files_without_texts_are_refused(tmp_path, name, content, told, error: type[HrmError]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=told):
        texts_of(path, MODEL_DIR)


def test_a_text_that_the_model_does_not_take_is_named(tiny_folders) -> None:
    with pytest.raises(JobError, match=r"text 2: prompt.*positions"):
        perplexity(tiny_folders["wide heads"], [(3, 4, 5), (3,) * 300])
    with pytest.raises(CheckpointError):
        perplexity(Path("nowhere"), [(3, 4)])


def test_a_folder_without_a_tokenizer_is_told(tiny_folders, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(JobError, match="tokenizer"):
        texts_of(tmp_path / "a.txt", tiny_folders["wide heads"])


def test_packing_the_demo_model_changes_little(monkeypatch) -> None:
    """By a row of the table in its README, on a few of the prompts."""
    texts = texts_of(PROMPTS, MODEL_DIR)[:12]
    before = perplexity(MODEL_DIR, texts).value
    name, _, bits, error, _, after, change = row("int4-g16", What.LINEAR, texts, before)
    assert (name, bits) == ("int4-g16", "5.00")
    assert 5 < float(error.removesuffix("%")) < 9
    assert after != f"{before:.2f}"
    assert abs(float(change.removesuffix("%"))) < 3
