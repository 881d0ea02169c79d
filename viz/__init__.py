"""Pictures of result files and training runs. No torch; the numbers come from the files alone."""
