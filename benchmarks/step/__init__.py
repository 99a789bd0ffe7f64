"""What `benchmarks/train_step.py` compares: a training step of ours, of the same network on dense tables, of peers."""
