"""Ways to run code on a device that fail if it does what a fast loop must not do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from tests.host_sync import no_host_sync

NUM_WARM_UPS = 3  # kernels are compiled in them
Result = TypeVar("Result")


def replayed(call: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """`call`, on CUDA captured as a graph whose replays give back the tensors of the capture; it may be run repeatedly."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@contextlib.contextmanager
def never_waits(device: torch.device) -> Iterator[None]:
    """Inside the block, making the host wait for the device is an error; on the CPU what would make it."""
    if device.type != "cuda":
        with no_host_sync():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
