"""The policy: a Megatron model with its optimizer, seen by the rest as rows in, logprobs and updates out.

Every process of the layout calls the same methods with the same rows; each works on its share.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pivotrl import watchdog
from pivotrl.batching import Item, Row, balance, pack
from pivotrl.config import Config, OptimizerConfig
from pivotrl.megatron import device, kernels, parallel
from pivotrl.plan import layout

device.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from pivotrl.megatron import hf_mapping  # noqa: E402
from pivotrl.megatron.model import build_chunks, data_parallel_config, transformer_config  # noqa: E402
from pivotrl.megatron.offload import HostMemory  # noqa: E402
from pivotrl.megatron.optimizer import build_optimizer, learning_rate, reload_params, set_learning_rate, update  # noqa: E402
from pivotrl.megatron.prefix_attention import own_spans  # noqa: E402

LossFunction = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class _Microbatch(NamedTuple):
    index: int  # of the row in the caller's list, -1 for one that only keeps the ranks in step
    row: Row
    temperature: float
    logits: bool  # wanted instead of logprobs


class _Share(NamedTuple):
    """This context-parallel rank's part of a row: which tokens it holds and which scored entries it predicts."""

    token_ids_T: Tensor
    position_ids_T: Tensor  # of the whole row: Megatron cuts its rotary table as we cut the tokens
    entries_S: Tensor  # indices into the row's entries
    positions_S: Tensor  # where those are predicted, counted in this rank's tokens
    targets_S: Tensor
    temperature: float
    logits: bool


class Policy:
    """A Qwen3 policy under Megatron-Core in the configured layout."""

    def __init__(self, config: Config, optimizer: OptimizerConfig | None, *, num_steps: int = 0):
        """Build the model with random weights; `optimizer` None makes a policy that only scores.

        Raises:
            ValueError: the layout does not fit the processes or the model, or a kernel or precision is not to be had here.
        """
        kernels.check(config)
        parallel.start(config.parallel, config.seed)
        layout.check(config, dist.get_world_size())
        self.config, self.optimizer_config, self.num_steps = config, optimizer, num_steps
        self.transformer_config = transformer_config(config)
        chunks = build_chunks(config.model, self.transformer_config)
        if optimizer is not None and optimizer.freeze_router:
            for chunk in chunks:
                for name, param in chunk.named_parameters():
                    param.requires_grad_(".router." not in name)
        chunks = [chunk.to(device.device()) for chunk in chunks]
        if config.precision.params == "bf16":
            chunks = [Float16Module(self.transformer_config, chunk) for chunk in chunks]
        self.optimizer: Any = None
        if optimizer is not None:
            wrap = functools.partial(DistributedDataParallel, self.transformer_config, data_parallel_config(config))
            chunks = [wrap(chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
            for chunk in chunks:
                chunk.broadcast_params()
            self.optimizer = build_optimizer(chunks, optimizer, config.precision)
            self.transformer_config.finalize_model_grads_func = finalize_model_grads
            self.transformer_config.grad_scale_func = self.optimizer.scale_loss
            no_sync = [chunk.no_sync for chunk in chunks]  # overlapped gradients are reduced after the last microbatch only
            self.transformer_config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        self.chunks = chunks
        self._host = HostMemory(chunks, self.optimizer) if optimizer is not None else None
        self._gatherer: hf_mapping.Gatherer | None = None
        self._reference: list[Tensor] | None = None

    def load_hf(self, folder: Path) -> None:
        """Load a Hugging Face folder into the policy, and make the optimizer's master copies follow."""
        hf_mapping.load_hf(self.config.model, self.chunks, folder)
        if self.optimizer is not None:
            reload_params(self.optimizer)

    def hf_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, whole tensor on the main process, None elsewhere); every process must run it to the end."""
        self.settle()
        if self._gatherer is None:
            self._gatherer = hf_mapping.Gatherer(self.config.model, self.chunks)
        return self._gatherer.tensors()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    @torch.no_grad()
    def settle(self) -> None:
        """With overlap_param_gather the ranks' shares of an update travel in the next training pass: fetch them now."""
        if self.optimizer is not None and self.config.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def offload(self) -> None:
        """Make room for rollout engines on the same device (pivotrl/megatron/offload.py); returns when every process has.

        Weights stay, so that logprobs and hf_weights work; `train_step` and checkpoints need `reload` first.
        """
        if self._host is not None:
            self._host.offload()
        dist.barrier()

    def reload(self) -> None:
        """Take the room back, once every process has come here; the training state is that of before, bit for bit."""
        dist.barrier()
        if self._host is not None:
            self._host.reload()

    def snapshot_reference(self) -> None:
        """Keep the present weights as the reference policy (a copy in host memory)."""
        self.settle()
        self._reference = [param.detach().to("cpu", copy=True) for param in self.parameters()]

    @torch.no_grad()
    def _swap_reference(self) -> None:
        assert self._reference is not None, "snapshot_reference was never called"
        for param, kept in zip(self.parameters(), self._reference, strict=True):
            moved = param.detach().to("cpu", copy=True)
            param.copy_(kept)
            kept.copy_(moved)

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Row], *, temperature: float, reference: bool = False) -> list[Tensor]:
        """Logprobs of every row's scored tokens at a sampling temperature: one CPU tensor [S] a row, on every process.

        With `reference`, those of the reference policy.
        """
        self.settle()
        if reference:
            self._swap_reference()
        for chunk in self.chunks:
            chunk.eval()
        results = self._run(rows, temperature, None)
        if reference:
            self._swap_reference()
        return _joined(results, [torch.empty(len(row.positions_S)) for row in rows])

    @torch.no_grad()
    def logits(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the policy predicts each row's scored tokens from: one CPU tensor [S, V] a row, on every process. For checks."""
        self.settle()
        for chunk in self.chunks:
            chunk.eval()
        results = self._run(rows, 1.0, None, logits=True)
        return _joined(results, [torch.empty(len(row.positions_S), self.config.model.vocab_size) for row in rows])

    def score(self, token_rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logprobs [length - 1] of each plain sequence's tokens, given those before them, at temperature 1."""
        rows = [pack([Item(tokens, range(1, len(tokens)))], max_row_tokens=len(tokens), shared_prefix=False)[0] for tokens in token_rows]
        return self.logprobs(rows, temperature=1.0)

    def train_step(self, rows: Sequence[Row], loss: LossFunction, *, temperature: float, step: int) -> dict[str, float]:
        """One optimizer update on the sum of `loss` over all rows.

        Returns:
            Sums of the loss function's metrics (maxima of those named *_max), grad_norm, learning_rate, forward_backward_s and optimizer_s.
        """
        began = time.perf_counter()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self._run(rows, temperature, loss)
        middle = time.perf_counter()
        lr = learning_rate(self.optimizer_config, step, self.num_steps)
        set_learning_rate(self.optimizer, lr)
        grad_norm = update(self.optimizer)
        if not math.isfinite(grad_norm):  # nothing was changed then
            raise RuntimeError(f"step {step}: the gradients are not finite (norm {grad_norm}); continue from the last checkpoint")
        metrics: dict[str, float] = {}
        for result in results:
            for name, value in result["metrics"].items():
                before = metrics.get(name, 0.0)
                metrics[name] = max(before, value) if name.endswith("_max") else before + value
        timing = {"forward_backward_s": middle - began, "optimizer_s": time.perf_counter() - middle}
        return {**metrics, "grad_norm": float(grad_norm), "learning_rate": lr, **timing}

    def _run(self, rows: Sequence[Row], temperature: float, loss: LossFunction | None, *, logits: bool = False) -> list[dict[str, Any]]:
        """Run this rank's rows through Megatron's schedule; the results of all ranks, on every rank."""
        dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        dealt = balance([row.cost for row in rows], dp)
        count = max(1, max(len(share) for share in dealt))
        pipeline, virtual = self.config.parallel.pipeline, self.config.parallel.virtual_pipeline
        if virtual:
            count = -(-count // pipeline) * pipeline  # interleaving wants a multiple of the stages
        microbatches = [_Microbatch(index, rows[index], temperature, logits) for index in dealt[dp_rank]]
        microbatches += [_Microbatch(-1, _empty_row(), temperature, logits)] * (count - len(microbatches))
        iterators = [iter(microbatches) for _ in self.chunks]
        store = get_forward_backward_func()(
            forward_step_func=self._forward_step(loss),
            data_iterator=iterators if virtual else iterators[0],
            model=self.chunks if virtual else self.chunks[0],
            num_microbatches=count,
            seq_length=1,  # rows differ in length: shapes travel with the tensors (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=loss is None,
        )
        reports = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        own = [result for result in store if result["index"] >= 0] if reports else []
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        return [result for results in everyone for result in results]

    def _forward_step(self, loss: LossFunction | None) -> Callable:
        def forward_step(iterator: Iterator[_Microbatch], chunk: Any) -> tuple[Tensor, Callable]:
            batch = next(iterator)
            watchdog.beat()
            row = _pad(batch.row, layout.token_multiple(self.config))
            share = _share(row, batch)
            where = device.device()
            output = chunk(
                input_ids=share.token_ids_T[None].to(where),
                position_ids=share.position_ids_T.expand(3, 1, -1).to(where),
                attention_mask=row.segments_N3,
                output_processor=_score_entries,
                output_processor_context=share,
            )

            def finish(logprobs_S: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                nothing = torch.zeros([], dtype=torch.int, device=where)  # weights are normalised: Megatron must not divide
                if loss is None:
                    scored = logprobs_S.detach().float().cpu()
                    return logprobs_S.sum(), nothing, {"index": batch.index, "entries": share.entries_S, "values": scored}
                fields = {name: column[share.entries_S].to(where) for name, column in row.fields.items()}
                if batch.index < 0:
                    return 0.0 * logprobs_S.sum(), nothing, {"index": -1}
                total, metrics = loss(logprobs_S, fields)
                return total, nothing, {"index": batch.index, "metrics": {name: float(value) for name, value in metrics.items()}}

            return output, finish

        return forward_step


def _score_entries(*, hidden_states: Tensor, output_layer: Any, output_weight: Any, context: _Share, config: Any, **_: Any) -> Tensor:
    """Logprobs [S] (or logits [S, V]) of this rank's scored tokens: the vocabulary projection runs on their positions only."""
    tp, count = config.tensor_model_parallel_size, len(context.positions_S)
    where = hidden_states.device
    padding = -count % tp if count else tp
    positions = torch.cat([context.positions_S, torch.zeros(padding, dtype=torch.long)]).to(where)
    targets = torch.cat([context.targets_S, torch.zeros(padding, dtype=torch.long)]).to(where)
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
    chosen = hidden_states.index_select(0, positions)  # [S, 1, H]
    if config.sequence_parallel:  # the output layer gathers its input again
        chosen = tensor_parallel.scatter_to_sequence_parallel_region(chosen)
    logits, _ = output_layer(chosen, weight=output_weight)  # [S, 1, V / tp]
    if context.logits:
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[:count, 0]
    nll = tensor_parallel.vocab_parallel_cross_entropy(logits.float() / context.temperature, targets[:, None])
    return -nll[:, 0][:count]


def _joined(results: list[dict[str, Any]], found: list[Tensor]) -> list[Tensor]:
    """Fill in what each row's context-parallel ranks report of its entries."""
    for result in results:
        found[result["index"]][result["entries"]] = result["values"]
    return found


def _share(row: Row, batch: _Microbatch) -> _Share:
    """What this rank's context-parallel share of a padded row holds."""
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    length = len(row.token_ids_T)
    own = torch.cat([torch.arange(*span) for span in own_spans(length, ranks, rank)])
    local = torch.full((length,), -1)
    local[own] = torch.arange(len(own))
    at = local[row.positions_S]
    entries = (at >= 0).nonzero()[:, 0]
    targets = row.targets_S[entries]
    return _Share(row.token_ids_T[own], row.position_ids_T, entries, at[entries], targets, batch.temperature, batch.logits)


def _pad(row: Row, multiple: int) -> Row:
    """Sequence and context parallelism split a row's tokens evenly: add a segment of unscored tokens at its end."""
    missing = -len(row.token_ids_T) % multiple
    if not missing:
        return row
    length = len(row.token_ids_T)
    extra = torch.tensor([[length, length + missing, -1]], dtype=row.segments_N3.dtype)
    return Row(
        torch.cat([row.token_ids_T, torch.zeros(missing, dtype=torch.long)]),
        torch.cat([row.position_ids_T, torch.arange(missing)]),
        torch.cat([row.segments_N3, extra]),
        row.positions_S,
        row.targets_S,
        row.owners_S,
        row.fields,
    )


def _empty_row() -> Row:
    none = torch.zeros(0, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    return Row(one, one, torch.tensor([[0, 1, -1]], dtype=torch.int32), none, none, none, {})
