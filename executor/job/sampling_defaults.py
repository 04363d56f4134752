"""How requests that do not say are sampled: by the checkpoint's generation_config.json, or as by OpenAI."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

from executor.checkpoint import DOWNLOAD_AGAIN, GENERATION_CONFIG_FILE
from executor.errors import CheckpointError, JobError
from executor.job.tokenizer_config import read_settings
from executor.sampling import SamplingParams

_APPLIED: Final = ("temperature", "top_p", "top_k", "min_p")
SamplingSource = Literal["model", "openai"]  # whose values apply where a request does not say
OPENAI: Final[SamplingSource] = "openai"
# What changes the answers of transformers and is not done here, and the values that change nothing.
_LEFT_OUT: Final[dict[str, tuple[Any, ...]]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "num_beams": (1,),
    "suppress_tokens": ([],),
    "bad_words_ids": ([],),
}


@final
@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Parameters by the names of `SamplingParams`, those of OpenAI's API left out.

    `left_out` are settings of the checkpoint that would change answers but are not done here.
    """

    values: Mapping[str, float] = field(default_factory=dict[str, float])
    left_out: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @staticmethod
    def of(source: SamplingSource, folder: Path) -> "SamplingDefaults":
        """What the folder's generation_config.json says; CheckpointError if a value of it is impossible.

        `do_sample: false` takes the most probable token. What it does not mention stays as by OpenAI.
        """
        path = folder / GENERATION_CONFIG_FILE
        settings = {} if source == OPENAI else read_settings(path)
        given: dict[str, Any] = {key: settings[key] for key in _APPLIED if settings.get(key) is not None}
        if settings.get("do_sample") is False:
            given = {"temperature": 0}
        try:
            SamplingParams(**given)
        except JobError as error:
            where = f"{path}: {error.where.removeprefix('body: ')}"
            raise CheckpointError(where, error.value, error.rule, DOWNLOAD_AGAIN) from error
        plain = SamplingParams()
        given |= {"top_k": max(given["top_k"], 0)} if "top_k" in given else {}  # -1 means all, too
        values = {key: value for key, value in given.items() if value != getattr(plain, key)}
        left_out = {
            key: settings[key]
            for key, neutral in _LEFT_OUT.items()
            if settings.get(key) is not None and settings[key] not in neutral
        }
        return SamplingDefaults(values, left_out)

    def __str__(self) -> str:
        """Names and values in a line; `openai` if there are none."""
        return ", ".join(f"{key} {value:g}" for key, value in self.values.items()) or OPENAI

    def decides(self, given: Mapping[str, Any]) -> bool:
        """Whether a request that gives those fields gets another answer by these defaults."""
        missing = self.values.keys() - given.keys()
        return bool(missing) and given.get("temperature") != 0

    @property
    def notice(self) -> str:
        """Says what applies where a request does not say."""
        return (
            f"where requests do not say, {GENERATION_CONFIG_FILE} does: {self};"
            f" --sampling-defaults {OPENAI} takes temperature 1 and all tokens"
        )

    @property
    def left_out_notice(self) -> str:
        """Says which settings are not followed."""
        settings = ", ".join(f"{key} {value}" for key, value in self.left_out.items())
        return f"{GENERATION_CONFIG_FILE} asks for {settings}, which is not done here: answers are without"
