"""``python -m qat`` is ``qat``, for torchrun."""

import sys

from qat.cli import main

sys.exit(main())
