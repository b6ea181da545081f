"""Frozen modules made of trunks: a gated block, and a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backends.contract import accumulator_dtype
from ..nn import fusable
from ..nn.gated import Anatomy
from ..ops.gating import gated_tail
from . import graphs
from .graphs import Graphs
from .trunk import FrozenTrunk


class FrozenGated(nn.Module):
    """A block of trunks with modules between them, and its end, y = relu(gate * z + shortcut(x)).

    chain: trunks and modules. squeeze: the squeeze-and-excitation module, or None; anatomy: reads it. last: with
    squeeze, the trunk of the last convolution z = W h + b, if it is 1x1: the mean of z then follows from the mean of h,
    so the gate is known before z. It runs after the chain.
    """

    def __init__(
        self,
        chain: list[nn.Module],
        last: FrozenTrunk | None,
        squeeze: nn.Module | None,
        anatomy: Anatomy,
        pool: nn.Module | None,
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.chain, self.last = nn.Sequential(*chain), last
        self.squeeze, self.anatomy = squeeze, anatomy
        self.pool, self.shortcut = pool, shortcut

    def _gate(self, z: Tensor) -> Tensor | None:
        """Return the gate (N, K). z: the chain's result, which is h if there is a `last`."""
        if self.squeeze is None:
            return None
        mean = z.mean((2, 3), keepdim=True)
        if self.last is not None:
            step = self.last.steps[0]
            dtype = accumulator_dtype(z.dtype)
            products = functional.linear(mean.flatten(1).to(dtype), step.weights[0].flatten(1).to(dtype))
            mean = torch.addcmul(step.shifts[0], step.scales[0], products)[:, :, None, None].to(z.dtype)
        excite = self.anatomy.excitation(self.squeeze)
        assert excite is not None
        return excite(mean).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.chain(x)
        gate = self._gate(z)
        if self.last is not None:
            z = self.last(z)
        shortcut = x if self.pool is None else self.pool(x)
        return gated_tail(z, gate, shortcut if self.shortcut is None else self.shortcut(shortcut))


class FrozenResNet(nn.Module):
    """A frozen ResNet whose trunk runs from the image through the stem and the first stages, usually all of them.

    On a GPU the whole model is one CUDA graph. The copy's own stem and stages stay, for code that calls them directly.

    copy: the copied ResNet, whose modules and attributes this takes over. after_trunk: the names of the stages that run
    after the trunk.
    """

    def __init__(
        self, copy: nn.Module, trunk: FrozenTrunk, after_trunk: tuple[str, ...], graphs: Graphs | None
    ) -> None:
        super().__init__()
        internals = set(self.__dict__)
        self.__dict__.update({name: value for name, value in copy.__dict__.items() if name not in internals})
        for name, child in copy.named_children():
            self.add_module(name, child)
        self.training = copy.training
        self.trunk, self.after_trunk, self.graphs = trunk, after_trunk, graphs

    def _after_trunk(self, x: Tensor) -> Tensor:
        for name in self.after_trunk:
            x = self.get_submodule(name)(x)
        return self.get_submodule("fc")(torch.flatten(self.get_submodule("avgpool")(x), 1))

    def _can_be_one_graph(self) -> bool:
        """Return whether the modules after the trunk are torch's own without hooks. Others may not allow a capture."""
        last = (self.get_submodule("avgpool"), self.get_submodule("fc"))
        known = type(last[0]) is nn.AdaptiveAvgPool2d and type(last[1]) in (nn.Linear, nn.Identity)
        return known and not self.after_trunk and not any(map(fusable.hook_on, last))

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        trunk.check(x)
        if self.graphs is not None and self._can_be_one_graph() and graphs.usable(x):
            head = (id(self.avgpool), id(self.fc))
            return self.graphs.run(x, trunk.buffer, trunk.fill, lambda b: self._after_trunk(trunk.run(b)), head)
        return self._after_trunk(trunk(x))
