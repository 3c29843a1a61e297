"""In which files does a checkpoint lie? One leaf file for each format."""
