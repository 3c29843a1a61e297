"""What is taken out of a model? `structured/`: whole units. `sparsity/`: single weights."""
