"""The reference checkpoint of the CPU benchmarks: Mixtral's shape at 1.1 B random parameters.

`python -m tests.bench.reference_checkpoint [FOLDER]` makes it; BENCH_CACHE names another folder to
keep it in, then XDG_CACHE_HOME.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from executor.checkpoint_files import INDEX_FILE
from executor.families import FAMILIES
from executor.random_weights import RandomWeights
from hrm.hub import CONFIG_FILE
from hrm.model_spec import ModelSpec, spec_from_hf_config

NAME: Final = "mixtral-1.1b-random"
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}


def cache_folder() -> Path:
    """Where benchmarks keep what is made once."""
    named = os.environ.get("BENCH_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    return Path(shared) / "moe-hrm" if shared else Path(__file__).with_name(".cache")


def reference_checkpoint(config: dict[str, Any] = CONFIG, folder: Path | None = None) -> Path:
    """The checkpoint's folder; it is made, whole or not at all, if it is not there yet."""
    folder = folder or cache_folder() / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write(config, partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        if folder.is_dir():  # another process was first
            return folder
        raise
    return folder


def _write(config: dict[str, Any], folder: Path) -> None:
    """One file for what lies outside the layers, and one a layer."""
    spec: ModelSpec = spec_from_hf_config(config, CONFIG_FILE)
    family = FAMILIES[spec.family]
    arch = family.architecture(config, CONFIG_FILE)
    everything = family.expected_tensors(arch)
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(spec.num_layers + 1)]
    for name, (shape, _) in everything.items():
        in_layer = re.match(r"model\.layers\.(\d+)\.", name)
        files[int(in_layer[1]) if in_layer else -1][name] = shape
    source, weight_map = RandomWeights(seed=0), dict[str, str]()
    for number, shapes in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
            source.read_into(name, tensors[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_parameters": spec.parameters}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    print(reference_checkpoint(folder=Path(sys.argv[1]) if len(sys.argv) > 1 else None))
