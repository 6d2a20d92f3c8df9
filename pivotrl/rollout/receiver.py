"""Runs inside the vLLM server process (loaded by `--worker-extension-cls`): receives new policy weights.

vLLM's native weight-transfer API (/init_weight_transfer_engine, /start_weight_update, /update_weights, /finish_weight_update)
gets one more backend, `pivotrl`, on CPU and on CUDA: weights under Hugging Face names, from a file or by broadcast. A file is
checked in full (names, shapes, checksums) before the model is touched, so a refused one leaves the server on its old weights.
Of a broadcast only names and shapes can be known before: one that is refused or broken off later leaves a server that must not
serve, and that reports no version.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from pivotrl.rollout import LEFT_ALONE, REFUSED, TensorInfo, buckets, process_group, tensor_checksum
from pivotrl.rollout.process_group import Group


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
class InitInfo(WeightTransferInitInfo):
    """An invitation into the sender's process group: see `process_group.Meeting`. Weights in files need none."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One part of an update: a file with the checksum of every tensor in it, the manifest of a broadcast, or one of its buckets.

    A manifest row is [name, dtype, shape], a row of a bucket's tensors has the checksum, too.
    """

    path: str = ""
    checksums: dict[str, int] = field(default_factory=dict)
    manifest: list[list] = field(default_factory=list)
    bucket: int = -1
    tensors: list[list] = field(default_factory=list)


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Backend `pivotrl` of vLLM's weight-transfer API."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._group: Group | None = None
        self._opened = False
        self._loaded: set[str] = set()
        self._awaited: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._num_buckets = 0

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Raises BrokenGroup when the group does not come about."""
        self.shutdown()
        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        self._group = process_group.accept(asdict(init_info), worker, self.device)

    def start_weight_update(self) -> None:
        """Nothing yet: the model is opened for loading only once names and shapes have passed their checks."""

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Check a part of an update and load it.

        Raises:
            ValueError: names or shapes differ from the model's, or a tensor's bytes differ from what the sender sent.
            BrokenGroup: a bucket did not arrive. In both cases the model keeps its weights only if no bucket was loaded before.
        """
        with ExitStack() as on_failure:
            on_failure.callback(self.end_loading)
            if update_info.path:
                self._load_file(update_info)
            elif update_info.manifest:
                self._expect(update_info.manifest)
            else:
                self._receive(update_info)
            on_failure.pop_all()

    def finish_weight_update(self) -> None:
        """Raises ValueError when tensors of the manifest, or weights of the model, did not come."""
        parameters = {name for name, _ in self.model.named_parameters()}
        missing, unloaded = sorted(self._awaited), sorted(parameters - self._loaded)
        self.end_loading()
        if missing or unloaded:
            raise ValueError(f"the update is incomplete: missing names {missing}, parameters without weights {unloaded}")

    def end_loading(self) -> None:
        """End layerwise loading, whatever has come; without all buckets the model is then good for nothing but the next update."""
        if self._opened:
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(self.model, self.model_config)
        self._opened, self._loaded, self._awaited = False, set(), {}

    def shutdown(self) -> None:
        if self._group:
            self._group.close()
        self._group = None

    def _load_file(self, update: UpdateInfo) -> None:
        with safe_open(update.path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            self._check_shapes(shapes)
            if unsent := sorted(shapes.keys() ^ update.checksums.keys()):
                raise ValueError(f"{REFUSED} without checksum {unsent}")
            for name in shapes:
                if tensor_checksum(file.get_tensor(name)) != update.checksums[name]:
                    raise ValueError(f"{REFUSED} checksum of {name} differs from what the sender wrote")
            self._load((name, file.get_tensor(name)) for name in shapes)

    def _expect(self, manifest: list[list]) -> None:
        self._check_shapes({name: tuple(shape) for name, _, shape in manifest})
        self._awaited = {name: (dtype, tuple(shape)) for name, dtype, shape in manifest}
        self._num_buckets = 0

    def _receive(self, update: UpdateInfo) -> None:
        if self._group is None:
            raise process_group.BrokenGroup(f"{LEFT_ALONE} this server is in no group")
        tensors = [TensorInfo(name, dtype, tuple(shape), checksum) for name, dtype, shape, checksum in update.tensors]
        if update.bucket != self._num_buckets:
            raise ValueError(f"{REFUSED} bucket {update.bucket} came where bucket {self._num_buckets} was due, first {tensors[0].name}")
        for info in tensors:
            if self._awaited.get(info.name) != (info.dtype, info.shape):
                raise ValueError(f"{REFUSED} {info.name} is {info.dtype} {info.shape}, due was {self._awaited.get(info.name)}")
        flat = torch.empty(buckets.num_bytes(tensors), dtype=torch.uint8, device=self.device)
        self._group.broadcast(flat)
        buckets.verify(flat, tensors)
        self._load(iter(buckets.unpack(flat, tensors)))
        self._num_buckets += 1
        for info in tensors:
            del self._awaited[info.name]

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if not self._opened:
            self._opened = True
            initialize_layerwise_reload(self.model)
        self._loaded |= self.model.load_weights(weights)

    def _check_shapes(self, found: dict[str, tuple[int, ...]]) -> None:
        expected = checkpoint_shapes(Path(self.model_config.model))
        if self.model_config.hf_config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or unexpected:
            raise ValueError(f"{REFUSED} missing names {missing}, unexpected names {unexpected}")
        for name, shape in found.items():
            if shape != expected[name]:
                raise ValueError(f"{REFUSED} {name} has shape {shape}, the model has {expected[name]}")


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
    """What vLLM mixes into its worker class. Importing this module repairs MoE layers on CPU and registers the receiver."""

    def abandon_weight_update(self) -> None:
        """Forget an update that was broken off: vLLM would refuse to start another one for ever."""
        self.weight_transfer_engine.end_loading()
        self._weight_update_active = False


prepack_experts_on_every_load()
WeightTransferEngineFactory.register_engine("pivotrl", Receiver)
