"""Which rows, for what? Splits that never overlap, sources, text that the model writes itself."""
