"""Trains the demo model, measures it on held-out text and cuts the demo prompts.

    python -m executor.demo.train --text kjv.txt --output-dir DIR
    python -m executor.demo.train evaluate --text kjv.txt --output-dir DIR
    python -m executor.demo.train prompts --text kjv.txt --output-dir DIR --prompts FILE

README.md says how to get kjv.txt. The network is transformers' own MixtralForCausalLM; what is
written is bf16, its tensors named and its files laid out as those of Mixtral 8x7B.

Shape suffixes: B windows, S positions in a window, T tokens, E experts, V vocabulary.
"""

import argparse
import copy
import datetime
import hashlib
import itertools
import json
import math
import platform
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from executor.demo import MODEL_DIR, PROMPTS, corpus
from hrm.files import write_whole

NO_TARGET = -100  # cross_entropy's ignore_index

MODEL_CONFIG = {  # the keys of the published Mixtral 8x7B config.json
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": corpus.BOS_ID,
    "eos_token_id": corpus.EOS_ID,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "max_position_embeddings": corpus.MAX_POSITIONS,
    "model_type": "mixtral",
    "num_attention_heads": 6,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": corpus.VOCAB_SIZE,
}
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": corpus.BOS_ID,
    "eos_token_id": corpus.EOS_ID,
    "transformers_version": "4.36.0",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the weights were trained; written to training.json."""

    seed: int = 0
    num_steps: int = 2300
    windows_per_step: int = 16
    window_tokens: int = 256
    num_warmup_steps: int = 100
    peak_learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    load_balancing_coefficient: float = 0.02

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final rate."""
        if step < self.num_warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.num_warmup_steps
        progress = (step - self.num_warmup_steps) / (self.num_steps - self.num_warmup_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        span = self.peak_learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * cosine


def batches(tokenizer: tokenizers.Tokenizer, chapters: Sequence[list[str]], recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless [B, S + 1] token windows; passages are cut and shuffled anew in every epoch."""
    for epoch in itertools.count():
        rng = random.Random(f"{recipe.seed} {epoch}")
        passages = corpus.cut_passages(chapters, rng)
        rng.shuffle(passages)
        tokens = torch.tensor([token for ids in corpus.encode(tokenizer, passages) for token in ids])
        windows = tokens.unfold(0, recipe.window_tokens + 1, recipe.window_tokens)
        for first in range(0, len(windows) - recipe.windows_per_step + 1, recipe.windows_per_step):
            yield windows[first : first + recipe.windows_per_step]


# Training


def passage_mask(tokens_BS: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S] mask: true where a token may see another, earlier in the same passage."""
    passage_BS = (tokens_BS == corpus.BOS_ID).cumsum(1)
    same_BSS = passage_BS[:, :, None] == passage_BS[:, None, :]
    return same_BSS.tril()[:, None]


def load_balancing_loss(router_logits: Sequence[torch.Tensor], experts_per_token: int) -> torch.Tensor:
    """Mean over layers of the Switch Transformer's loss (arXiv 2101.03961, eq. 4); 1 if even."""
    losses = []
    for logits_TE in router_logits:
        num_tokens, num_experts = logits_TE.shape
        chosen = logits_TE.topk(experts_per_token).indices.flatten()
        share_E = chosen.bincount(minlength=num_experts) / (num_tokens * experts_per_token)
        losses.append(num_experts * (share_E * logits_TE.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def train_step(
    model: transformers.MixtralForCausalLM, optimizer: torch.optim.Optimizer, windows: torch.Tensor, recipe: Recipe
) -> tuple[float, float]:
    """Cross-entropy per token in nats and the load-balancing loss, before the update."""
    tokens_BS, targets_BS = windows[:, :-1], windows[:, 1:]
    targets_BS = targets_BS.masked_fill(targets_BS == corpus.BOS_ID, NO_TARGET)
    output = model.model(tokens_BS, attention_mask=passage_mask(tokens_BS), output_router_logits=True)
    logits_BSV = model.lm_head(output.last_hidden_state)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=NO_TARGET)
    balance = load_balancing_loss(output.router_logits, model.config.num_experts_per_tok)
    (loss + recipe.load_balancing_coefficient * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), balance.item()


def save(model: transformers.MixtralForCausalLM, tokenizer: tokenizers.Tokenizer, output_dir: Path) -> None:
    """Writes the checkpoint folder; a reader sees each file either old or new, never half."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as folder:
        staging = Path(folder)
        copy.deepcopy(model).bfloat16().save_pretrained(staging, max_shard_size="6MB")
        tokenizer.save(str(staging / "tokenizer.json"))
        write_json(staging / "tokenizer_config.json", corpus.TOKENIZER_CONFIG)
        write_json(staging / "config.json", MODEL_CONFIG)
        write_json(staging / "generation_config.json", GENERATION_CONFIG)
        for path in staging.iterdir():
            path.chmod(0o644)
            path.replace(output_dir / path.name)


def write_json(path: Path, value: object) -> None:
    """Writes `value` indented, ending in a newline."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Writes all that is needed to train on from here, as safetensors."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    save_file(tensors, path, metadata={"step": str(step), "seconds": str(seconds)})


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restores what `save_state` wrote; returns the steps done and the seconds they took."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            part, _, name = key.partition(".")
            if part == "model":
                weights[name] = file.get_tensor(key)
            else:
                index, _, moment = name.partition(".")
                moments.setdefault(int(index), {})[moment] = file.get_tensor(key)
        metadata = file.metadata()
    model.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(metadata["step"]), float(metadata["seconds"])


def train(args: argparse.Namespace, recipe: Recipe) -> None:
    """Trains, saves, evaluates what was saved, and writes training.json beside it."""
    torch.manual_seed(recipe.seed)
    chapters, _ = corpus.split(corpus.read_chapters(args.text))
    tokenizer = corpus.train_tokenizer(chapters)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MODEL_CONFIG)).float()
    model.set_experts_implementation("eager")  # on a CPU faster than the default
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=recipe.adam_betas,
        fused=True,
    )
    tokens_per_step = recipe.windows_per_step * recipe.window_tokens
    first_step, seconds_before = 0, 0.0
    if args.checkpoint and args.checkpoint.exists():
        first_step, seconds_before = load_state(args.checkpoint, model, optimizer)

    model.train()
    started_s = time.perf_counter()
    windows = itertools.islice(batches(tokenizer, chapters, recipe), first_step, None)
    for step in range(first_step, recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        loss, balance = train_step(model, optimizer, next(windows), recipe)
        done, seconds = step + 1, seconds_before + time.perf_counter() - started_s
        if done % 20 == 0:
            print(
                f"step {done}/{recipe.num_steps}  loss {loss:.3f}  balance {balance:.3f}  "
                f"{done * tokens_per_step / seconds:.0f} tokens/s",
                flush=True,
            )
        if done % args.save_every == 0 and done < recipe.num_steps:
            save(model, tokenizer, args.output_dir)
            print(json.dumps(evaluate(args.text, args.output_dir)["held_out"]), flush=True)
            if args.checkpoint:
                save_state(args.checkpoint, model, optimizer, done, seconds)

    seconds = seconds_before + time.perf_counter() - started_s
    save(model, tokenizer, args.output_dir)
    write_json(
        args.output_dir / "training.json",
        {
            "text": corpus.TEXT_SOURCE,
            "text_sha256": hashlib.sha256(args.text.read_bytes()).hexdigest(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "recipe": asdict(recipe),
            "tokens_seen": recipe.num_steps * tokens_per_step,
            "seconds": round(seconds),
            **evaluate(args.text, args.output_dir),
        },
    )


def cpu_name() -> str:
    """The processor as Linux names it, elsewhere as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()


# What the saved model is worth


@torch.inference_mode()
def evaluate(text: Path, model_dir: Path) -> dict[str, object]:
    """Loss of the saved bf16 weights, computed in float32, on the held-out chapters.

    `perplexity` is per predicted token, end-of-sequence included; `bits_per_byte` divides the
    same sum by the UTF-8 bytes of the passages. `expert_share` is each layer's share of
    routings that went to each expert.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    model = transformers.MixtralForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    _, held_out = corpus.split(corpus.read_chapters(text))
    passages = corpus.cut_passages(held_out, random.Random(0))
    loss_nats, num_targets = 0.0, 0
    num_experts = model.config.num_local_experts
    experts_per_token = model.config.num_experts_per_tok
    counts = torch.zeros(model.config.num_hidden_layers, num_experts, dtype=torch.int64)
    for ids in corpus.encode(tokenizer, passages):
        output = model(torch.tensor([ids[:-1]]), output_router_logits=True)
        targets = torch.tensor(ids[1:])
        loss_nats += F.cross_entropy(output.logits[0], targets, reduction="sum").item()
        num_targets += len(targets)
        for layer, logits_TE in enumerate(output.router_logits):
            chosen = logits_TE.topk(experts_per_token).indices.flatten()
            counts[layer] += chosen.bincount(minlength=num_experts)
    num_bytes = sum(len(passage.encode()) for passage in passages)
    share = counts / counts.sum(1, keepdim=True)
    return {
        "held_out": {
            "num_chapters": len(held_out),
            "num_passages": len(passages),
            "num_tokens": num_targets,
            "num_bytes": num_bytes,
            "perplexity": round(math.exp(loss_nats / num_targets), 4),
            "bits_per_byte": round(loss_nats / math.log(2) / num_bytes, 4),
        },
        "expert_share": [[round(s, 3) for s in layer] for layer in share.tolist()],
    }


def main() -> None:
    """Parses the command line shown at the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m executor.demo.train")
    parser.add_argument("command", nargs="?", default="train", choices=("train", "evaluate", "prompts"))
    parser.add_argument("--text", type=Path, required=True, help="one `Book1:1 verse` per line")
    parser.add_argument("--output-dir", type=Path, default=MODEL_DIR, help="the model's folder")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="written by `prompts`")
    parser.add_argument("--num-steps", type=int, default=Recipe.num_steps)
    parser.add_argument("--save-every", type=int, default=300, help="steps; also evaluates")
    parser.add_argument("--checkpoint", type=Path, help="training state: resumed from if there, saved at each save")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.command == "train":
        train(args, Recipe(num_steps=args.num_steps))
    elif args.command == "evaluate":
        print(json.dumps(evaluate(args.text, args.output_dir), indent=2))
    else:
        corpus.write_prompts(args.text, args.output_dir, args.prompts)


if __name__ == "__main__":
    main()
