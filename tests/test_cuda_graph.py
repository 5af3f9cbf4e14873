"""What CudaGraph keeps, on a stand-in for CUDA: which inputs share a graph, what it reads, when it is made.

What a real card computes by it is in test_cuda.py.
"""

import contextlib

import pytest
import torch
from conftest import load_script
from torch import nn

td3_bc = load_script("offline/td3_bc.py")


class Learner:
    """Sums up a batch, doubled by choice; a graph of it reads what its inputs were held in."""

    def __init__(self):
        self.weight = nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.weight.parameters(), 0.5)
        self.eager = 0

    def learn(self, batch: dict[str, torch.Tensor], doubled: bool, share: torch.Tensor) -> dict:
        self.eager += 1
        self.read = batch, doubled, share
        return {"sum": batch["rows"].sum() * (2 if doubled else 1) * share}


@pytest.fixture
def graph(monkeypatch):
    """A CudaGraph whose replay computes its result anew, where the capture left it."""
    learner = Learner()

    class Graph:
        def replay(self):
            batch, doubled, share = self.read
            self.result["sum"].copy_(batch["rows"].sum() * (2 if doubled else 1) * share)

    @contextlib.contextmanager
    def capture(graph, stream):
        yield
        graph.read = learner.read
        learner.eager -= 1  # a capture runs nothing

    class Stream:
        def wait_stream(self, other):
            pass

    learner.cards = []
    monkeypatch.setattr(torch.cuda, "set_device", learner.cards.append)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    whole = td3_bc.CudaGraph.capture

    def kept(self, *inputs):
        found = whole(self, *inputs)
        found[0].result = found[2]
        return found

    monkeypatch.setattr(td3_bc.CudaGraph, "capture", kept)
    return td3_bc.CudaGraph(learner)


def call(graph, size: int, doubled: bool = False, share: float = 1.0) -> float:
    return float(graph({"rows": torch.full((size,), 3.0)}, doubled, torch.tensor(share))["sum"])


def test_the_card_of_the_parameters_becomes_the_current_one(graph):
    """Streams and graphs are made on it: those of another card would capture nothing."""
    assert graph.learner.cards == [next(graph.learner.weight.parameters()).device]


def test_three_eager_calls_then_replays_of_new_inputs(graph):
    assert [call(graph, 2, share=share) for share in (1, 2, 3, 4, 5)] == [6, 12, 18, 24, 30]
    assert graph.learner.eager == 3


def test_what_is_no_tensor_and_every_shape_has_a_graph_of_its_own(graph):
    for size, doubled, wanted in [(2, False, 6), (2, True, 12), (4, False, 12)] * 5:
        assert call(graph, size, doubled) == wanted
    assert len(graph.graphs) == 3
    assert graph.learner.eager == 9


def test_new_optimisers_mean_a_new_graph(graph):
    for _ in range(4):
        call(graph, 2)
    graph.learner.optimizer = torch.optim.Adam(graph.learner.weight.parameters(), 0.1)
    for _ in range(4):
        call(graph, 2)
    assert (len(graph.graphs), graph.learner.eager) == (2, 6)


def test_optimisers_can_be_captured_and_a_schedule_still_writes_their_step_size(graph):
    schedule = torch.optim.lr_scheduler.LambdaLR(graph.learner.optimizer, lambda step: 1 / (step + 1))
    call(graph, 2)
    (group,) = graph.learner.optimizer.param_groups
    held = group["lr"]
    graph.learner.optimizer.step()
    schedule.step()
    assert group["capturable"]
    assert group["lr"] is held
    assert float(held) == 0.25
