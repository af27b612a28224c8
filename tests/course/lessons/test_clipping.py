"""The clip, the means and the pictures of notebook 05, against numbers worked by hand."""

import pytest
import torch
from matplotlib.figure import Figure

from grpo_lab.course.lessons import clipping
from grpo_lab.course.recorded import RecordedRun


@pytest.fixture(scope="module")
def batch():
    """Four tokens: good and bad ones that moved far, up and down."""
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5])
    return clipping.Reuse([torch.ones(4), ratios], torch.tensor([1.0, 1.0, -1.0, -1.0]), [0.0], [0.0, 0.0], {})


def test_the_gradient_in_all_six_regions():
    ratios = torch.tensor([0.5, 1.0, 2.0] * 2)
    gain, slope = clipping.surrogate_and_gradient(ratios, torch.tensor([1.0] * 3 + [-1.0] * 3), 0.2, 0.3)
    # by log pi the slope of c A is c A itself, and 0 where the minimum takes the clipped one
    torch.testing.assert_close(gain, torch.tensor([0.5, 1.0, 1.3, -0.8, -1.0, -2.0]))
    torch.testing.assert_close(slope, torch.tensor([0.5, 1.0, 0.0, 0.0, -1.0, -2.0]))


@pytest.mark.parametrize(("sign", "edge", "cut_at"), [("+1", "> 1.30", 2.0), ("-1", "< 0.80", 0.5)])
def test_the_rug_holds_the_tokens_of_that_sign_and_parts_the_cut_ones(batch, sign, edge, cut_at):
    clipping.ground_of_clip(figure := Figure())
    words = clipping.draw_clip(figure, batch, sign, 0.2, 0.3, 1)
    assert edge in words
    assert "2 real tokens" in words
    assert "50.0% of them are cut" in words
    left = figure.axes[0]
    kept, cut = (line for line in left.lines if line.get_marker() == "|")
    assert cut.get_xdata().tolist() == [cut_at]
    assert kept.get_xdata().tolist() == [2.5 - cut_at]


def test_before_any_update_nothing_is_cut(batch):
    clipping.ground_of_clip(figure := Figure())
    assert "0.0% of them are cut" in clipping.draw_clip(figure, batch, "+1", 0.02, 0.02, 0)


@pytest.mark.parametrize(
    ("how", "short", "long"),
    # two completions of 4 and 16 tokens: 1/2 each; 20 tokens in all; 2 * 64
    [("sequence-mean", 1 / 8, 1 / 32), ("token-mean", 1 / 20, 1 / 20), ("constant", 1 / 128, 1 / 128)],
)
def test_the_pull_on_a_token(how, short, long):
    a, b = clipping.pull((4, 16), how)
    assert a.tolist() == pytest.approx([short] * 4)
    assert b.tolist() == pytest.approx([long] * 16)


def test_the_bars_of_the_length_bias():
    clipping.ground_of_length_bias(figure := Figure())
    words = clipping.draw_length_bias(figure, 16)
    shares = [bar.get_width() for bar in figure.axes[0].patches]
    assert shares == pytest.approx([0.5, 0.5, 0.2, 0.8, 0.2, 0.8])
    assert "4.0 times" in words.splitlines()[0]


def test_equal_advantages_push_on_the_length_through_the_sequence_mean_alone():
    # one token, or two of which the second is the end or not, with stop = 1/2:
    # (1/2)(1/2) - (1/4)(1/2)(1/2 - 1/2) - (1/4)(1/2)(1/2 + 1/2) = 1/8
    assert clipping.push_to_stop("sequence-mean", 1.0, stop=0.5, longest=2) == pytest.approx(1 / 8)
    assert clipping.push_to_stop("sequence-mean", -1.0) < -0.1
    assert clipping.push_to_stop("constant", -1.0) == pytest.approx(0.0, abs=1e-12)


def test_one_rollout_starts_at_ratio_one_and_its_first_update_is_never_cut():
    run = clipping.reuse(0.2, 0.2, updates=2, look_at=(2,))
    assert run.ratios[0].tolist() == pytest.approx([1.0] * len(run.advantages), abs=1e-4)
    assert run.believed[0] == pytest.approx(0.0, abs=1e-4)
    assert run.cut[0] == 0.0 < run.cut[1]
    c, A = run.ratios[1], run.advantages
    cut = ((c > 1.2) & (A > 0)) | ((c < 0.8) & (A < 0))
    assert run.cut[1] == pytest.approx(cut.float().mean().item(), abs=0.01)
    share, low, high = run.right[2]
    assert 0 <= low <= share <= high <= 1


def test_the_figure_of_reuse_and_the_one_of_the_loss(batch):
    runs = {n: batch._replace(right={0: (0.5, 0.4, 0.6), 1: (0.25, 0.2, 0.3)}) for n in ("a", "b")}
    figure = Figure()
    assert "a: promised 0.00; right 0.50 after 0, 0.25 after 1" in clipping.draw_reuse(figure, runs)
    rows = [{"step": n, "loss": -1e-9, "reward": 0.5, "grad_norm": 2.0, "frac_reward_zero_std": 0.0} for n in (1, 2)]
    info = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "2.13"}}
    words = clipping.draw_why_zero(figure := Figure(), RecordedRun(info, rows, []))
    assert words.splitlines()[0] == "loss: 0.000 at step 1, 0.000 at step 2"
    assert "recorded 2026-01-01" in figure.get_suptitle()
