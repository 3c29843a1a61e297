"""Layer solvers: pure functions of tensors. They see whole rows (out, in) of one weight and a Hessian X^T X (in, in)."""
