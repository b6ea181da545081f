"""The extension: what was built, and what it says of bad input."""

import pytest
import torch

from resnet_kernels.backends import extension


def module():
    built, reason = extension.load()
    assert built is not None, reason
    return built


def test_it_was_built_for_this_torch():
    assert module().build_info()["torch"] == torch.__version__.split("+")[0]


def test_cpu_passes_name_what_is_wrong():
    C = module()
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    y = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    conv = C.pack_conv(torch.randn(5, 3, 1, 1), torch.ones(5), (1, 0, 1, 1), [2, 3, 5, 5], "auto")

    def bn_pass(t, a=None, b=None, residual=None):
        """a*t + b + residual"""
        nothing = (None, None, (0,) * 5)
        added = None if residual is None else (residual, *[None] * 6, False, *nothing)
        operand = (t, None, a, b, *[None] * 3, False, *nothing)
        return C.bn_pass(operand, None, added, False, None, 0.0, True, None, "", None)

    def unpool(winners, window=(3, 2, 1, 10, 9)):
        return C.bn_pass(
            (x, *[None] * 6, False, None, winners, window), None, None, False, None, 0.0, True, None, "", None
        )

    bytes_of_x = x.to(torch.uint8)

    ones = torch.ones(4)
    cases = [
        (lambda: bn_pass(torch.randn(2, 4, 5, 5)), "x: expected channels_last memory"),
        (lambda: bn_pass(x[0]), "x: expected 4 dimensions"),
        (lambda: bn_pass(x, torch.ones(3), ones), "x: expected 4 contiguous values, one per channel"),
        (lambda: bn_pass(x, ones.double(), ones), "x: expected float32, got Double"),
        (lambda: bn_pass(x, ones), "x: expected a with b"),
        (lambda: bn_pass(x, residual=x[:1]), r"residual: expected \[2, 4, 5, 5\], got \[1, 4, 5, 5\]"),
        (lambda: bn_pass(x, residual=x.bfloat16()), "residual: expected Float, got BFloat16"),
        (lambda: C.wgrad(x, x[:1], 1, 1, (1, 0, 1, 1), False), "g: images: expected 1, got 2"),
        (lambda: C.wgrad(x, x.double(), 1, 1, (1, 0, 1, 1), False), "x: expected Float, got Double"),
        (lambda: C.data_grad(x, torch.randn(3, 4, 1, 1), 5, 5, (1, 0, 1, 1)), "g: channels: expected 3, got 4"),
        (lambda: C.second_moments(x.double()), "h: dtype: expected Float, got Double"),
        (lambda: C.max_pool_relu(x, 9, 2, 1), "a window of 9 does not fit a map of 5 x 5 padded by 1"),
        (lambda: C.max_pool_relu(x, 3, 2, 2), r"expected 2 \* padding <= kernel"),
        (lambda: C.max_pool_relu_winners(x.double(), None, None, 3, 2, 1), "x: expected Float, got Double"),
        (lambda: C.max_pool_relu_winners(x, ones, None, 3, 2, 1), "max pool: expected a with b"),
        (lambda: C.max_pool_relu_winners(x, ones[:3], ones, 3, 2, 1), "a and b: expected 4 contiguous values"),
        (lambda: unpool(x), "x: expected Byte, got Float"),
        (lambda: unpool(bytes_of_x[:1]), r"x: expected \[2, 4, 5, 5\], got \[1, 4, 5, 5\]"),
        (lambda: unpool(bytes_of_x, (0, 2, 1, 10, 9)), "x: expected a window and a stride of at least 1"),
        (lambda: C.conv(x, conv, None, None, False, False), "x: channels: expected 3, got 4"),
        (lambda: C.conv(x[:, :3], conv, None, x, False, False), r"x: expected channels_last memory"),
        (
            lambda: C.conv(y, conv, None, x, False, False),
            r"residual: sizes: expected \[2, 5, 5, 5\], got \[2, 4, 5, 5\]",
        ),
    ]
    for call, says in cases:
        with pytest.raises(RuntimeError, match=says):
            call()


def test_a_missing_or_broken_extension_is_a_reason(monkeypatch):
    for error, says in (
        (ModuleNotFoundError("no _C"), "was not built"),
        (ImportError("undefined symbol"), "built for another torch"),
    ):

        def fail(name, error=error):
            raise error

        extension.load.cache_clear()
        monkeypatch.setattr(extension.importlib, "import_module", fail)
        found, reason = extension.load()
        monkeypatch.undo()
        assert found is None and says in reason
    extension.load.cache_clear()
