"""Result files: one JSON a run, a superset of the original's schema. No torch, no models."""

from pipespec.results.environment import describe_environment
from pipespec.results.locks import locked
from pipespec.results.metadata import SCHEMA_VERSION, metadata_differences, run_metadata
from pipespec.results.paths import (
    OutputPlan,
    ensure_writable,
    ensure_writable_file,
    partial_path,
    plan_output,
    result_file_name,
)
from pipespec.results.reading import RunFile, load_results
from pipespec.results.streaming import RunExtract, find_files, read_run, read_runs
from pipespec.results.writer import ResultWriter, sample_result

__all__ = [
    "SCHEMA_VERSION",
    "OutputPlan",
    "ResultWriter",
    "RunExtract",
    "RunFile",
    "describe_environment",
    "ensure_writable",
    "ensure_writable_file",
    "find_files",
    "load_results",
    "locked",
    "metadata_differences",
    "partial_path",
    "plan_output",
    "read_run",
    "read_runs",
    "result_file_name",
    "run_metadata",
    "sample_result",
]
