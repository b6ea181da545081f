"""Frozen models as CUDA graphs: the cache with captures that only remember, and the real thing on a GPU."""

import copy
import pickle
import threading

import pytest
import torch
import torchvision
from torch import nn

import resnet_kernels as rk
from resnet_kernels.inference import graphs
from resnet_kernels.inference.graphs import Captured, Graphs
from resnet_kernels.testing import assert_matches, randomize_

NHWC = torch.channels_last


class Event:
    def __init__(self, *streams):
        self.recorded = 0

    def record(self, stream):
        self.recorded += 1

    def synchronize(self):
        pass


class Stream:
    waited = 0

    def wait_event(self, event):
        assert event.recorded
        Stream.waited += 1


@pytest.fixture
def remembered(monkeypatch):
    """Captures that run nothing until they are replayed, into one result, as a graph does. Their inputs' sizes."""
    captured = []

    def capture(self, b, function):
        captured.append(tuple(b.shape))
        result = torch.full_like(function(b), float("nan"))
        return Captured(b, result, lambda: result.copy_(function(b)))

    Stream.waited = 0
    monkeypatch.setattr(Graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(graphs, "usable", lambda x: x.numel() > 0)
    return captured


def twice(frozen, x):
    """The first call of a size runs without a graph."""
    frozen(x)
    return frozen(x)


def small(name="resnet18"):
    return randomize_(torchvision.models.get_model(name, num_classes=8)).eval()


def test_one_graph_for_each_size_and_a_bounded_number(remembered, monkeypatch):
    model = small()
    frozen = rk.freeze(model)
    inputs = [torch.randn(n, 3, h, 32) for n, h in ((1, 32), (2, 32), (1, 40))]
    with torch.no_grad():
        want = [rk.freeze(model, cuda_graphs=False)(x) for x in inputs]
        for _ in range(2):
            for x, y in zip(inputs, want, strict=True):
                torch.testing.assert_close(frozen(x), y)
        assert len(remembered) == 3, "one capture at the second call of each size"
        for x, y in zip(inputs, want, strict=True):
            torch.testing.assert_close(frozen(x), y)
        # A graph is captured on memory of its own: what its input was, or whose, makes no difference.
        torch.testing.assert_close(frozen(inputs[0].contiguous(memory_format=NHWC).double()), want[0])
    assert remembered == [(1, 3, 32, 32), (2, 3, 32, 32), (1, 3, 40, 32)]
    assert Stream.waited == 6, "each replay but the first waits for the one before"
    monkeypatch.setattr(Graphs, "MAX_GRAPHS", 2)
    twice(frozen, torch.randn(3, 3, 32, 32))
    assert len(frozen.net.graphs) == 2
    frozen(inputs[0])
    assert len(remembered) == 4, "the graph used last was forgotten first"
    frozen(inputs[2])
    assert len(remembered) == 5


def test_results_stay_when_the_graph_is_replayed(remembered):
    frozen = rk.freeze(small())
    a, b = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    first = twice(frozen, a)
    kept = first.clone()
    assert not torch.equal(frozen(b), first)
    assert torch.equal(first, kept)


def test_flags_that_a_capture_fixes_get_a_graph_of_their_own(remembered, monkeypatch):
    frozen, x = rk.freeze(small()), torch.randn(1, 3, 32, 32)
    twice(frozen, x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    twice(frozen, x)
    frozen(x)
    assert len(remembered) == 2


def test_copies_refreshed_and_unpickled_models_capture_anew(remembered):
    model = small()
    frozen, x = rk.freeze(model), torch.randn(1, 3, 32, 32)
    want = twice(frozen, x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen.net))):
        torch.testing.assert_close(twice(other, x), want)
    assert len(remembered) == 3
    nn.init.zeros_(model.fc.weight)
    frozen.refresh()
    torch.testing.assert_close(twice(frozen, x), model.fc.bias.expand(1, -1))
    assert len(remembered) == 4


def test_threads_take_turns(remembered):
    frozen = rk.freeze(small())
    inputs = [torch.randn(1, 3, 32, 32) for _ in range(6)]
    want = [rk.freeze(frozen._source[0], cuda_graphs=False)(x) for x in inputs]
    got = [None] * len(inputs)

    def call(i):
        got[i] = frozen(inputs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert len(remembered) == 1


def test_a_capture_that_fails_leaves_nothing_behind(remembered, monkeypatch):
    frozen, x = rk.freeze(small()), torch.randn(1, 3, 32, 32)
    working = Graphs._capture

    def failing(self, b, function):
        raise RuntimeError("no memory")

    monkeypatch.setattr(Graphs, "_capture", failing)
    frozen(x)
    with pytest.raises(
        RuntimeError, match="the capture failed .no memory.; pass cuda_graphs=False to run without graphs"
    ):
        frozen(x)
    monkeypatch.setattr(Graphs, "_capture", working)
    assert frozen(x).shape == (1, 8) and len(frozen.net.graphs) == 1


def test_trunks_of_other_models_are_graphs_of_their_own(remembered):
    model = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    randomize_(model)
    x = torch.randn(1, 3, 33, 32)
    with torch.no_grad():
        torch.testing.assert_close(twice(rk.freeze(model), x)["out"], model(x)["out"], rtol=1e-3, atol=1e-3)
    assert len(remembered) == 5, "stem and four stages"


def test_bad_input_is_named_before_anything_is_captured(remembered):
    frozen = rk.freeze(small())
    with pytest.raises(ValueError, match="expected .N, 3, H, W. of a floating dtype, got .1, 4, 32, 32."):
        frozen(torch.randn(1, 4, 32, 32))
    assert twice(frozen, torch.randn(0, 3, 32, 32)).shape == (0, 8) and not remembered


def test_inference_mode_and_back(remembered):
    frozen, x = rk.freeze(small()), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        want = twice(frozen, x)
    torch.testing.assert_close(frozen(x), want.clone())
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), want)
    assert len(remembered) == 1


def test_a_head_of_the_users_own_is_not_captured(remembered):
    """It may return anything, and its hooks would not see a replay."""

    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x), float(x.sum())

    model = small()
    model.fc = Head(512, 8)
    frozen, x = rk.freeze(model), torch.randn(1, 3, 32, 32)
    logits, number = twice(frozen, x)
    assert logits.shape == (1, 8) and isinstance(number, float)
    seen = []
    model.fc = nn.Linear(512, 8)
    frozen = rk.freeze(model)
    frozen.net.avgpool.register_forward_hook(lambda m, args, out: seen.append(out))
    for _ in range(4):
        frozen(x)
    assert len(seen) == 4
    assert len(remembered) == 2 and len(frozen.net.graphs) == 0, "the trunks were captured"


def test_a_head_that_is_replaced_counts(remembered):
    frozen, x = rk.freeze(small()), torch.randn(1, 3, 32, 32)
    twice(frozen, x)
    frozen.net.fc = nn.Linear(512, 5)
    assert twice(frozen, x).shape == (1, 5)


def test_a_compiled_caller_sees_one_opaque_call():
    frozen, x = rk.freeze(small()), torch.randn(2, 3, 32, 32)

    def caller(t):
        return frozen(t * 2).softmax(1)

    torch.testing.assert_close(torch.compile(caller, backend="eager")(x), caller(x))


# On a GPU.


@pytest.fixture
def on_gpu():
    model = small("resnet50").to("cuda", torch.bfloat16)
    return model, torch.randn(4, 3, 96, 64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "library", "gpu"])
def test_graphs_on_a_gpu(on_gpu, backend):
    model, x = on_gpu
    with rk.use_backend(backend) if backend else torch.no_grad():
        frozen, plain = rk.freeze(model), rk.freeze(model, cuda_graphs=False)
    want, exact = model(x.bfloat16()), copy.deepcopy(model).double()(x.double())
    for _ in range(3):
        got = frozen(x)
        assert_matches(got, want, exact, 2048)
        assert torch.equal(got, plain(x))
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(frozen(x), got)
    assert len(frozen.net.graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["library", "gpu"])
def test_side_streams_and_threads_on_a_gpu(on_gpu, backend):
    model, x = on_gpu
    with rk.use_backend(backend):
        frozen = rk.freeze(model)
    inputs = [torch.randn_like(x) for _ in range(8)]
    want = [twice(frozen, t) for t in inputs]
    got = [None] * len(inputs)

    def call(i):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                got[i] = frozen(inputs[i])
            stream.synchronize()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_no_host_synchronisation_on_a_gpu(on_gpu):
    model, x = on_gpu
    frozen = rk.freeze(model)
    twice(frozen, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        frozen(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_inside_another_capture_on_a_gpu(on_gpu):
    model, x = on_gpu
    frozen = rk.freeze(model)
    want = twice(frozen, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = frozen(x)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = small("resnet50").to("cuda:1", torch.bfloat16)
    x = torch.randn(2, 3, 64, 64, device="cuda:1")
    with rk.use_backend("gpu"):
        frozen = rk.freeze(model)
    assert torch.equal(twice(frozen, x), frozen(x)) and frozen(x).device == x.device


@pytest.mark.gpu
def test_memory_of_graphs_is_bounded_on_a_gpu(on_gpu):
    model, _ = on_gpu
    frozen = rk.freeze(model)
    held = []
    for n in range(1, 25):
        twice(frozen, torch.randn(n, 3, 64, 64, device="cuda"))
        held.append(torch.cuda.memory_allocated())
    assert len(frozen.net.graphs) == graphs.Graphs.MAX_GRAPHS
    del frozen
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < held[-1]
