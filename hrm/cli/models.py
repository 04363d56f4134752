"""`hrm models`: how large a model is, and where its bytes are."""

from collections import Counter
from typing import Any, Final

import click
from rich.table import Table

from hrm.cli.console import as_is, console, plain_table, print_json
from hrm.cli.params import json_option
from hrm.contract.families import EXECUTED_FAMILIES
from hrm.formats import FORMATS, Formats
from hrm.layers import Layer
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec, load_model
from hrm.model_spec.families import FAMILY_READERS
from hrm.units import format_bytes, format_count

STORED: Final = FORMATS["bfloat16"]  # what the bytes that are shown are in
_FORMATS: Final = Formats.of(STORED.name)


@click.command()
@click.argument("name", required=False)
@json_option
def models(name: str | None, as_json: bool) -> None:
    """List the built-in models and all families, or show NAME (built-in, folder or config.json) in detail."""
    spec = load_model(name) if name else None
    if as_json:
        every = {known.name: model_json(known) for known in BUILT_IN_MODELS.values()}
        print_json(every if spec is None else model_json(spec))
    elif spec is None:
        _print_list(list(BUILT_IN_MODELS.values()))
        _print_families()
    else:
        _print_model(spec)


def model_json(spec: ModelSpec) -> dict[str, Any]:
    """A model's dimensions and all that follows from them; bytes are as it is stored, all that is plain in `dtype`."""
    return {
        "name": spec.name,
        "family": spec.family,
        "runs": spec.family in EXECUTED_FAMILIES,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_experts": spec.num_experts,
        "experts_per_token": spec.experts_per_token,
        "tied_embeddings": spec.tied_embeddings,
        "published_dtype": spec.published_dtype,
        "packing": spec.packing,
        "parameters": spec.parameters,
        "active_parameters": spec.active_parameters,
        "expert_layers": spec.num_expert_layers,
        "dtype": STORED.name,
        "weight_bytes": spec.bytes_in(STORED),
        "layer_bytes": spec.layer_bytes(STORED),
        "total_layer_bytes": spec.total_layer_bytes(STORED),
        "expert_bytes": spec.expert_bytes(STORED),
        "embedding_bytes": STORED.bytes_of(spec.embedding_parameters),
        "head_bytes": STORED.bytes_of(spec.head_parameters),
        "kv_bytes_per_token": spec.kv_bytes_per_token(_FORMATS),
        "kv_bytes_per_token_beyond_windows": _kv_bytes_beyond_windows(spec),
        "layer_kinds": [
            {
                "layers": count,
                "has_experts": kind.has_experts,
                "window": kind.window,
                "layer_bytes": kind.bytes_in(STORED),
                "dense_bytes": kind.dense_bytes(STORED),
                "num_experts": kind.num_experts,
                "kv_bytes_per_token": kind.mixer.cached_bytes(_FORMATS),
                "state_bytes": kind.mixer.state_bytes(_FORMATS),
                "mixer": kind.mixer,
                "ffn": kind.ffn,
            }
            for kind, count in spec.layer_kinds().items()
        ],
    }


def _kv_bytes_beyond_windows(spec: ModelSpec) -> int:
    """What one more token adds to the cache of a context that is longer than every window."""
    return sum(layer.mixer.cached_bytes(_FORMATS) for layer in spec.layers if not layer.window)


def _print_list(specs: list[ModelSpec]) -> None:
    table = plain_table(
        "model", "parameters", "active", "layers", "experts", "a layer", "an expert", "KV a token", right_from=1
    )
    for spec in specs:
        table.add_row(
            spec.name,
            format_count(spec.parameters),
            format_count(spec.active_parameters),
            str(spec.num_layers),
            _experts(spec),
            format_bytes(spec.layer_bytes(STORED)),
            format_bytes(spec.expert_bytes(STORED)),
            format_bytes(spec.kv_bytes_per_token(_FORMATS)),
        )
    console.print(table)
    console.print(
        "[dim]Bytes as published, or in bfloat16; a layer with experts, and a token in all caches. hrm models NAME[/]"
    )


def _print_families() -> None:
    table = plain_table("family", "plans", "runs", "models")
    for family, reader in FAMILY_READERS.items():
        table.add_row(family, "yes", "yes" if family in EXECUTED_FAMILIES else "no", reader.models)
    console.print()
    console.print(table)
    console.print(
        "[dim]Families by the model_type of a config.json: hrm plans any model of theirs, executor run runs some.[/]"
    )


def _experts(spec: ModelSpec) -> str:
    shared = " + shared" if spec.experts.shared_intermediate_size else ""
    return f"{spec.experts_per_token} of {spec.num_experts}{shared}"


def _print_model(spec: ModelSpec) -> None:
    console.print(f"[bold]{as_is(spec.name)}[/] ({spec.family})")
    table = Table(box=None, pad_edge=False, show_header=False)
    share = spec.active_parameters / spec.parameters
    rows = {
        "parameters": f"{format_count(spec.parameters)} ({spec.parameters:,})",
        "active": f"{format_count(spec.active_parameters)} a token, {share:.0%}",
        "weights": f"{format_bytes(STORED.bytes_of(spec.parameters))} in {STORED.name}{_published(spec)}",
        "experts": f"{spec.experts_per_token} of {spec.num_experts} a token,"
        f" {format_bytes(spec.expert_bytes(STORED))} each"
        f" ({spec.experts.expert_hidden_size} x {spec.intermediate_size}){_shared(spec)}",
        **_attention(spec),
        "embedding": f"{spec.vocab_size} tokens x {spec.hidden_size}"
        f" ({format_bytes(STORED.bytes_of(spec.embedding_parameters))}), "
        + ("tied to the LM head" if spec.tied_embeddings else "and an LM head beside it"),
        "KV cache": _cache(spec),
        "": _windows(spec),
        "runs": _runs(spec),
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, as_is(text))
    console.print(table)
    console.print()
    _print_layers(spec)


def _runs(spec: ModelSpec) -> str:
    return "with executor run" if spec.family in EXECUTED_FAMILIES else "no: planned only"


def _published(spec: ModelSpec) -> str:
    if not spec.published_dtype:
        return ""
    if not spec.packing:
        return f" (published: {spec.published_dtype}; plans use the dtype that you choose)"
    return f"; as published and planned, {format_bytes(spec.bytes_in(STORED))}: {spec.packing}"


def _shared(spec: ModelSpec) -> str:
    inner = spec.experts.shared_intermediate_size
    if not inner:
        return ""
    tensors = (tensor for tensor in spec.expert_kind.tensors if tensor.name.startswith("shared_w"))
    shared = format_bytes(sum(tensor.bytes_in(STORED) for tensor in tensors))
    return f"; shared: {shared} ({spec.hidden_size} x {inner})"


def _attention(spec: ModelSpec) -> dict[str, str]:
    """A row for each kind of attention that layers have, windows apart."""
    kinds = Counter(layer.without_window.mixer for layer in spec.layers)
    if len(kinds) == 1:
        return {"attention": next(iter(kinds)).words}
    return {f"in {count} layers": mixer.words for mixer, count in kinds.items()}


def _cache(spec: ModelSpec) -> str:
    """What a token takes, and what a sequence takes however long it is."""
    told = f"{format_bytes(spec.kv_bytes_per_token(_FORMATS))} a token in all layers"
    each = {layer.mixer.cached_bytes(_FORMATS) for layer in spec.layers}
    if len(each) == 1:
        told += f", {format_bytes(each.pop())} in each"
    states = sum(layer.mixer.state_bytes(_FORMATS) for layer in spec.layers)
    return f"{told}, and {format_bytes(states)} a sequence" if states else told


def _windows(spec: ModelSpec) -> str:
    """What the windows mean for the cache of a long context; empty without windows."""
    windows = Counter(layer.window for layer in spec.layers if layer.window)
    if not windows:
        return ""
    kept = " and ".join(
        f"{count} of {spec.num_layers} layers keep {window} tokens at most" for window, count in windows.items()
    )
    return f"{format_bytes(_kv_bytes_beyond_windows(spec))} beyond the windows: {kept}"


def _print_layers(spec: ModelSpec) -> None:
    table = plain_table("layers", "count", "bytes each", "outside experts", "routed experts", "attend to", right_from=1)
    for kind, count in spec.layer_kinds().items():
        table.add_row(*_layer_row(spec, kind, count))
    table.add_row("all", str(spec.num_layers), format_bytes(spec.total_layer_bytes(STORED)))
    console.print(table)


def _layer_row(spec: ModelSpec, kind: Layer, count: int) -> tuple[str, ...]:
    experts = format_bytes(kind.num_experts * spec.expert_bytes(STORED))
    state = kind.mixer.state_bytes(_FORMATS)
    reaches = f"{kind.window} tokens" if kind.window else "all tokens"
    return (
        "with experts" if kind.has_experts else "dense FFN" if kind.ffn else "no FFN",
        str(count),
        format_bytes(kind.bytes_in(STORED)),
        format_bytes(kind.dense_bytes(STORED)),
        f"{kind.num_experts}: {experts}" if kind.num_experts else "none",
        f"a state, {format_bytes(state)}" if state else reaches,
    )
