import os
import sys
import zlib
from pathlib import Path

import pytest
import torch

os.environ.pop("RESNET_KERNELS_BACKEND", None)


# The benchmarks are no part of the package. Last: where a package is installed, it is that which is tested.
sys.path.append(str(Path(__file__).parents[1]))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# With one thread eager computes 1x1 convolutions of few positions by MKL, whose sums err half as much as oneDNN's, by
# which eager computes all others and we compute these: its error would be no measure of ours.
if not INTERPRETING:
    torch.set_num_threads(max(2, torch.get_num_threads()))


# Those that take longest begin first, in this order: with processes side by side, short tests then fill the rest of the
# time. Between them they take most of a run.
LONGEST = (
    "test_everything_marked_interpreted",
    "test_tritons_kernels_are_the_same_machine_code",
    "test_every_section_runs_or_says_why_not",
    "test_shipped_configurations_compile_clean",
    "test_training_compiles_clean",
    "test_reductions_compile_clean",
    "test_odd_blocks_compile_clean",
    "test_what_is_wrong_crashes_or_hangs_has_no_time_and_stops_nothing",
    "test_inductor_forward_and_backward",
    "test_peak_activation_memory_is_at_most_half_of_eagers",
    "test_two_processes",
)


def pytest_collection_modifyitems(config, items):
    # Triton reads TRITON_INTERPRET when it is imported: what it interprets runs in processes of its own, alone
    # (test_interpreted.py starts them, each with a part).
    chosen = [i for i in items if ("interpreted" in i.keywords) == INTERPRETING and not bf16_in_the_interpreter(i)]
    if INTERPRETING:
        part, parts = map(int, os.environ.get("RESNET_KERNELS_TESTS_PART", "0/1").split("/"))
        chosen = chosen[part::parts]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[i for i in items if i not in kept])
    rank = {name: i for i, name in enumerate(LONGEST)}
    items[:] = sorted(chosen, key=lambda item: rank.get(getattr(item, "originalname", item.name), len(rank)))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel that takes the device along fails every later test of its process: of one that is a worker among others
    the next test gets a new one."""
    report = (yield).get_result()
    if report.failed and "gpu" in item.keywords and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def bf16_in_the_interpreter(item):
    # It multiplies bfloat16 wrongly: `why_not` says so, and test_triton.py tests that it does.
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "interpreted" in item.keywords and any(v is torch.bfloat16 or v == "bf16" for v in values)


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Random inputs that differ from test to test and are the same from run to run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def exact_fp32(request, monkeypatch):
    """On a GPU fp32 is fp32: whether cuDNN takes tf32 depends on sizes, and so does its error."""
    if "gpu" in request.keywords:
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")


@pytest.fixture
def poisoned():
    """torch.empty, in C++ too, returns NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
