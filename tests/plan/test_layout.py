"""The layout rules against Megatron itself, and what they say to a person."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest

from pivotrl.cluster_config import ClusterConfig
from pivotrl.config import Config, ModelConfig, ParallelConfig
from pivotrl.megatron import parallel
from pivotrl.megatron.simulate import build_on_meta, simulated_rank
from pivotrl.plan import layout
from pivotrl.recipe import compose

SHAPE = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 12, "num_query_groups": 6, "head_dim": 8, "ffn_hidden_size": 24}
MODELS = {
    "dense": ModelConfig(name="dense", **SHAPE, num_layers=4),
    "tied": ModelConfig(name="tied", **SHAPE, num_layers=6, tie_embeddings=True),
    "words": ModelConfig(name="words", **(SHAPE | {"vocab_size": 50}), num_layers=4),  # one fault each, not hidden by another
    "width": ModelConfig(name="width", **(SHAPE | {"ffn_hidden_size": 20}), num_layers=4),
    "moe": ModelConfig(name="moe", **SHAPE, num_layers=4, num_experts=6, experts_per_token=2, moe_ffn_hidden_size=12),
    "deep": ModelConfig(name="deep", **SHAPE, num_layers=8, num_experts=4, experts_per_token=4, moe_ffn_hidden_size=10),
}


def random_layouts(count: int) -> list[tuple[str, ParallelConfig, int]]:
    """Layouts of which about half are legal, each with the reasons mixed."""
    rng, found = random.Random(0), []
    while len(found) < count:
        sizes = {name: rng.choice((1, 1, 1, 2, 2, 3, 4)) for name in layout.SIZES if name != "virtual_pipeline"}
        parallel_config = ParallelConfig(**sizes, virtual_pipeline=rng.choice((None, None, None, 1, 2, 3)))
        multiple = layout.processes_multiple(parallel_config)
        world = rng.choice((multiple, multiple, multiple, 2 * multiple, multiple + rng.choice((1, 2))))
        if world <= 96:
            found.append((rng.choice(list(MODELS)), parallel_config, world))
    return found


def builds(config: Config, world_size: int) -> str:
    """Empty when Megatron builds the first and the last rank, else what it says."""
    for rank in {0, world_size - 1}:
        try:
            with simulated_rank(config.parallel, rank=rank, world_size=world_size):
                build_on_meta(config)
        except (ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_no_fault_exactly_where_megatron_builds(monkeypatch):
    monkeypatch.setattr(parallel, "check_layout", lambda config, world_size: None)  # our own rules must not answer for Megatron
    parallel.stop()
    legal, wrong = 0, []
    for name, sizes, world in random_layouts(600):
        config = Config(model=MODELS[name], parallel=sizes)
        found, said = layout.faults(config, world), builds(config, world)
        legal += not said
        if bool(found) != bool(said):
            wrong.append((name, sizes, world, found, said))
    assert wrong == []
    assert 90 < legal < 510, "the grid must hold both kinds"


WRONG = [  # (overrides, processes, words of the fault)
    (["parallel.tensor=4"], 4, "model.num_query_groups=2 is not a multiple of parallel.tensor=4; set parallel.tensor to 1 or 2"),
    (["parallel.pipeline=3"], 3, "model.num_layers=4 is not a multiple of parallel.pipeline=3; set parallel.pipeline to 1, 2 or 4"),
    (["parallel.expert=3"], 3, "model.num_experts=8 is not a multiple of parallel.expert=3"),
    (["parallel.expert_tensor=3"], 3, "model.moe_ffn_hidden_size=128 is not a multiple of parallel.expert_tensor=3"),
    (["model.vocab_size=1023", "parallel.tensor=2"], 2, "model.vocab_size=1023 is not a multiple of parallel.tensor=2"),
    (["model.num_experts=0", "model.ffn_hidden_size=255", "parallel.tensor=2"], 2, "model.ffn_hidden_size=255"),
    (["model.num_experts=0", "parallel.expert=2"], 2, "model 'tiny' has none; set parallel.expert=1"),
    (["parallel.virtual_pipeline=2"], 1, "parallel.pipeline=1 has none"),
    (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
        2,
        "gives 2 layers a rank, not a multiple of parallel.virtual_pipeline=3; set 1 or 2",
    ),
    (["parallel.context=0"], 1, "parallel.context=0: sizes start at 1"),
    (["parallel.tensor=2"], 3, "tensor x pipeline x context = 2 does not divide the 3 processes"),
    (["model.experts_per_token=9"], 1, "model.experts_per_token=9 must lie in 1 to model.num_experts=8"),
    (["precision.fp8=tensorwise"], 1, "works on bf16 weights"),
    (["precision=bf16", "precision.fp8=tensorwise", "kernels.layers=local"], 1, "needs Transformer Engine's layers"),
    (["precision=bf16", "precision.fp8=tensorwise", "model.moe_ffn_hidden_size=24"], 1, "= 24 is not a multiple of 16"),
    (["precision=bf16", "precision.fp8=blockwise", "model.hidden_size=192"], 1, "= 192 is not a multiple of 128"),
    (["precision.main_grads=bf16"], 1, "gradients of fp32 parameters are fp32"),
    (["kernels.dispatcher=deepep"], 1, "set kernels.dispatcher=alltoall"),
]


@pytest.mark.parametrize(("overrides", "processes", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_each_fault_is_one_sentence_with_sizes_and_fix(overrides, processes, words):
    found = layout.faults(compose(*overrides), processes)
    assert any(words in fault for fault in found), found
    assert all("\n" not in fault and (";" in fault or ": " in fault) for fault in found)


def test_fp8_divides_what_a_rank_holds():
    config = compose("model=qwen3_30b_a3b", "precision=bf16", "precision.fp8=tensorwise", "parallel.expert_tensor=32")
    assert any("moe_ffn_hidden_size / expert_tensor = 24" in fault for fault in layout.faults(config, 32))
    config.parallel.expert_tensor = 16  # 768 / 16 = 48 = 3 x 16
    assert layout.faults(config, 16) == []


def test_warnings_name_slow_and_wasteful_layouts():
    config = compose("parallel.tensor=2", "parallel.context=2", "batching.max_row_tokens=4098", "cluster.gpus_per_node=2")
    slow, padded = layout.warnings(config, 4)
    assert "tensor x context = 4 spans nodes of 2 GPUs" in slow and "set 4104" in padded
    assert layout.warnings(replace(config, cluster=ClusterConfig(gpus_per_node=4)), 4) == [padded]
    assert layout.warnings(config, 3) == [], "an illegal layout has faults, not warnings"


def test_nearest_changes_as_little_as_it_can_and_is_legal():
    config = compose("parallel.tensor=4", "parallel.pipeline=2")
    closest = layout.nearest(config, 8)
    assert layout.overrides(config.parallel, closest) == ["parallel.tensor=2"]
    assert layout.faults(replace(config, parallel=closest), 8) == []
    config.parallel = ParallelConfig(pipeline=2, virtual_pipeline=3)
    assert layout.overrides(config.parallel, layout.nearest(config, 2)) == ["parallel.virtual_pipeline=2"]
    config.parallel = ParallelConfig(tensor=2, virtual_pipeline=2)
    assert layout.overrides(config.parallel, layout.nearest(config, 2)) == ["parallel.virtual_pipeline=null"]


def test_candidates_are_legal_and_complete_for_small_grids():
    config = compose()
    found = list(layout.candidates(config, 4))
    assert all(layout.faults(replace(config, parallel=parallel_config), 4) == [] for parallel_config in found)
    assert len({str(parallel_config) for parallel_config in found}) == len(found)
    assert {(p.tensor, p.pipeline, p.context) for p in found} == {
        (t, p, c) for t in (1, 2) for p in (1, 2, 4) for c in (1, 2, 4) if 4 % (t * p * c) == 0
    }


MULTIPLES = [  # tensor, context, bf16, fp8
    (1, 1, 1, 16),
    (4, 1, 4, 64),
    (1, 4, 8, 64),
    (2, 3, 12, 96),
    (3, 1, 3, 48),
]


@pytest.mark.parametrize(("tensor", "context", "bf16", "fp8"), MULTIPLES)
def test_rows_are_padded_to_what_every_share_needs(tensor, context, bf16, fp8):
    sizes = [f"parallel.tensor={tensor}", f"parallel.context={context}"]
    assert layout.token_multiple(compose("precision=bf16", *sizes)) == bf16
    assert layout.token_multiple(compose("precision=fp8_blockwise", *sizes)) == fp8
    assert fp8 % (2 * context if context > 1 else 1) == 0 and fp8 // (tensor * context) % 16 == 0


def test_rules_load_without_torch():
    code = "import sys, pivotrl.plan; print(*sorted({'torch', 'megatron', 'numpy', 'hydra'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
