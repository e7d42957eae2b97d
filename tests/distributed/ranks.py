"""Processes in a group of torch.distributed that run functions together, one after another."""

import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = 200  # seconds: a rank that waits for another one longer has been left alone


class Ranks:
    """`ranks(function, *arguments)` runs it on every rank and returns a list of what they return.

    The function is found by its name, and so must be one of a module.
    """

    def __init__(self, size, folder):
        self.size = size
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            pipe, end = context.Pipe()
            arguments = (rank, size, folder / "store", end)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.pipes.append(pipe)
            self.processes[-1].start()

    def __call__(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} is still waiting"
            result, error = pipe.recv()
            results.append(result)
            errors += [] if error is None else [f"rank {rank}: {error}"]
        assert not errors, "\n".join(errors)
        return results

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank, size, store, pipe):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=PATIENCE / 2)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    while True:
        function, arguments = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
