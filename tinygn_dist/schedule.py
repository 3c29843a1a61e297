"""Schedules: pure functions of the step."""


def warmup_linear(step: int, total: int, warmup: float = 0.1) -> float:
    """Factor on the learning rate: linear from 0 over the first `warmup` of the steps, then linear to 0 at the end.

    step counts from 0; the first step already learns.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (total - step) / max(1, total - rise)
