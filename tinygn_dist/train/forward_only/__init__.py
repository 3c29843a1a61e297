"""How do survivors learn where nothing can be backpropagated? Slopes along random directions."""
