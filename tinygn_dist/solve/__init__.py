"""Layer solvers: pure functions of tensors, on whole rows (out, in) of a weight and a Hessian X^T X (in, in)."""
