"""Ideal and distillation gradients against enumeration and finite differences, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from support.exact_tree import ExactTree, Floats

from genssd.distill.diagnose.alignment import (
    LOSSES,
    LossName,
    cosine,
    descent_direction,
    ideal_gradient,
    measure_alignment,
    renormalise,
    teacher_advantage,
    total_variation,
    weighted_terms,
)

TREES = [ExactTree.random(3, 4, seed) for seed in range(3)]
SIX = range(6)


def draw(seed: int, candidates: int = 6, scale: float = 1.5) -> tuple[Floats, Floats, Floats]:
    """Draw random log p, log q and success rates."""
    random = np.random.default_rng(seed)
    log_p, log_q = (renormalise(scale * random.normal(size=candidates)) for _ in range(2))
    return log_p, log_q, random.random(candidates)


def evaluate_loss(loss: LossName, z: Floats, log_q: Floats, beta: float, alpha: float) -> float:
    """Return the value of a loss by its definition; `sampled` has none, since its gradient is an estimate."""
    log_p = z - np.log(np.exp(z).sum())
    p, q = np.exp(log_p), np.exp(log_q)

    def kl(a: Floats, b: Floats) -> float:
        return float((a * np.log(a / b)).sum())

    if loss == "forward_kl":
        return kl(q, p)
    if loss == "reverse_kl":
        return kl(p, q)
    if loss == "jsd":
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if loss == "skew_forward_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    assert loss == "skew_reverse_kl"
    return kl(p, (1 - alpha) * q + alpha * p)


def numerical(function: object, z: Floats, step: float = 1e-5) -> Floats:
    assert callable(function)
    unit = np.eye(len(z)) * step
    return np.array([(function(z + e) - function(z - e)) / (2 * step) for e in unit])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "sampled"])
@pytest.mark.parametrize("seed", range(3))
def test_descent_is_minus_the_gradient_of_the_loss(loss: LossName, seed: int) -> None:
    log_p, log_q, _ = draw(seed)
    options = {"beta": 0.3, "alpha": 0.2}
    expected = numerical(lambda z: evaluate_loss(loss, z, log_q, **options), log_p)
    direction = descent_direction(log_p, weighted_terms(loss, log_p, log_q, sampled_index=0, **options))
    np.testing.assert_allclose(direction, -expected, atol=1e-9)


def test_the_sampled_loss_is_the_reverse_divergence_on_average() -> None:
    log_p, log_q, _ = draw(3)
    each = [descent_direction(log_p, weighted_terms("sampled", log_p, log_q, sampled_index=y)) for y in SIX]
    full = descent_direction(log_p, weighted_terms("reverse_kl", log_p, log_q, sampled_index=0))
    np.testing.assert_allclose(np.exp(log_p) @ np.array(each), full, atol=1e-14)
    # and it is the score function times the log-ratio: what a policy gradient does with the drawn token
    onehot = np.eye(6)[2]
    np.testing.assert_allclose(each[2], (log_q - log_p)[2] * (onehot - np.exp(log_p)), atol=1e-14)


@pytest.mark.parametrize("tree", TREES)
def test_the_ideal_gradient_is_that_of_success(tree: ExactTree) -> None:
    """d Pr(success) / d z of a node's logits is the probability of its prefix times p_j (Q_j - V)."""
    for prefix in tree.nodes()[:20]:
        ideal = ideal_gradient(tree.log_p(prefix), tree.success_after(prefix))
        expected = numerical(lambda nudge, at=prefix: tree.success((), {at: nudge}), np.zeros(3))
        np.testing.assert_allclose(tree.reach(prefix) * ideal, expected, atol=1e-9)
        assert abs(ideal.sum()) < 1e-15


@pytest.mark.parametrize("eta", [0.01, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_teacher_tilted_towards_success_is_aligned_exactly(seed: int, eta: float) -> None:
    """q proportional to p exp(eta Q): reverse KL has f = -eta Q + const, whatever eta; tilted away, -1."""
    log_p, _, success = draw(seed)
    towards, away = (renormalise(log_p + sign * eta * success) for sign in (1.0, -1.0))
    assert measure_alignment("reverse_kl", log_p, towards, success, sampled_index=0) == pytest.approx(1.0, abs=1e-12)
    assert measure_alignment("reverse_kl", log_p, away, success, sampled_index=0) == pytest.approx(-1.0, abs=1e-12)
    for loss in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        alignment = measure_alignment(loss, log_p, towards, success, sampled_index=0)
        assert isinstance(alignment, float)
        assert alignment > 0.0
        if eta == 0.01:
            assert alignment == pytest.approx(1.0, abs=1e-4)
    assert teacher_advantage(log_p, towards, success) > 0.0 > teacher_advantage(log_p, away, success)


def test_forward_divergence_is_aligned_only_in_the_limit() -> None:
    log_p, _, success = draw(0)
    alignments = [
        measure_alignment("forward_kl", log_p, renormalise(log_p + eta * success), success, sampled_index=0)
        for eta in (9.0, 1e-3)
    ]
    assert alignments[0] != pytest.approx(1.0, abs=1e-2)
    assert alignments[1] == pytest.approx(1.0, abs=1e-6)


def test_following_the_descent_raises_success() -> None:
    """The sign: a step along the aligned direction, not against it, makes the tree succeed more often."""
    tree = TREES[0]
    prefix = (0, 1)
    log_p, success = tree.log_p(prefix), tree.success_after(prefix)
    teacher = renormalise(log_p + 2.0 * success)
    before = tree.success(())
    for loss in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        step = 0.1 * descent_direction(log_p, weighted_terms(loss, log_p, teacher, sampled_index=0))
        assert tree.success((), {prefix: step}) > before > tree.success((), {prefix: -step})


@pytest.mark.parametrize("loss", LOSSES)
def test_a_random_teacher_is_not_aligned(loss: LossName) -> None:
    """Over many random nodes the mean is 0 within its own error, which is far below 1."""
    values = []
    for seed in range(1500):
        log_p, log_q, success = draw(seed)
        alignment = measure_alignment(loss, log_p, log_q, success, sampled_index=seed % 6)
        assert isinstance(alignment, float)
        values.append(alignment)
    error = np.std(values) / np.sqrt(len(values))
    assert np.std(values) > 0.2
    assert abs(np.mean(values)) < 4 * error


@pytest.mark.parametrize("loss", LOSSES)
def test_constants_change_nothing(loss: LossName) -> None:
    log_p, log_q, success = draw(5)
    alignment = measure_alignment(loss, log_p, log_q, success, sampled_index=1)
    assert measure_alignment(loss, log_p, log_q, success + 3.0, sampled_index=1) == pytest.approx(alignment, abs=1e-12)
    weighted = weighted_terms(loss, log_p, log_q, sampled_index=1)
    np.testing.assert_allclose(
        descent_direction(log_p, weighted + 5.0 * np.exp(log_p)), descent_direction(log_p, weighted), atol=1e-14
    )
    assert abs(descent_direction(log_p, weighted).sum()) < 1e-14


@pytest.mark.parametrize("loss", LOSSES)
def test_where_there_is_no_alignment_the_reason_is_told(loss: LossName) -> None:
    log_p, log_q, success = draw(6)
    assert measure_alignment(loss, log_p, log_q, np.full(6, 0.3), sampled_index=0) == "flat"
    assert measure_alignment(loss, log_p[:1] * 0, log_q[:1] * 0, success[:1], sampled_index=0) == "forced"
    assert measure_alignment(loss, log_p, log_p.copy(), success, sampled_index=0) == "same"
    assert measure_alignment(loss, log_p, renormalise(log_p + 1e-8 * log_q), success, sampled_index=0) == "same"
    assert isinstance(
        measure_alignment(loss, log_p, renormalise(log_p + 1e-4 * log_q), success, sampled_index=0), float
    )


def test_a_teacher_that_forbids_a_token() -> None:
    """Bounded losses keep a finite gradient; those that contain log q do not."""
    log_p, log_q, success = draw(7)
    log_q = renormalise(np.where(np.arange(6) == 2, -np.inf, log_q))
    finite = ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
    assert all(isinstance(measure_alignment(loss, log_p, log_q, success, sampled_index=2), float) for loss in finite)
    assert measure_alignment("reverse_kl", log_p, log_q, success, sampled_index=2) == "infinite"
    assert measure_alignment("sampled", log_p, log_q, success, sampled_index=2) == "infinite"
    assert isinstance(measure_alignment("sampled", log_p, log_q, success, sampled_index=1), float)


@pytest.mark.parametrize("loss", LOSSES)
def test_improbable_candidates_do_not_overflow(loss: LossName) -> None:
    log_p = renormalise(np.array([0.0, -1.0, -900.0]))
    log_q = renormalise(np.array([-900.0, -1.0, 0.0]))
    alignment = measure_alignment(loss, log_p, log_q, np.array([1.0, 0.0, 1.0]), sampled_index=0)
    assert isinstance(alignment, float)
    assert -1.0 - 1e-12 <= alignment <= 1.0 + 1e-12


def test_helpers_say_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="must be numbers"):
        renormalise(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="at least one of them finite"):
        renormalise(np.array([-np.inf, -np.inf]))
    with pytest.raises(ValueError, match="'kl' is not one of forward_kl"):
        weighted_terms("kl", np.zeros(1), np.zeros(1), sampled_index=0)  # type: ignore[arg-type]
    tiny = np.array([1e-200, -1e-200])
    assert cosine(tiny, tiny) == pytest.approx(1.0)
    np.testing.assert_allclose(np.exp(renormalise(np.array([5.0, 5.0]))), 0.5)
    assert total_variation(np.log([0.5, 0.5]), np.log([0.75, 0.25])) == pytest.approx(0.25)
