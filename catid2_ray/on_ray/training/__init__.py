"""Training through Ray Train and DeepSpeed: the loop, its engine, its checkpoints, and the rows that workers read."""
