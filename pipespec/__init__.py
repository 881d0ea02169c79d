"""PipeSpec: asynchronous, hierarchical speculative decoding. Importing it loads no torch."""
