"""Frozen modules made of trunks: a gated block, and a whole ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet

from ..backends.contract import accumulator_dtype
from ..nn import fusable, gated
from ..ops.gating import gated_tail
from . import graphs
from .graphs import Graphs
from .trunk import FrozenTrunk


class FrozenGated(nn.Module):
    """A block of trunks with modules between them, and its end, y = relu(gate * z + shortcut(x)).

    chain: trunks and modules. squeeze: squeeze-and-excitation, of blocks of `kind`, or None. last: where squeeze sees z
    = W h + b before it is there, by the mean of h, W's trunk, which then follows the chain.
    """

    def __init__(
        self,
        chain: list[nn.Module],
        last: FrozenTrunk | None,
        squeeze: nn.Module | None,
        kind: type[gated.Gated],
        pool: nn.Module | None,
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.chain, self.last = nn.Sequential(*chain), last
        self.squeeze, self.kind = squeeze, kind
        self.pool, self.shortcut = pool, shortcut

    def _gate(self, z: Tensor) -> Tensor | None:
        """z: h where there is a `last`."""
        if self.squeeze is None:
            return None
        mean = z.mean((2, 3), keepdim=True)
        if self.last is not None:
            step = self.last.steps[0]
            w = accumulator_dtype(z.dtype)
            products = functional.linear(mean.flatten(1).to(w), step.weights[0].flatten(1).to(w))
            mean = torch.addcmul(step.shifts[0], step.scales[0], products)[:, :, None, None].to(z.dtype)
        excite = self.kind._excite(self.squeeze)
        assert excite is not None
        return excite(mean).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.chain(x)
        gate = self._gate(z)
        if self.last is not None:
            z = self.last(z)
        shortcut = x if self.pool is None else self.pool(x)
        return gated_tail(z, gate, shortcut if self.shortcut is None else self.shortcut(shortcut))


class FrozenResNet(resnet.ResNet):
    """A ResNet's copy whose trunk runs from the image through the stem and the first stages, usually all, in one; on a
    GPU the whole model is one CUDA graph."""

    trunk: FrozenTrunk
    after_trunk: tuple[str, ...]
    graphs: Graphs | None

    def _after_trunk(self, x: Tensor) -> Tensor:
        for name in self.after_trunk:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _known_to_the_end(self) -> bool:
        """Whether nothing behind the trunk is a user's, which may do what no capture allows, or see no replay."""
        last = (self.avgpool, self.fc)
        known = type(last[0]) is nn.AdaptiveAvgPool2d and type(last[1]) in (nn.Linear, nn.Identity)
        return known and not self.after_trunk and not any(map(fusable.hook_on, last))

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk
        trunk.check(x)
        if self.graphs is not None and self._known_to_the_end() and graphs.usable(x):
            last = (id(self.avgpool), id(self.fc))
            return self.graphs.run(x, trunk.buffer, trunk.fill, lambda b: self._after_trunk(trunk.run(b)), last)
        return self._after_trunk(trunk(x))
