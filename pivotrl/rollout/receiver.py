"""Runs inside the vLLM server process (loaded by `--worker-extension-cls`): receives new policy weights.

vLLM's native weight-transfer API (/start_weight_update, /update_weights, /finish_weight_update) gets one more backend,
`file`: a safetensors file with Hugging Face names, on CPU and on CUDA. An update is checked in full (names, shapes,
checksums) before the model is touched, so a refused update leaves the server on its old weights.
"""

import functools
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from pivotrl.rollout import tensor_checksum


def prepack_experts_on_every_load() -> None:
    """Repair weight updates of MoE layers on CPU; does nothing on other devices, or when called again.

    vLLM 0.32 packs the experts into its CPU layout on the first load only. An update then copies unpacked weights into the
    packed buffer, and every logprob is wrong without an error.

    Raises:
        RuntimeError: this vLLM looks different, so the repair could itself corrupt the weights.
    """
    original = UnquantizedFusedMoEMethod._setup_kernel
    if not current_platform.is_cpu() or hasattr(original, "__wrapped__"):
        return
    source = inspect.getsource(original)
    if "if not is_weight_update:" not in source or "fused_experts.process_weights_after_loading(layer)" not in source:
        raise RuntimeError(
            "UnquantizedFusedMoEMethod._setup_kernel is not the one of vLLM 0.32.0: pin vllm to 0.32.0, or check whether "
            "weight updates of MoE layers on CPU work without prepack_experts_on_every_load and remove it"
        )

    @functools.wraps(original)
    def setup_kernel(self, layer, w13, w2):
        is_update = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """A file needs no rendezvous."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One whole set of weights: a safetensors file and the checksum of every tensor the sender put into it."""

    path: str = ""
    checksums: dict[str, int] = field(default_factory=dict)


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Backend `file` of vLLM's weight-transfer API."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """Nothing yet: the model is opened for loading only once the file has passed its checks."""

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Check the file, then load it.

        Raises:
            ValueError: names or shapes differ from the model's, or a tensor's bytes differ from what the sender wrote.
        """
        with safe_open(update_info.path, framework="pt") as file:
            self._check(file, update_info.checksums)
            parameters = {name for name, _ in self.model.named_parameters()}
            initialize_layerwise_reload(self.model)
            loaded = self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            if unloaded := parameters - loaded:
                raise ValueError(f"these parameters got no weights: {sorted(unloaded)}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass

    def _check(self, file, checksums: dict[str, int]) -> None:
        expected = checkpoint_shapes(Path(self.model_config.model))
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if self.model_config.hf_config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unexpected or found.keys() != checksums.keys():
            unsent = sorted(found.keys() ^ checksums.keys())
            raise ValueError(f"weights refused: missing names {missing}, unexpected names {unexpected}, without checksum {unsent}")
        for name, shape in found.items():
            if shape != expected[name]:
                raise ValueError(f"weights refused: {name} has shape {shape}, the model has {expected[name]}")
            if tensor_checksum(file.get_tensor(name)) != checksums[name]:
                raise ValueError(f"weights refused: checksum of {name} differs from what the sender wrote")


def checkpoint_shapes(model_path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a Hugging Face folder, from the files' headers alone.

    Raises:
        FileNotFoundError: the folder holds no safetensors files.
    """
    shapes = {}
    for path in sorted(model_path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not shapes:
        raise FileNotFoundError(f"{model_path} holds no *.safetensors: start the server from a local Hugging Face folder")
    return shapes


class WorkerExtension:
    """What vLLM mixes into its worker class; importing this module is all that is needed."""


prepack_experts_on_every_load()
WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)
