"""freeze: a copy of a model for inference, its blocks folded, packed and run depth first.

model.py    freeze, FrozenModel
freezer.py  builds the copy
trunk.py    a run of folded blocks
modules.py  a gated block, a whole ResNet
graphs.py   a function of one tensor as CUDA graphs
"""

from .model import FrozenModel, freeze
from .modules import FrozenGated, FrozenResNet
from .trunk import FrozenTrunk, Step

__all__ = ["FrozenGated", "FrozenModel", "FrozenResNet", "FrozenTrunk", "Step", "freeze"]
