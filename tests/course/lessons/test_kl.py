"""The seven words of notebook 06, against hand numbers and against plain sampling-free oracles."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab.algorithm.kl import exact_kl
from grpo_lab.course.lessons import drift, kl
from grpo_lab.course.recorded import RecordedRun


def test_at_distance_zero_the_policy_is_the_reference():
    assert [kl.value(kl.policy(0.0), name) for name in kl.ESTIMATORS] == [(0.0, 0.0)] * 3


def test_k1_and_k3_have_the_value_and_k2_has_not():
    far, right = kl.policy(2.0), exact_kl(kl.policy(2.0), kl.REF).item()
    assert [kl.value(far, name)[0] for name in ("k1", "k3")] == pytest.approx([right] * 2)
    assert abs(kl.value(far, "k2")[0] - right) > 0.05


def test_the_spread_of_one_word_by_a_plain_loop():
    p, d = kl.policy(1.0).softmax(-1), (kl.policy(1.0).log_softmax(-1) - kl.REF.log_softmax(-1)).tolist()
    mean = sum(q * x for q, x in zip(p.tolist(), d, strict=True))
    square = sum(q * (x - mean) ** 2 for q, x in zip(p.tolist(), d, strict=True))
    assert kl.value(kl.policy(1.0), "k1")[1] == pytest.approx(math.sqrt(square))


def test_the_expected_gradients():
    far = kl.policy(1.0)
    exact, reverse = kl.exact_gradient(far), kl.exact_gradient(far, reverse=True)
    same = torch.testing.assert_close
    same(kl.gradient(far, "k1", "in the loss"), torch.zeros_like(far))
    same(kl.gradient(far, "k2", "in the loss"), exact)
    same(kl.gradient(far, "k3", "in the loss"), reverse)
    same(reverse, far.softmax(-1) - kl.REF.softmax(-1))  # pi - ref, as the notebook says
    same(kl.gradient(far, "k1", "in the reward"), exact)
    same(kl.gradient(far, "k3", "in the reward"), exact - reverse)
    for name in ("k1", "k3"):
        same(kl.gradient(far, name, "in the loss", corrected=True), exact)


def test_the_bars_are_the_exact_gradient_and_the_words_its_cosines():
    kl.ground_of_estimators(figure := Figure())
    words = kl.draw_estimators(figure, "in the loss", 1.0)
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx(kl.exact_gradient(kl.policy(1.0)).tolist())
    assert "k1: value 0.508, one word ± 0.89; gradient of length 0.000, cosine 0.00" in words
    assert "cosine 1.00" in words.splitlines()[2]


def test_descent_on_the_penalty_alone():
    start = kl.policy(1.0)
    stays, comes_back = (kl.descend(name, steps=20) for name in ("k1", "k3"))
    torch.testing.assert_close(stays.logits, start)
    assert comes_back.kl[-1] < 0.1 * comes_back.kl[0]
    torch.testing.assert_close(kl.descend("k1", steps=20, top_p=0.9).logits, start)  # scored as sampled
    # under the full softmax k1 takes from what is kept and gives to what is cut: q - pi, by hand for one step
    p = start.softmax(-1)
    kept = torch.zeros(7, dtype=torch.bool)
    kept[p.argsort(descending=True)[: int((p.sort(descending=True)[0].cumsum(0) < 0.9).sum()) + 1]] = True
    q = p.where(kept, 0.0) / p[kept].sum()
    one = kl.descend("k1", steps=1, top_p=0.9, scored="full softmax")
    torch.testing.assert_close(one.logits, start - 0.5 * (q - p))


def test_k1_under_the_wrong_softmax_ends_near_uniform():
    wrong = kl.descend("k1", top_p=0.9, scored="full softmax")
    assert wrong.entropy[-1] > 0.95 * math.log(7) > wrong.entropy[0]
    assert wrong.kl[-1] > wrong.kl[0]


def test_the_figure_of_the_descents():
    run = kl.Descent([0.5, 0.25], [1.0, 1.5], kl.REF)
    kl.ground_of_descent(figure := Figure())
    words = kl.draw_descent(figure, {"exactly": dict.fromkeys(kl.ESTIMATORS, run)}, "exactly")
    assert words.splitlines()[0] == "k1: KL 0.500 → 0.250 nats, entropy 1.00 → 1.50"


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_no_policy_does_better_than_the_closed_form(beta):
    logits = drift.optimum(beta).requires_grad_()
    J = logits.softmax(-1) @ drift.REWARDS - beta * exact_kl(logits, kl.REF)
    (slope,) = torch.autograd.grad(J, logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


def test_a_small_beta_earns_more_and_drifts_further():
    (low_reward, low_kl), (high_reward, high_kl) = (drift.gained(drift.optimum(b)) for b in (2.0, 0.1))
    assert low_reward < high_reward
    assert low_kl < high_kl
    drift.ground_of_beta(figure := Figure())
    assert "0.370" in drift.draw_beta(figure, 0.5)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([*kl.REF.softmax(-1).tolist(), *drift.optimum(0.5).softmax(-1).tolist()])


def test_the_recorded_sweep_averages_the_seeds():
    info = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "2.13"}, "after": {"eval/pass@1": 0.5}}
    runs = [RecordedRun(info, [{"step": 1, "reward": r, "kl": 0.1}], []) for r in (0.2, 0.4)]
    with_kl = drift.sweep(runs)
    without = drift.sweep([RecordedRun(info, [{"step": 1, "reward": 0.7}], [])])
    assert with_kl.reward == pytest.approx([0.3])
    assert without.kl is None
    sweeps = {"0": without, "0.5": with_kl}
    drift.ground_of_sweep(figure := Figure(), sweeps)
    words = drift.draw_sweep(figure, sweeps, "0.5")
    assert "50%, 50% (seeds 0 to 1)" in words
    assert "KL 0.100 nats per token, reward 0.30" in words
    assert [text.get_text() for text in figure.axes[0].texts] == ["β 0", "β 0.5"]  # the higher one first
    assert "not computed" in drift.draw_sweep(figure, sweeps, "0")


def test_a_live_run_logs_kl_and_reward():
    rows = drift.live_run(2.0, steps=2)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy is still the reference
    assert "in the last five steps" in drift.draw_live(Figure(), {"β 2": rows * 3})
