import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_server import write_config  # noqa: E402

from pivotrl.config import RolloutConfig, WeightTransport  # noqa: E402
from pivotrl.rollout import command  # noqa: E402

CONFIG = {"max_prompt_tokens": 100, "max_new_tokens": 50}


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(command, "on_cuda", lambda: True)


def options_of(config, tmp_path):
    return command.server_command(config, write_config(tmp_path), port=1234, seed=2**31 + 5)


def value(line, name):
    return line[line.index(name) + 1]


def test_on_a_cpu(tmp_path):
    line = options_of(RolloutConfig(**CONFIG, kv_cache_gib=0.5), tmp_path)
    assert line[0] == sys.executable and value(line, "--port") == "1234" and value(line, "--seed") == "5"
    assert value(line, "--max-model-len") == "151" and value(line, "--kv-cache-memory-bytes") == str(2**29)
    assert json.loads(value(line, "--weight-transfer-config")) == {"backend": "pivotrl"}
    assert "--enable-sleep-mode" not in line and "--gpu-memory-utilization" not in line


def test_on_gpus(tmp_path, on_cuda):
    line = options_of(RolloutConfig(**CONFIG, colocated=True, tensor_parallel=2, gpu_memory_utilization=0.4), tmp_path)
    assert "--enable-sleep-mode" in line and value(line, "--gpu-memory-utilization") == "0.4"
    assert "--distributed-executor-backend" not in line and "--no-enable-chunked-prefill" not in line


def test_the_trainers_process_group_is_not_inherited(on_cuda):
    inherited = {"RANK": "3", "MASTER_ADDR": "node", "HOME": "/somewhere", "PYTHONPATH": "mine", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    found = command.server_environment(RolloutConfig(tensor_parallel=2, num_servers=2), 1, inherited)
    assert not found.keys() & {"RANK", "MASTER_ADDR"} and found["HOME"] == "/somewhere" and found["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert found["PYTHONPATH"].endswith(":mine") and found["VLLM_SERVER_DEV_MODE"] == "1"
    chosen = command.server_environment(RolloutConfig(gpus=[2, 0], num_servers=2), 1, {})
    assert chosen["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colocated": True, "urls": ["http://node:1"]}, "rollout.urls is for servers of others"),
        ({"colocated": True, "weight_transport": WeightTransport.broadcast}, "set rollout.weight_transport=file"),
        ({"bucket_mib": 0}, "rollout.bucket_mib=0: give MiB above 0"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        command.check(RolloutConfig(**options))
    command.check(RolloutConfig(colocated=True))


def test_sleep_needs_cuda(monkeypatch):
    with pytest.raises(ValueError, match="vLLM's CPU build has no sleep mode: set rollout.colocated=false"):
        command.check_device(RolloutConfig(colocated=True))
    command.check_device(RolloutConfig())
    monkeypatch.setattr(command, "on_cuda", lambda: True)
    command.check_device(RolloutConfig(colocated=True))
