"""Which weights make up best for those that change? Solvers of one matrix."""
