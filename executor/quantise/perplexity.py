"""How well a model predicts texts, run by the executor itself: each token is forced, and its probability told."""

from collections.abc import Iterator, Sequence
from math import fsum
from pathlib import Path
from typing import Final

from executor.batching import Batcher, Request
from executor.checkpoint import Checkpoint
from executor.checks import check_request
from executor.errors import JobError, RunError
from executor.families import family_for
from executor.generate import Generator
from executor.guard import told_as
from executor.job.input_file import check_input
from executor.job.machine import AcceleratorOptions, prepare
from executor.job.requests import LineReader, Rejected
from executor.job.room import AnswerRoom
from executor.job.tokenizer import TextTokenizer, missing_tokenizer
from executor.quantise.report import Perplexity
from executor.sampling import SamplingParams
from executor.weight_pages import StoredWeights
from hrm.files import read_regular
from hrm.formats import FORMATS
from hrm.machines import load_host, with_memory, without_gpus
from hrm.model_spec import ModelSpec, decoder_keys
from hrm.policy_file import PolicyFile, policy_file_of
from hrm.profiling.environment import available_ram_bytes
from hrm.search import Space, search
from hrm.workload import Workload

PROMPTS: Final = "--prompts"
WINDOW_TOKENS: Final = 512  # of a text that is predicted as one
HOST: Final = "generic-workstation"  # to solve policies for: how fast it is does not matter here
MEMORY_SHARE: Final = 0.8  # of what is available
Tokens = tuple[int, ...]


def texts_of(path: Path, model: Path) -> list[Tokens]:
    """The texts of a file in a model's tokens: prompts of a job's lines (.jsonl), or one text, cut into windows.

    Raises HrmError if they cannot be read, a line is no request, or there is nothing to predict.
    """
    texts = list(_prompts(path, model) if path.suffix == ".jsonl" else _windows(path, model))
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise JobError(f"{PROMPTS}: {path}", "<no tokens to predict>", "must have texts of two or more", "add some")
    return texts


def _prompts(path: Path, model: Path) -> Iterator[Tokens]:
    check_input(path)
    room = AnswerRoom(share_tokens=1, gen_len=1, most_tokens=1)
    for item in LineReader(model, room, tell=lambda _: None).read(path):
        if isinstance(item, Rejected):
            raise JobError(f"{PROMPTS}: {item.name}", "<rejected>", f"must be a request: {item.message}", "correct it")
        yield item.prompt


def _windows(path: Path, model: Path) -> Iterator[Tokens]:
    """Each begins with what the tokenizer puts before a text."""
    tokenizer = TextTokenizer.of_checkpoint(model)
    if tokenizer is None:
        raise JobError(f"{PROMPTS}: {path}", "<a text>", "needs the model's tokenizer", missing_tokenizer(model))
    content = read_regular(path, "a readable text file, or JSON lines named .jsonl", JobError)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise JobError(f"{PROMPTS}: {path}", f"<{error.reason}>", "must be text in UTF-8", "convert it") from error
    with told_as(JobError, f"{PROMPTS}: {path}", "must be what the model's tokenizer takes", "shorten or correct it"):
        plain, whole = (tokenizer.encode(text, add_special_tokens=special) for special in (False, True))
    before = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else ()
    size = WINDOW_TOKENS - len(before)
    for start in range(0, len(plain), size):
        yield before + plain[start : start + size]


def perplexity(model: Path, texts: Sequence[Tokens], *, kv_format: str = "") -> Perplexity:
    """That of a checkpoint on texts of two tokens or more, of which each first token is only read.

    It runs in this machine's memory, in the dtype that its config names, with its KV cache in `kv_format` if that is
    not the same. Raises HrmError if it cannot be run or does not fit.
    """
    with Checkpoint.open(model) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        planned = _planned(checkpoint, arch.spec, texts, kv_format)
        prepared = prepare(AcceleratorOptions(name="cpu"), planned, planned.policy)
        requests = [_forced(index, text) for index, text in enumerate(texts)]
        for request in requests:
            check_request(request, arch, planned.policy)
        made = Generator(prepared, arch, StoredWeights(checkpoint, family), max_spans=0)
    found = Perplexity()
    with made:
        for index, batch in enumerate(Batcher(iter(requests), planned.policy)):
            for completion in made.generate(batch, index=index).completions:
                if completion.error is not None:
                    raise RunError(
                        f"{model}: {completion.request.name}", "<failed>", completion.error, "check the model"
                    )
                logprobs = completion.logprobs
                found = Perplexity(found.nats - fsum(logprobs), found.tokens + len(logprobs))
    return found


def _forced(index: int, text: Tokens) -> Request:
    """A request that is given the first token, and goes on with the others."""
    params = SamplingParams(max_tokens=len(text) - 1, temperature=0, ignore_eos=True, logprobs=True, forced=text[1:])
    return Request(f"text {index + 1}", text[:1], params)


def _planned(checkpoint: Checkpoint, spec: ModelSpec, texts: Sequence[Tokens], kv_format: str) -> PolicyFile:
    """A policy for the texts in this machine's memory; how fast a machine it is solved for makes no difference."""
    keys = decoder_keys(checkpoint.config, checkpoint.config_path)
    dtype = next((keys.get(key) for key in ("dtype", "torch_dtype") if keys.get(key) in FORMATS), "bfloat16")
    profile = with_memory(without_gpus(load_host(HOST)), cpu_memory_bytes=MEMORY_SHARE * available_ram_bytes())
    longest = max(map(len, texts))
    workload = Workload(name="perplexity", prompt_len=1, max_prompt_len=1, gen_len=longest - 1, num_requests=len(texts))
    found = search(Space(spec, profile, workload, dtype=dtype, kv_format=kv_format))
    return policy_file_of(found.require(), spec, profile, workload)
