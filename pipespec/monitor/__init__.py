"""What a run's devices do meanwhile: sources of readings, and the process that asks them.

`pipespec.gpu_monitor` is the side that a program uses. Nothing here imports torch.
"""
