"""The demo model's text: chapters, the passages they are cut into, tokenizer and prompts."""

import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from hrm.files import write_whole

TEXT_SOURCE = "King James Bible, Debian package bible-kjv-text 4.38"
HELD_OUT_EVERY = 50  # chapters
PASSAGE_CHARS = (100, 200, 400, 800)
SENTENCE_END = (".", "?", "!")
VOCAB_SIZE = 2048
MAX_POSITIONS = 1024
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
NUM_PROMPTS, MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 128, 4, 160

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": UNK,
    "model_max_length": MAX_POSITIONS,
    "clean_up_tokenization_spaces": False,
}


def read_chapters(path: Path) -> list[list[str]]:
    """Verses by chapter, from lines such as `Ge1:1 In the beginning ...`."""
    verses = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        match = re.fullmatch(r"(\d?[A-Za-z]+\d+):\d+ (.+)", line)
        if match is None:
            raise ValueError(
                f"{path}:{number}: a line must read `Book1:1 verse`, got {line[:40]!r}; "
                "executor/demo/README.md has the command that writes this file"
            )
        verses.append(match)
    chapters = itertools.groupby(verses, key=lambda verse: verse[1])
    return [[verse[2].strip() for verse in chapter] for _, chapter in chapters]


def split(chapters: Sequence[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Training chapters and held-out chapters."""
    train, held_out = [], []
    for number, chapter in enumerate(chapters, start=1):
        (train if number % HELD_OUT_EVERY else held_out).append(chapter)
    return train, held_out


def cut_passages(chapters: Sequence[list[str]], rng: random.Random) -> list[str]:
    """Runs of whole verses, each closed by a sentence end after a length drawn per passage.

    `encode` closes a passage with `</s>`, so a model learns to stop at sentence ends, the more
    likely the longer the passage.
    """
    passages = []
    for verses in chapters:
        passage, min_chars = "", rng.choice(PASSAGE_CHARS)
        for verse in verses:
            passage = f"{passage} {verse}" if passage else verse
            if len(passage) >= min_chars and passage.endswith(SENTENCE_END):
                passages.append(passage)
                passage, min_chars = "", rng.choice(PASSAGE_CHARS)
        if passage:
            passages.append(passage)
    return passages


def train_tokenizer(chapters: Sequence[list[str]]) -> tokenizers.Tokenizer:
    """Byte-level BPE that puts `<s>` before what it encodes."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (" ".join(verses) for verses in chapters),
        tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[UNK, BOS, EOS],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, passages: Sequence[str]) -> list[list[int]]:
    """Token ids of each passage, from `<s>` to `</s>`."""
    return [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(passages)]


def cut_prompt(tokenizer: tokenizers.Tokenizer, passage: str, min_tokens: int) -> str | None:
    """The fewest whole words of `passage` that make `min_tokens`, or None if all are needed."""
    words = passage.split(" ")
    for num_words in range(1, len(words)):
        prompt = " ".join(words[:num_words])
        if len(tokenizer.encode(prompt).ids) >= min_tokens:
            return prompt
    return None


def write_prompts(text: Path, model_dir: Path, path: Path) -> None:
    """Beginnings of held-out passages as an OpenAI batch file; many are short, few are long."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    _, held_out = split(read_chapters(text))
    rng = random.Random(0)
    passages = cut_passages(held_out, rng)
    rng.shuffle(passages)
    lengths = [
        min(MAX_PROMPT_TOKENS, max(MIN_PROMPT_TOKENS, round(rng.lognormvariate(math.log(20), 0.9))))
        for _ in range(NUM_PROMPTS)
    ]
    prompts = {}
    for index in sorted(range(NUM_PROMPTS), key=lambda i: -lengths[i]):  # few passages are long
        cuts = ((p, cut_prompt(tokenizer, p, lengths[index])) for p in passages)
        passage, prompts[index] = next((p, prompt) for p, prompt in cuts if prompt)
        passages.remove(passage)
    lines: list[str] = []
    for index in range(NUM_PROMPTS):
        body = {"model": "demo", "prompt": prompts[index], "max_tokens": 32, "temperature": 0}
        request = {"custom_id": f"demo-{index:03}", "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps(request | {"body": body}) + "\n")
    write_whole(path, "".join(lines))
