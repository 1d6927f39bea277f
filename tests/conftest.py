"""One thread for every test process and its children, set before torch is imported.

The models are tiny: a second thread gives nothing, and costs minutes when two processes want the same core.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
