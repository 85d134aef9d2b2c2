"""Gloo's loop thread polls again and again while the thread that sends holds its connection's lock.

Four ranks on two cores, small reductions: `python 0029-gloo-loop-spins.py`. CPU seconds of the loop
threads, first with the kernel's usual policy, then where no woken thread displaces a running one.
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

RANKS, CORES, ROUNDS = 4, 2, 4000
POLICIES = {"SCHED_OTHER": os.SCHED_OTHER, "SCHED_BATCH": os.SCHED_BATCH}


def loops() -> float:
    """CPU seconds of this process's gloo_tcp_loop threads."""
    ticks = 0
    for stat in Path("/proc/self/task").glob("*/stat"):
        name, _, fields = stat.read_text().rpartition(")")
        if "gloo_tcp_loop" in name:
            ticks += sum(map(int, fields.split()[11:13]))  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def main(rank: int, store: str, name: str) -> None:
    """Reduce on one rank and print the sums of all."""
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, {cores[rank * CORES // RANKS]})
    os.sched_setscheduler(0, POLICIES[name], os.sched_param(0))  # Gloo's threads inherit both
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    value = torch.ones(64)
    dist.all_reduce(value)
    started, used, looped = time.perf_counter(), time.process_time(), loops()
    for _ in range(ROUNDS):
        dist.all_reduce(value)
        value /= RANKS
    seconds = time.perf_counter() - started
    sums = torch.tensor([time.process_time() - used, loops() - looped])
    dist.all_reduce(sums)
    if rank == 0:
        total, loop = sums.tolist()
        print(f"{name}: {seconds:.2f} s, {total:.2f} CPU s, of them {loop:.2f} in gloo_tcp_loop")
    dist.destroy_process_group()


if __name__ == "__main__":
    for name in [*POLICIES, *POLICIES]:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(main, (f"{folder}/store", name), nprocs=RANKS)
