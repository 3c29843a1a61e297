"""What is a Hugging Face model made of? Families, anatomy, matrices, stacks, channel graph, task losses."""
