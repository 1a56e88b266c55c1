"""What all tests share."""

import os
import tempfile

os.environ.setdefault("MKL_CBWR", "AUTO")  # as recipes set it, and before anything is computed: both must round alike
os.environ["SINGREG_CACHE"] = tempfile.mkdtemp(prefix="singreg-tests-")  # no test reads or fills the user's own cache
