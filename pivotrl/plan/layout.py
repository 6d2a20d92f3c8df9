"""The layout rules, in one place and without torch: which parallel.* sizes carry which model on how many processes.

The rules are Megatron-Core 0.19.2's own (tests/plan/test_layout.py builds every layout of a random grid and compares) and those
of Transformer Engine's FP8 (from its documentation: not testable without a GPU).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from pivotrl.config import Config, Dispatcher, Dtype, Fp8Recipe, LayerSpec, ModelConfig, ParallelConfig

SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
MAX_VIRTUAL = 4  # stages a rank that the search tries; more cost messages and memory for ever smaller bubbles
FP8_MULTIPLE, FP8_BLOCK = 16, 128


def grids(parallel: ParallelConfig) -> tuple[tuple[str, int], tuple[str, int]]:
    """The two ways in which Megatron cuts the processes, by name and size: dense layers, and experts."""
    return (
        ("tensor x pipeline x context", parallel.tensor * parallel.pipeline * parallel.context),
        ("expert x expert_tensor x pipeline", parallel.expert * parallel.expert_tensor * parallel.pipeline),
    )


def processes_multiple(parallel: ParallelConfig) -> int:
    """The layout runs on multiples of this many processes."""
    return math.lcm(*(size for _, size in grids(parallel)))


def token_multiple(config: Config) -> int:
    """Rows are padded to a multiple of this many tokens.

    Context parallelism takes two chunks a rank, sequence parallelism cuts those, and FP8 products want 16 tokens in every rank's share.
    """
    shares = config.parallel.tensor * config.parallel.context
    cut = shares * 2 if config.parallel.context > 1 else shares
    return cut if config.precision.fp8 is None else math.lcm(cut, FP8_MULTIPLE * shares)


def world_faults(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Why `world_size` processes cannot carry the layout, whatever the model; one sentence each, with the fix."""
    sizes = {name: getattr(parallel, name) for name in SIZES}
    wrong = [f"parallel.{name}={size}: sizes start at 1" for name, size in sizes.items() if size is not None and size < 1]
    if wrong:
        return wrong
    found = [
        f"parallel: {name} = {size} does not divide the {world_size} processes started; "
        f"start a multiple of {size} (torchrun --nproc-per-node) or change parallel.*"
        for name, size in grids(parallel)
        if world_size % size
    ]
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        found.append(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves pipeline stages, and parallel.pipeline=1 has none; "
            "set parallel.virtual_pipeline=null or parallel.pipeline of 2 or more"
        )
    return found


def faults(config: Config, world_size: int) -> list[str]:
    """Why `world_size` processes cannot train the model in the layout; empty when they can. One sentence each, with sizes and fix."""
    found = world_faults(config.parallel, world_size)
    if any("sizes start at 1" in fault for fault in found):
        return found
    return found + model_faults(config.model, config.parallel) + setting_faults(config) + _fp8_faults(config)


def model_faults(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Why the layout cannot divide the model, on however many processes; one sentence each, with the fix."""
    divided = [  # (what, size, by which field, parts)
        ("model.num_attention_heads", model.num_attention_heads, "tensor", parallel.tensor),
        ("model.num_query_groups", model.num_query_groups, "tensor", parallel.tensor),
        ("model.vocab_size", model.vocab_size, "tensor", parallel.tensor),
        ("model.num_layers", model.num_layers, "pipeline", parallel.pipeline),
    ]
    if model.num_experts:
        divided.append(("model.num_experts", model.num_experts, "expert", parallel.expert))
        divided.append(("model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor", parallel.expert_tensor))
    else:
        divided.append(("model.ffn_hidden_size", model.ffn_hidden_size, "tensor", parallel.tensor))
    found = [_indivisible(*entry) for entry in divided if entry[1] % entry[3]]
    virtual, per_rank = parallel.virtual_pipeline, model.num_layers // parallel.pipeline
    if virtual is not None and parallel.pipeline > 1 and model.num_layers % parallel.pipeline == 0 and per_rank % virtual:
        fits = _listed(size for size in range(1, per_rank + 1) if per_rank % size == 0)
        found.append(
            f"model.num_layers={model.num_layers} gives {per_rank} layers a rank, not a multiple of "
            f"parallel.virtual_pipeline={virtual}; set {fits}"
        )
    if not model.num_experts and parallel.expert > 1:
        found.append(f"parallel.expert={parallel.expert} shares out experts, and model {model.name!r} has none; set parallel.expert=1")
    if model.num_attention_heads % model.num_query_groups:
        found.append(
            f"model.num_attention_heads={model.num_attention_heads} is not a multiple of "
            f"model.num_query_groups={model.num_query_groups}; each group serves as many heads: correct the model"
        )
    if model.num_experts and not 1 <= model.experts_per_token <= model.num_experts:
        found.append(
            f"model.experts_per_token={model.experts_per_token} must lie in 1 to model.num_experts={model.num_experts}; correct the model"
        )
    return found


def _indivisible(name: str, size: int, field: str, parts: int) -> str:
    fits = _listed(n for n in range(1, min(size, 64) + 1) if size % n == 0)
    return f"{name}={size} is not a multiple of parallel.{field}={parts}; set parallel.{field} to {fits}"


def _listed(sizes: Iterator[int], limit: int = 8) -> str:
    found = [str(size) for size in sizes]
    return " or ".join(filter(None, [", ".join(found[:limit][:-1]), found[:limit][-1]]))


def check(config: Config, world_size: int) -> None:
    """Raises ValueError with all faults of the layout, if there are any."""
    if found := faults(config, world_size):
        raise ValueError("; ".join(found))


def setting_faults(config: Config) -> list[str]:
    """Kernels and precisions that contradict one another or the layout, whatever the machine; what a machine lacks, kernels.check says."""
    precision, parallel, kernels = config.precision, config.parallel, config.kernels
    found = []
    if precision.main_grads == Dtype.bf16 and precision.params == Dtype.fp32:
        found.append("precision.main_grads=bf16: gradients of fp32 parameters are fp32; set precision.main_grads=fp32")
    if kernels.dispatcher == Dispatcher.deepep and not config.model.num_experts:
        found.append(f"kernels.dispatcher=deepep: model {config.model.name!r} has no experts; set kernels.dispatcher=alltoall")
    if kernels.dispatcher == Dispatcher.deepep and parallel.expert * parallel.expert_tensor == 1:
        found.append(
            "kernels.dispatcher=deepep moves tokens between ranks, and parallel.expert=1 keeps them; set kernels.dispatcher=alltoall"
        )
    if precision.fp8 is None:
        return found
    if precision.params != Dtype.bf16:
        found.append(
            f"precision.fp8={precision.fp8} works on bf16 weights, not precision.params={precision.params}; set precision.params=bf16"
        )
    if kernels.layers == LayerSpec.local:
        found.append(f"precision.fp8={precision.fp8} needs Transformer Engine's layers; set kernels.layers=auto")
    return found


def _fp8_faults(config: Config) -> list[str]:
    """Sides of the layers' matrix products that FP8 cannot take."""
    precision, model, parallel = config.precision, config.model, config.parallel
    if precision.fp8 is None:
        return []
    multiple = FP8_BLOCK if precision.fp8 == Fp8Recipe.blockwise else FP8_MULTIPLE
    heads = model.head_dim * model.num_attention_heads // parallel.tensor
    sides = [
        ("model.hidden_size", model.hidden_size),
        ("head_dim x heads / tensor", heads),
        ("head_dim x (heads + 2 x groups) / tensor", heads + 2 * model.head_dim * model.num_query_groups // parallel.tensor),
    ]
    if model.num_experts:
        sides.append(("moe_ffn_hidden_size / expert_tensor", model.moe_ffn_hidden_size // parallel.expert_tensor))
    else:
        sides.append(("ffn_hidden_size / tensor", model.ffn_hidden_size // parallel.tensor))
    return [
        f"precision.fp8={precision.fp8}: {name} = {size} is not a multiple of {multiple}, which its matrix products need; "
        "lower the parallel size or set precision.fp8=null"
        for name, size in sides
        if size % multiple
    ]


def row_faults(config: Config) -> dict[str, str]:
    """Why training would refuse the rows, each with the override that mends it: a row holds the longest prompt and action."""
    longest, limit = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens, config.batching.max_row_tokens
    if longest <= limit:
        return {}
    fix = f"batching.max_row_tokens={longest}"
    sizes = f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}"
    return {f"batching.max_row_tokens={limit} does not hold the longest prompt and action, {sizes}; set {fix} or lower those": fix}


def warnings(config: Config, world_size: int) -> list[str]:
    """What runs, but badly or not as it looks; one sentence each."""
    parallel, per_node, found = config.parallel, config.cluster.gpus_per_node, []
    if any(fault for fault in world_faults(parallel, world_size)):
        return found
    if per_node:
        experts = parallel.expert * parallel.expert_tensor
        slow = (("tensor", parallel.tensor), ("tensor x context", parallel.tensor * parallel.context), ("expert x expert_tensor", experts))
        for name, size in slow:
            if size > per_node:
                found.append(f"{name} = {size} spans nodes of {per_node} GPUs: its collectives run over the network")
                break
    if parallel.expert_tensor > 1 and not config.model.num_experts:
        found.append(f"parallel.expert_tensor={parallel.expert_tensor} does nothing: model {config.model.name!r} has no experts")
    multiple, limit = token_multiple(config), config.batching.max_row_tokens
    if limit % multiple:
        found.append(
            f"batching.max_row_tokens={limit} is not a multiple of {multiple}, so that full rows are padded; "
            f"set {-(-limit // multiple) * multiple}"
        )
    return found


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def candidates(config: Config, world_size: int) -> Iterator[ParallelConfig]:
    """Every legal layout of the sizes in SIZES for `world_size` processes, with at most MAX_VIRTUAL virtual stages."""
    model, base = config.model, config.parallel
    tensors = [t for t in divisors(math.gcd(model.num_attention_heads, model.num_query_groups)) if world_size % t == 0]
    pipelines = [p for p in divisors(model.num_layers) if world_size % p == 0]
    experts = [e for e in divisors(model.num_experts or 1) if world_size % e == 0]
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if world_size % (tensor * pipeline):
            continue
        virtuals = [None, *(v for v in range(2, MAX_VIRTUAL + 1) if pipeline > 1 and (model.num_layers // pipeline) % v == 0)]
        contexts = divisors(world_size // (tensor * pipeline))
        shards = sorted({1, tensor}) if model.num_experts else [1]
        for virtual, context, expert, shard in itertools.product(virtuals, contexts, experts, shards):
            layout = dataclasses.replace(
                base, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context, expert=expert, expert_tensor=shard
            )
            if not faults(dataclasses.replace(config, parallel=layout), world_size):
                yield layout


def nearest(config: Config, world_size: int) -> ParallelConfig | None:
    """The legal layout with the fewest changed sizes, and among those the closest ones; None when the model has none here."""
    return min(candidates(config, world_size), key=lambda layout: _distance(config.parallel, layout), default=None)


def _distance(wanted: ParallelConfig, layout: ParallelConfig) -> tuple[int, float]:
    pairs = [(getattr(wanted, name) or 1, getattr(layout, name) or 1) for name in SIZES]
    return sum(a != b for a, b in pairs), sum(abs(math.log2(max(a, 1) / b)) for a, b in pairs)


def overrides(wanted: ParallelConfig, layout: ParallelConfig) -> list[str]:
    """The Hydra overrides that turn one layout into the other."""
    fields = [field.name for field in dataclasses.fields(ParallelConfig)]
    values = {name: getattr(layout, name) for name in fields if getattr(wanted, name) != getattr(layout, name)}
    return [f"parallel.{name}={'null' if value is None else value}" for name, value in values.items()]
