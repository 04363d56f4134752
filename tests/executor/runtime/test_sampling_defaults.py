"""What requests that do not say are sampled with: the checkpoint's generation_config.json."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from executor.errors import CheckpointError
from executor.job.sampling_defaults import SamplingDefaults
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, refused, run_words, tokens_of
from tests.executor.tiny_models import edit_json, transformers_greedy

SETTINGS = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.05}


def defaults_of(tmp_path, settings) -> SamplingDefaults:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    return SamplingDefaults.of("model", tmp_path)


@pytest.mark.parametrize(
    ("settings", "values", "left_out"),
    [
        ({}, {}, {}),
        ({"_from_model_config": True, "eos_token_id": [2, 7]}, {}, {}),
        ({"do_sample": True}, {}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.8}, {"temperature": 0}, {}),
        ({"temperature": 1.0, "top_p": 1, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}, {}, {}),
        ({"top_k": -1}, {}, {}),
        ({"temperature": 0.6, "min_p": 0.05}, {"temperature": 0.6, "min_p": 0.05}, {}),
        (SETTINGS, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.05}),
    ],
)
def test_settings_of_a_checkpoint(settings, values, left_out, tmp_path):
    found = defaults_of(tmp_path, settings)
    assert (dict(found.values), dict(found.left_out)) == (values, left_out)
    assert SamplingDefaults.of("openai", tmp_path) == SamplingDefaults()


def test_checkpoint_without_settings(tmp_path):
    assert SamplingDefaults.of("model", tmp_path) == SamplingDefaults()


@pytest.mark.parametrize(("key", "value"), [("temperature", "hot"), ("top_k", 2.5), ("top_p", 0), ("min_p", [1])])
def test_impossible_settings_are_refused_by_name(key, value, tmp_path):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {key} is .* must be"):
        defaults_of(tmp_path, {key: value})


@pytest.fixture
def folder(tiny_folders, tmp_path):
    path = shutil.copytree(tiny_folders["wide heads"], tmp_path / "model")
    edit_json(path / "generation_config.json", **SETTINGS)
    return path


def test_requests_that_do_not_say_get_the_models_and_are_told_once(run, folder, policy_path, tmp_path, capsys):
    lines = [line(f"r{i}", prompt, temperature=None, seed=i) for i, prompt in enumerate(PROMPTS[:4])]
    own = [line(f"own{i}", PROMPTS[i], temperature=1, top_k=-1, top_p=1, seed=i) for i in range(4)]
    captured, done = run([*lines, *own, line("greedy", PROMPTS[0])])
    assert captured.err.count("where requests do not say, generation_config.json does: temperature 0.7") == 1
    assert captured.err.count("repetition_penalty 1.05") == 1
    assert "sampling     temperature 0.7, top_p 0.9, top_k 5 where requests do not say" in captured.out
    assert tokens_of(done["greedy"]) == transformers_greedy(folder, PROMPTS[0], 5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["sampling_defaults"] == {"temperature": 0.7, "top_p": 0.9, "top_k": 5}
    said = [line(f"r{i}", prompt, temperature=0.7, top_k=5, top_p=0.9, seed=i) for i, prompt in enumerate(PROMPTS[:4])]
    shutil.rmtree(tmp_path / "run")
    _, same = run(said)
    assert [tokens_of(same[f"r{i}"]) for i in range(4)] == [tokens_of(done[f"r{i}"]) for i in range(4)]
    shutil.rmtree(tmp_path / "run")
    captured, plain = run(lines, "--sampling-defaults", "openai")
    assert [tokens_of(plain[f"r{i}"]) for i in range(4)] == [tokens_of(done[f"own{i}"]) for i in range(4)]
    assert "generation_config" not in captured.err
    capsys.readouterr()
    arguments = run_words(folder, policy_path, tmp_path / "prompts.jsonl", tmp_path / "run", "--resume")
    assert exit_code(arguments) == 2
    refused(capsys.readouterr(), "--sampling-defaults", "temperature 0.7", "openai")


def test_jobs_that_say_all_are_told_nothing(run, folder):
    edit_json(folder / "generation_config.json", repetition_penalty=None)
    captured, _ = run([line("a", PROMPTS[0]), line("b", PROMPTS[1], temperature=0.5, top_p=1, top_k=0)])
    assert "generation_config" not in captured.err


def test_end_of_text_of_the_tokenizer_ends_answers_too(run, folder):
    """config.json and generation_config.json of base models do not name what ends a chat's turn."""
    tokens = transformers_greedy(folder, PROMPTS[0], 6)
    ends = next(token for token in tokens[1:] if token != tokens[0])
    edit_json(folder / "generation_config.json", **dict.fromkeys(SETTINGS), eos_token_id=[96, 95])
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": f"w{ends}"}}))
    _, done = run([line("a", PROMPTS[0], max_tokens=6), line("b", PROMPTS[0], max_tokens=6, ignore_eos=True)])
    assert tokens_of(done["a"]) == tokens[: tokens.index(ends) + 1]
    assert tokens_of(done["b"])[: len(tokens)] == tokens
    choice = done["a"]["response"]["body"]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert f"w{ends}" not in choice["text"].split()
