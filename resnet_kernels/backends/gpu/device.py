"""What every kernel here shares."""

import triton
import triton.language as tl

# The interpreter multiplies fp32 as it is.
ROUNDS = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def factor(t, PRECISION: tl.constexpr):
    """t as a product takes it. Tensor cores cut fp32 off to tf32: rounded before, as by cuDNN, it errs half as much."""
    if t.dtype == tl.float32 and PRECISION == "tf32" and ROUNDS:
        nearest = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # The bits of a NaN may carry into the sign.
        t = tl.where(t != t, t, nearest)
    return t


@triton.jit
def settled(acc, positive):
    """acc, once it is there. An operand made in registers is read by wgmma while the loop goes on; Triton 3.6 makes the
    next one in the same registers after waiting for a part of the steps only. Who looks at the sum waits for all."""
    if positive < 0:
        acc = tl.zeros_like(acc)
    return acc


@triton.jit
def relu(t):
    # The default of tl.maximum drops NaN on a GPU.
    return tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def lazy(v, a_ptr, b_ptr, channels, inside, RELU: tl.constexpr):
    """relu(fma(a, v, b)) rounded to v's dtype where `inside` (a row of booleans), else 0: padding is zero after it.

    v [BLOCK_M, BLOCK_K]; channels [BLOCK_K], those beyond the last masked by the second of the pair.
    """
    c, known = channels
    a = tl.load(a_ptr + c, known, 0.0)
    b = tl.load(b_ptr + c, known, 0.0)
    t = tl.fma(v.to(tl.float32), a[None, :].broadcast_to(v.shape), b[None, :].broadcast_to(v.shape))
    if RELU:
        t = relu(t)
    return tl.where(inside[:, None], t, 0.0).to(v.dtype)


@triton.jit
def affine(acc, scale_ptr, shift_ptr, channels, known, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """acc * scale + shift per column, fp32. acc [BLOCK_M, BLOCK_N]."""
    if SCALE:
        scale = tl.load(scale_ptr + channels, known, 0.0)[None, :].broadcast_to(acc.shape)
        if SHIFT:
            acc = tl.fma(acc, scale, tl.load(shift_ptr + channels, known, 0.0)[None, :].broadcast_to(acc.shape))
        else:
            acc = acc * scale
    elif SHIFT:
        acc = acc + tl.load(shift_ptr + channels, known, 0.0)[None, :]
    return acc
