"""What does a file do in the engine that serves it? One leaf file for each engine, and runs of two files in turns."""
