"""What a run means: the loop, the module, the data, and what of them goes into a checkpoint."""
