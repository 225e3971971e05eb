"""CUDA graphs: the launches of a function, recorded once and replayed without the host. Knows torch only.

The function works in place on tensors that keep their shapes and places, and reads nothing on the host; see
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs for the rules that are followed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from rlhf_accel.system.errors import in_one_line


def runs(step: Callable[[], None], *, capture: bool, failed: Callable[[str], None]) -> Iterator[None]:
    """Each `next` runs the step once. With `capture`, the first run warms up, and later ones replay its graph; if none
    can be captured, `failed` is called with the reason, and the step runs as it is."""
    if capture:
        try:
            warm_up(step)
            yield
            step = captured(step)
        except RuntimeError as error:  # of operators and libraries, which are many; the step has not taken effect
            failed(in_one_line(error))
    while True:
        step()
        yield


def warm_up(step: Callable[[], None]) -> None:
    """Run the step on a stream of its own, so that what libraries allocate and choose at first is not captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A function that replays the step, which is not run. Raises `RuntimeError` if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog, may use the device meanwhile. After a failure, torch leaves its stream for
    # captures the current one; the outer context does not.
    here = torch.cuda.stream(torch.cuda.current_stream())
    with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
