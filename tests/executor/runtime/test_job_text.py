"""Jobs of texts: what is told before weights are loaded, defaults, stops and windows."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from executor.job.trace_file import TraceFile
from hrm.policy_file import load_policy_file, save_policy_file
from tests.executor.runtime.jobs import PROMPTS, line, outputs, refused, run_words, tokens_of
from tests.executor.tiny_models import edit_json, transformers_greedy, transformers_logits

DATA = Path(__file__).parents[1] / "data"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A checkpoint with a tokenizer of 97 words, `w0` to `w96`, that writes spaces before them."""
    path = shutil.copytree(tiny_folders["wide heads"], tmp_path / "model")
    made = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(97)}, unk_token="▁w0"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["▁w2"])
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture
def no_weights(monkeypatch):
    """Fails whatever goes as far as to load weights."""

    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("executor.job.model_part.Generator", load)


def words(tokens) -> str:
    return " ".join(f"w{token}" for token in tokens)


def chat(name, *contents, **body) -> dict:
    messages = [{"role": "user", "content": content} for content in contents]
    url = "/v1/chat/completions"
    return {"custom_id": name, "url": url, "body": {"messages": messages, "temperature": 0, **body}}


def choice_of(item) -> dict:
    assert item["error"] is None, item
    return item["response"]["body"]["choices"][0]


# -- defaults ---------------------------------------------------------------------------------


def test_chat_without_max_tokens(run, folder):
    captured, done = run(
        [
            chat("open", words(PROMPTS[0])),
            chat("null", words(PROMPTS[1]), max_tokens=None),
            chat("given", words(PROMPTS[2]), max_tokens=3),
            line("default", words(PROMPTS[3]), max_tokens=None),
        ]
    )
    share = 256 // 2
    for name, prompt, most in (
        ("open", PROMPTS[0], share - len(PROMPTS[0])),
        ("null", PROMPTS[1], share - len(PROMPTS[1])),
        ("given", PROMPTS[2], 3),
        ("default", PROMPTS[3], 16),
    ):
        assert tokens_of(done[name]) == transformers_greedy(folder, prompt, most), name
    assert captured.err.count("without max_tokens") == 1
    assert f"{share} tokens" in captured.err
    assert "hrm search" not in captured.err  # which is for those who ask for more


def test_fields_that_change_nothing(run, folder):
    lines = [json.loads(text) for text in (DATA / "neutral_fields.jsonl").read_text().splitlines()]
    for item in lines:
        prompt = words(PROMPTS[0])
        item["body"]["prompt"] = [prompt] if isinstance(item["body"]["prompt"], list) else prompt
    _, done = run(lines)
    expected = transformers_greedy(folder, PROMPTS[0], 8)
    assert len(choice_of(done["n3"])["logprobs"]["token_logprobs"]) == len(expected)
    assert choice_of(done["n1"])["logprobs"] is None
    for item in done.values():
        assert tokens_of(item) == expected


@pytest.mark.parametrize("accelerator", ["cpu", "emulated"])
def test_log_probabilities_are_those_of_transformers(run, folder, accelerator):
    """Of the model's distribution, whatever the temperature, and of those that ask alone."""
    bodies = [{"temperature": 0}, {"temperature": 1.5, "seed": 3}]
    asked = [line(f"a{i}", words(PROMPTS[i]), logprobs=0, **b) for i, b in enumerate(bodies)]
    asked += [chat("c", words(PROMPTS[2]), max_tokens=5, logprobs=True), line("d", [3])]
    _, done = run(asked, "--accelerator", accelerator)
    for name, prompt in (("a0", PROMPTS[0]), ("a1", PROMPTS[1]), ("c", PROMPTS[2])):
        choice = choice_of(done[name])
        tokens, told = choice["token_ids"], choice["logprobs"]
        logits = transformers_logits(folder, [*prompt, *tokens])[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()
        if name == "c":
            told = {key: [item[key] for item in told["content"]] for key in ("token", "logprob")}
            assert told["logprob"] == pytest.approx(expected, abs=1e-4)
            assert "".join(told["token"]) == choice["message"]["content"]
        else:
            assert told["token_logprobs"] == pytest.approx(expected, abs=1e-4)
            assert "".join(told["tokens"]) == choice["text"]
            for text, offset in zip(told["tokens"], told["text_offset"], strict=True):
                assert choice["text"][offset:].startswith(text)
    assert choice_of(done["d"])["logprobs"] is None


def test_text_continues_the_prompt_and_stops_with_its_space(run, folder):
    expected = transformers_greedy(folder, PROMPTS[4], 12)
    third = f" w{expected[2]}"
    _, done = run(
        [line("whole", words(PROMPTS[4]), max_tokens=12), line("stopped", words(PROMPTS[4]), max_tokens=12, stop=third)]
    )
    text = choice_of(done["whole"])["text"]
    assert text == "".join(f" w{token}" for token in expected if token != 2)
    stopped = choice_of(done["stopped"])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(third)]
    assert len(stopped["token_ids"]) == 1 + expected.index(expected[2])


def test_special_token_as_stop_text(run, folder):
    expected = transformers_greedy(folder, PROMPTS[4], 12)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens([f"▁w{expected[3]}"])
    made.save(str(folder / "tokenizer.json"))
    _, done = run([line("a", words(PROMPTS[4]), max_tokens=12, stop=[f"▁w{expected[3]}"])])
    end = expected.index(expected[3])
    assert choice_of(done["a"])["token_ids"] == expected[: end + 1]
    assert choice_of(done["a"])["text"] == "".join(f" w{token}" for token in expected[:end])


def test_parts_of_a_message(run, folder):
    parts = [{"type": "text", "text": words(part)} for part in (PROMPTS[0], PROMPTS[1])]
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    _, done = run([chat("text", parts, max_tokens=4), chat("image", [image], max_tokens=4)])
    assert tokens_of(done["text"]) == transformers_greedy(folder, PROMPTS[0] + PROMPTS[1], 4)
    assert "image_url" in done["image"]["error"]["message"]


# -- told before weights are loaded -----------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words_"),
    [
        (gzip.compress(b'{"custom_id": "a"}\n', mtime=0), ["gzip", "gunzip"]),
        (json.dumps([line("a", [3])]).encode(), ["JSON array", "jq"]),
        (json.dumps(line("a", [3])).encode("utf-16"), ["UTF-16", "iconv"]),
        (b"", ["no lines"]),
    ],
)
def test_input_of_another_form(run, no_weights, tmp_path, content, words_):
    captured, done = run([content], code=2)
    refused(captured, "--input", *words_)
    assert not done
    assert not (tmp_path / "run").exists()


def test_nothing_to_run_is_no_success(run, no_weights, tmp_path):
    lines = [line("a", [97]), b"{nope", line("c", "", n=2), *[line(f"d{i}", []) for i in range(9)]]
    captured, done = run(lines, code=2)
    refused(captured, "12 requests", "0 to 96", "JSON object", "body: n", "--resume")
    assert len(done) == 12
    assert all(item["error"] for item in done.values())
    _, after = run([line("a", [96])], code=2, output="run")  # the directory holds outputs
    assert after == done


def test_nothing_to_run_can_be_put_right(run):
    run([line("a", [97])], code=2)
    _, done = run([line("a", [96])], "--resume")
    assert len(tokens_of(done["a"])) > 0


def test_something_to_run_is_a_success(run):
    _, done = run([line("a", [97]), line("b", [3])])
    assert done["a"]["error"]
    assert tokens_of(done["b"])


def test_no_answer_is_no_success(run, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    captured, done = run([line("a", [3]), line("b", [4])], "--quiet", code=2)
    refused(captured, "2 errors, no answer", "not finite", "--resume")
    assert {item["error"]["code"] for item in done.values()} == {"request_failed"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "failed"


def test_folder_without_a_tokenizer(run, no_weights, folder):
    (folder / "tokenizer.json").rename(folder / "tekken.json")
    captured, _ = run([line("a", "w3"), chat("b", "w3")], code=2)
    refused(captured, "tokenizer.json", "tekken.json", "AutoTokenizer")


def test_folder_with_a_broken_tokenizer(run, no_weights, folder, tmp_path):
    (folder / "tokenizer.json").write_text("{")
    captured, _ = run([line("a", "w3")], code=2)
    refused(captured, "tokenizer.json", "must be a tokenizer")
    assert not (tmp_path / "run").exists()


def test_chat_lines_of_a_model_with_a_broken_template(run, folder):
    (folder / "chat_template.jinja").write_text("{% if")
    captured, done = run([chat("a", "w3")], code=2)
    refused(captured, "chat_template.jinja", "jinja template")
    _, done = run([chat("a", "w3"), line("b", [3])], output="other")
    assert "chat_template.jinja" in done["a"]["error"]["message"]
    assert tokens_of(done["b"])


@pytest.mark.parametrize("method", ["hqq", "bitsandbytes"])
def test_quantised_checkpoint(run, no_weights, folder, method):
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    captured, _ = run([line("a", [3])], code=2)
    refused(captured, "quantization_config", method, "quantised")


# -- windows ----------------------------------------------------------------------------------


def test_requests_beyond_a_sliding_window(run, folder, policy_path):
    edit_json(folder / "config.json", sliding_window=30)
    content = load_policy_file(policy_path)
    model = content.model.with_layers(layer.with_window(30) for layer in content.model.layers)
    save_policy_file(policy_path, replace(content, model=model))
    prompts = [[3 + i] * 25 for i in range(3)]
    _, done = run([line(str(i), prompt, max_tokens=12) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert tokens_of(done[str(i)]) == transformers_greedy(folder, prompt, 12)


# -- disks and streams that fail --------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2])
def test_disk_filled_by_the_trace_does_not_stop_the_job(run, tmp_path, monkeypatch, after):
    append, calls = TraceFile._append, []

    def fill(self, text):
        calls.append(text)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, text)

    monkeypatch.setattr(TraceFile, "_append", fill)
    captured, done = run([line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)])
    assert len(done) == len(PROMPTS)
    assert all(tokens_of(item) for item in done.values())
    assert captured.err.count("the trace is given up") == 1
    assert "No space left" in captured.err
    assert "trace.json" not in captured.out
    assert not list((tmp_path / "run").glob("trace*"))
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["outcome"] == "completed"
    assert content["trace"]["spans"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["pipes without a reader", "closed"])
def test_closed_streams_do_not_stop_a_job(folder, policy_path, tmp_path, how):
    """A chat line, so that something is told on the way."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(chat("a", words(PROMPTS[0]))))
    code = "import sys; from executor.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *run_words(folder, policy_path, path, tmp_path / "run")]
    if how == "closed":
        command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, check=False, stdout=write_end, stderr=write_end)
    os.close(write_end)
    assert done.returncode == 0
    assert len(tokens_of(outputs(tmp_path / "run")["a"])) > 0
    assert (tmp_path / "run" / "run.json").exists()
