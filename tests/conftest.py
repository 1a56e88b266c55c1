"""What all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("MKL_CBWR", "AUTO")  # as recipes set it, and before anything is computed: both must round alike
