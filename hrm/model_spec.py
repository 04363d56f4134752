"""A mixture-of-experts transformer by its dimensions, from which parameters and bytes follow."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from hrm.errors import ModelError
from hrm.numeric import Number
from hrm.units import DTYPE_BYTES

ROUTING_BYTES: Final = 12  # a token's routed expert: 8 bytes of index, 4 of weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Dimensions of a decoder whose every layer is attention followed by routed experts.

    `matrices_per_expert` is 3 for the gated FFN (w1, w2, w3) that all supported families use.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    tied_embeddings: bool = False
    matrices_per_expert: int = 3

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        for field in (
            "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads",
            "head_dim", "num_experts", "experts_per_token", "vocab_size",
        ):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"{self.name}: {field}", value, "must be a positive integer", "check the config"
                )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.name}: num_kv_heads", self.num_kv_heads,
                f"must divide num_heads {self.num_heads}", "check the config",
            )  # fmt: skip
        if self.experts_per_token > self.num_experts:
            raise ModelError(
                f"{self.name}: experts_per_token", self.experts_per_token,
                f"must be at most num_experts {self.num_experts}", "check the config",
            )  # fmt: skip

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_parameters(self) -> int:
        """Parameters of one layer's query, key and value projections."""
        return self.hidden_size * (self.query_size + 2 * self.kv_size)

    @property
    def output_parameters(self) -> int:
        """Parameters of one layer's attention output projection."""
        return self.query_size * self.hidden_size

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's router."""
        return self.hidden_size * self.num_experts

    @property
    def dense_parameters(self) -> int:
        """Parameters of one layer outside its experts: projections, router and two norms."""
        return (
            self.qkv_parameters
            + self.output_parameters
            + self.router_parameters
            + 2 * self.hidden_size
        )

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return self.matrices_per_expert * self.hidden_size * self.intermediate_size

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head with the final norm, whether or not tied to the embedding."""
        return self.embedding_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        per_layer = self.dense_parameters + self.num_experts * self.expert_parameters
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.num_layers * per_layer + embeddings + self.hidden_size

    @property
    def active_parameters(self) -> int:
        """Parameters one token touches: those of its routed experts and all that is dense."""
        idle = (self.num_experts - self.experts_per_token) * self.expert_parameters
        return self.parameters - self.num_layers * idle

    def layer_bytes(self, dtype: str) -> int:
        """Weight bytes of one layer."""
        return (self.dense_parameters + self.num_experts * self.expert_parameters) * DTYPE_BYTES[
            dtype
        ]

    def kv_bytes_per_token_layer(self, dtype: str) -> int:
        """KV cache bytes of one token in one layer."""
        return 2 * self.kv_size * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache bytes of one token in all layers."""
        return self.num_layers * self.kv_bytes_per_token_layer(dtype)

    def experts_hit(self, num_tokens: Number) -> Number:
        """Expected number of distinct experts that `num_tokens` reach under uniform routing."""
        miss = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.num_experts * (1 - miss)


# Dimensions as in the published config.json of each model.
BUILT_IN_MODELS: Final = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="mixtral-8x7b", family="mixtral", num_layers=32, hidden_size=4096,
            intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
            num_experts=8, experts_per_token=2, vocab_size=32000,
        ),
        ModelSpec(
            name="mixtral-8x22b", family="mixtral", num_layers=56, hidden_size=6144,
            intermediate_size=16384, num_heads=48, num_kv_heads=8, head_dim=128,
            num_experts=8, experts_per_token=2, vocab_size=32000,
        ),
        ModelSpec(
            name="dbrx", family="dbrx", num_layers=40, hidden_size=6144,
            intermediate_size=10752, num_heads=48, num_kv_heads=8, head_dim=128,
            num_experts=16, experts_per_token=4, vocab_size=100352,
        ),
    )
}  # fmt: skip


def load_model(model: str) -> ModelSpec:
    """Resolve a built-in name, a checkpoint folder or a `config.json` path.

    Raises ModelError if it is none of them or the config cannot be used.
    """
    if model in BUILT_IN_MODELS:
        return BUILT_IN_MODELS[model]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ModelError(
            "--model", model,
            f"must be one of {', '.join(BUILT_IN_MODELS)}, a folder with a config.json, or one",
            "check the name or path; `hrm models` lists the built-in ones",
        )  # fmt: skip
    return spec_from_hf_config(read_config(path), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(
            str(path), f"<{error}>", "must be a readable JSON file", "download the config again"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            str(path), f"<{type(config).__name__}>", "must hold a JSON object", "check the file"
        )
    return cast("dict[str, Any]", config)


def spec_from_hf_config(config: dict[str, Any], where: str) -> ModelSpec:
    """Read a Mixtral- or DBRX-shaped Hugging Face config.

    Returns the spec named after the config's folder. Raises ModelError naming `where` and the key
    if the architecture is unknown or a key is missing or no positive integer.
    """
    family = config.get("model_type")
    reader = _FAMILY_READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        raise ModelError(
            f"{where}: model_type", family, f"must be one of {', '.join(_FAMILY_READERS)}",
            "use a Mixtral- or DBRX-shaped model",
        )  # fmt: skip
    path = Path(where)
    name = path.parent.name if path.name == "config.json" else path.stem
    name = name or str(family)
    try:
        return reader(config, where, name)
    except ModelError as error:
        if error.where.startswith(where):
            raise
        field = error.where.removeprefix(f"{name}: ")
        raise ModelError(f"{where}: {field}", error.value, error.rule, error.remedy) from error


def _integer(config: dict[str, Any], where: str, *keys: str, default: int | None = None) -> int:
    key = next((k for k in keys if config.get(k) is not None), None)
    value = default if key is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = "<missing>" if value is None else value
        raise ModelError(
            f"{where}: {keys[0]}", shown, "must be a positive integer", "check the config.json"
        )
    return value


def _truth(config: dict[str, Any], where: str, key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise ModelError(f"{where}: {key}", value, "must be true or false", "check the config.json")
    return value


def _read_mixtral(config: dict[str, Any], where: str, name: str) -> ModelSpec:
    hidden_size = _integer(config, where, "hidden_size")
    num_heads = _integer(config, where, "num_attention_heads")
    return ModelSpec(
        name=name,
        family="mixtral",
        num_layers=_integer(config, where, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, where, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_integer(config, where, "num_key_value_heads", default=num_heads),
        head_dim=_integer(config, where, "head_dim", default=hidden_size // num_heads),
        num_experts=_integer(config, where, "num_local_experts", "num_experts"),
        experts_per_token=_integer(config, where, "num_experts_per_tok", "experts_per_token"),
        vocab_size=_integer(config, where, "vocab_size"),
        tied_embeddings=_truth(config, where, "tie_word_embeddings"),
    )


def _section(config: dict[str, Any], where: str, key: str) -> dict[str, Any]:
    section = config.get(key)
    if not isinstance(section, dict):
        raise ModelError(
            f"{where}: {key}", "<missing>" if section is None else section,
            "must be an object with the model's sizes", "check the config.json",
        )  # fmt: skip
    return cast("dict[str, Any]", section)


def _read_dbrx(config: dict[str, Any], where: str, name: str) -> ModelSpec:
    ffn = _section(config, where, "ffn_config")
    attention = _section(config, where, "attn_config")
    hidden_size = _integer(config, where, "d_model")
    num_heads = _integer(config, where, "n_heads")
    return ModelSpec(
        name=name,
        family="dbrx",
        num_layers=_integer(config, where, "n_layers"),
        hidden_size=hidden_size,
        intermediate_size=_integer(ffn, f"{where}: ffn_config", "ffn_hidden_size"),
        num_heads=num_heads,
        num_kv_heads=_integer(attention, f"{where}: attn_config", "kv_n_heads"),
        head_dim=hidden_size // num_heads,
        num_experts=_integer(ffn, f"{where}: ffn_config", "moe_num_experts"),
        experts_per_token=_integer(ffn, f"{where}: ffn_config", "moe_top_k"),
        vocab_size=_integer(config, where, "vocab_size"),
        tied_embeddings=_truth(config, where, "tie_word_embeddings"),
    )


_FAMILY_READERS: Final = {"mixtral": _read_mixtral, "dbrx": _read_dbrx}
