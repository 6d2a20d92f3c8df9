"""Dense against shared-prefix training: one optimizer step on one pivot with a history of P tokens and G actions of R tokens.

    python tools/benchmarks/shared_prefix.py --json out.json [--cases 256,32,8 1024,64,16] [--layers 4 --hidden 128] [--repeats 3]

Dense and shared steps take turns in one process, and the best time of each counts; peak memory is measured in a process of its
own per mode. `ideal` is the ratio of tokens, G (P + R) / (P + G R).
"""

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import cases

from pivotrl.config import Config, ModelConfig, OptimizerConfig, PrecisionConfig


def main() -> None:
    parser = cases.parser(__doc__)
    parser.add_argument("--row-tokens", type=int, default=16_384, help="dense rows are packed up to this many tokens")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    peaks = {(case, shared): run_apart(args, case, shared) for case in args.cases for shared in (False, True)}
    results = []
    policy = make_policy(args)
    for case in args.cases:
        seconds = {shared: float("inf") for shared in (False, True)}
        step = 0
        for repeat in range(args.repeats + 1):
            for shared in (False, True):
                elapsed = one_step(policy, args, case, shared=shared, step=step)
                step += 1
                if repeat:  # the first round warms caches up
                    seconds[shared] = min(seconds[shared], elapsed)
        results.append(describe(case, seconds, peaks))
        print(json.dumps(results[-1]), flush=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n")


def describe(case: tuple[int, int, int], seconds: dict[bool, float], peaks: dict) -> dict[str, Any]:
    prompt, reply, group = case
    return {
        "P": prompt,
        "R": reply,
        "G": group,
        "dense_tokens": group * (prompt + reply),
        "shared_tokens": prompt + group * reply,
        "dense_s": round(seconds[False], 4),
        "shared_s": round(seconds[True], 4),
        "ratio": round(seconds[False] / seconds[True], 3),
        "ideal": round(group * (prompt + reply) / (prompt + group * reply), 3),
        "dense_peak_gib": round(peaks[(case, False)], 3),
        "shared_peak_gib": round(peaks[(case, True)], 3),
    }


def make_policy(args: argparse.Namespace) -> Any:
    from pivotrl.megatron.policy import Policy

    config = Config()
    config.model = ModelConfig(
        name="benchmark",
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        head_dim=args.hidden // args.heads,
        ffn_hidden_size=2 * args.hidden,
        num_experts=args.experts,
        experts_per_token=2 if args.experts else 0,
        moe_ffn_hidden_size=args.hidden,
    )
    config.precision = PrecisionConfig(name=args.precision, params=args.precision)
    return Policy(config, OptimizerConfig(lr=1e-5), num_steps=1)


def one_step(policy: Any, args: argparse.Namespace, case: tuple[int, int, int], *, shared: bool, step: int) -> float:
    """Seconds of pack + forward + backward + optimizer for one pivot."""
    import torch

    from pivotrl.batching import Item, pack
    from pivotrl.loss import sft_loss

    prompt_length, reply, group = case
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, args.vocab, (prompt_length,), generator=generator).tolist()
    actions = torch.randint(0, args.vocab, (group, reply), generator=generator).tolist()
    scored = range(prompt_length, prompt_length + reply)
    items = [Item([*prompt, *action], scored, fields={"weights": [1 / (group * reply)] * reply}) for action in actions]
    began = time.perf_counter()
    rows = pack(items, max_row_tokens=max(args.row_tokens, prompt_length + group * reply if shared else 0), shared_prefix=shared)
    policy.train_step(rows, sft_loss, temperature=1.0, step=step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run_apart(args: argparse.Namespace, case: tuple[int, int, int], shared: bool) -> float:
    """Peak memory of one step over that of the built policy, in GiB, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(args, case, shared, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _peak(args: argparse.Namespace, case: tuple[int, int, int], shared: bool, queue: Any) -> None:
    import torch

    policy = make_policy(args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_step(policy, args, case, shared=shared, step=0)
        queue.put((torch.cuda.max_memory_allocated() - before) / 2**30)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_step(policy, args, case, shared=shared, step=0)
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


if __name__ == "__main__":
    main()
