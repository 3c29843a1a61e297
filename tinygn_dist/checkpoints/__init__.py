"""What is in the files? Loading, sharded loading, safetensors, export, checkpoints of a run."""
