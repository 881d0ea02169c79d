"""`pipespec.monitor.sampler` with a pretended NVML, for tests of the monitor's own process.

`python fake_sampler.py NUM_GPUS BEHAVIOUR PARENT_PID`. Behaviours: "well"; "lose": the second GPU
is lost after its fifth look at its power; "hang": it never answers.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from fake_nvml import FakeNvml

from pipespec.monitor.sampler import main


class LosesOne(FakeNvml):
    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1 and self.num_calls.get("nvmlDeviceGetPowerUsage", 0) >= 5 * len(self.gpus):
            self.lost.add(1)
        return super().nvmlDeviceGetPowerUsage(handle)


def make_nvml(num_gpus: int, behaviour: str) -> Any:
    if behaviour == "hang":
        time.sleep(600.0)
    kind = LosesOne if behaviour == "lose" else FakeNvml
    return kind(*[("H100", 80)] * num_gpus)


if __name__ == "__main__":
    num_gpus, behaviour, parent = sys.argv[1:]
    sys.exit(main([parent], lambda: make_nvml(int(num_gpus), behaviour)))
