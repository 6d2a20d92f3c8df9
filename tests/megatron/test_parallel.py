"""Layouts and process groups."""

import os
import re

import pytest
import torch
import torch.distributed as dist

from pivotrl.config import ParallelConfig
from pivotrl.megatron import parallel

FITS = [
    (ParallelConfig(), 1),
    (ParallelConfig(), 3),
    (ParallelConfig(tensor=2, pipeline=2, expert=2), 4),
    (ParallelConfig(tensor=2, pipeline=2, expert=8), 16),
    (ParallelConfig(tensor=2, expert_tensor=1, expert=2), 2),
]
MISFITS = [
    (ParallelConfig(tensor=2), 1, "tensor x pipeline x context = 2 does not divide the 1 processes"),
    (ParallelConfig(tensor=2, pipeline=2), 6, "tensor x pipeline x context = 4 does not divide the 6 processes"),
    (ParallelConfig(expert=4), 2, "expert x expert_tensor x pipeline = 4 does not divide the 2 processes"),
    (ParallelConfig(tensor=2, pipeline=2, expert=8), 8, "expert x expert_tensor x pipeline = 16 does not divide the 8 processes"),
]


@pytest.mark.parametrize(("config", "processes"), FITS)
def test_layout_that_fits(config, processes):
    parallel.check_layout(config, processes)


@pytest.mark.parametrize(("config", "processes", "message"), MISFITS)
def test_layout_that_does_not_fit_names_sizes_and_fix(config, processes, message):
    with pytest.raises(ValueError, match=re.escape(message) + ".*torchrun --nproc-per-node"):
        parallel.check_layout(config, processes)


def test_process_alone_starts_stops_and_starts_again_without_a_trace_in_the_environment():
    environment = dict(os.environ)
    parallel.stop()
    assert parallel.is_main(), "before any start the only process is the main one"
    for _ in range(2):
        parallel.start(ParallelConfig(), seed=0)
        parallel.start(ParallelConfig(), seed=0)
        assert (dist.get_world_size(), parallel.rank(), parallel.is_main()) == (1, 0, True)
        assert parallel.broadcast({"rows": [1, 2]}) == {"rows": [1, 2]}
        parallel.stop()
        parallel.stop()
        assert not dist.is_initialized()
    assert dict(os.environ) == environment


def test_misfit_is_found_before_megatron_lays_out():
    parallel.stop()
    with pytest.raises(ValueError, match="tensor x pipeline x context = 2"):
        parallel.start(ParallelConfig(tensor=2), seed=0)
    parallel.stop()


def test_seed_decides_random_weights():
    drawn = []
    for seed in (1, 1, 2):
        parallel.stop()
        parallel.start(ParallelConfig(), seed)
        drawn.append(torch.randn(3))
    parallel.stop()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
