"""Losses as sums and counts: padding counts for nothing, every token once."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from tests import tiny
from tinygn_dist.config import RecoverConfig
from tinygn_dist.models import objective
from tinygn_dist.models.objective import (
    IGNORED,
    Losses,
    add_reference,
    causal_lm,
    classification,
    distillation,
    feature_match,
    head_distance,
    needs_reference,
    num_counted,
    token_losses,
)
from tinygn_dist.train.distill import student_losses


def padded_to(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The same rows with more padding on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {k: F.pad(v, (0, length - v.shape[1]), value=fill[k]) for k, v in batch.items()}


@pytest.mark.parametrize("at_once", [1, 14, 1000])
def test_token_losses_are_the_plain_cross_entropy_per_sequence(monkeypatch, at_once: int):
    """Also when the logits of one, two or all tokens are taken at once."""
    monkeypatch.setattr(objective, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[1, 3:] = IGNORED
    found = token_losses(logits, labels)
    plain = [-logits.double().log_softmax(-1)[r, t, labels[r, t]] for r, t in [(0, i) for i in range(5)]]
    assert float(found.total[0]) == pytest.approx(float(sum(plain)), rel=1e-6)
    assert found.count.tolist() == [5, 3] and found.total.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(
        float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("at_once", [1, 14, 1000])
def test_token_losses_have_the_gradients_of_torchs_cross_entropy(monkeypatch, at_once: int, dtype: torch.dtype):
    """To the last bit of the logits' dtype or nearly, the second derivatives too."""
    monkeypatch.setattr(objective, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[1, 3:] = IGNORED
    weights, along = torch.randn(2, generator=generator).double(), torch.randn(2, 5, 7, generator=generator).to(dtype)

    def derivatives(total: torch.Tensor) -> list[torch.Tensor]:
        (slope,) = torch.autograd.grad((total * weights).sum(), logits, retain_graph=True)
        (again,) = torch.autograd.grad((total * weights).sum(), logits, create_graph=True)
        (curvature,) = torch.autograd.grad((again * along).sum(), logits)
        return [slope, again, curvature]

    plain = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    exact = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    for found, wanted in zip(
        derivatives(token_losses(logits, labels).total), derivatives(plain.sum(1, dtype=torch.float64)), strict=True
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=4 * exact, atol=4 * exact)


def test_token_losses_keep_the_logits_alone():
    """What autograd holds between forward and backward: logits and labels, at any number of tokens at once."""
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(7, (2, 5))
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        token_losses(logits, labels)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.is_floating_point()}
    assert sum(storages.values()) == logits.untyped_storage().nbytes()


def test_causal_lm_is_the_models_own_loss():
    model, batch = tiny.build("llama"), tiny.batches("llama", 1, padded=False)[0]
    found = causal_lm(model, batch)
    assert float(found.mean().detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
    assert found.count.tolist() == [9, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_counts_for_nothing(family: str):
    model, batch = tiny.build(family), tiny.batches(family, 1)[0]
    with torch.no_grad():
        short, long = causal_lm(model, batch), causal_lm(model, padded_to(batch, 32))
    torch.testing.assert_close(short.total, long.total, rtol=1e-5, atol=1e-4)
    assert torch.equal(short.count, long.count)


def test_all_tokens_ignored_is_zero_not_nan():
    losses = token_losses(torch.randn(1, 3, 5), torch.full((1, 3), IGNORED))
    assert float(losses.total) == 0 and int(losses.count) == 0 and float(losses.mean()) == 0


def test_classification_and_feature_match():
    model, batch = tiny.build("bert-classifier"), tiny.batches("bert-classifier", 1)[0]
    with torch.no_grad():
        found, logits = (
            classification(model, batch),
            model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits,
        )
    torch.testing.assert_close(found.total.float(), F.cross_entropy(logits, batch["labels"], reduction="none"))
    encoder = tiny.build("bert")
    (batch,) = add_reference(encoder, tiny.batches("bert", 1), torch.device("cpu"))
    with torch.no_grad():
        assert float(feature_match(encoder, batch).total.abs().max()) == 0
        moved = feature_match(encoder, {**batch, "reference": batch["reference"] * 2})
    # |x - 2x|^2 / |2x|^2 = 1/4 for each real token
    torch.testing.assert_close(moved.total, batch["attention_mask"].sum(1).double() / 4)
    assert moved.count.tolist() == batch["attention_mask"].sum(1).tolist()


def test_distillation_against_the_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator)
    counts = torch.tensor([[True, True, False], [True, False, False]])
    found = distillation(student, teacher, counts, temperature=2.0)
    wanted = [0.0, 0.0]
    for r, t in ((0, 0), (0, 1), (1, 0)):
        p, q = (x[r, t].double() / 2 for x in (teacher, student))
        wanted[r] += float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum()) * 4
    assert found.total.tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.count.tolist() == [2, 1]


def test_distillation_is_zero_at_the_teacher_and_the_same_for_both_paddings():
    """Loss over padding, or divided by the sequence length, would differ between 10 and 32 tokens."""
    student, teacher = tiny.build("llama"), tiny.build("llama")
    options, batch = RecoverConfig(steps=1, distill=1.0), tiny.batches("llama", 1)[0]
    with torch.no_grad():
        assert float(student_losses(student, teacher, "causal-lm", batch, options).total.abs().max()) == 0
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
        short = student_losses(student, teacher, "causal-lm", batch, options)
        long = student_losses(student, teacher, "causal-lm", padded_to(batch, 32), options)
    assert float(short.total.min()) > 1e-3
    torch.testing.assert_close(short.total, long.total, rtol=1e-4, atol=1e-6)
    assert torch.equal(short.count, long.count)


def test_distill_share_mixes_both_terms():
    student, teacher, batch = tiny.build("llama"), tiny.build("qwen2"), tiny.batches("llama", 1)[0]

    def total(share: float) -> torch.Tensor:
        options = RecoverConfig(steps=1, distill=share)
        return student_losses(student, teacher, "causal-lm", batch, options).total

    with torch.no_grad():
        torch.testing.assert_close(total(0.3), 0.7 * total(0.0) + 0.3 * total(1.0))
        torch.testing.assert_close(total(0.0), causal_lm(student, batch).total)


def test_means_divide_sums_once():
    losses = Losses(torch.tensor([6.0, 2.0], dtype=torch.float64), torch.tensor([3, 1]))
    assert float(losses.mean()) == 2.0


def _labels_of(problem_type: str, outputs: int, generator: torch.Generator) -> torch.Tensor:
    if problem_type == "single_label_classification":
        return torch.randint(outputs, (4,), generator=generator)
    if problem_type == "multi_label_classification":
        return torch.rand(4, outputs, generator=generator) > 0.5
    numbers = torch.randn(4, outputs, generator=generator)
    return numbers[:, 0] if outputs == 1 else numbers


HEADS = [
    ("single_label_classification", 3),
    ("multi_label_classification", 3),
    ("multi_label_classification", 1),
    ("regression", 1),
    ("regression", 2),
]


@pytest.mark.parametrize("problem_type, outputs", HEADS)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_the_loss_of_a_head_is_the_models_own(family: str, problem_type: str, outputs: int):
    config = tiny.CONFIGS[family]()
    config.num_labels, config.problem_type, config.pad_token_id = outputs, problem_type, 0
    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids, labels = (
        torch.randint(3, tiny.VOCAB, (4, 7), generator=generator),
        _labels_of(problem_type, outputs, generator),
    )
    own = labels.float() if labels.dtype == torch.bool else labels
    with torch.no_grad():
        found = classification(model, {"input_ids": ids, "labels": labels})
        wanted = model(input_ids=ids, labels=own).loss
    assert float(found.mean()) == pytest.approx(float(wanted), rel=1e-5)
    assert found.count.tolist() == [1] * 4 and found.total.dtype == torch.float64 and float(found.total.min()) > 0
    assert num_counted({"input_ids": ids, "labels": labels}) == 4


def test_without_labels_the_loss_is_the_distance_to_the_dense_scores():
    config = tiny.CONFIGS["llama"]()
    config.num_labels, config.pad_token_id = 1, 0
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    assert needs_reference("sequence-classification", [batch])
    (batch,) = add_reference(model, [batch], torch.device("cpu"))
    with torch.no_grad():
        assert float(classification(model, batch).total.abs().max()) == 0
        moved = classification(model, {**batch, "reference": batch["reference"] + 0.5})
    torch.testing.assert_close(moved.total, torch.full((2,), 0.25, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert num_counted(batch) == 2


def test_the_distance_of_heads_against_the_definitions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, generator=generator)
    several, numbers, one = torch.zeros(4, 3, dtype=torch.bool), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    p, q = (logits.double() for logits in (teacher, student))
    yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
    for labels, wanted in ((several, yes.mean(1)), (numbers, (p - q).square().mean(1)), (one, kl)):
        found = head_distance(student, teacher, labels, 1.0)
        torch.testing.assert_close(found.total, wanted, rtol=1e-5, atol=1e-6)
        assert found.count.tolist() == [1] * 4
        assert float(head_distance(teacher, teacher, labels, 2.0).total.abs().max()) < 1e-9


@pytest.mark.parametrize("problem_type, outputs", HEADS[1:])
def test_students_of_such_heads(problem_type: str, outputs: int):
    config = tiny.CONFIGS["bert"]()
    config.num_labels, config.problem_type = outputs, problem_type
    student, teacher = (hf.AutoModelForSequenceClassification.from_config(config).eval() for _ in range(2))
    labels = _labels_of(problem_type, outputs, torch.Generator().manual_seed(1))
    batch = {"input_ids": torch.randint(3, tiny.VOCAB, (4, 7)), "labels": labels}

    def total(share: float, *models: torch.nn.Module) -> torch.Tensor:
        options = RecoverConfig(steps=1, distill=share)
        return student_losses(*models, "sequence-classification", batch, options).total

    with torch.no_grad():
        own, away = total(0.0, student, teacher), total(1.0, student, teacher)
        torch.testing.assert_close(own, classification(student, batch).total)
        torch.testing.assert_close(total(0.3, student, teacher), 0.7 * own + 0.3 * away)
        assert float(total(1.0, teacher, teacher).abs().max()) < 1e-9 < float(away.min())
