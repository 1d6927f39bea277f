"""Set before torch and triton are imported: one thread for every test process and its children, Triton interpreted
where there is no GPU.

The models are tiny: a second thread gives nothing, and costs minutes when two processes want the same core.
"""

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels are tested: on the GPU, or in the interpreter."""
    pytest.importorskip("triton", reason="the kernels for GPUs need the triton package (extra 'test' on Linux)")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fake_gpu():
    """A GPU whose tensors hold no data: while the test runs, whatever looks at a value, and so would wait, raises."""
    with _cuda_device_guard(), FakeTensorMode(), _NothingComesBack():
        yield torch.device("cuda")


class _NothingComesBack(TorchDispatchMode):
    """Fake tensors may be copied to the CPU; real ones wait for the GPU to have computed them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cuda":
            device = kwargs.get("device")
            assert device is None or device.type == "cuda", "a tensor is copied from the GPU to the CPU"
        return function(*args, **kwargs)


@contextmanager
def _cuda_device_guard():
    """Most methods of a tensor look up the guard of its device, which torch's builds for CPUs have none of for CUDA,
    not even for fake tensors (builds for CUDA do: ``FakeTensorMode.__enter__``). The meta device's does nothing."""
    cuda, meta = (int(getattr(torch._C._autograd.DeviceType, name).value) for name in ("CUDA", "Meta"))
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * (max(cuda, meta) + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    missing = guards[cuda] is None
    if missing:
        guards[cuda] = guards[meta]
    yield
    if missing:
        guards[cuda] = None
