"""Prompts: one registry of data sets for every command. Importing it loads no library."""

from pipespec.data.prefill import shortened
from pipespec.data.prompts import PromptTokenizer, Sample, Span, Turn, prompt_ids, prompt_text
from pipespec.data.registry import BUILT_IN, Dataset, load_dataset

__all__ = [
    "BUILT_IN",
    "Dataset",
    "PromptTokenizer",
    "Sample",
    "Span",
    "Turn",
    "load_dataset",
    "prompt_ids",
    "prompt_text",
    "shortened",
]
