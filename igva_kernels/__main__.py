"""``python -m igva_kernels`` is the command ``igva-kernels``."""

import sys

from igva_kernels.cli import main

sys.exit(main())
