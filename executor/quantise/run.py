"""From a checkpoint in a folder to one with packed matrices in another, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from executor.checkpoint import Checkpoint
from executor.checkpoint_files import INDEX_FILE, SINGLE_FILE, read_object
from executor.download import SMALL_FILES
from executor.errors import CheckpointError
from executor.families import family_for
from executor.formats.encode import encode
from executor.loading import Loading
from executor.quantise.plan import MatrixToPack, PackingPlan, plan_of
from executor.quantise.publications import Publication, Stacked, publication_of
from executor.quantise.report import Report
from executor.quantise.shards import Entry, Shard
from executor.safetensors_file import DOWNLOAD_AGAIN, SafetensorsFile
from hrm.errors import ModelError
from hrm.files import is_file, open_regular, write_whole
from hrm.folders import check_new_folder, new_folder
from hrm.hub import CONFIG_FILE
from hrm.model_spec import What, decoder_keys
from hrm.model_spec.published_dtype import QUANTISATION_KEYS
from hrm.model_spec.quantisation import TEXT_PREFIXES, scale_dtype
from hrm.units import is_whole_number

OUT: Final = "--out"
WEIGHT: Final = ".weight"
COPIED: Final = (*SMALL_FILES, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
STACKED_FAMILIES: Final = ("gpt_oss",)  # whose packed experts are published in one tensor a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseOptions:
    """The checkpoint's folder and that of the new one, and which matrices are to be in which format."""

    model: Path
    out: Path
    format: str
    what: What = What.EXPERTS
    model_name: str = ""


def quantise(options: QuantiseOptions, loading: Loading | None = None) -> Report:
    """Write a checkpoint with packed matrices, whole or not at all, and say what that cost.

    `loading` tells meanwhile how far it is, in bytes that were read. Raises HrmError if the checkpoint is none that
    is supported, is quantised already or does not take the format, or if the folder cannot be written.
    """
    check_new_folder(options.out, OUT, CheckpointError)
    if is_file(options.model):
        rule = "must be a folder with a config.json and safetensors files"
        raise CheckpointError("--model", str(options.model), rule, "use the checkpoint that the file was made of")
    with Checkpoint.open(options.model, options.model_name) as checkpoint:
        _check_plain(checkpoint)
        work = _Work.of(checkpoint, options)
        files = [SafetensorsFile(path) for path in checkpoint.weight_files]
        try:
            return work.write(files, options.out, loading or Loading())
        finally:
            for file in files:
                file.close()


def _check_plain(checkpoint: Checkpoint) -> None:
    for key in QUANTISATION_KEYS:
        if decoder_keys(checkpoint.config, checkpoint.config_path).get(key) or checkpoint.config.get(key):
            rule = "must not be there: what is rounded already would only get worse"
            raise ModelError(f"{checkpoint.config_path}: {key}", "<present>", rule, "use the original checkpoint")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A stored tensor: its name in its file, and that by which the checkpoint knows it.

    Those of a multimodal model's text part differ in how they begin.
    """

    file: SafetensorsFile
    stored: str
    known: str
    prefix: str = ""
    plain: str = ""

    def written(self, name: str) -> str:
        """What a tensor made of it is called in files, by a name like those that the checkpoint knows."""
        return self.prefix + name.removeprefix(self.plain)

    def module(self, name: str) -> str:
        """What the tensors of a packed matrix begin with, which has a name like that."""
        return self.written(name).removesuffix(WEIGHT)

    @property
    def num_bytes(self) -> int:
        """Its bytes as it is stored."""
        return self.file.tensors[self.stored].num_bytes


def _tensors(file: SafetensorsFile, checkpoint: Checkpoint) -> Iterator[_Tensor]:
    """Those tensors that the checkpoint has in a file, in the order in which they are stored there."""
    for stored in sorted(file.tensors, key=lambda name: file.tensors[name].start):
        for prefix, plain in (("", ""), *TEXT_PREFIXES):
            known = plain + stored.removeprefix(prefix)
            here = stored.startswith(prefix) and known in checkpoint.names
            if here and checkpoint.where(known) == f"{file.path}: {stored}":
                yield _Tensor(file, stored, known, prefix, plain)
                break


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """A checkpoint, what becomes of its tensors, and how that is published."""

    checkpoint: Checkpoint
    head: str
    published: Publication
    plan: PackingPlan

    @staticmethod
    def of(checkpoint: Checkpoint, options: QuantiseOptions) -> "_Work":
        """Raises HrmError if the checkpoint cannot be used, or not with these options."""
        where = checkpoint.config_path
        family = family_for(checkpoint.config, where)
        arch = family.architecture(checkpoint.config, where)
        checkpoint.check(family.expected_tensors(arch, checkpoint.names))
        published = publication_of(
            options.format,
            scale_dtype(decoder_keys(checkpoint.config, where)),
            stacked=arch.spec.family in STACKED_FAMILIES,
        )
        if isinstance(published, Stacked) and options.what is not What.EXPERTS:
            rule = "must be experts for this model: as it is published, packed, all else is plain"
            raise ModelError("--what", options.what.value, rule, "leave it out")
        plan = plan_of(checkpoint, family, arch.spec, published, options.what)
        return _Work(checkpoint, family.outside["lm_head"], published, plan)

    def write(self, files: Sequence[SafetensorsFile], out: Path, loading: Loading) -> Report:
        """The new folder, once all of it is there."""
        tensors = [list(_tensors(file, self.checkpoint)) for file in files]
        entries = [self._entries(some) for some in tensors]
        before = sum(tensor.num_bytes for some in tensors for tensor in some)
        after = sum(entry.num_bytes for some in entries for entry in some.values())
        check_new_folder(out, OUT, CheckpointError, num_bytes=after)
        obstacle = next(filter(None, (self.published.obstacle(matrix.width) for matrix in self.plan.every)), "")
        report = Report(
            format=self.published.form.name,
            method=self.published.method,
            obstacle=obstacle,
            bytes_before=before,
            bytes_after=after,
        )
        loading.set(0, before)
        with new_folder(out, OUT, CheckpointError) as folder:
            paths = [file.path.relative_to(self.checkpoint.folder) for file in files]
            for path, told, some in zip(paths, entries, tensors, strict=True):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                with Shard(folder / path, told) as shard:
                    for tensor in some:
                        self._write_tensor(tensor, shard, loading, report)
            if [str(path) for path in paths] != [SINGLE_FILE]:
                _write_index(folder, dict(zip(paths, entries, strict=True)), after)
            self._write_config(folder, tensors)
            _copy_others(self.checkpoint.folder, folder)
        return report

    def _entries(self, tensors: Sequence[_Tensor]) -> dict[str, Entry]:
        """The tensors of a new file, made of those of the old one."""
        entries: dict[str, Entry] = {}
        for tensor in tensors:
            matrices = self.plan.matrices.get(tensor.known)
            if matrices is None:
                told = tensor.file.tensors[tensor.stored]
                entries[self._copied(tensor)] = Entry(told.dtype, told.shape, told.num_bytes)
                continue
            several = (len(matrices),) if isinstance(self.published, Stacked) else ()
            for matrix in matrices:
                for name, rows in matrix.written:
                    for end, part in self.published.shapes(rows.stop - rows.start, matrix.width).items():
                        entries[tensor.module(name) + end] = Entry.like(part, *several)
        return entries

    def _copied(self, tensor: _Tensor) -> str:
        return tensor.written(self.plan.renamed.get(tensor.known, tensor.known))

    def _write_tensor(self, tensor: _Tensor, shard: Shard, loading: Loading, report: Report) -> None:
        matrices = self.plan.matrices.get(tensor.known)
        if matrices is None:
            offset = 0
            for part in tensor.file.pieces(tensor.stored):
                shard.write(self._copied(tensor), part, offset)
                offset += len(part)
                loading.done_bytes += len(part)
            return
        for matrix in matrices:
            self._write_matrix(tensor, matrix, shard, report)
            loading.done_bytes += tensor.num_bytes // len(matrices)

    def _write_matrix(self, tensor: _Tensor, matrix: MatrixToPack, shard: Shard, report: Report) -> None:
        weights = torch.empty(matrix.rows, matrix.width)
        self.checkpoint.read_into(matrix.stored, weights.T if matrix.transposed else weights, matrix.first_row)
        if not weights.isfinite().all():
            where = f"{tensor.file.path}: {tensor.stored}"
            raise CheckpointError(where, "<NaN or infinite>", "must be finite numbers", DOWNLOAD_AGAIN)
        for name, rows in matrix.written:
            packed = encode(weights[rows], self.published.form)
            report.add(matrix.layer, weights[rows], packed, of_expert=matrix.of_expert)
            for end, part in self.published.parts(packed).items():
                shard.write(tensor.module(name) + end, part, matrix.place * part.nbytes)

    def _write_config(self, folder: Path, tensors: Sequence[Sequence[_Tensor]]) -> None:
        """The old config with what it says of quantisation, in the words of files."""
        copied = [tensor for some in tensors for tensor in some if tensor.known not in self.plan.matrices]
        told = [(self._copied(tensor), tensor.file.tensors[tensor.stored].shape) for tensor in copied]
        plain = {name.removesuffix(WEIGHT) for name, shape in told if len(shape) > 1 and name.endswith(WEIGHT)}
        plain.add(self.head.removesuffix(WEIGHT))  # a module, also if it has the embedding's weights
        config = read_object(self.checkpoint.folder / CONFIG_FILE, DOWNLOAD_AGAIN)
        config["quantization_config"] = self.published.config(sorted(plain, key=_in_order))
        write_whole(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n", CheckpointError)


def _in_order(name: str) -> list[tuple[int, str]]:
    """By numbers in a name as numbers."""
    return [(int(part), "") if is_whole_number(part) else (-1, part) for part in name.split(".")]


def _write_index(folder: Path, entries: Mapping[Path, Mapping[str, Entry]], num_bytes: int) -> None:
    where = {name: path.as_posix() for path, told in entries.items() for name in told}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(where.items()))}
    write_whole(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n", CheckpointError)


def _copy_others(model: Path, folder: Path) -> None:
    """What belongs to a model besides its weights and config; a link's file is copied, not the link."""
    for path in sorted({path for pattern in COPIED for path in model.glob(pattern)}):
        target = folder / path.relative_to(model)
        if path.name in {CONFIG_FILE, INDEX_FILE} or not is_file(path):
            continue
        target.parent.mkdir(exist_ok=True)
        with open_regular(path, "a readable file", CheckpointError) as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
