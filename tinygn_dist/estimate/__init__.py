"""How does the loss change? Probes by finite differences, derivatives by backpropagation, statistics of layer inputs.

Everything is attached through `accelerate.hooks.ModelHook` and removed afterwards; no weight is touched.
"""
