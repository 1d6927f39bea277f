"""Set before torch and triton are imported: one thread for every test process and its children, Triton interpreted
where there is no GPU.

The models are tiny: a second thread gives nothing, and costs minutes when two processes want the same core.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAMBASCOPE_HOME"] = tempfile.mkdtemp(prefix="jambascope-home-")  # the user's own stays as it is

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels are tested: on the GPU, or in the interpreter."""
    pytest.importorskip("triton", reason="the kernels for GPUs need the triton package (extra 'test' on Linux)")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def fake_cuda():
    """``with fake_cuda():`` a GPU whose tensors hold no data, so that whatever waits for it raises."""
    path = Path(__file__).with_name("fake_cuda.py")
    spec = importlib.util.spec_from_file_location("fake_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fake_cuda


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """All browser tests go to one process, a file of the others at a time to whichever is free: two servers and two
    browsers would each compile every kernel, and wait for one another."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "browser" if nodeid.startswith("tests/browser/") else super()._split_scope(nodeid)

    return Scheduling(config, log)
