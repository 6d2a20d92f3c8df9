"""Stand-ins for the rollout tests: a server that speaks the few vLLM routes we use (run as a script), a service that starts
it instead of vLLM, and a tiny Qwen3-MoE model folder for the tests that start the real one."""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pivotrl.config import RolloutConfig
from pivotrl.rollout.service import RolloutService


class FakeVllm(BaseHTTPRequestHandler):
    """Tokens follow from prompt and seed. A prompt holding 400 or 500 gets that status, 503 does once on all servers together;
    99 kills the process once, midway. Broadcast weights are received and checked as the real receiver does it, and thrown away; the
    first bucket's first byte arrives wrong as long as the file `damage` lies beside the marker, whose text is the server's port."""

    protocol_version = "HTTP/1.1"
    lock, in_flight, max_in_flight, version, die_marker = threading.Lock(), 0, 0, "default", Path()
    calls, group, received = [], None, {}

    def log_message(self, *_):
        pass

    def do_GET(self):
        replies = {"/health": {}, "/weight_info": {"weight_version": FakeVllm.version}, "/get_world_size": {"world_size": 1}}
        replies |= {"/seen": {"max_in_flight": FakeVllm.max_in_flight}, "/calls": FakeVllm.calls, "/received": FakeVllm.received}
        self.reply(200, replies[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        if self.path != "/inference/v1/generate":
            FakeVllm.calls.append(self.path)
            FakeVllm.version = body.get("weight_version", body.get("new_version", FakeVllm.version))
            try:
                self.receive(body)
            except (RuntimeError, ValueError) as error:
                return self.reply(500, {"error": {"message": str(error)}})
            return self.reply(200, {"success": True})
        with self.lock:
            FakeVllm.in_flight += 1
            FakeVllm.max_in_flight = max(FakeVllm.in_flight, FakeVllm.max_in_flight)
        time.sleep(0.05)
        with self.lock:
            FakeVllm.in_flight -= 1
        for status in {400, 500} & set(body["token_ids"]):
            return self.reply(status, {"error": {"message": f"prompt of {len(body['token_ids'])} tokens not served"}})
        failed = FakeVllm.die_marker.with_name("failed")
        if 503 in body["token_ids"] and not failed.exists():
            failed.touch()
            return self.reply(503, {"error": {"message": "busy"}})
        if 99 in body["token_ids"] and not FakeVllm.die_marker.exists():
            FakeVllm.die_marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        params = body["sampling_params"]
        choices = []
        for i in range(params["n"]):
            tokens = random.Random(f"{params['seed'] + i} {body['token_ids']}").choices(range(1000), k=params["max_tokens"])
            content = [{"token_id": token, "logprob": -1.0} for token in tokens]
            span = {"version": FakeVllm.version, "start": 0, "end": len(tokens)}
            choices.append(
                {"index": i, "finish_reason": "length", "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": [span]}
            )
        self.reply(200, {"choices": choices})

    def receive(self, body):
        if "init_info" in body:
            import torch

            from pivotrl.rollout import process_group

            FakeVllm.group = process_group.accept(body["init_info"], 0, torch.device("cpu"))
        elif "tensors" in body.get("update_info", {}):
            import torch

            from pivotrl.rollout import TensorInfo, buckets

            tensors = [TensorInfo(name, dtype, tuple(shape), checksum) for name, dtype, shape, checksum in body["update_info"]["tensors"]]
            flat = torch.empty(buckets.num_bytes(tensors), dtype=torch.uint8)
            FakeVllm.group.broadcast(flat)
            damage = self.die_marker.with_name("damage")
            if damage.exists() and damage.read_text() == str(self.server.server_address[1]):
                flat[0] ^= 1
            buckets.verify(flat, tensors)
            FakeVllm.received |= {info.name: info.checksum for info in tensors}

    def reply(self, status, payload):
        content = json.dumps(payload, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class FakeService(RolloutService):
    """The real service around the fake server."""

    extra: tuple[str, ...] = ()

    def command(self, server_index: int, port: int) -> list[str]:
        marker = str(self.log_dir / "died")  # of all servers, or the request would kill one after the other
        return [sys.executable, __file__, "--port", str(port), "--die-marker", marker, *self.extra]


class ServiceWithSwitch(RolloutService):
    """The real service, whose workers can also be told to go without the prepack repair."""

    worker_extension = "switch_extension.SwitchExtension"

    def environment(self, server_index: int) -> dict[str, str]:
        environment = super().environment(server_index)
        return environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{self.model_path.parent}"}


SWITCH_EXTENSION = """
from pivotrl.rollout.receiver import UnquantizedFusedMoEMethod as Method, WorkerExtension

class SwitchExtension(WorkerExtension):
    def use_repair(self, repaired):
        if not repaired:
            type(self).repaired, Method._setup_kernel = Method._setup_kernel, Method._setup_kernel.__wrapped__
        else:
            Method._setup_kernel = type(self).repaired
        return {}

    def damage(self, bucket):
        # flip a bit of one bucket of the next update, as it arrives
        group, counted = self.weight_transfer_engine._group, []
        original = group.broadcast
        def broadcast(flat, *options):
            original(flat, *options)
            counted.append(flat)
            if len(counted) == bucket + 1:
                flat[3] ^= 64
        group.broadcast = broadcast
        return {}
"""
_started: list[RolloutService] = []


def new_service(folder: Path, **options) -> RolloutService:
    """A service with real vLLM servers for a tiny model, not started yet."""
    write_tiny_model(folder / "model", 0)
    (folder / "switch_extension.py").write_text(SWITCH_EXTENSION)
    sizes = {"max_prompt_tokens": 200, "max_new_tokens": 300, "kv_cache_gib": 0.1, "max_sequences": 64, "max_restarts": 1}
    return ServiceWithSwitch(RolloutConfig(**sizes | options), folder / "model", folder / "logs", seed=0)


def real_service(tmp_path_factory) -> RolloutService:
    """One real vLLM server for the whole test session, serving a tiny model; it stops when Python does."""
    if not _started:
        service = new_service(tmp_path_factory.mktemp("rollout"))
        service.start()
        service.wait_ready()
        assert service.reported_versions() == [0]
        _started.append(service)
    return _started[0]


def write_config(folder: Path) -> Path:
    """The least that the service wants to see of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return folder


def write_tiny_model(folder: Path, seed: int):
    """Save a random Qwen3-MoE (2 layers, 4 experts, 260 tokens) with a byte-level tokenizer; returns the transformers model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = (
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=260,
                hidden_size=64,
                intermediate_size=64,
                moe_intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                max_position_embeddings=512,
                initializer_range=0.1,
                tie_word_embeddings=False,
                eos_token_id=257,
            )
        )
        .float()
        .eval()
    )
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<eos>", "<a>", "<b>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet + specials)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return model


def hf_weights(model) -> list:
    """(name, tensor) as in the model's checkpoint: transformers keeps the experts of a layer fused in memory."""
    weights = []
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for e, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                weights += [(f"{prefix}.experts.{e}.gate_proj.weight", gate), (f"{prefix}.experts.{e}.up_proj.weight", up)]
        elif kind == "down_proj":
            weights += [(f"{prefix}.experts.{e}.down_proj.weight", down) for e, down in enumerate(tensor)]
        else:
            weights.append((name, tensor))
    return weights


def token_logprobs(model, row) -> list[float]:
    """log p(row[t + 1] | row[: t + 1]) of a transformers model."""
    import torch

    row = torch.tensor(row)
    with torch.no_grad():
        logprobs = model(row[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, row[1:, None])[:, 0].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--die-marker", type=Path)
    parser.add_argument("--fail-once", type=Path, help="unless this file exists, make it and end as if the port were taken")
    parser.add_argument("--fail", help="end at once with this message")
    parser.add_argument("--receives", action="store_true", help="be ready for broadcast weights")
    arguments = parser.parse_args()
    if arguments.receives:
        import pivotrl.rollout.process_group  # noqa: F401 - takes seconds: before anybody waits for it
    if arguments.fail:
        sys.exit(arguments.fail)
    if arguments.fail_once and not arguments.fail_once.exists():
        arguments.fail_once.touch()
        sys.exit("OSError: [Errno 98] Address already in use")
    FakeVllm.die_marker = arguments.die_marker
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", arguments.port), FakeVllm).serve_forever()
