"""Device functions that all Triton kernels of this backend share."""

import triton
import triton.language as tl

# Round fp32 to tf32 before a product. The interpreter multiplies fp32 unrounded, so there it does nothing.
ROUND_TF32 = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def product_operand(t, PRECISION: tl.constexpr):
    """Return t as an operand of tl.dot: fp32 rounded to tf32 if PRECISION is "tf32", else unchanged.

    Tensor cores truncate fp32 to tf32. Rounding to nearest first, as cuDNN does, halves the error.
    """
    if t.dtype == tl.float32 and PRECISION == "tf32" and ROUND_TF32:
        nearest = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # The bits of a NaN may carry into the sign.
        t = tl.where(t != t, t, nearest)
    return t


@triton.jit
def wait_for_sum(acc, positive):
    """Return acc, and make the mainloop wait for every outstanding wgmma. `positive` is an argument above 0 at run
    time, which the compiler cannot know.

    wgmma reads an operand in registers while the loop continues. Triton 3.6 waits for only some of the outstanding
    products before it writes the next operand into the same registers. The branch below reads the sum, which forces a
    full wait.
    """
    if positive < 0:
        acc = tl.zeros_like(acc)
    return acc


@triton.jit
def relu(t):
    # On a GPU, tl.maximum drops NaN by default.
    return tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lazy_value(v, a_ptr, b_ptr, channels, inside, RELU: tl.constexpr):
    """Return relu(fma(a, v, b)) rounded to v's dtype. Rows that are not `inside` the map are 0: the convolution pads
    the result of the affine, not v.

    v [BLOCK_M, BLOCK_K]. inside [BLOCK_M]. channels: a pair (channel indices, channel mask), each [BLOCK_K].
    """
    c, channel_mask = channels
    a = tl.load(a_ptr + c, channel_mask, 0.0)
    b = tl.load(b_ptr + c, channel_mask, 0.0)
    t = tl.fma(v.to(tl.float32), a[None, :].broadcast_to(v.shape), b[None, :].broadcast_to(v.shape))
    if RELU:
        t = relu(t)
    return tl.where(inside[:, None], t, 0.0).to(v.dtype)


@triton.jit
def affine(acc, scale_ptr, shift_ptr, channels, channel_mask, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Return acc * scale + shift per column, in fp32. acc [BLOCK_M, BLOCK_N]."""
    if SCALE:
        scale = tl.load(scale_ptr + channels, channel_mask, 0.0)[None, :].broadcast_to(acc.shape)
        if SHIFT:
            shift = tl.load(shift_ptr + channels, channel_mask, 0.0)
            acc = tl.fma(acc, scale, shift[None, :].broadcast_to(acc.shape))
        else:
            acc = acc * scale
    elif SHIFT:
        acc = acc + tl.load(shift_ptr + channels, channel_mask, 0.0)[None, :]
    return acc
