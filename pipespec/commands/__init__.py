"""What the commands share: flags, inputs, progress, tables, and how an error becomes an exit code.

Commands know flags, files and what a person reads; processes and tensors are below `decoding`.
"""
