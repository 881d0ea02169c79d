"""The native runner: a model's forward on CPU in C++, compiled on the machine that runs it."""

from pipespec.runners.native.build import BuildError
from pipespec.runners.native.runner import NativeRunner

__all__ = ["BuildError", "NativeRunner"]
