"""Several processes: batch norms of a group against one process that has the joined batch, DDP, FSDP2.

Starting processes is slow: two of them run every check, each in a process group of its own, so that one that fails
leaves the next ones alone.
"""

import contextlib
import copy
import datetime
import traceback
import zlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

import resnet_kernels as rk
from resnet_kernels.nn.fusable import parts, why_plain
from resnet_kernels.ops.chain_training import moments_pay
from resnet_kernels.testing import BlockCase, randomize_

WORLD = 2
# For how long a process waits for a peer that failed.
PATIENCE = datetime.timedelta(seconds=20)

CASES = {
    c.name: c
    for c in (
        BlockCase("basic", True, 16, 16, 6, 5, N=16),
        BlockCase("basic-projection", True, 16, 32, 10, 9, 2, N=16),
        BlockCase("basic-projection-few", True, 16, 32, 5, 5, 2, N=4),
        BlockCase("basic-option-A", True, 16, 32, 7, 6, 2, N=4, option="A"),
        BlockCase("bottleneck", False, 64, 16, 6, 6, N=16),
        BlockCase("bottleneck-few", False, 64, 16, 3, 3, N=4),
        BlockCase("bottleneck-projection", False, 16, 16, 10, 9, 2, N=16),
        BlockCase("bottleneck-projection-few", False, 32, 16, 5, 4, 2, N=4),
        BlockCase("bottleneck-option-A", False, 16, 8, 9, 7, 2, N=16, option="A"),
        BlockCase("bottleneck-option-C", False, 64, 16, 6, 6, N=16, option="C"),
        BlockCase("bottleneck-groups", False, 64, 32, 6, 6, 2, N=16, groups=4, base_width=8),
        BlockCase("mixed", False, 32, 16, 7, 7, 2, N=8),
        BlockCase("one-value", False, 32, 8, 1, 1, N=4),
        BlockCase("no-value", False, 32, 8, 6, 6, N=4),
    )
}
SPLITS = {"even": {4: (2, 2), 8: (4, 4), 16: (8, 8)}, "uneven": {4: (3, 1), 8: (7, 1), 16: (13, 3)}}
MOMENTS = ("bottleneck", "bottleneck-projection", "basic-projection", "mixed")
CHECKS = {}


def check(*rows):
    """Registers a function under its name and each row of arguments."""

    def register(function):
        for row in rows or ((),):
            CHECKS["-".join((function.__name__, *row))] = function, row
        return function

    return register


def split(case, how):
    return (4, 0) if case.name == "no-value" else SPLITS[how][case.N]


def close(got, want, tolerance, name, eager=None):
    """By the norm of the difference: where rounding takes an element over a ReLU's edge, its gradient jumps. It may be
    twice that of `eager`, PyTorch's own result."""
    error, norm = (got.double() - want.double()).norm(), want.double().norm()
    allowed = tolerance * norm + 1e-12 + (0 if eager is None else 2 * (eager.double() - want.double()).norm())
    assert error <= allowed, f"{name}: {error:.2e} of {norm:.2e}, expected at most {allowed:.2e}"


def trained(block, x, dy):
    """y, gradients and statistics of a step."""
    x = x.clone().requires_grad_()
    y = block.train()(x)
    y.backward(dy)
    return (
        {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in block.named_parameters()} | dict(block.named_buffers())
    )


def replaced(model):
    assert rk.replace_blocks(model).replaced
    return model


@check(
    *[(dtype, how, name) for dtype in ("fp64", "fp32") for how in SPLITS for name in CASES],
    *[("bf16", "uneven", name) for name in MOMENTS],
)
def joined_batch(rank, dtype, how, name):
    """Batch norms of the group, as torchvision's block with BatchNorm in fp64 on the joined batch."""
    case = CASES[name]
    kind, backend, tolerance, of_gradients = {
        "fp64": (torch.float64, "reference", 1e-11, 1e-10),
        "fp32": (torch.float32, "cpu", 1e-5, 1e-2),
        "bf16": (torch.bfloat16, "cpu", 1e-2, 1e-2),
    }[dtype]
    block, x = case.make().to(kind).train(), case.input(kind)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    want = trained(copy.deepcopy(block).double(), x.double(), dy.double())
    eager = trained(copy.deepcopy(block), x, dy) if dtype == "bf16" else {}
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(replaced(block))
    sizes = split(case, how)
    x, dy = (t.split(sizes)[rank] for t in (x, dy))
    with rk.use_backend(backend):
        assert why_plain(ours, x) is None
        got = trained(ours, x, dy)
    for key, least in (("y", tolerance), ("x", of_gradients)):
        close(got[key], want[key].split(sizes)[rank], least, key, eager[key].split(sizes)[rank] if eager else None)
    for key, _ in ours.named_parameters():
        total = got[key].double()
        dist.all_reduce(total)
        close(total, want[key], of_gradients, key, eager.get(key))
    for key, _ in ours.named_buffers():
        close(got[key], want[key], tolerance, key, eager.get(key))


def test_the_cases_go_by_moments_on_all_on_some_and_on_no_process():
    def by_moments(case, images):
        p = parts(case.make())
        rows = images * -(-case.H // case.stride) * -(-case.W // case.stride)
        pointwise = [conv for conv in p.convs[len(p.convs) // 2 :] if conv.kernel_size == (1, 1)]
        return any(moments_pay(rows, conv.in_channels, conv.out_channels) for conv in pointwise)

    found = {name: [by_moments(case, n) for n in split(case, "uneven")] for name, case in CASES.items()}
    assert all(found[name] == [True, name != "mixed"] for name in MOMENTS)
    assert all(found[name] == [False, False] for name in CASES if "few" in name or name in ("basic", "one-value"))


@check(("subgroup",), ("world",))
def group_of_one(rank, which):
    """SyncBatchNorm without company is BatchNorm."""
    case = CASES["bottleneck-projection"]
    block, x = case.make().double(), case.input(torch.float64)
    dy = torch.randn_like(copy.deepcopy(block)(x))
    want = trained(copy.deepcopy(block), x, dy)
    if which == "world":
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(replaced(block), group if which == "subgroup" else None)
    with rk.use_backend("reference"):
        got = trained(ours, x, dy)
    for key, value in want.items():
        close(got[key], value, 1e-11, key)


def network(block):
    return randomize_(resnet.ResNet(block, [2, 1, 1, 1], num_classes=4))


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (resnet.BasicBlock, resnet.Bottleneck))]


def gradients(model, x):
    model.train()(x).square().sum().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def mean_gradients(model, batches):
    """Over the batches, each alone in torchvision's model, in fp64."""
    every = [gradients(copy.deepcopy(model).double(), x.double()) for x in batches]
    return {name: torch.stack([g[name] for g in every]).mean(0) for name in every[0]}


@check(("fp64",), ("fp32",))
def ddp(rank, dtype):
    model, batches = network(resnet.Bottleneck), torch.randn(6, 3, 32, 32).split(3)
    want = mean_gradients(model, batches)
    kind, backend, tolerance = {"fp64": (torch.float64, "reference", 1e-9), "fp32": (torch.float32, "cpu", 1e-2)}[dtype]
    with rk.use_backend(backend):
        got = gradients(DistributedDataParallel(replaced(model.to(kind))), batches[rank].to(kind))
    for name, value in want.items():
        close(got[name], value, tolerance, name)


@check()
def ddp_with_the_joined_batch(rank):
    """DDP's mean of the gradients, of a loss that is a sum over the joined batch."""
    model, x = network(resnet.Bottleneck).double(), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    want = gradients(copy.deepcopy(model), x)
    # DDP refuses SyncBatchNorm on CPUs when it is made: the norms, which keep their parameters, are converted after.
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(DistributedDataParallel(replaced(model)))
    with rk.use_backend("reference"):
        got = gradients(ours, x.split((4, 2))[rank])
    for name, value in want.items():
        close(WORLD * got[name], value, 1e-9, name)


@check(("Bottleneck",), ("BasicBlock",))
def fsdp2(rank, block):
    """A step of sharded blocks in a sharded model is that of the whole one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, batches = network(getattr(resnet, block)), torch.randn(6, 3, 32, 32).split(3)
    grads = mean_gradients(model, batches)
    whole, ours = copy.deepcopy(model).double(), replaced(model)
    for name, p in whole.named_parameters():
        p.grad = grads[name]
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*blocks(ours), ours):
        fully_shard(module, mesh=mesh)
    with rk.use_backend("cpu"):  # which raises where a block cannot run fused
        gradients(ours, batches[rank])
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for m in (whole, ours):
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    after = dict(whole.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad.full_tensor(), grads[name], 1e-2, f"gradient of {name}")
        close(p.detach().full_tensor() - before[name], after[name].detach() - before[name], 1e-2, f"step of {name}")


def run(rank, folder):
    """Every check; what was wrong with it, or None, into a file."""
    torch.set_num_threads(1)
    wrong = {}
    for i, (name, (function, args)) in enumerate(CHECKS.items()):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{i}", rank=rank, world_size=WORLD, timeout=PATIENCE
        )
        torch.manual_seed(zlib.crc32(name.encode()))
        # Where collectives do not match, gloo aborts the process.
        wrong[name] = "the process ended here"
        torch.save(wrong, folder / f"{rank}.pt")
        try:
            function(rank, *args)
            wrong[name] = None
        except Exception:  # whatever it was: told to the test of this check, which fails with it
            wrong[name] = traceback.format_exc(limit=-4)[-2000:]
        dist.destroy_process_group()
    torch.save(wrong, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    with contextlib.suppress(torch.multiprocessing.ProcessExitedException):
        torch.multiprocessing.spawn(run, (folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, wrong):
    told = [found.get(name, "not reached") for found in wrong]
    texts = [f"process {rank}: {text}" for rank, text in enumerate(told) if text]
    assert not texts, "\n".join(texts)
