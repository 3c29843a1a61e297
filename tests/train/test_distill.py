"""Hidden-state distillation and the teacher's logits on disk, against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tinygn_dist.backends.base import Backend
from tinygn_dist.config import Config, RecoverConfig
from tinygn_dist.errors import UserError
from tinygn_dist.models.objective import causal_lm, distillation
from tinygn_dist.runtime.progress import Progress
from tinygn_dist.train.distill import by_token, hidden_distance, student_losses
from tinygn_dist.train.teacher_cache import SEQUENCE, TeacherCache, coarse_distillation


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_hidden_distance_is_the_normalised_squared_error_of_each_layer():
    """Two layers, sequences of 3 and 2 real tokens; each layer of each sequence on its own."""
    student, teacher, mask = random(2, 2, 3, 4), random(2, 2, 3, 4, seed=1), torch.tensor([[1, 1, 1], [1, 1, 0]])
    wanted = []
    for row, length in enumerate((3, 2)):
        layers = [(student[layer, row, :length].double(), teacher[layer, row, :length].double()) for layer in range(2)]
        wanted.append(sum(float(((s - t) ** 2).mean() / (t**2).mean()) for s, t in layers))
    assert hidden_distance(list(student), list(teacher), mask).tolist() == pytest.approx(wanted, rel=1e-6)


def test_hidden_states_of_every_layer_pull_at_the_student():
    """The teacher at twice a layer's output would be 1/4 away; here: 0 at the teacher, and the gradient reaches all."""
    student, teacher, batch = tiny.build("llama"), tiny.build("llama"), tiny.batches("llama", 1)[0]
    options = RecoverConfig(steps=1, distill=0.0, distill_hidden=2.0)
    own = causal_lm(student, batch).total
    torch.testing.assert_close(student_losses(student, teacher, "causal-lm", batch, options).total, own)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.05)
        states = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        mine = student(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    away = hidden_distance(mine.hidden_states[1:], states.hidden_states[1:], batch["attention_mask"])
    found = student_losses(student, teacher, "causal-lm", batch, options)
    torch.testing.assert_close(found.total - own, 2.0 * away * found.count)
    assert len(mine.hidden_states) == 4 and away.min() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_whole_vocabulary_nothing_is_lost(temperature: float):
    student, teacher = random(2, 3, 7), random(2, 3, 7, seed=1)
    counts = torch.tensor([[True, True, False], [True, False, False]])
    values, ids = (teacher / temperature).log_softmax(-1).topk(7)
    found = coarse_distillation(student, values, ids, counts, temperature)
    wanted = distillation(student, teacher, counts, temperature)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.count, wanted.count)


def test_the_tokens_that_are_not_stored_count_as_one():
    student, teacher = random(1, 1, 6).requires_grad_(), random(1, 1, 6, seed=1)
    values, ids = teacher.log_softmax(-1).topk(2)
    p, q = teacher.double().softmax(-1)[0, 0], student.double().softmax(-1)[0, 0]
    top = ids[0, 0].tolist()
    rest = [token for token in range(6) if token not in top]
    wanted = sum(p[t] * (p[t] / q[t]).log() for t in top) + p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
    found = coarse_distillation(student, values, ids, torch.ones(1, 1, dtype=torch.bool), 1.0).total.sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    (gradient,), (reference,) = (torch.autograd.grad(loss, student, retain_graph=True) for loss in (found, wanted))
    torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)
    full = distillation(student.detach(), teacher, torch.ones(1, 1, dtype=torch.bool), 1.0).total
    assert 0 < float(found.detach()) < float(full)


def test_what_was_written_is_read_by_sequence(backend: Backend, tmp_path: Path):
    teacher, student = tiny.build("llama"), tiny.build("qwen2")
    batches = [
        {**batch, SEQUENCE: torch.tensor([n])} for n, batch in enumerate(tiny.batches("llama", size=1, padded=False))
    ]
    cache = TeacherCache(tmp_path / "cache", tiny.VOCAB, 1.0, {"model": "m"})
    assert not cache.is_complete(backend)
    cache.write(teacher, [(2, batches[2]), (0, batches[0])], lambda x: by_token(x, "causal-lm"), backend, Progress())
    assert cache.is_complete(backend)
    assert not TeacherCache(tmp_path / "cache", tiny.VOCAB, 1.0, {"model": "other"}).is_complete(backend)
    options = RecoverConfig(steps=1, distill=0.7)
    for number in (0, 2):
        with torch.no_grad():
            found = student_losses(student, cache, "causal-lm", batches[number], options)
            wanted = student_losses(student, teacher, "causal-lm", batches[number], options)
        torch.testing.assert_close(found.total, wanted.total, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileNotFoundError):
        cache.read(batches[1], torch.device("cpu"))


def test_the_cap_and_what_does_not_go_together_are_told(tmp_path: Path):
    cache = TeacherCache(tmp_path, 64, 1.0, {})
    cache.check_size(2**20, cap_gib=0.5)  # 2**20 predictions of 64 * 8 bytes are half a GiB
    with pytest.raises(UserError, match="lower recover.teacher_top_k"):
        cache.check_size(2**20 + 1, cap_gib=0.5)
    with pytest.raises(ValueError, match="not the hidden states"):
        RecoverConfig(distill_hidden=1.0, teacher_cache_gib=1.0)
    with pytest.raises(ValueError, match="may remove layers"):
        Config(model={"name": "m"}, prune={"pattern": "layers"}, recover={"steps": 1, "distill_hidden": 1.0})
