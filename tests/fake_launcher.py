"""A program that holds a pipeline of fake workers, for tests that end it from outside.

    python fake_launcher.py BEHAVIOUR BEHAVIOUR ...

prints one line of JSON, {"pids": [...]}, when all stages are ready, then receives until it is
ended. With "loading" as the first argument it prints once all stages are loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipespec.config import ModelConfig, Schedule
from pipespec.interrupts import install_signal_handlers
from pipespec.launcher import Pipeline, StageStatus
from pipespec.placement import StagePlacement

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


def fake_pipeline(*behaviours: str, **options: object) -> Pipeline:
    """A pipeline of fake workers, one a behaviour."""
    count = len(behaviours)
    return Pipeline(
        [ModelConfig(path=name, devices=("cpu",)) for name in behaviours],
        [StagePlacement("cpu", cores=(), threads=index + 1) for index in range(count)],
        Schedule(),
        **{
            "folders": [None] * count,
            "vocab_size": 100,
            "context_length": None,
            "tokenizer_digest": "digest of the fake tokenizer",
            "ready_timeout_s": 60.0,
            "command": WORKER,
            **options,
        },  # type: ignore[arg-type]
    )


def main(arguments: list[str]) -> None:
    wants_loading = arguments[0] == "loading"

    def tell(statuses: tuple[StageStatus, ...]) -> None:
        print(json.dumps({"pids": [status.pid for status in statuses]}), flush=True)

    def on_progress(statuses: tuple[StageStatus, ...]) -> None:
        if wants_loading and all(status.phase == "loading" for status in statuses):
            tell(statuses)

    with (
        install_signal_handlers(),
        fake_pipeline(*arguments[wants_loading:], on_progress=on_progress) as pipeline,
    ):
        tell(pipeline.statuses)
        while True:
            pipeline.receive(60.0)


if __name__ == "__main__":
    main(sys.argv[1:])
