"""What a run of the peers' benchmark is told: engines, models, rows, and the two sizes it comes in."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hrm.errors import HrmError, closest
from tests.bench.reference_checkpoint import CONFIG, NAME, cache_folder

OURS: Final = "ours"
TRANSFORMERS: Final = "transformers"
ROOFS: Final = "roofs"  # what the machine does at best in these minutes; takes turns as engines do
_DRIVERS: Final = "tests.bench.peers.drivers"
# Engines and the modules that run them; all but ours have a file of requirements.
DRIVERS: Final = {
    OURS: f"{_DRIVERS}.ours",
    "vllm": f"{_DRIVERS}.vllm_cpu",
    "openvino": f"{_DRIVERS}.openvino_batching",
    "llama": f"{_DRIVERS}.llama_batch",
    TRANSFORMERS: f"{_DRIVERS}.transformers_generate",
    ROOFS: f"{_DRIVERS}.roofs",
}
PEERS: Final = tuple(name for name in DRIVERS if name not in {OURS, ROOFS})
QWEN_CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
_SMALL: Final = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True, slots=True, order=True)
class Row:
    """So many requests of so many new tokens each."""

    requests: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.new_tokens}"

    @property
    def tokens(self) -> int:
        """New tokens in all."""
        return self.requests * self.new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Configs of the models by their short names, the folders they are kept in, the prompts' length and the rows."""

    name: str
    configs: dict[str, dict[str, Any]]
    folders: dict[str, str]
    prompt_len: int
    rows: tuple[Row, ...]


FULL: Final = Scale(
    name="full",
    configs={"mixtral": CONFIG, "qwen": QWEN_CONFIG},
    folders={"mixtral": NAME, "qwen": "qwen3-moe-1b-random"},
    prompt_len=64,
    rows=(Row(32, 32), Row(128, 16)),
)
SMALL: Final = Scale(
    name="small",
    configs={
        "mixtral": CONFIG | _SMALL | {"intermediate_size": 256, "num_local_experts": 4},
        "qwen": QWEN_CONFIG
        | _SMALL
        | {"intermediate_size": 256, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4},
    },
    folders={"mixtral": "mixtral-small-random", "qwen": "qwen3-moe-small-random"},
    prompt_len=16,
    rows=(Row(4, 4), Row(8, 3)),
)
SCALES: Final = {scale.name: scale for scale in (FULL, SMALL)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """All that is asked for; `out` is the folder of the turns and their logs."""

    scale: Scale
    peers: tuple[str, ...]
    models: tuple[str, ...]
    rows: tuple[Row, ...]
    repeats: int
    out: Path
    turn_minutes: float

    @property
    def engines(self) -> tuple[str, ...]:
        """Ours and the peers."""
        return (OURS, *self.peers)

    @property
    def small(self) -> bool:
        """Whether it is a rehearsal, whose figures say nothing."""
        return self.scale is not FULL

    def compared(self) -> dict[str, Any]:
        """What turns must share to be laid side by side."""
        return {
            "scale": self.scale.name,
            "prompt_len": self.scale.prompt_len,
            "rows": [str(row) for row in self.rows],
            "cpus": sorted(os.sched_getaffinity(0)),
        }


def peers_folder() -> Path:
    """Where environments, and what the peers make of checkpoints, are kept."""
    return cache_folder() / "peers"


def parse_names(text: str, known: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Names between commas, each once; all that are known for an empty text."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            near = closest(name, known)
            remedy = f"did you mean {near}?" if near else "correct it"
            raise HrmError(option, name, f"must be of {', '.join(known)}", remedy)
    return names or known


def parse_rows(text: str, usual: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows such as 32x32,128x16; the usual ones for an empty text."""
    rows: list[Row] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        requests, times, new = part.partition("x")
        if not (times and requests.isdecimal() and new.isdecimal() and int(requests) and int(new)):
            raise HrmError("--rows", part, "must be REQUESTSxNEW_TOKENS, both at least 1", "write 32x32,128x16")
        rows.append(Row(int(requests), int(new)))
    return tuple(dict.fromkeys(rows)) or usual
