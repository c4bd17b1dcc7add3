from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread a process, in threads that a test starts and in processes that it starts too: the workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # kernels run in the interpreter; Triton's own library looks at this once, when it is first imported by anybody
    os.environ["TRITON_INTERPRET"] = "1"

_WORKERS = 8  # each takes about 1.5 GB


def pytest_xdist_auto_num_workers(config):
    """As many workers as this process may use cores; the default counts physical ones."""
    return min(_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session")
def model():
    """model(family) -> its tiny model, built once a session; a test must leave it as it was."""
    built = {}

    def get(family):
        if family.name not in built:
            built[family.name] = family.build()
        return built[family.name]

    return get


@pytest.fixture(autouse=True)
def _nothing_left():
    """No test may leave a handle on a model, a call open, or a thread under another kind of scheduling."""
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    if policy is not None:
        assert os.sched_getscheduler(0) == policy
    import sys

    if "mmaccel.handle" in sys.modules:
        from mmaccel import handle

        assert not any(handle._active.values())
    if "mmaccel.core.run" in sys.modules:
        from mmaccel.core import run

        assert run._runs.get() == {}
