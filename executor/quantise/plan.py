"""What becomes of the tensors of a checkpoint: packed, copied, or copied under another name.

A family knows which stored tensors its experts and other matrices are, and what they are called where each
expert's are on their own: packed matrices are published so, for each is the weight of a module.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from executor.checkpoint import Checkpoint
from executor.errors import CheckpointError
from executor.families import Family
from executor.families.stored import Joined
from executor.model import dense_tensors, expert_tensors
from executor.quantise.publications import Publication, Stacked
from hrm.errors import ModelError
from hrm.model_spec import ModelSpec, What, packable


@dataclass(frozen=True, slots=True)
class MatrixToPack:
    """A matrix (rows, width) of a stored tensor: all of it, or an expert's part from `first_row` on.

    `written` are its rows by the names of the packed matrices that they become. Where all experts of a layer are
    written in one tensor, it is the one in that `place`.
    """

    stored: str
    first_row: int
    rows: int
    width: int
    transposed: bool
    written: tuple[tuple[str, slice], ...]
    layer: int
    of_expert: bool = True
    place: int = 0


@dataclass(slots=True)
class PackingPlan:
    """The matrices to pack, by the stored tensors that they are of, and new names of tensors that are copied."""

    matrices: dict[str, list[MatrixToPack]] = field(default_factory=dict[str, list[MatrixToPack]])
    renamed: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def every(self) -> Iterator[MatrixToPack]:
        """All matrices."""
        return chain.from_iterable(self.matrices.values())


def plan_of(checkpoint: Checkpoint, family: Family, spec: ModelSpec, published: Publication, what: What) -> PackingPlan:
    """What is to be packed in a checkpoint, by the names that it knows.

    Raises ModelError where experts have no names of their own, and CheckpointError for a matrix that the format
    does not take, or if there is none to pack.
    """
    plan = PackingPlan()
    for index, layer in enumerate(spec.layers):
        for tensor in expert_tensors(layer):
            if len(tensor.shape) > 1 and not published.form.takes(tensor.shape, tensor.parts):
                told = f"<{' + '.join(map(str, tensor.parts or tensor.shape[:1]))} rows of {tensor.shape[1]}>"
                rule = f"must have whole groups and bytes in {published.form.name}, to be run"
                where = f"{checkpoint.folder}: experts of layer {index}"
                raise CheckpointError(where, told, rule, "choose a --format of smaller groups")
        for matrix in _of_layer(checkpoint, family, spec, published, index):
            plan.matrices.setdefault(matrix.stored, []).append(matrix)
        if layer.experts and not isinstance(published, Stacked):
            plan.renamed |= _renamed(checkpoint, family, spec, index)
        if what is What.LINEAR:
            for matrix in _linear(checkpoint, family, spec, plan.renamed, index):
                plan.matrices.setdefault(matrix.stored, [matrix])
    for matrix in plan.every:
        if not published.form.takes((matrix.rows, matrix.width)):
            rule = f"must have rows of whole bytes in {published.form.name}"
            raise CheckpointError(matrix.stored, f"<rows of {matrix.width}>", rule, "choose another --format")
    if not plan.matrices:
        raise CheckpointError("--what", what.value, "must be matrices that the model has", "try --what linear")
    return plan


def _of_layer(
    checkpoint: Checkpoint, family: Family, spec: ModelSpec, published: Publication, index: int
) -> Iterator[MatrixToPack]:
    """The matrices of a layer's experts."""
    layer, names = spec.layers[index], checkpoint.names
    tensors, apart = expert_tensors(layer), family.apart()
    for expert in range(layer.num_experts):
        for joined in family.joined(tensors, spec, names, index, expert):
            if isinstance(published, Stacked):
                yield from _matrices(joined, joined, index, expert)
                continue
            if apart is None:
                raise ModelError(
                    f"{checkpoint.config_path}: model_type",
                    spec.family,
                    "must be a family whose experts are published one by one, for packed they are modules of their own;"
                    " here all of a layer are in one tensor",
                    "run it as it is",
                )
            alone = next(apart.joined((joined.tensor,), spec, (), index, expert))
            yield from _matrices(joined, alone, index)


def _matrices(joined: Joined, written: Joined, layer: int, place: int = 0) -> Iterator[MatrixToPack]:
    """The stored pieces of an expert's tensor, each with the written ones whose rows it has."""
    if len(joined.tensor.shape) < 2:
        assert joined is written, "no family has biases in experts that are stored in two ways"
        return
    for piece in joined.pieces:
        rows, first = piece.rows.stop - piece.rows.start, piece.rows.start
        inside = [other for other in written.pieces if first <= other.rows.start < piece.rows.stop]
        names = tuple((other.name, slice(other.rows.start - first, other.rows.stop - first)) for other in inside)
        width = joined.tensor.shape[1]
        yield MatrixToPack(piece.name, piece.first_row, rows, width, piece.transposed, names, layer, place=place)


def _renamed(checkpoint: Checkpoint, family: Family, spec: ModelSpec, index: int) -> dict[str, str]:
    """What tensors of a layer are called beside experts that are on their own, if otherwise than now."""
    tensors, apart = dense_tensors(spec.layers[index]), family.apart()
    assert apart is not None, "the experts have names of their own"
    before, after = family.joined(tensors, spec, checkpoint.names, index), apart.joined(tensors, spec, (), index)
    pairs = ((old.pieces, new.pieces) for old, new in zip(before, after, strict=True))
    names = chain.from_iterable(zip(old, new, strict=True) for old, new in pairs)
    return {old.name: new.name for old, new in names if old.name != new.name}


def _linear(
    checkpoint: Checkpoint, family: Family, spec: ModelSpec, renamed: dict[str, str], index: int
) -> Iterator[MatrixToPack]:
    """The matrices of a layer outside its experts that are packed."""
    layer = spec.layers[index]
    packed = {tensor.name for tensor in packable(layer)}
    for joined in family.joined(dense_tensors(layer), spec, checkpoint.names, index):
        if joined.tensor.name not in packed:
            continue
        for piece in joined.pieces:
            rows, width = piece.shape
            name = renamed.get(piece.name, piece.name)
            yield MatrixToPack(piece.name, 0, rows, width, False, ((name, slice(0, rows)),), index, of_expert=False)
