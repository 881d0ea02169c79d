"""What `python -m pipespec.doctor` looks at: each module answers one question about the machine.

Whatever loads torch runs in a child process (`probe`), pinned as a stage would be.
"""
