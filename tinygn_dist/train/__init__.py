"""How do survivors go on learning? The loop, distillation, gradual masks, block reconstruction, `forward_only/`."""
