"""How published weights are quantised: which matrix has which packed format, by what the config says.

Each method has its own words for the modules that it leaves as they were; here all are patterns of
module names (`model.layers.3.mlp.experts.7.gate_proj`), read as the tools read them that write them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple, cast

from hrm.errors import ModelError
from hrm.formats import MOST_GROUPED, PackedFormat, packed_format
from hrm.model_spec.config_file import Keys
from hrm.model_spec.gguf import METHOD, TYPES
from hrm.model_spec.published_dtype import QUANTISATION_KEYS

# What a multimodal model has its text part's names behind, and what those begin with on their own.
TEXT_PREFIXES: Final = (("model.language_model.", "model."), ("language_model.", ""), ("thinker.", ""))
MOST_REPEATS: Final = 6  # in a pattern: more could take longer than anyone waits
UNQUANTISED: Final = "use a checkpoint in a format that is read, or an unquantised one"


class Packing(StrEnum):
    """How files keep the parts of a packed matrix: under which names, and in which order of bits."""

    FP8 = "fp8"
    MXFP4 = "mxfp4"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    AWQ = "awq"
    PACKED_INT = "pack-quantized"
    PLAIN_INT = "int-quantized"
    PLAIN_FLOAT = "float-quantized"
    PACKED_NVFP4 = "nvfp4-pack-quantized"
    PACKED_MXFP4 = "mxfp4-pack-quantized"
    MODELOPT = "modelopt"
    GGUF = "gguf"


class Quantised(NamedTuple):
    """The format of a matrix, and how files keep it."""

    format: PackedFormat
    packing: Packing


@dataclass(frozen=True, slots=True)
class Modules:
    """Modules by their whole names, by what their names end with, and by what these match from their start on.

    There may be thousands of whole names. `within` says that they stand for all that is within them, too.
    """

    whole: frozenset[str] = frozenset()
    ends: tuple[str, ...] = ()
    pattern: re.Pattern[str] = re.compile(r"(?!)")
    within: bool = False

    def has(self, name: str) -> bool:
        """Whether the module of that name is one of them."""
        if name in self.whole or name.endswith(self.ends) or self.pattern.match(name):
            return True
        if not (self.within and self.whole):
            return False
        return any(name[: dot.start()] in self.whole for dot in re.finditer(r"\.", name))


EVERY: Final = Modules(ends=("",))


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Which modules of a model are quantised: the first group counts that has one, unless it is left out."""

    groups: tuple[tuple[Modules, Quantised], ...]
    left_out: Modules = Modules()

    def of(self, *names: str) -> Quantised | None:
        """How the weight of a module is stored that has one of these names; None if it is plain.

        The names are those of a text model; patterns may tell them as its multimodal model has them.
        """
        known = [name for plain in names for name in _with_prefixes(plain)]
        if any(map(self.left_out.has, known)):
            return None
        found = (how for modules, how in self.groups if any(map(modules.has, known)))
        return next(found, None)


def quantisation(keys: Keys) -> Quantisation | None:
    """How a decoder's weights are quantised; None if they are not.

    Raises ModelError naming the key and its value if no checkpoint that is stored so can be read.
    """
    name = next((key for key in QUANTISATION_KEYS if keys.get(key)), None)
    if name is None:
        return None
    given = keys.section(name)
    method = given.get("quant_method")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        key = "quant_method" if method is not None else next(iter(given.values))
        raise given.refusal(key, f"must be of a method that is read: {', '.join(_METHODS)}", UNQUANTISED)
    if keys.get("expert_dtype") not in (None, "fp8"):
        raise keys.refusal("expert_dtype", "must be fp8, or missing", UNQUANTISED)
    return read(given, scale_dtype(keys))


def _with_prefixes(name: str) -> Iterator[str]:
    yield name
    for prefix, plain in TEXT_PREFIXES:
        if name.startswith(plain):
            yield prefix + name.removeprefix(plain)


def scale_dtype(keys: Keys) -> str:
    """What scales of groups are stored in where a tool keeps the dtype of the weights that it was given."""
    told = next((keys.get(key) for key in ("dtype", "torch_dtype") if keys.get(key) is not None), None)
    return {"float16": "f16", "float32": "f32"}.get(str(told), "bf16")


# -- patterns ---------------------------------------------------------------------------------------

_PLAIN: Final = re.compile(r"[\w.-]+")  # a name that is no pattern of anything else


def _matching(given: Keys, key: str, sources: Iterable[str], **others: Any) -> Modules:
    """What one of these regular expressions matches from the start on; ModelError if they are none."""
    sources = list(sources)
    for source in sources:
        if re.search(r"\)[*+{]", source) or len(re.findall(r"[*+{]", source)) > MOST_REPEATS:
            raise _wrong(given, key, source, "must repeat no group, and little else", "write simpler patterns")
        try:
            re.compile(source)
        except (re.error, OverflowError, RecursionError) as error:
            raise _wrong(given, key, source, "must be a regular expression", f"correct it: {error}") from error
    joined = {"pattern": re.compile("|".join(f"(?:{source})" for source in sources))} if sources else {}
    return Modules(**joined, **others)


def _wrong(given: Keys, key: str, value: str, rule: str, remedy: str = "check the config.json") -> ModelError:
    return ModelError(f"{given.where}: {key}", value, rule, remedy)


def _names(given: Keys, *keys: str) -> tuple[str, list[str]]:
    """The first of the keys that is there, and its list of names."""
    key = next((key for key in keys if given.get(key) is not None), keys[0])
    if not isinstance(given.get(key), list | None):
        raise given.refusal(key, "must be a list of names of modules")
    items = cast("list[Any]", given.get(key) or [])
    if any(not isinstance(name, str) or not name for name in items):
        raise given.refusal(key, "must be a list of names of modules")
    return key, items


def _as_transformers(given: Keys, *keys: str) -> Modules:
    """A name or a regular expression matches from the start to the end of a part, a name at the end too."""
    key, names = _names(given, *keys)
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    patterns = (f"(?:{name}){boundary}" for name in names if not _PLAIN.fullmatch(name))
    return _matching(given, key, patterns, whole=frozenset(names), ends=tuple(names), within=True)


def _as_compressed_tensors(given: Keys, key: str) -> Modules:
    """Behind re: is what matches from the start on; other names are whole."""
    _, names = _names(given, key)
    patterns = (name.removeprefix("re:") for name in names if name.startswith("re:"))
    return _matching(given, key, patterns, whole=frozenset(names))


def _as_modelopt(given: Keys, *keys: str) -> Modules:
    """A * is anything; what is named leaves out all that it has within."""
    key, names = _names(given, *keys)
    patterns = (re.escape(name).replace(r"\*", ".*") + r"(?:\.|$)" for name in names if "*" in name)
    return _matching(given, key, patterns, whole=frozenset(names), within=True)


# -- methods ----------------------------------------------------------------------------------------


def _fp8(given: Keys, _: str) -> Quantisation:
    """DeepSeek-V3's: blocks that share a scale, or a matrix that does."""
    given.word("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    form = PackedFormat(code="fp8")
    if given.get("weight_block_size") is not None:
        form = _blocks(given, "weight_block_size")
    left_out = _as_transformers(given, "modules_to_not_convert", "ignored_layers")
    return Quantisation(((EVERY, Quantised(form, Packing.FP8)),), left_out)


def _blocks(given: Keys, key: str) -> PackedFormat:
    sizes = given.integers(key)
    if len(sizes) != 2 or sizes[0] != sizes[1] or not 1 < sizes[0] <= MOST_GROUPED:
        raise given.refusal(key, "must be the rows and columns of square blocks")
    return PackedFormat(code="fp8", rows=sizes[0], columns=sizes[0])


def _mxfp4(given: Keys, _: str) -> Quantisation:
    """gpt-oss's: the routed experts alone."""
    experts = Modules(pattern=re.compile(r".*\.experts(?:\.|$)"))
    how = Quantised(_known("mxfp4"), Packing.MXFP4)
    return Quantisation(((experts, how),), _as_transformers(given, "modules_to_not_convert"))


def _known(name: str) -> PackedFormat:
    form = packed_format(name)
    assert form is not None, name
    return form


def _group_size(given: Keys, key: str = "group_size", default: int | None = None) -> int:
    """Columns that share a scale; 0 for a whole row."""
    if given.get(key) == -1:
        return 0
    return given.integer(key, default=default, at_most=MOST_GROUPED)


def _bits(given: Keys, key: str, *known: int) -> int:
    bits = given.integer(key)
    if bits not in known:
        raise given.refusal(key, f"must be {' or '.join(map(str, known))}", UNQUANTISED)
    return bits


def _gptq(given: Keys, _: str) -> Quantisation:
    """All matrices alike, but for those that `dynamic` leaves out or stores otherwise."""
    dynamic = given.section("dynamic").values if given.get("dynamic") else {}
    left_out: list[str] = []
    groups: list[tuple[Modules, Quantised]] = []
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            left_out.append(pattern.removeprefix("-:"))
            continue
        if not isinstance(changes, dict):
            raise _wrong(given, "dynamic", pattern, "must have an object")
        path = f"{given.path}: dynamic: {pattern}"
        changed = replace(given, values={**given.values, **cast("dict[str, Any]", changes)}, path=path)
        groups.append((_matching(given, "dynamic", [pattern.removeprefix("+:")]), _gptq_matrix(changed)))
    rest = Modules(ends=_in_blocks(given))
    return Quantisation((*groups, (rest, _gptq_matrix(given))), _matching(given, "dynamic", left_out))


def _in_blocks(given: Keys) -> tuple[str, ...]:
    """What the modules end with that are quantised at all; nothing if the config does not say."""
    key = "modules_in_block_to_quantize"
    parts = cast("list[Any]", given.get(key)) if isinstance(given.get(key), list) else []
    names = [name for part in parts for name in (cast("list[Any]", part) if isinstance(part, list) else [part])]
    if given.get(key) is not None and (not names or any(not isinstance(name, str) for name in names)):
        raise given.refusal(key, "must be lists of names of modules")
    return tuple(f".{name}" for name in names) or ("",)


def _gptq_matrix(given: Keys) -> Quantised:
    bits, size = _bits(given, "bits", 4, 8), _group_size(given)
    packing = given.word("checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    if given.truth("is_marlin_format"):
        raise given.refusal("is_marlin_format", "must be false: this order of weights is of one GPU's kernels")
    symmetric = given.truth("sym", default=True)
    if bits == 8 and not symmetric:
        raise given.refusal("sym", "must be true for 8 bits", UNQUANTISED)
    form = PackedFormat(
        code=f"int{bits}",
        columns=size,
        scale="f16" if size else "f32",
        zeros=not symmetric,
        ordered=given.truth("desc_act") and size > 0,
    )
    return Quantised(form, Packing(packing))


def _awq(given: Keys, _: str) -> Quantisation:
    """AutoAWQ's order of weights for GEMMs; a name leaves out whatever has it within its own."""
    version = given.get("version")
    if version is not None and (not isinstance(version, str) or version.lower() != "gemm"):
        raise given.refusal("version", "must be gemm", UNQUANTISED)
    if not given.truth("zero_point", default=True):
        raise given.refusal("zero_point", "must be true", UNQUANTISED)
    _bits(given, "bits" if given.get("bits") is not None else "w_bit", 4)
    size = _group_size(given, "group_size" if given.get("group_size") is not None else "q_group_size", 128)
    form = PackedFormat(code="int4", columns=size, scale="f16" if size else "f32", zeros=True)
    key, names = _names(given, "modules_to_not_convert")
    left_out = _matching(given, key, (f".*{re.escape(name)}" for name in names))
    return Quantisation(((EVERY, Quantised(form, Packing.AWQ)),), left_out)


def _compressed_tensors(given: Keys, scale: str) -> Quantisation:
    """Groups with targets: names of modules count before classes of them."""
    for key in ("sparsity_config", "transform_config"):
        if given.get(key) and given.section(key).get("format") != "dense":
            raise given.refusal(key, "must be empty", UNQUANTISED)
    by_name: list[tuple[Modules, Quantised]] = []
    by_class: list[tuple[Modules, Quantised]] = []
    for name, values in given.section("config_groups").values.items():
        path = f"{given.path}: config_groups: {name}"
        if not isinstance(values, dict):
            raise _wrong(given, "config_groups", name, "must be an object")
        group = Keys(cast("dict[str, Any]", values), given.file, path)
        if group.get("weights") is None:
            continue
        how = _compressed_matrix(group, group if group.get("format") is not None else given, scale)
        targets = _as_compressed_tensors(group, "targets")
        by_name.append((targets, how))
        if "Linear" in _names(group, "targets")[1]:
            by_class.append((EVERY, how))
    if not by_name:
        raise given.refusal("config_groups", "must have a group with weights", UNQUANTISED)
    return Quantisation((*by_name, *by_class), _as_compressed_tensors(given, "ignore"))


# What compressed-tensors' formats hold: codes by type and bits, and in which shapes these share scales.
_IN_ROWS: Final = ("channel", "tensor")
_COMPRESSED: Final[Mapping[Packing, tuple[Mapping[tuple[str, int], str], tuple[str, ...]]]] = {
    Packing.PACKED_INT: ({("int", 4): "int4", ("int", 8): "int8"}, (*_IN_ROWS, "group")),
    Packing.PLAIN_INT: ({("int", 8): "int8"}, (*_IN_ROWS, "group")),
    Packing.PLAIN_FLOAT: ({("float", 8): "fp8"}, (*_IN_ROWS, "block")),
    Packing.PACKED_NVFP4: ({("float", 4): "nvfp4"}, ("tensor_group", "group")),
    Packing.PACKED_MXFP4: ({("float", 4): "mxfp4"}, ("group",)),
}


def _compressed_matrix(group: Keys, with_format: Keys, scale: str) -> Quantised:
    weights = group.section("weights")
    kind, bits = weights.word("type", ("int", "float"), default="int"), weights.integer("num_bits", default=8)
    naive = Packing.PLAIN_INT if kind == "int" else Packing.PLAIN_FLOAT
    packing = with_format.word("format", (*_COMPRESSED, "naive-quantized"))
    packing = naive if packing == "naive-quantized" else Packing(packing)
    codes, strategies = _COMPRESSED[packing]
    code = codes.get((kind, bits))
    if code is None:
        told = " or ".join(f"{bits} bits of {kind}" for kind, bits in codes)
        raise weights.refusal("num_bits", f"must be {told} in {packing}", UNQUANTISED)
    grouped = "group" if weights.get("group_size") not in (None, -1) else "tensor"
    strategy = weights.word("strategy", strategies, default=grouped)
    if code in ("nvfp4", "mxfp4"):
        form = _known(code)
        if _group_size(weights, default=form.columns) != form.columns:
            raise weights.refusal("group_size", f"must be {form.columns} in {packing}", UNQUANTISED)
        return Quantised(form, packing)
    if strategy == "block":
        return Quantised(_blocks(weights, "block_structure"), packing)
    return Quantised(_compressed_integers(weights, code, strategy, scale), packing)


def _compressed_integers(weights: Keys, code: str, strategy: str, scale: str) -> PackedFormat:
    """Also floats that share a scale in rows."""
    size = _group_size(weights) if strategy == "group" else 0
    asymmetric = not weights.truth("symmetric", default=True)
    if asymmetric and code != "int4":
        raise weights.refusal("symmetric", f"must be true for {code}", UNQUANTISED)
    order = weights.get("actorder")  # true stands for group; weights in static order are in their groups
    ordered = size > 0 and (order is True or str(order).lower() == "group")
    return PackedFormat(code=code, columns=size, scale=scale if size else "f32", zeros=asymmetric, ordered=ordered)


def _modelopt(given: Keys, _: str) -> Quantisation:
    """NVIDIA ModelOpt's."""
    algorithm = given.word("quant_algo", ("NVFP4", "FP8"))
    if algorithm == "NVFP4" and _group_size(given, default=16) != 16:
        raise given.refusal("group_size", "must be 16 in NVFP4")
    how = Quantised(_known(algorithm.lower()), Packing.MODELOPT)
    return Quantisation(((EVERY, how),), _as_modelopt(given, "exclude_modules", "ignore"))


def _gguf(given: Keys, _: str) -> Quantisation:
    """As the header of a GGUF file is told: each format has a list of names."""
    groups: list[tuple[Modules, Quantised]] = []
    formats = given.section("formats")
    for name in formats.values:
        if name not in {kind.format for kind in TYPES.values() if kind.format}:
            raise formats.refusal(name, "must be under a format that GGUF files have")
        groups.append((Modules(frozenset(_names(formats, name)[1])), Quantised(_known(name), Packing.GGUF)))
    return Quantisation(tuple(groups))


_METHODS: Final[Mapping[str, Callable[[Keys, str], Quantisation]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    METHOD: _gguf,
}
