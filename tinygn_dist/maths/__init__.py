"""What is true of tensors and integers? Nothing here knows of a model; it imports torch and itself."""
