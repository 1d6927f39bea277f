"""Tasks whose peak memory is wanted: each runs in a process of its own, ``python -m ...children TASK ARGUMENTS``.

The peak is the process's high-water mark less what it held when the task began (the libraries, loaded by then).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_child(task: str, *arguments: object) -> dict[str, float] | str:
    """What the task measured: seconds, peak bytes, and bytes held before; or how the process ended."""
    command = [sys.executable, "-m", "jambascope.studies.bench.children", task, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        return f"its process was killed by signal {-done.returncode} (9: the system was out of memory)"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def load_ours(directory: str, device: str) -> Any:
    """Open a checkpoint and touch every weight: one that is only mapped has not been read."""
    from jambascope.model import HookedJamba

    return _touch(HookedJamba.from_pretrained(directory, device=device))


def load_theirs(directory: str, device: str) -> Any:
    """The same with transformers."""
    from transformers import JambaForCausalLM

    return _touch(JambaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device))


@torch.no_grad()
def _touch(model: torch.nn.Module) -> torch.nn.Module:
    for p in model.parameters():
        p.view(-1)[::512].sum()  # one number in every 2 KiB: every page
    return model


def one_pass(name: str, device: str, length: str) -> Any:
    """One forward pass of a packaged model over random tokens, to the logits of every position."""
    from jambascope.model import HookedJamba

    model = HookedJamba.from_pretrained(name, device=device)
    with torch.no_grad():
        return model(torch.randint(3, model.config.d_vocab, (1, int(length)), device=model.device))


TASKS: dict[str, Callable[..., Any]] = {"load-ours": load_ours, "load-theirs": load_theirs, "one-pass": one_pass}


def peak_bytes(reset: bool = False) -> float:
    """The most memory that this process has held, since the last reset where the system knows one (Linux)."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # no such file, or not allowed: then since the process began
            pass
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024.0 * int(status["VmHWM"].split()[0])
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(task: str, *arguments: str) -> None:
    import transformers

    import jambascope.model  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    transformers.JambaForCausalLM  # noqa: B018  imported when it is named
    before = peak_bytes(reset=True)
    start = time.perf_counter()
    kept = TASKS[task](*arguments)
    found = {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(), "before_bytes": before}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        found |= {"seconds": time.perf_counter() - start, "device_peak_bytes": torch.cuda.max_memory_allocated()}
    del kept
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
