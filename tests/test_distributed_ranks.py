"""The process groups of the tests: an error on a rank is an error of the test and does not spoil the next."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks


def total(rank, world):
    t = torch.tensor(rank + 1)
    dist.all_reduce(t)
    return int(t)


def fails_on_one(rank, world):
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()  # waits for the other for ever


def dies(rank, world):
    if rank == 1:
        os._exit(3)
    dist.barrier()


def test_errors_on_one_rank_are_raised_and_the_group_starts_again():
    ranks = Ranks(2)
    try:
        assert ranks.run(total) == [3, 3]
        with pytest.raises(AssertionError, match="fails_on_one: rank 1 of 2"):
            ranks.run(fails_on_one)
        assert ranks.run(total) == [3, 3]
        with pytest.raises(AssertionError, match="dies: rank"):
            ranks.run(dies)
    finally:
        ranks.stop()
    assert not ranks.processes
