"""One contestant as a process: `python -m pipespec.comparison.child DIR`, started by the race.

Should the race be killed, this process removes DIR, the race's run directory, and ends.

The first line of standard input says what to load; each line after it asks for one text and is
answered by one line. It waits for the next one in a read, and ends with its input. Whatever a
library prints goes to the log: the pipe for answers is a private copy of standard output.

Pinning and the sizes of thread pools come before torch is imported, because pools keep what they
began with.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

from pipespec.comparison.speaker import Speaker
from pipespec.errors import PipeSpecError
from pipespec.worker import pin, watch_launcher

_ORPHANED_WITHIN_S: Final = 0.05  # a killed race closes its pipes shortly before it is gone


def main() -> int:
    """Serves until the input ends; returns the exit status."""
    answers = _private_output()
    for number in (signal.SIGINT, signal.SIGHUP):  # the race decides when it ends
        signal.signal(number, signal.SIG_IGN)
    race_pid, run_dir = os.getppid(), Path(sys.argv[1])
    watch_launcher(race_pid, run_dir)
    try:
        spec = json.loads(sys.stdin.readline())
        _serve(spec, answers)
    except PipeSpecError as error:
        _say(answers, {"error": str(error)})
        return error.exit_code
    except Exception as error:  # whatever a library raises is told and logged, not lost
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        _say(answers, {"error": f"{type(error).__name__}: {reason}".rstrip(": ")})
        return 1
    time.sleep(_ORPHANED_WITHIN_S)
    if os.getppid() != race_pid:  # faster than the watch: the last one to leave finds all closed
        shutil.rmtree(run_dir, ignore_errors=True)
    return 0


def _serve(spec: Mapping[str, Any], answers: IO[str]) -> None:
    started_s = time.perf_counter()
    with _open(spec) as speaker:
        load_s = time.perf_counter() - started_s
        _say(answers, {"ready": {"load_s": load_s, "pid": os.getpid(), **speaker.info}})
        for line in sys.stdin:
            ask = json.loads(line)
            answer = speaker.generate(ask["ids"], ask["max_new_tokens"], ask["variant"])
            _say(
                answers,
                {
                    "token_ids": answer.token_ids,
                    "seconds": answer.seconds,
                    "first_token_s": answer.first_token_s,
                    "num_first_tokens": answer.num_first_tokens,
                    "stages": [asdict(stage) for stage in answer.stages],
                },
            )


def _open(spec: Mapping[str, Any]) -> AbstractContextManager[Speaker]:
    """Loads what the specification names."""
    if spec["kind"] == "transformers":
        pin(spec["cores"])
        from pipespec.comparison.peer import open_peer

        return open_peer(spec)
    from pipespec.comparison.own import open_own

    return open_own(spec)


def _private_output() -> IO[str]:
    """Where answers go; what others write to standard output goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return answers


def _say(answers: IO[str], message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # everything is closed; for the interpreter to unload torch takes a second
