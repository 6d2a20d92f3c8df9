"""Conversion is exact both ways, in bounded memory, and a fault of source, table or result leaves no target behind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from hf_cases import DENSE, MODELS, MOE, REPOSITORY, assert_same, random_folder, rewrite, tensors_of  # noqa: E402

from pivotrl.config import Config, Dtype, ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from pivotrl.export import hf_config, model_of  # noqa: E402
from pivotrl.megatron import checkpoint, hf_mapping, parallel  # noqa: E402
from pivotrl.megatron.conversion import Options, check_layout, convert  # noqa: E402
from pivotrl.megatron.conversion_proof import Check  # noqa: E402
from pivotrl.megatron.hf_folder import INDEX  # noqa: E402
from pivotrl.megatron.policy import Policy  # noqa: E402
from pivotrl.recipe import compose  # noqa: E402

WEIGHTS = Options(check=Check.weights)


@pytest.fixture(autouse=True)
def outside_of_process_groups():
    parallel.stop()
    yield
    parallel.stop()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both models, in fp32, in one file each."""
    place = tmp_path_factory.mktemp("hf")
    return {name: random_folder(model, place / name) for name, model in MODELS.items()}


# --- exact ------------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one process": ("moe", ParallelConfig(), 1),
    "tp2-pp2-ep4": ("moe", ParallelConfig(tensor=2, pipeline=2, expert=4), 8),
    "tp4-etp2-pp2-vpp2": ("moe", ParallelConfig(tensor=4, expert=2, expert_tensor=2, pipeline=2, virtual_pipeline=2), 8),
    "tied": ("dense", ParallelConfig(), 1),
    "tied-tp2-pp4": ("dense", ParallelConfig(tensor=2, pipeline=4), 8),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip_keeps_every_bit_and_a_policy_loads_what_was_cut(name, folders, tmp_path):
    model, layout, processes = LAYOUTS[name]
    report = convert("megatron", folders[model], tmp_path / "m", Options(layout=layout, check=Check.weights))
    assert len(list((tmp_path / "m").glob("*.distcp"))) == processes
    assert report.experts_per_layer == MODELS[model].num_experts and report.tensors == len(hf_mapping.hf_shapes(MODELS[model]))
    convert("hf", tmp_path / "m", tmp_path / "hf", Options(check=Check.weights, max_shard_bytes=50_000))
    assert_same(tmp_path / "hf", folders[model])
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    policy = Policy(Config(model=MODELS[model]), None)
    assert checkpoint.load(policy, tmp_path / "m") == (0, 0)
    expected = tensors_of(folders[model])
    assert all(torch.equal(tensor, expected[key]) for key, tensor in policy.hf_weights())


def test_the_way_back_needs_nothing_but_the_checkpoint(folders, tmp_path):
    convert("megatron", folders["moe"], tmp_path / "m", WEIGHTS)
    convert("hf", tmp_path / "m", tmp_path / "hf", WEIGHTS)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads((folders["moe"] / name).read_text())


def test_bf16_stays_bf16_and_odd_values_survive(tmp_path):
    folder = random_folder(MOE, tmp_path / "source", torch.bfloat16)

    def spoil(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][3, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])

    rewrite(folder, spoil)
    report = convert("megatron", folder, tmp_path / "m", Options(layout=ParallelConfig(tensor=2, expert=2), check=Check.weights))
    assert report.dtype == "bf16"
    convert("hf", tmp_path / "m", tmp_path / "hf", WEIGHTS)
    assert_same(tmp_path / "hf", folder)


def test_precision_asked_for_is_written(folders, tmp_path):
    convert("megatron", folders["moe"], tmp_path / "m", Options(dtype=Dtype.bf16, check=Check.weights))
    convert("hf", tmp_path / "m", tmp_path / "hf", Options(dtype=Dtype.fp32, check=Check.weights))
    found, source = tensors_of(tmp_path / "hf"), tensors_of(folders["moe"])
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in source.items())
    assert json.loads((tmp_path / "m" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_training_checkpoint_without_kept_tokenizer(folders, tmp_path):
    policy = Policy(Config(model=DENSE), OptimizerConfig())
    policy.load_hf(folders["dense"])
    checkpoint.save(policy, tmp_path / "run", 4)
    parallel.stop()
    with pytest.raises(FileNotFoundError, match="keeps no tokenizer .hf/.: give --tokenizer FOLDER"):
        convert("hf", tmp_path / "run", tmp_path / "hf", WEIGHTS)
    report = convert("hf", tmp_path / "run", tmp_path / "hf", Options(tokenizer=folders["dense"], check=Check.weights))
    assert report.notes == ["optimizer state of the source is left out: a Hugging Face folder holds weights"]
    assert_same(tmp_path / "hf", folders["dense"])


def test_written_output_layer_of_a_tied_model_is_left_out_aloud(folders, tmp_path):
    folder = shutil.copytree(folders["dense"], tmp_path / "source")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert convert("megatron", folder, tmp_path / "m", WEIGHTS).notes == ["lm_head.weight of the source is left out: embeddings are tied"]


# --- a damaged source -------------------------------------------------------------------------------------------------------


def lose_expert(tensors):
    for name in [name for name in tensors if ".2.mlp.experts.7." in name]:
        del tensors[name]
    tensors["model.layers.9.odd"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(3)


def lose_many(tensors):
    for name in [name for name in tensors if ".experts." in name][:50]:
        del tensors[name]


def test_every_fault_of_the_source_is_in_one_error(folders, tmp_path):
    folder = rewrite(shutil.copytree(folders["moe"], tmp_path / "source"), lose_expert)
    with pytest.raises(ValueError) as error:
        convert("megatron", folder, tmp_path / "m", WEIGHTS)
    for fault in (
        "does not fit model",
        *(f"missing model.layers.2.mlp.experts.7.{name}_proj.weight" for name in ("gate", "up", "down")),
        "unexpected model.layers.9.odd",
        "model.norm.weight is (3,), the model wants (64,)",
    ):
        assert fault in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    rewrite(shutil.copytree(folders["moe"], tmp_path / "many"), lose_many)
    with pytest.raises(ValueError, match="; and 30 more$"):
        convert("megatron", tmp_path / "many", tmp_path / "m", WEIGHTS)


def test_truncated_shard_and_absent_file_are_named(folders, tmp_path):
    folder = random_folder(MOE, tmp_path / "source", max_shard_bytes=200_000)
    file = sorted(folder.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{file.name} is not a whole safetensors file \(it has"):
        convert("megatron", folder, tmp_path / "m", WEIGHTS)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{INDEX} names files that are not there: {file.name}; copy the folder again"):
        convert("megatron", folder, tmp_path / "m", WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_corrupted_chunk_is_found(folders, tmp_path):
    convert("megatron", folders["moe"], tmp_path / "m", WEIGHTS)
    file = tmp_path / "m" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.index(tensors_of(folders["moe"])["model.layers.1.mlp.experts.3.down_proj.weight"].numpy().tobytes())
    data[at + 100] ^= 16
    file.write_bytes(data)
    message = r"__0_0\.distcp is damaged in decoder\.layers\.mlp\.experts\.experts\.linear_fc2\.weight at \(1, 3, 0, 0\)"
    with pytest.raises(ValueError, match=message):
        convert("hf", tmp_path / "m", tmp_path / "hf", WEIGHTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


# --- what cannot be meant ---------------------------------------------------------------------------------------------------


def test_existing_target_is_kept_until_a_good_one_is_there(folders, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(ValueError, match="exists: give another folder, or --overwrite"):
        convert("megatron", folders["dense"], target, WEIGHTS)
    again = dataclasses.replace(WEIGHTS, overwrite=True)
    with pytest.raises(ValueError, match="is not a multiple of parallel.tensor=3"):
        convert("megatron", folders["dense"], target, dataclasses.replace(again, layout=ParallelConfig(tensor=3)))
    assert (target / "precious").exists()
    convert("megatron", folders["dense"], target, again)
    assert not (target / "precious").exists() and (target / ".metadata").exists()
    for inside in (folders["dense"], folders["dense"].parent):
        with pytest.raises(ValueError, match="holds the source"):
            convert("megatron", folders["dense"], inside, again)


def test_wrong_direction_and_wrong_folders_are_named(folders, tmp_path):
    convert("megatron", folders["dense"], tmp_path / "m", WEIGHTS)
    for to, source, message in (
        ("megatron", tmp_path / "m", "is a Megatron checkpoint already"),
        ("hf", folders["dense"], "is no Megatron checkpoint"),
        ("hf", tmp_path / "nowhere", "nowhere is no folder"),
        ("nemo", folders["dense"], "--to nemo: allowed are megatron and hf"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert(to, source, tmp_path / "out", WEIGHTS)


def test_model_that_was_not_meant_is_named_by_its_fields(folders, tmp_path):
    wrong = dataclasses.replace(MOE, rope_theta=1e4, experts_per_token=4, init_std=0.5, ffn_hidden_size=1)
    with pytest.raises(ValueError) as error:
        convert("megatron", folders["moe"], tmp_path / "m", dataclasses.replace(WEIGHTS, model=wrong))
    assert "rope_theta 1000000.0 where the model has 10000.0" in str(error.value)
    assert "experts_per_token 2 where the model has 4" in str(error.value)
    assert "init_std" not in str(error.value) and "ffn_hidden_size" not in str(error.value)
    convert("megatron", folders["moe"], tmp_path / "m", dataclasses.replace(WEIGHTS, model=MOE))


def test_dtypes_that_leave_a_choice_are_refused(tmp_path):
    folder = random_folder(DENSE, tmp_path / "source", torch.float16)
    with pytest.raises(ValueError, match=r"has tensors of torch\.float16: choose with precision=fp32 or precision=bf16"):
        convert("megatron", folder, tmp_path / "m", WEIGHTS)
    assert convert("megatron", folder, tmp_path / "m", dataclasses.replace(WEIGHTS, dtype=Dtype.fp32)).dtype == "fp32"


@pytest.mark.parametrize(
    ("model", "layout", "messages"),
    [
        (MOE, ParallelConfig(tensor=8), ["num_query_groups=4 is not a multiple of parallel.tensor=8"]),
        (MOE, ParallelConfig(tensor=3, expert=3), ["vocab_size=256 is not a multiple of parallel.tensor=3", "num_experts=8"]),
        (MOE, ParallelConfig(pipeline=2, virtual_pipeline=4), ["2 layers a rank, not a multiple of parallel.virtual_pipeline=4"]),
        (MOE, ParallelConfig(virtual_pipeline=2), ["parallel.virtual_pipeline=2 interleaves pipeline stages"]),
        (MOE, ParallelConfig(tensor=0), ["parallel.tensor=0: sizes start at 1"]),
        (DENSE, ParallelConfig(expert=2), ["has none; set parallel.expert=1"]),
        (DENSE, ParallelConfig(expert_tensor=2), ["a dense model has none; set parallel.expert_tensor=1"]),
    ],
)
def test_illegal_layouts_are_refused(model, layout, messages):
    with pytest.raises(ValueError, match="the layout does not fit model") as error:
        check_layout(model, layout)
    assert all(message in str(error.value) for message in messages)


def test_the_papers_layout_is_legal():
    config = compose("model=qwen3_30b_a3b", "parallel=tp2_pp2_ep8")
    check_layout(config.model, config.parallel)
    with pytest.raises(ValueError, match="num_query_groups=4"):
        check_layout(config.model, ParallelConfig(tensor=8))


# --- config.json ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*MODELS.values(), dataclasses.replace(MOE, norm_topk_prob=False, rope_theta=1e7, rms_norm_eps=1e-5)])
def test_shape_of_a_config_is_the_inverse_of_writing_it(model):
    found = model_of(hf_config(model, "float32", [0]), model.name)
    assert found == dataclasses.replace(model, init_std=found.init_std)


def test_older_configs_and_unsupported_ones():
    config = hf_config(MOE, "float32", [0])
    older = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_theta": 5e5, "rope_scaling": None}
    assert model_of(older, "older").rope_theta == 5e5
    for change, message in (
        ({"model_type": "llama"}, "model_type 'llama' is not supported; allowed: qwen3, qwen3_moe"),
        ({"attention_bias": True, "mlp_only_layers": [0]}, r"has no attention_bias=True, mlp_only_layers=\[0\]"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "has no rope type yarn"),
    ):
        with pytest.raises(ValueError, match=message):
            model_of(config | change, "odd")
    del config["head_dim"]
    with pytest.raises(ValueError, match="odd lacks head_dim"):
        model_of(config, "odd")


# --- memory and the command line --------------------------------------------------------------------------------------------


def run_tool(*arguments):
    command = [sys.executable, str(REPOSITORY / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def test_memory_is_twice_the_largest_tensor_and_a_little(tmp_path):
    """190 MiB of weights in two files, with a largest tensor of 12 MiB. Beyond twice that, 64 MiB are for what imports, malloc and the
    records of 327 tensors take; a file held whole, or mapped, would exceed it."""
    shape = {"vocab_size": 8192, "hidden_size": 384, "num_attention_heads": 6, "num_query_groups": 2, "head_dim": 64}
    experts = {"num_experts": 24, "experts_per_token": 2, "moe_ffn_hidden_size": 384, "ffn_hidden_size": 384, "max_positions": 512}
    model = ModelConfig(name="wide", num_layers=4, **shape, **experts)
    source = random_folder(model, tmp_path / "source", max_shard_bytes=150_000_000)
    steps = (
        ("megatron", source, tmp_path / "m", "parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"),
        ("hf", tmp_path / "m", tmp_path / "hf", "--max-shard-bytes", "150MB"),
    )
    for to, *arguments in steps:
        done = run_tool("--to", to, *arguments, "--check", "weights")
        assert done.returncode == 0, done.stderr[-3000:]
        facts = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
        largest, used = float(facts["largest_tensor_mib"]), float(facts["peak_mib"]) - float(facts["start_mib"])
        assert largest == 12.0 and int(facts["bytes"]) > 180 * 2**20
        assert used <= 2 * largest + 64, f"{used:.0f} MiB"
    for file in source.glob("*.safetensors"):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()


def test_command_line_ends_with_one_sentence(tmp_path):
    done = run_tool("--to", "hf", tmp_path / "none", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"convert_checkpoint: {tmp_path / 'none'} is no folder"
    for arguments, message in (
        (("--to", "hf", "a", "b", "optimizer.lr=1"), "optimizer changes nothing here; overrides are model, parallel and precision"),
        (("--to", "hf", "a", "b", "--max-shard-bytes", "many"), "'many' is no size"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2 and message in done.stderr
