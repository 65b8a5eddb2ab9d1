"""CUDA graphs without a GPU: what is captured, replayed and dropped; `torch.cuda` is a stand-in."""

import weakref
from contextlib import contextmanager

import pytest
import torch

import graphs
from config import CONFIGS
from engine import aligned_rows
from graphs import Captured, release_graphs
from random_weights import random_model
from scorer import Scorer


class Graph:
    """Of a doubling: a replay doubles what lies in the captured input into the captured result."""

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        x, y = self.call
        y.copy_(x * 2)


@pytest.fixture
def recorded(monkeypatch) -> tuple[list, list]:
    """Arguments and results of the doubling's calls, and the pools that its graphs were given."""
    calls, pools = [], []

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        pools.append(pool)
        yield
        graph.call = calls[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return calls, pools


def test_captured_function(recorded):
    calls, pools = recorded
    model = torch.nn.Linear(2, 2)
    model.revision = 0

    def double(x):
        calls.append((x, x * 2))
        return calls[-1][1]

    captured = Captured(double, model)
    before = torch.tensor([1.0, 2.0])
    first = captured(before)
    assert first.tolist() == [2, 4] and len(calls) == 2  # run, then captured
    given = torch.tensor([5.0, 6.0])
    assert captured(given).tolist() == [10, 12] and len(calls) == 2  # replayed
    assert first.tolist() == [2, 4] and before.tolist() == [1, 2] and given.tolist() == [5, 6]
    assert captured(torch.tensor([7.0])).tolist() == [14] and len(calls) == 4  # another shape
    assert captured(torch.tensor([8.0, 9.0])).tolist() == [16, 18] and len(calls) == 4
    assert pools == [None, "pool"]
    weight = weakref.ref(model.weight)
    del model.weight
    assert weight() is not None  # a graph reads it
    model.revision = 1  # the weights have changed
    assert captured(torch.tensor([1.0, 3.0])).tolist() == [2, 6] and len(calls) == 6
    assert weight() is None
    release_graphs()
    assert captured(torch.tensor([1.0, 3.0])).tolist() == [2, 6] and len(calls) == 8


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_rows_lie_where_compiled_code_wants_them(dtype, batch):
    rows = torch.arange(7 * batch).reshape(7, batch).to(dtype)
    aligned = aligned_rows(rows)
    torch.testing.assert_close(aligned, rows, rtol=0, atol=0)
    assert all(row.data_ptr() % 16 == 0 and row.is_contiguous() for row in aligned)


def test_compiled_code_of_other_operators_is_not_taken():
    """The key of torch's cache on disk tells signatures apart, for steps and for evaluation."""
    settings, before = torch.compiler.config, graphs.operators_tag()
    library = torch.library.Library("flatllama", "FRAGMENT")
    library.define("of_this_test(Tensor x) -> Tensor")
    assert graphs.operators_tag() != before
    model = random_model(CONFIGS["tiny"], None, "cpu", torch.float32)
    for compiled in (
        lambda: graphs.one_graph(lambda x: x, None),
        lambda: Scorer(model, 1, 8, compiled=True),
    ):
        with settings.patch(cache_key_tag="a user's"):
            compiled()
            assert settings.cache_key_tag == "a user's" + graphs.operators_tag()
            compiled()
            assert settings.cache_key_tag.count(graphs.operators_tag()) == 1
