"""The race: contestants on the same prompts, models and hardware, measured within one run.

`contestants` says who races and where, `process` and `user_command` run them, each in a process of
its own (`child`, with `own` and `peer` inside), `race` lets them take turns, `record` keeps what
they did in a file, `measures` and `tables` make numbers and text of it.
"""
