"""Entry point of `python -m resnet_kernels.cli`."""

import sys

from .main import main

sys.exit(main())
