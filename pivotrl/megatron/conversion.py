"""Converts Hugging Face folders to Megatron checkpoints and back, tensor by tensor, and proves the result.

Both ways use the one mapping table (hf_mapping) and write a temporary folder, which gets its name when conversion_proof is content.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

from pivotrl import export
from pivotrl.config import Config, Dtype, KernelsConfig, LayerSpec, ModelConfig, ParallelConfig, PrecisionConfig
from pivotrl.megatron import checkpoint, hf_mapping
from pivotrl.megatron.conversion_proof import Check, check_logits, compare_weights
from pivotrl.megatron.hf_folder import HfFolder, HfWriter
from pivotrl.megatron.model import DTYPES
from pivotrl.megatron.torch_dist import CheckpointReader, RankPlan, Shard, check_cover, plan_rank, write_checkpoint
from pivotrl.metrics import peak_rss_bytes, progress
from pivotrl.plan.layout import model_faults, processes_multiple, world_faults
from pivotrl.records import write_json


@dataclass(frozen=True)
class Options:
    """`model` None takes the shape from the config.json. `dtype` None keeps the source's, so that the way back gives the same bits.

    `tokenizer` is a folder with tokenizer and config.json for --to hf; None: the ones kept in the checkpoint.
    """

    model: ModelConfig | None = None
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: Dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = export.SHARD_BYTES
    check: Check = Check.auto
    overwrite: bool = False


@dataclass
class Report:
    """What a conversion did. Peak memory is the largest resident size of this process; `start_mib` was resident before any tensor."""

    tensors: int
    bytes: int
    dtype: str
    experts_per_layer: int
    largest_tensor_mib: float
    start_mib: float
    peak_mib: float
    write_s: float
    compare_s: float
    logits: str
    notes: list[str]

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        facts = asdict(self)
        notes = facts.pop("notes")
        return [f"{name}: {round(value, 2) if isinstance(value, float) else value}" for name, value in facts.items()] + notes


def convert(to: str, source: Path, target: Path, options: Options) -> Report:
    """Convert `source` into the new folder `target`; `to` is "megatron" or "hf". Must run outside of a process group.

    Raises:
        FileNotFoundError: source or tokenizer is not there or not whole.
        ValueError: the target exists, names or shapes do not fit, something is damaged, or a check failed. No target is left then.
    """
    if to not in ("megatron", "hf"):
        raise ValueError(f"--to {to}: allowed are megatron and hf")
    with _whole(source, target, overwrite=options.overwrite) as partial:
        return _to_megatron(source, partial, options) if to == "megatron" else _to_hf(source, partial, options)


@contextmanager
def _whole(source: Path, target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `target` if the block ends well, and is removed if not."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: give another folder, or --overwrite to replace it when the new one is checked")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{target} holds the source {source}: give another folder")
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- the two directions -----------------------------------------------------------------------------------------------------


def _to_megatron(source: Path, partial: Path, options: Options) -> Report:
    if (source / ".metadata").exists() or (source / "latest").exists():
        raise ValueError(f"{source} is a Megatron checkpoint already: use --to hf, or give a Hugging Face folder")
    folder = HfFolder(source)
    model = _model(options.model, source)
    hf_mapping.check_fit(model, folder)
    stored = {entry.dtype for name, entry in folder.tensors.items() if name in hf_mapping.hf_shapes(model)}
    dtype = _dtype(options.dtype, stored, source)
    check_layout(model, options.layout)
    plan = _plan(model, ParallelConfig(), dtype)
    plans = _plan(model, options.layout, dtype)
    started, start_mib = time.perf_counter(), psutil.Process().memory_info().rss / 2**20
    bar = progress(range(sum(len(rank.shards) for rank in plans)), desc="write")

    def fetch(shard: Shard) -> torch.Tensor:
        next(bar)
        return _fill(folder, shard, DTYPES[dtype])

    write_checkpoint(partial, plans, DTYPES[dtype], fetch, {"step": 0, "version": 0})
    next(bar, None)
    (partial / "hf").mkdir()
    export.copy_tokenizer(source, partial / "hf")
    _copy_config(source, partial / "hf", model, dtype)
    notes = (
        [] if len(folder.tensors) == len(hf_mapping.hf_shapes(model)) else ["lm_head.weight of the source is left out: embeddings are tied"]
    )
    return _prove(_Proof(model, dtype, plan, folder, partial, source), started, start_mib, options.check, notes)


def _to_hf(source: Path, partial: Path, options: Options) -> Report:
    reader = CheckpointReader(checkpoint.latest(source) or source)
    kept = options.tokenizer or reader.folder / "hf"
    if not kept.is_dir():
        raise FileNotFoundError(f"{reader.folder} keeps no tokenizer (hf/): give --tokenizer FOLDER, with tokenizer and config.json")
    model = _model(options.model, kept)
    dtype = _dtype(options.dtype, reader.dtypes(), source)
    plan = _plan(model, ParallelConfig(), dtype)
    reader.check_fit(model.name, plan[0].shards)
    started, start_mib = time.perf_counter(), psutil.Process().memory_info().rss / 2**20
    with HfWriter(partial, hf_mapping.hf_shapes(model), DTYPES[dtype], options.max_shard_bytes) as writer:
        for shard in progress(plan[0].shards, desc="write"):
            _write_tensors(writer, shard, reader.read(shard).to(DTYPES[dtype]))
    export.copy_tokenizer(kept, partial)
    _copy_config(kept, partial, model, dtype)
    notes = ["optimizer state of the source is left out: a Hugging Face folder holds weights"] if reader.has_optimizer else []
    return _prove(_Proof(model, dtype, plan, HfFolder(partial), reader.folder, partial), started, start_mib, options.check, notes)


def _fill(folder: HfFolder, shard: Shard, dtype: torch.dtype) -> torch.Tensor:
    """A shard's values out of the Hugging Face folder."""
    if len(shard.parts) == 1:  # the common case: no second copy
        piece = shard.parts[0]
        return folder.read(piece.name, piece.index).to(dtype).contiguous().view(shard.sizes)
    values = torch.empty(shard.sizes[-shard.dims :], dtype=dtype)
    for piece in shard.parts:
        values[piece.rows].copy_(folder.read(piece.name, piece.index))
    return values.view(shard.sizes)


def _write_tensors(writer: HfWriter, shard: Shard, values: torch.Tensor) -> None:
    """The whole Hugging Face tensors that a shard of the undivided model holds."""
    for name in dict.fromkeys(piece.name for piece in shard.parts):
        pieces = [piece for piece in shard.parts if piece.name == name]
        if len(pieces) == 1:
            writer.write(name, values[pieces[0].rows])
            continue
        whole = values.new_empty(writer.entries[name].shape)
        for piece in pieces:
            whole[piece.index].copy_(values[piece.rows])
        writer.write(name, whole)


# --- what is converted ------------------------------------------------------------------------------------------------------


def _model(given: ModelConfig | None, folder: Path) -> ModelConfig:
    """The model as its config.json says, if that agrees with what was given."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: it belongs to the weights")
    said = export.model_of(json.loads(path.read_text()), str(path))
    if given is None:
        return said
    ignored = ["name", "hf_path", "init_std", "max_positions"] + (["ffn_hidden_size"] if said.num_experts else [])
    differ = [
        f"{name} {getattr(said, name)} where the model has {value}"
        for name, value in asdict(given).items()
        if name not in ignored and getattr(said, name) != value
    ]
    hf_mapping.refuse_faults(f"{path} is not of model {given.name!r} (give the right model=, or none)", differ)
    return given


def _dtype(wanted: Dtype | None, found: set[torch.dtype], source: Path) -> str:
    """ "fp32" or "bf16": the wanted one, else the source's own."""
    if wanted is not None:
        return str(wanted)
    names = [name for name, dtype in DTYPES.items() if found == {dtype}]
    if not names:
        raise ValueError(f"{source} has tensors of {', '.join(sorted(map(str, found)))}: choose with precision=fp32 or precision=bf16")
    return names[0]


def check_layout(model: ModelConfig, layout: ParallelConfig) -> None:
    """Raises ValueError with every part of the model that the layout cannot divide."""
    faults = world_faults(layout, processes_multiple(layout)) or model_faults(model, layout)
    if not model.num_experts and layout.expert_tensor > 1:
        faults.append(
            f"parallel.expert_tensor={layout.expert_tensor} cuts experts, and a dense model has none; set parallel.expert_tensor=1"
        )
    hf_mapping.refuse_faults(f"the layout does not fit model {model.name!r}", faults)


def _plan(model: ModelConfig, layout: ParallelConfig, dtype: str) -> list[RankPlan]:
    """What every rank of the layout holds, checked to be the whole model once."""
    config = Config(
        model=model,
        parallel=ParallelConfig(
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
        ),
        precision=PrecisionConfig(name=dtype, params=Dtype(dtype)),
        kernels=KernelsConfig(layers=LayerSpec.local),  # names in checkpoints are the same for both kinds of layers
    )
    plans = [plan_rank(config, rank) for rank in progress(range(processes_multiple(config.parallel)), desc="plan")]
    check_cover(model, [shard for rank in plans for shard in rank.shards])
    return plans


def _copy_config(kept: Path, target: Path, model: ModelConfig, dtype: str) -> None:
    """The source's own config.json and generation_config.json, with the dtype that was written."""
    config = json.loads((kept / "config.json").read_text())
    config.pop("torch_dtype", None)
    write_json(target / "config.json", {**config, "dtype": export.TORCH_NAMES[dtype]})
    if (kept / "generation_config.json").is_file():
        shutil.copy2(kept / "generation_config.json", target / "generation_config.json")


# --- proof ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Proof:
    """Both sides of a finished conversion."""

    model: ModelConfig
    dtype: str
    plan: list[RankPlan]
    hf: HfFolder
    megatron: Path
    hf_path: Path


def _prove(sides: _Proof, started: float, start_mib: float, check: Check, notes: list[str]) -> Report:
    wrote = time.perf_counter()
    experts = compare_weights(sides.model, sides.plan[0].shards, sides.hf, CheckpointReader(sides.megatron), DTYPES[sides.dtype])
    compared = time.perf_counter()
    peak = _peak_mib()
    shapes = hf_mapping.hf_shapes(sides.model)
    itemsize = DTYPES[sides.dtype].itemsize
    boxes = [math.prod(shard.sizes) for shard in sides.plan[0].shards] + [math.prod(shape) for shape in shapes.values()]
    return Report(
        tensors=len(shapes),
        bytes=sum(map(math.prod, shapes.values())) * itemsize,
        dtype=sides.dtype,
        experts_per_layer=experts,
        largest_tensor_mib=max(boxes) * itemsize / 2**20,
        start_mib=start_mib,
        peak_mib=peak,
        write_s=wrote - started,
        compare_s=compared - wrote,
        logits=check_logits(sides.model, sides.hf_path, sides.megatron, check),
        notes=notes,
    )


def _peak_mib() -> float:
    return peak_rss_bytes(psutil.Process()) / 2**20
