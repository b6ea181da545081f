"""The measurement suite itself: what it finds wrong has no time; crashes, hangs and cuts leave a valid file."""

import copy
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import resnet_kernels as rk
from benchmarks import accuracy, cases, cudnn_graph, gpu_suite, measure, ncu, sections
from benchmarks.cases import ConvAct
from benchmarks.conftest import EventTimer, Recorded
from benchmarks.folding import folded
from benchmarks.providers import PROVIDERS, Built, Provider, providers_of
from resnet_kernels.analysis import timing
from resnet_kernels.analysis.results import Results, Row, load, parse
from resnet_kernels.analysis.timing import Clock, interleaved, rotating, sample
from resnet_kernels.backends import library
from resnet_kernels.testing import BlockCase, eager_results

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = {
    "primitives": cases._convolution(8, 16, 1, 6, 1, True, "fp32", 2),
    "statistics": cases._statistics(8, 16, 3, 6, "fp32", 2),
    "blocks": next(c for c in cases.blocks("fp32", 1, False) if c.name == "r18-layer1"),
    "inference": cases.model("inference", "resnet18", "fp32", 2, 32),
    "training": cases.model("training", "resnet18", "fp32", 4, 32),
}
QUICK = (
    "eager",
    "eager channels_last",
    "eager folded",
    "timm",
    "replaced",
    "frozen",
    "cpu",
    "library",
    "frozen library",
)


def rows_of(case, providers, rounds=2):
    told = Recorded()
    measure.measure(case, CPU, providers, told, rounds, seconds=5, budget=60)
    return {row.provider: row for row in told.rows}


# A case by every provider


@pytest.mark.parametrize("name", TINY)
def test_providers_are_right_and_timed(name):
    case = TINY[name]
    found = rows_of(case, [p for p in providers_of(case.section, "cpu") if p.name in QUICK])
    assert {"eager", "eager channels_last"} <= set(found)
    for row in found.values():
        assert row.status in ("ok", "unavailable"), row
        assert (row.seconds is not None and row.p20 <= row.seconds <= row.p80) == (row.status == "ok")
        assert row.reason or row.status == "ok"
    ours = [row for row in found.values() if not row.peer]
    assert ours and {"statistics": "unavailable"}.get(name, "ok") in {row.status for row in ours}
    if name in ("inference", "training"):
        assert found["eager"].peak_bytes is None or found["eager"].peak_bytes >= 0


def test_a_provider_that_is_wrong_has_no_time(monkeypatch):
    """Ours, with a kernel broken; the others are timed."""
    conv = library.conv
    monkeypatch.setattr(library, "conv", lambda *args: (conv(*args)[0] * 1.001, None))
    found = rows_of(TINY["primitives"], providers_of("primitives", "cpu"))
    assert found["library"].status == "wrong" and found["library"].seconds is None and "rms" in found["library"].reason
    assert found["cpu"].status == "ok" and found["cpu"].seconds > 0


def test_a_wrong_gradient_has_no_time():
    def build(prepared, case):
        module = copy.deepcopy(prepared.module)
        module.layer1[0].conv1.weight.register_hook(lambda g: 1.5 * g)
        return Built({"call": lambda *inputs: None}, module)

    bad = Provider("bad", False, frozenset({"training"}), build)
    row = rows_of(TINY["training"], [bad])["bad"]
    assert row.status == "wrong" and row.seconds is None
    assert row.errors["gradient_rms"] > 2 * row.errors["eager_gradient_rms"]


def test_a_provider_that_raises_is_failed_and_one_that_takes_too_long_is_cut():
    def build(prepared, case):
        raise LookupError("no such thing\nat all")

    raising = Provider("raising", True, frozenset({"inference"}), build)
    slow = Provider("slow", True, frozenset({"inference"}), build, patience=(1e3, 1e3))
    eager = next(p for p in PROVIDERS if p.name == "eager")
    found = rows_of(TINY["inference"], [raising, slow, eager])
    assert (found["raising"].status, found["raising"].reason) == ("failed", "LookupError: no such thing")
    assert found["slow"].status == "cut" and "building may take 1000" in found["slow"].reason
    assert found["eager"].status == "ok"


def test_a_case_is_random_and_the_same_for_every_provider():
    first, second = (TINY["inference"].prepare(CPU, seed) for seed in (0, 0))
    other = TINY["inference"].prepare(CPU, 1)
    assert torch.equal(first.inputs[0][0], second.inputs[0][0]) and len(first.inputs) >= 2
    assert not torch.equal(first.inputs[0][0], first.inputs[1][0])
    assert not torch.equal(first.inputs[0][0], other.inputs[0][0])
    assert first.exact[0].dtype == torch.float64


def test_floors_come_from_what_a_case_needs_and_the_machine_can():
    case = cases._convolution(64, 64, 3, 56, 1, False, "bf16", 256)
    M = 256 * 56 * 56
    assert case.need.flops == 2 * M * 9 * 64 * 64
    assert case.need.bytes == 2 * (2 * M * 64 + 9 * 64 * 64)
    assert case.floor({"memory": 1e12, "matrix": {"bf16": 1e15}}) == case.need.bytes / 1e12
    assert case.floor({"memory": 1e15, "matrix": {"bf16": 1e12}}) == case.need.flops / 1e12
    assert case.floor({"memory": 1e12}) is None


def test_folded_is_the_same_without_batch_norms():
    module = ConvAct(8, 16, 3, 2).eval()
    torch.nn.init.uniform_(module.bn1.running_var, 0.5, 2)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(folded(module)(x), module(x))
    model = TINY["inference"].make().eval()
    copied = folded(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in copied.modules())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(copied(images), model(images), rtol=1e-3, atol=1e-3)


def test_cudnn_graphs_take_the_place_of_every_convolution():
    """Of the modules' structure; the graphs themselves need a GPU."""
    fused = cudnn_graph.fuse(TINY["inference"].make().eval())
    convolutions = [m for m in fused.modules() if isinstance(m, cudnn_graph.Fused)]
    assert len(convolutions) == 19 and sum(m.relu for m in convolutions) == 16
    assert all(m.conv.bias is not None for m in convolutions)


@pytest.mark.parametrize(
    "case",
    [cases._weight_gradient(8, 16, 3, 9, 2, "fp32", 2), cases._statistics(8, 16, 1, 9, "fp32", 2)],
    ids=["weight-gradient", "statistics"],
)
def test_what_training_asks_of_a_convolution_is_right_and_timed(case):
    told = Recorded()
    measure.measure(case, torch.device("cpu"), providers_of("primitives", "cpu"), told, 2, 5, 300)
    assert {row.provider: row.status for row in told.rows} == {
        "eager": "ok",
        "eager channels_last": "ok",
        "eager folded": "ok",
        "cpu": "ok",
        "library": "unavailable",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("provider", [p for p in providers_of("inference", "cuda") if p.patience[0] < 20], ids=str)
def test_providers_on_a_gpu(provider):
    case = cases.model("inference", "resnet18", "bf16", 4, 64)
    told = Recorded()
    measure.measure(case, torch.device("cuda"), [provider], told, 2, 5, 300)
    assert told.rows and all(row.status in ("ok", "unavailable") for row in told.rows), told.rows


# Accuracy


SMALL = BlockCase("small", False, 32, 8, 6, 6, option="C", N=4)


def test_accuracy_is_eagers_and_ours():
    told = Recorded()
    for data in accuracy.DATA:
        accuracy.measure(SMALL, "fp32", data, CPU, told, 2)
    assert [(r.provider, r.peer, r.part, r.status, r.rounds) for r in told.rows] == [
        (provider, peer, data, "ok", 2)
        for data in ("ordinary", "large mean")
        for provider, peer in (("eager channels_last", True), ("replaced", False))
    ]
    for row in told.rows:
        assert {"y", "d x", "d conv2.weight", "d bn3.bias", "d downsample.1.weight", "bn1.running_var"} < set(
            row.errors
        )
        assert all(0 <= error < 1e-2 for error in row.errors.values()), row
    # Before a 1x1 and its batch norm, and past a ReLU that lets all through, a bias has no effect.
    assert ["d bn2.bias" in row.errors for row in told.rows] == [True, True, False, False]


def test_accuracy_is_relative():
    def off(*args):
        found, masks = eager_results(*args)
        return {name: 1.01 * t for name, t in found.items()}, masks

    found = accuracy.errors(off, SMALL, torch.float32, 0.0, CPU, 2)
    assert len(found) == 22 and all(error == pytest.approx(0.01, rel=1e-2) for error in found.values())


def test_accuracy_that_is_not_there_has_its_reason(monkeypatch):
    def unavailable(*args):
        raise rk.BackendUnavailable("not here")

    told = Recorded()
    monkeypatch.setattr(accuracy, "eager_results", None)
    monkeypatch.setattr(accuracy, "fused_results", unavailable)
    accuracy.measure(SMALL, "fp32", "ordinary", CPU, told, 1)
    monkeypatch.setattr(told, "left", lambda: 0.0)
    accuracy.measure(SMALL, "bf16", "ordinary", CPU, told, 1)
    assert [r.status for r in told.rows] == ["failed", "unavailable", "cut", "cut"]
    assert told.rows[1].reason == "not here" and "TypeError" in told.rows[0].reason


# Timing


def test_samples_and_rounds():
    assert sample([3.0]) == (3.0, 3.0, 3.0, 1)
    assert sample([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == (6, 3, 9, 11)
    order, clock = [], Clock(CPU)
    calls = {name: functools.partial(order.append, name) for name in "abc"}
    found = interleaved(calls, clock, 3)
    assert order == list("abcbcacab") and found["a"].rounds == 3
    assert interleaved({"slow": lambda: time.sleep(0.02)}, clock, 100, budget=0.1)["slow"].rounds < 10
    assert interleaved({"slow": lambda: time.sleep(0.02)}, clock, 100, budget=-1)["slow"].rounds == 1
    assert interleaved({"slow": lambda: time.sleep(0.02)}, clock, 3)["slow"].median >= 0.02


def test_inputs_rotate():
    seen = []
    call = rotating(seen.append, [(1,), (2,), (3,)])
    for _ in range(5):
        call()
    assert seen == [1, 2, 3, 1, 2]


class FakeEvent:
    """Records in order; a GPU that takes a millisecond between two."""

    count = 0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        FakeEvent.count += 1
        self.at = FakeEvent.count

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, other):
        return float(other.at - self.at)


def test_pytest_benchmark_is_given_the_time_between_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = Clock(CPU)
    clock._other = torch.zeros(4, dtype=torch.int32)
    timer = EventTimer(clock)
    start, end = timer(), timer()
    assert end - start == pytest.approx(1e-3) and clock._other.eq(1).all()
    clock._other.zero_()
    second = timer()
    assert clock._other.eq(1).all()
    clock._other.zero_()
    assert timer() - second == pytest.approx(1e-3) and clock._other.eq(0).all()
    assert clock.seconds(lambda: None) == pytest.approx(1e-3)
    assert timing.Instant(2.0) - timing.Instant(0.5) == 1.5


# The suite


# It is run from its own tree; an environment with another torch has the package installed elsewhere.
from_the_tree = pytest.mark.skipif(Path(rk.__file__).parents[1] != ROOT, reason="the package is not the tree's own")


def suite(out, *arguments, plugin=None, **rest):
    environment = os.environ | ({"PYTHONPATH": str(plugin)} if plugin else {})
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **rest
    )


def test_without_a_gpu_it_ends_in_seconds_with_a_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_suite.main([]) == 2
    assert "is a CPU-only build" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would begin")
def test_make_gpu_ends_without_a_gpu():
    done = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no NVIDIA GPU" in done.stderr


@from_the_tree
def test_every_section_runs_or_says_why_not(tmp_path):
    """In two calls: the second goes on where the first ended. A third, of other code, does not."""
    few = ["--models", "resnet18", "--batches", "1", "--rounds", "1", "--budget", "360"]
    few += ["--providers", "eager", "eager channels_last", "frozen", "replaced", "cpu"]
    *first, last = gpu_suite.NAMES[: gpu_suite.NAMES.index("accuracy") + 1]
    output = ""
    for chosen in (first, [last, "profile", "--resume"]):
        process = suite(tmp_path, *few, "--sections", *chosen)
        output += process.communicate(timeout=500)[0]
        assert process.returncode == 0, output
    results = load(tmp_path / "results.json")
    assert [s.name for s in results.sections] == gpu_suite.NAMES
    for section in results.sections:
        assert section.status == "ok" or (section.status == "skipped" and section.reason), section
    measured = {"primitives", "blocks", "layers", "inference", "training", "accuracy"}
    assert {"facts", "tuning"} | measured == {s.name for s in results.sections if s.status == "ok"}
    assert results.facts["memory"] > 1e8 and results.facts["matrix"]["fp32"] > 1e8 and results.facts["commit"]
    assert {r.section for r in results.rows} == measured
    assert all(r.status == "ok" and (r.errors if r.section == "accuracy" else r.floor) for r in results.rows)
    assert all((r.seconds is None) == (r.section == "accuracy") for r in results.rows)
    assert [p for p in (tmp_path / "tuning").iterdir() if p.suffix == ".json"]
    assert "resnet18" in output and (tmp_path / "report.html").stat().st_size > 10_000
    assert "| inference |" in (tmp_path / "report.md").read_text()
    results.facts["commit"] = "another"
    results.save(tmp_path / "results.json")
    process = suite(tmp_path, "--resume")
    assert "expected results of commit" in process.communicate(timeout=60)[0] and process.returncode == 2


PLUGIN = """
import os, time
from benchmarks.providers import PROVIDERS, Built, Provider
from benchmarks.providers import _channels_last

def wrong(prepared, case):
    run = _channels_last(prepared, case).runs["call"]
    return Built({"call": lambda *inputs: 1.01 * run(*inputs)})

def crashing(prepared, case):
    os._exit(66)

def hanging(prepared, case):
    time.sleep(600)

def crashing_later(prepared, case):
    run, calls = _channels_last(prepared, case).runs["call"], []
    def call(*inputs):
        calls.append(1)
        return run(*inputs) if len(calls) < 5 else os._exit(67)  # when it is timed
    return Built({"call": call})

def elsewhere(prepared, case):
    return None if case.name in ("3x3 64->64 56x56", "r18-layer1") else "once is enough"

for name, build in (("wrong", wrong), ("crashing", crashing), ("hanging", hanging), ("last", _channels_last)):
    PROVIDERS.append(Provider(name, False, frozenset({"primitives"}), build, why_not=elsewhere))
PROVIDERS.append(Provider("crashing later", False, frozenset({"blocks"}), crashing_later, why_not=elsewhere))
"""


@from_the_tree
def test_what_is_wrong_crashes_or_hangs_has_no_time_and_stops_nothing(tmp_path):
    (tmp_path / "unsound.py").write_text(PLUGIN)
    names = ["eager", "wrong", "crashing", "hanging", "last", "crashing later"]
    chosen = ["--sections", "primitives", "blocks", "--budget", "200", "--rounds", "1", "--batches", "1"]
    process = suite(
        tmp_path / "out", *chosen, "--patience", "20", "--plugin", "unsound", "--providers", *names, plugin=tmp_path
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    results = load(tmp_path / "out" / "results.json")
    first = {r.provider: r for r in results.rows if r.case == "3x3 64->64 56x56"}
    assert {name: row.status for name, row in first.items()} == {
        "eager": "ok",
        "wrong": "wrong",
        "crashing": "failed",
        "hanging": "failed",
        "last": "ok",
    }
    assert "crashed: exit code 66" in first["crashing"].reason and "hung: no word for 20 s" in first["hanging"].reason
    assert all((row.seconds is not None) == (row.status == "ok") for row in results.rows)
    blocks = [r for r in results.rows if r.section == "blocks" and r.case == "r18-layer1"]
    assert {r.provider: r.status for r in blocks} == {"eager": "ok", "crashing later": "failed"}
    assert "crashed: exit code 67" in next(r.reason for r in blocks if r.status == "failed")
    assert (tmp_path / "out" / "report.md").exists()


def survivors(out):
    """Processes that still write there."""
    found = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout.split()
    return [pid for pid in found if int(pid) != os.getpid()]


@from_the_tree
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_cut_in_the_middle_it_leaves_a_valid_file(tmp_path, how):
    chosen = [
        "--sections",
        "primitives",
        "inference",
        "training",
        "--models",
        "resnet18",
        "--providers",
        "eager",
        "cpu",
    ]
    process = suite(tmp_path, "--budget", "200", *chosen)
    deadline = time.monotonic() + 120
    path = tmp_path / "results.json"
    while time.monotonic() < deadline and not (path.exists() and len(load(path).rows) >= 1):
        time.sleep(random.uniform(0.05, 0.3))
    process.send_signal(how)
    process.communicate(timeout=60)
    results = load(path)
    assert results.rows and all(r.status == "ok" for r in results.rows)
    statuses = {s.name: s.status for s in results.sections}
    if how == signal.SIGTERM:
        assert process.returncode == 130 and statuses["training"] == "cut" and set(statuses.values()) <= {"ok", "cut"}
        assert (tmp_path / "report.md").exists()
    else:
        assert statuses["training"] == "waiting"
    time.sleep(0.5)
    assert not survivors(tmp_path)


@from_the_tree
def test_time_that_is_not_there_cuts_sections(tmp_path):
    process = suite(tmp_path, "--budget", "10", "--sections", "primitives", "blocks")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert {s.status for s in load(tmp_path / "results.json").sections} == {"cut"}


# What other tools say


def test_junit_is_summed_up(tmp_path):
    (tmp_path / "junit.xml").write_text(
        """<testsuites><testsuite><testcase classname="a" name="right"/><testcase classname="a" name="left">
        <failure message="assert 1 == 2&#10;more">text</failure></testcase><testcase classname="b" name="no">
        <skipped message="why"/></testcase><testcase classname="b" name="broken"><error>boom</error></testcase>
        </testsuite></testsuites>"""
    )
    assert gpu_suite.junit_summary(tmp_path / "junit.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": {"a::left": "assert 1 == 2", "b::broken": "boom"},
    }


NAMES = (
    "ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "dram__bytes.sum.per_second",
)
LINES = (
    NAMES,
    ("", "", "us", "%", "register/thread", "Gbyte/s"),
    ("0", "_conv_pool_kernel(bf16*)", "340.5", "41.25", "128", "206.1"),
    ("1", "_conv_box_kernel(bf16*)", "50.1", "n/a", "96", "1,206.1"),
)
NCU = "\n".join(["==PROF== Connected to process 1", *(",".join(f'"{v}"' for v in line) for line in LINES)])


def test_ncus_table_is_read_whatever_is_missing():
    stem, box = ncu.rows(NCU)
    assert (stem.part, stem.seconds) == ("0: _conv_pool_kernel", pytest.approx(340.5e-6))
    assert stem.metrics == {"dram_share": 41.25, "registers": 128, "dram_bytes_per_second": pytest.approx(206.1e9)}
    assert box.metrics == {"registers": 96, "dram_bytes_per_second": pytest.approx(1206.1e9)}
    assert ncu.rows("") == [] and ncu.rows("==ERROR== no permission\n") == []
    parse({"schema": 1, "facts": sections.static_facts("cpu"), "rows": [dataclasses.asdict(stem)]})


def test_the_slowest_kernels_are_kept_in_their_order(monkeypatch):
    monkeypatch.setattr(ncu, "SLOWEST", 1)
    assert [row.part for row in ncu.rows(NCU)] == ["0: _conv_pool_kernel"]


def test_a_summary_names_ours_peers_and_what_is_wrong():
    from rich.console import Console

    base = dict(section="inference", case="resnet50", dtype="bf16", batch=256)
    rows = [
        Row(**base, provider="eager", status="ok", peer=True, seconds=0.02),
        Row(**base, provider="frozen", status="ok", seconds=0.01, floor=0.005),
        Row(**base, provider="frozen triton", status="wrong", reason="rms"),
    ]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(gpu_suite.summary(Results({}, [], rows)))
    text = console.export_text()
    assert "frozen (call)" in text and "2.00" in text and "50%" in text and "frozen triton wrong" in text
