"""The parts of the HTML report: what is read of result files, and how it becomes one page."""
