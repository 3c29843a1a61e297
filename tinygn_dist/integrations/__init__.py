"""How does it run inside somebody else's loop? An Accelerate script (`Compressor`), a Trainer (`TinyGNCallback`)."""
