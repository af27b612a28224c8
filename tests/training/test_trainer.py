"""The trainer: one step is the sentence that describes it, and nothing but the settings changes what it does."""

import json
import signal
import warnings
from contextlib import suppress

import pytest
import torch
from conftest import tiny_architecture, tiny_model
from trainers import PROMPTS, likes_threes, make_trainer, weights

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.algorithm.advantages import group_advantages
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.tasks.registry import TASKS
from grpo_lab.training import progress, step
from grpo_lab.training.config import PRESETS
from grpo_lab.training.evaluation import wilson_interval


def texts(record):
    return [row["completion"] for row in record.completions]


# --- it learns ------------------------------------------------------------------------------------------


def test_reward_rises_and_the_reference_stays(tmp_path, uniform_model):
    run = make_trainer(tmp_path, model=uniform_model, max_steps=25, learning_rate=3e-2, kl_coef=0.01)
    reference = torch.cat([p.flatten().clone() for p in run.ref_model.parameters()])
    rewards = [record.metrics["reward"] for record in run.steps()]
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])
    assert torch.equal(reference, torch.cat([p.flatten() for p in run.ref_model.parameters()]))


def test_the_kl_penalty_holds_the_policy_back_and_costs_reward(tmp_path, uniform_model):
    kl, reward = {}, {}
    start = uniform_model.state_dict()
    for beta in (0.001, 1.0):
        model = tiny_model(tie_word_embeddings=False)
        model.load_state_dict(start)
        run = make_trainer(tmp_path, model=model, max_steps=20, kl_coef=beta, top_k=0, top_p=1.0)
        last = list(run.steps())[-1].metrics
        kl[beta], reward[beta] = last["kl"], last["reward"]
    assert kl[1.0] < 0.2 * kl[0.001]
    assert reward[1.0] < 0.5 * reward[0.001]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in TASKS])
def test_every_variant_trains(tmp_path, preset):
    run = make_trainer(tmp_path, max_steps=2, num_iterations=2, **PRESETS[preset])
    before = weights(run)
    records = list(run.steps())
    assert all(torch.isfinite(torch.tensor(list(r.metrics.values()))).all() for r in records)
    assert not torch.equal(before, weights(run))


def test_the_kl_penalty_also_holds_groups_without_advantages(tmp_path):
    def reward(prompts, completions):
        return [float(i == 0) for i in range(len(completions))]

    for kl_coef, no_gradient in ((0.1, [False]), (0.0, [False, True])):
        batch = make_trainer(tmp_path, reward=reward, kl_coef=kl_coef).collect([0, 1, 2, 3])
        assert [part.no_gradient for part in batch.parts] == no_gradient


# --- memory is the only thing that micro-batches change --------------------------------------------------


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "constant"])
@pytest.mark.parametrize("extra", [{}, {"num_iterations": 2, "gamma": 0.9}, {"scale_rewards": "batch"}], ids=str)
def test_accumulation_changes_nothing(tmp_path, aggregation, extra):
    def run(batch_size, accumulation):
        r = make_trainer(
            tmp_path, batch_size=batch_size, gradient_accumulation_steps=accumulation, aggregation=aggregation,
            learning_rate=1e-4, **extra,
        )  # fmt: skip
        records = list(r.steps())
        return weights(r), [texts(record) for record in records], [record.metrics for record in records]

    whole_weights, whole_texts, whole_metrics = run(4, 1)
    for split in ((2, 2), (1, 4)):
        part_weights, part_texts, part_metrics = run(*split)
        assert part_texts == whole_texts
        # Adam divides by the gradient's size, so rounding can move a weight by a little of the 1e-4 that a step is
        torch.testing.assert_close(part_weights, whole_weights, atol=2e-6, rtol=0)
        for part, whole in zip(part_metrics, whole_metrics, strict=True):
            ignored = {"step_time"}
            assert {k: v for k, v in part.items() if k not in ignored} == pytest.approx(
                {k: v for k, v in whole.items() if k not in ignored}, rel=1e-3, abs=1e-5
            )


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = make_trainer(tmp_path), make_trainer(tmp_path, gradient_checkpointing=True)
    gradients = []
    for run in (plain, saving):
        run.components.engine.optimizer.optimizer.register_step_pre_hook(
            lambda *_, run=run: gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
        )
        run.update(run.collect([0, 1, 2, 3]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_no_gradient_stays_while_the_next_completions_are_sampled(tmp_path):
    run = make_trainer(tmp_path)
    run.update(run.collect([0, 1, 2, 3]))
    assert all(p.grad is None for p in run.model.parameters())


def test_gradient_checkpointing_really_recomputes(tmp_path):
    run = make_trainer(tmp_path, gradient_checkpointing=True, max_steps=1)
    calls = []
    run.model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    run.update(run.collect([0, 1, 2, 3]))
    batch = run.collect([0, 1, 2, 3])
    calls.clear()
    run.update(batch)
    assert len(calls) == 2  # forward, and again in backward


# --- one distribution for sampler and scorer -------------------------------------------------------------


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_k": 0, "top_p": 0.8}, {"temperature": 1.7}], ids=str)
def test_right_after_sampling_the_ratio_is_one_and_the_kl_zero(tmp_path, truncation):
    run = make_trainer(tmp_path, **truncation)
    first = next(run.steps())
    assert run.first_check["ratio"] < 1e-5
    assert run.first_check["kl"] == 0
    assert first.metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_a_scorer_that_forgets_the_temperature_is_noticed(tmp_path):
    run = make_trainer(tmp_path, temperature=0.5)
    run.components.models.score = lambda *a, **k: completion_scores(*a, **k | {"temperature": 1.0})
    with pytest.warns(UserWarning, match="ratio should be 1"):
        next(run.steps())


def test_dropout_is_off_while_ratios_are_compared(tmp_path):
    def noisy():
        return tiny_model(attention_dropout=0.5)

    off = make_trainer(tmp_path, model=noisy())
    assert [r.metrics["sampling/sampling_logp_difference/max"] < 1e-5 for r in off.steps()] == [True] * 3
    with pytest.warns(UserWarning, match="ratio should be 1"):
        next(make_trainer(tmp_path, model=noisy(), disable_dropout=False).steps())


# --- several updates per rollout -------------------------------------------------------------------------


def test_later_updates_use_the_same_completions_and_the_same_old_logprobs(tmp_path):
    run = make_trainer(tmp_path, num_iterations=3, max_steps=6)
    seen = []
    for record in run.steps():
        old = run.batch.parts[0].old_logprobs.clone() if run.batch else None
        seen.append((texts(record), old, record.metrics["clip_ratio/region_mean"]))
    assert seen[0][0] == seen[1][0] == seen[2][0] != seen[3][0] == seen[5][0]
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][2] == 0  # one update: ratio 1, clip inactive by construction
    assert seen[2][2] > 0


def test_the_whole_gradient_of_the_first_update_is_reinforce(tmp_path):
    """At ratio 1 the surrogate's gradient is that of A log pi, averaged per completion and then over them."""
    run = make_trainer(tmp_path, kl_coef=0.0, max_grad_norm=float("inf"))
    batch = run.collect([0, 1, 2, 3])
    total = 0.0
    for part in batch.parts:
        rollouts = part.rollouts
        logprobs = completion_logprobs(
            run.model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens,
            temperature=run.config.temperature, kept=rollouts.kept,
        )  # fmt: skip
        for row, values, m in zip(part.rows.tolist(), logprobs, rollouts.completion_mask, strict=True):
            total = total - batch.completions[row]["advantage"] * values[m].mean() / len(batch.completions)
    expected = torch.autograd.grad(total, list(run.model.parameters()))
    norm = torch.cat([g.flatten() for g in expected]).norm().item()
    assert run.update(batch)["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_where_dropout_is_at_work_no_two_rows_share_it(tmp_path, disable_dropout):
    run = make_trainer(tmp_path, model=tiny_architecture("gpt2"), disable_dropout=disable_dropout)
    rollouts = run.collect([0]).parts[0].rollouts.select(torch.tensor([0, 0]))
    run.model.train()
    one, other = run.components.models._score_under(run.model, rollouts, completion_logprobs)
    assert torch.equal(one, other) == disable_dropout


def test_every_rollout_draws_numbers_of_its_own(tmp_path):
    run = make_trainer(tmp_path)
    first, again = texts(run.collect([0, 1])), texts(run.collect([0, 1]))
    run.step = 1
    assert first == again != texts(run.collect([0, 1]))


# --- rewards, groups, gamma ------------------------------------------------------------------------------


def test_columns_stand_beside_their_own_prompts_k_times(tmp_path):
    judged = []

    def reward(prompts, completions, answer, **columns):
        judged.extend(zip(prompts, completions, strict=True))
        assert "unused" in columns
        assert [p.split(":")[1] for p in prompts] == [f"{a}=" for a in answer]
        return [float(len(c)) for c in completions]

    answers = [p.split(":")[1][:-1] for p in PROMPTS]
    dataset = SimplePromptDataset(PROMPTS, answer=answers, unused=answers)
    record = next(make_trainer(tmp_path, prompts=dataset, reward=reward).steps())
    rewards = torch.tensor([row["reward"] for row in record.completions]).view(4, 4)
    assert torch.allclose(
        torch.tensor([row["advantage"] for row in record.completions]).view(4, 4), group_advantages(rewards)
    )
    assert judged == [(row["prompt"], row["completion"]) for row in record.completions]
    for group in range(4):
        assert len({row["prompt"] for row in record.completions[4 * group : 4 * group + 4]}) == 1


def test_several_rewards_are_weighted_and_logged_apart(tmp_path):
    def only_some(prompts, completions):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    run = make_trainer(tmp_path, reward=[likes_threes, only_some], reward_weights=(1.0, 10.0), max_steps=1)
    record = next(run.steps())
    for i, row in enumerate(record.completions):
        parts = row["rewards"]
        assert parts["only_some"] == (None if i % 2 else 1.0)
        assert row["reward"] == pytest.approx(parts["likes_threes"] + 10 * (parts["only_some"] or 0))
    assert record.metrics["rewards/only_some/mean"] == 1.0


def test_gamma_gives_early_tokens_less(tmp_path):
    part = make_trainer(tmp_path, gamma=0.5).collect([0, 1]).parts[0]
    n = int(part.rollouts.completion_mask[0].sum())
    assert part.advantages[0, :n].tolist() == pytest.approx(
        [part.advantages[0, n - 1].item() * 0.5 ** (n - 1 - t) for t in range(n)]
    )


def test_kl_in_the_reward_is_the_log_ratio_of_the_whole_completion(tmp_path):
    reference = tiny_model(seed=7)
    run = make_trainer(
        tmp_path, ref_model=reference, kl_in="reward", kl_estimator="k1", kl_coef=0.5, scale_rewards="none"
    )
    batch = run.collect([0, 1])
    part = batch.parts[0]
    policy = run.components.models.logprobs(part.rollouts)
    log_ratio = ((policy - part.ref_logprobs) * part.rollouts.completion_mask).sum(1)
    rewards = torch.tensor([row["reward"] for row in batch.completions]) - 0.5 * log_ratio
    assert part.advantages.tolist() == pytest.approx(
        group_advantages(rewards.view(2, 4), scale="none").flatten().tolist()
    )


def test_kl_in_the_reward_of_an_untouched_reference_is_no_reward_in_half_precision_either(tmp_path):
    in_reward = {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 1.0, "precision": "bf16"}
    run = make_trainer(tmp_path, reward=lambda prompts, completions: [1.0] * len(completions), **in_reward)
    assert run.collect([0, 1]).parts[0].advantages.tolist() == [0.0] * 8


def test_the_sentence_about_the_loss_is_only_said_where_it_is_true(tmp_path, capsys):
    plain = {"baseline": "none", "scale_rewards": "none"}
    for settings, true in (({}, True), (plain, False), ({"surrogate": "cispo"}, False)):
        make_trainer(tmp_path, max_steps=1, **settings).train()
        assert ("hovers around 0" in capsys.readouterr().out) == true


def test_an_invalid_generation_config_does_not_stop_the_first_save(tmp_path):
    model = tiny_model()
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    make_trainer(tmp_path, model=model, save_steps=1, max_steps=1).train()


def test_a_bad_reward_function_stops_the_run_and_leaves_what_was_written(tmp_path):
    calls = []

    def breaks(prompts, completions):
        calls.append(1)
        return [float("inf")] * len(completions) if len(calls) == 3 else likes_threes(prompts, completions)

    run = make_trainer(tmp_path, reward=breaks, save_steps=1)
    with pytest.raises(ValueError, match="'breaks' returned inf"):
        run.train()
    assert [row["step"] for row in run.log.metrics.read()] == [1, 2]
    assert (tmp_path / "checkpoint-2" / "training_state.pt").exists()
    assert torch.isfinite(weights(run)).all()


# --- metrics ---------------------------------------------------------------------------------------------


def test_metrics_are_what_they_are_called(tmp_path):
    run = make_trainer(
        tmp_path, batch_size=2, gradient_accumulation_steps=2, kl_coef=0.1, num_iterations=2, max_steps=2
    )
    records = run.steps()
    next(records)
    batch, before = run.batch, run.model.state_dict()
    model = tiny_model()
    model.load_state_dict(before)
    second = next(records).metrics
    rewards = torch.tensor([row["reward"] for row in batch.completions]).view(4, 4)
    entropy = kl = tokens = moved = cut_off = 0.0
    lengths = []
    for part in batch.parts:
        r = part.rollouts
        lengths += r.completion_mask.sum(1).tolist()
        cut_off += sum(1 not in row for row in r.completion_ids.tolist())  # 1 ends a completion, 0 pads
        with torch.no_grad():
            positions = (r.attention_mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=r.input_ids, attention_mask=r.attention_mask, position_ids=positions).logits
        logits = logits[:, -r.num_tokens - 1 : -1] / 0.7
        for i, t in r.completion_mask.nonzero().tolist():
            kept = r.kept[i, t][r.kept[i, t] >= 0]
            logp = logits[i, t][kept].log_softmax(0)[kept == r.completion_ids[i, t]].item()
            p = logits[i, t].softmax(0)
            entropy -= (p * p.log()).sum().item()
            d = part.ref_logprobs[i, t].item() - logp
            kl += torch.tensor(d).exp().item() - d - 1
            ratio, A = torch.tensor(logp - part.old_logprobs[i, t].item()).exp().item(), part.advantages[i].item()
            moved += (ratio > 1.2 and A > 0) or (ratio < 0.8 and A < 0)
            tokens += 1
    assert second["entropy"] == pytest.approx(entropy / tokens, rel=1e-4)
    assert second["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert second["clip_ratio/region_mean"] == pytest.approx(moved / tokens)
    assert second["clip_ratio/region_mean"] == second["clip_ratio/low_mean"] + second["clip_ratio/high_mean"] > 0
    assert second["reward"] == pytest.approx(rewards.mean().item())
    assert second["reward_std"] == pytest.approx(rewards.std(1).mean().item())
    assert second["frac_reward_zero_std"] == (rewards.std(1) == 0).float().mean().item()
    assert second["completions/mean_length"] == tokens / 16
    assert (second["completions/min_length"], second["completions/max_length"]) == (min(lengths), max(lengths))
    assert second["completions/clipped_ratio"] == cut_off / 16 != 0.5  # or its opposite would pass
    assert second["epoch"] == 4 / 12  # four of the twelve prompts have been used
    assert second["num_tokens"] == sum(p.rollouts.attention_mask.sum().item() for p in batch.parts)
    assert set(second) <= {*trainer_metrics(), "rewards/likes_threes/mean"}


def test_dead_groups_are_counted(tmp_path):
    run = make_trainer(tmp_path, reward=lambda prompts, completions: [0.0, 1.0, 0.0, 0.0] + [0.7] * 12)
    assert run.collect([0, 1, 2, 3]).metrics["frac_reward_zero_std"] == 3 / 4


def trainer_metrics():
    from grpo_lab.training.metrics import METRICS

    return METRICS


def test_steps_are_optimizer_steps_and_the_schedule_is_transformers(tmp_path):
    from transformers import get_scheduler

    run = make_trainer(
        tmp_path, max_steps=None, num_epochs=2, gradient_accumulation_steps=2, batch_size=2, num_iterations=2,
        warmup_steps=3, lr_scheduler="cosine", logging_steps=5, save_steps=4,
    )  # fmt: skip
    assert run.total_steps == 2 * 3 * 2  # epochs x batches of 4 of the 12 prompts x updates per rollout
    rates = [record.metrics["learning_rate"] for record in run.steps()]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=12)
    expected = []
    for _ in rates:
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)
    assert [row["step"] for row in run.log.metrics.read()] == [5, 10, 12]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_a_warmup_longer_than_the_run_is_said(tmp_path):
    with pytest.warns(UserWarning, match="never reaches"):
        list(make_trainer(tmp_path, warmup_steps=100, lr_scheduler="linear").steps())


def test_the_bar_says_reward_kl_and_length_and_why_the_loss_is_zero(tmp_path, capsys):
    history = make_trainer(tmp_path).train()
    out = capsys.readouterr()
    assert "reward 0." in out.err
    assert "KL 0." in out.err
    assert "length" in out.err
    assert "importance ratio 1 ±" in out.out
    assert "hovers around 0" in out.out
    assert [row["step"] for row in history] == [1, 2, 3]
    assert (tmp_path / "training.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 16
    words = {"step", "prompt", "completion", "reward", "rewards", "advantage"}
    assert set(rows[0]) == words | {"completion_ids", "logprobs", "ref_logprobs"}
    assert {len(row["completion_ids"]) - len(row["logprobs"]) for row in rows} == {0}
    assert make_tokenizer().decode(rows[0]["completion_ids"], skip_special_tokens=True) == rows[0]["completion"]


# --- faults ----------------------------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_in_the_end_fatal(tmp_path, monkeypatch):
    run = make_trainer(tmp_path, max_steps=20, max_skipped_steps=3)
    records = run.steps()
    next(records)
    before = weights(run)
    real = step.grpo_loss

    def broken(logprobs, *a, **k):
        return real(logprobs * float("nan"), *a, **k)

    monkeypatch.setattr(step, "grpo_loss", broken)
    skipping = next(records).metrics
    assert skipping["skipped_steps"] == 1
    assert "skipped 1" in progress.step_text(skipping)
    assert torch.equal(before, weights(run))
    assert run.components.engine.scheduler.last_epoch == 1  # the schedule waits too
    monkeypatch.setattr(step, "grpo_loss", real)
    assert next(records).metrics["skipped_steps"] == 1
    monkeypatch.setattr(step, "grpo_loss", broken)
    with pytest.raises(ArithmeticError, match="3 steps in a row"):
        list(records)
    assert torch.isfinite(weights(run)).all()


def test_ctrl_c_that_a_shell_has_told_to_ignore_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a run in the background of a script
    try:
        run = make_trainer(tmp_path, reward=lambda p, c: signal.raise_signal(signal.SIGINT) or [0.0] * len(c))
        with suppress(KeyboardInterrupt):  # it would end the tests
            run.train()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.step == run.total_steps


def test_no_setting_of_a_launcher_divides_the_gradient(tmp_path, monkeypatch):
    alone = next(make_trainer(tmp_path / "alone").steps()).metrics["grad_norm"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert next(make_trainer(tmp_path / "launched").steps()).metrics["grad_norm"] == alone


def test_ctrl_c_finishes_the_step_saves_and_can_be_resumed(tmp_path):
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.train()

    def impatient(prompts, completions):
        if stopped.step == 1:
            signal.raise_signal(signal.SIGINT)  # in the middle of the second step
        return likes_threes(prompts, completions)

    impatient.__name__ = "likes_threes"  # a run only goes on with the reward functions it had
    stopped = make_trainer(tmp_path / "stopped", max_steps=4, reward=impatient)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-2"):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = make_trainer(tmp_path / "stopped", max_steps=4)
    resumed.train(resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def test_gradients_left_by_others_are_not_added(tmp_path):
    clean, dirty = make_trainer(tmp_path), make_trainer(tmp_path)
    next(iter(dirty.model.parameters())).grad = torch.ones_like(next(iter(dirty.model.parameters())))
    assert clean.update(clean.collect([0, 1]))["grad_norm"] == dirty.update(dirty.collect([0, 1]))["grad_norm"]


def test_a_fault_while_collecting_loses_no_prompt(tmp_path):
    seen, calls = [], []

    def fails_once(prompts, completions):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no connection")
        seen.extend(prompts)
        return likes_threes(prompts, completions)

    run = make_trainer(tmp_path, reward=fails_once)
    with pytest.raises(ValueError, match="no connection"):
        list(run.steps())
    list(run.steps())
    assert set(seen) == set(PROMPTS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=str,
)
def test_out_of_memory_is_answered_with_what_to_lower(tmp_path, error):
    def explode(*_, **__):
        raise error

    run = make_trainer(tmp_path)
    run.components.models.score = explode
    with pytest.raises(MemoryError) as caught:
        run.train()
    for knob in ("--batch-size (now 4", "--num-generations (K, now 4)", "--max-new-tokens (now 6)", "--precision"):
        assert knob in str(caught.value)


def test_a_prompt_longer_than_the_context_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"80 tokens.*context of 64.*Shorten"):  # before the first step
        make_trainer(tmp_path, prompts=[*PROMPTS, "1+" * 40])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "there is no cuda device here.*--device auto"),
        ({"device": "tpu"}, "device must be auto, cuda, cpu or mps"),
        ({"precision": "fp16"}, "fp16 needs CUDA"),
        ({"eval_steps": 1}, "no eval_dataset"),
        ({"reward_weights": (1.0, 2.0)}, "2 reward_weights for 1 reward"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(tmp_path, settings, message):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_the_policy_cannot_be_its_own_reference(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="the KL would always be 0"):
        make_trainer(tmp_path, model=model, ref_model=model)
    make_trainer(tmp_path, model=model, ref_model=model, kl_coef=0.0)


def test_a_column_must_not_be_called_as_an_argument_of_reward_functions(tmp_path):
    dataset = SimplePromptDataset(PROMPTS, completions=PROMPTS)
    with pytest.raises(ValueError, match=r"column 'completions'.*Rename"):
        make_trainer(tmp_path, prompts=dataset)


def test_k1_in_the_loss_runs_and_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="expected gradient of 0"):
        run = make_trainer(tmp_path, kl_estimator="k1", max_steps=1)
    assert len(list(run.steps())) == 1


def test_without_kl_there_is_no_reference_at_all(tmp_path):
    run = make_trainer(tmp_path, ref_model=tiny_model(seed=1), kl_coef=0.0)
    assert run.ref_model is None
    assert "kl" not in next(run.steps()).metrics


def test_saving_never_removes_other_files(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("years of work")
    run = make_trainer(tmp_path / "out")
    with pytest.raises(ValueError, match="holds other files"):
        run.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").exists()


def test_weights_that_are_not_finite_are_noticed_at_once(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ArithmeticError, match="not finite"):
        make_trainer(tmp_path, model=model).train()


def test_a_reward_that_scores_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no reward function scored any completion"):
        make_trainer(tmp_path, reward=lambda prompts, completions: [None] * len(completions)).train()


def test_a_fault_in_the_middle_leaves_a_checkpoint_of_the_last_whole_step(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    calls = []

    def fails(prompts, completions):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no connection")
        return likes_threes(prompts, completions)

    fails.__name__ = "likes_threes"
    with pytest.raises(ValueError, match="no connection"):
        make_trainer(tmp_path / "broken", reward=fails).train()
    resumed = make_trainer(tmp_path / "broken")
    resumed.train(resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def test_resuming_from_an_older_checkpoint_forgets_the_newer_ones(tmp_path):
    make_trainer(tmp_path, save_steps=1).train()
    run = make_trainer(tmp_path, save_steps=100)
    next(run.steps(resume=tmp_path / "checkpoint-1"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_model_or_reference_with_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="share a vocabulary, got 21 and 30"):
        make_trainer(tmp_path, ref_model=tiny_model(vocab_size=30))
    with pytest.raises(ValueError, match="the model knows only 10"):
        make_trainer(tmp_path, model=tiny_model(vocab_size=10))


# --- precision -------------------------------------------------------------------------------------------


def test_half_precision_weights_are_trained_in_float32(tmp_path):
    run = make_trainer(tmp_path, model=tiny_model().bfloat16())
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    next(run.steps())
    assert run.first_check["kl"] == 0


def test_bf16_arithmetic_trains_on_the_cpu_too_and_stays_with_its_trainer(tmp_path):
    run = make_trainer(tmp_path / "half", precision="bf16", max_steps=2)
    before = weights(run)
    full = make_trainer(tmp_path / "full", model=run.model, max_steps=1)  # made between, on the same model
    records = list(run.steps())
    assert (run.precision, full.precision) == ("bf16", "fp32")
    logits = run.model(torch.tensor([[5, 6, 7]])).logits
    assert not torch.equal(logits, logits.bfloat16().float())  # the model itself is not left in bf16
    assert 0 < records[0].metrics["sampling/sampling_logp_difference/max"] < 0.5
    assert not torch.equal(before, weights(run))


# --- evaluation ------------------------------------------------------------------------------------------


def test_evaluation_counts_right_answers_and_leaves_training_alone(tmp_path):
    def run(evaluate):
        r = make_trainer(tmp_path, success_reward=0.25)
        out = []
        for record in r.steps():
            out.append(texts(record))
            if evaluate:
                scores = r.evaluate(SimplePromptDataset(PROMPTS[:5]), num_generations=3)
        return out, weights(r), scores if evaluate else None

    plain, plain_weights, _ = run(False)
    evaluated, evaluated_weights, scores = run(True)
    assert plain == evaluated
    assert torch.equal(plain_weights, evaluated_weights)
    assert 0 <= scores["eval/pass@1_low"] <= scores["eval/pass@1"] <= scores["eval/pass@3"] <= 1
    assert scores["eval/pass@1"] * 15 == pytest.approx(round(scores["eval/pass@1"] * 15))


def test_the_numbers_of_an_evaluation_by_hand(tmp_path):
    # three prompts: one greedy answer each; then two samples each, of which both, one and none are right
    rewards = {3: [1.0, 0.9, 1.0], 6: [1.0, 2.0, 0.5, 1.0, None, 0.0]}
    run = make_trainer(tmp_path, reward=lambda prompts, completions: rewards[len(completions)])
    scores = run.evaluate(SimplePromptDataset(PROMPTS[:3]), num_generations=2)
    shares = {"pass@1_greedy": 2 / 3, "pass@1": (1 + 1 / 2 + 0) / 3, "pass@2": 2 / 3}
    for name, share in shares.items():
        bounds = (scores[f"eval/{name}_low"], scores[f"eval/{name}_high"])
        assert (scores[f"eval/{name}"], *bounds) == pytest.approx((share, *wilson_interval(share, 3))), name
    assert scores["eval/reward"] == pytest.approx((1 + 2 + 0.5 + 1 + 0) / 5)  # what was not scored does not count


@pytest.mark.parametrize("weights", [None, (0.25, 4.0)])
def test_what_is_right_the_first_reward_function_says_whatever_the_others_and_the_weights_add(tmp_path, weights):
    def right(prompts, completions):
        return [[1.0, 0.0][i % 2] for i in range(len(completions))]

    def form(prompts, completions):
        return [[0.0, 5.0][i % 2] for i in range(len(completions))]

    for first, share in (((right, form), 1.0), ((form, right), 0.0)):
        run = make_trainer(tmp_path, reward=list(first), reward_weights=weights, success_reward=1.0)
        scores = run.evaluate(SimplePromptDataset(PROMPTS[:1]), num_generations=2)
        assert (scores["eval/pass@1_greedy"], scores["eval/pass@1"], scores["eval/pass@2"]) == (share, 0.5, 1.0)
        by = dict(zip(first, weights or (1.0, 1.0), strict=True))
        assert scores["eval/reward"] == pytest.approx((by[right] + 5 * by[form]) / 2)


def test_greedy_evaluation_is_what_generate_says(tmp_path, tokenizer):
    model = tiny_model()
    expected = []
    for prompt in PROMPTS[:6]:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        expected.append("1" in tokenizer.decode(out, skip_special_tokens=True))
    assert 0 < sum(expected) < 6
    run = make_trainer(tmp_path, model=model, reward=lambda prompts, completions: ["1" in c for c in completions])
    scores = run.evaluate(SimplePromptDataset(PROMPTS[:6]))
    assert scores["eval/pass@1_greedy"] == sum(expected) / 6


def test_evaluation_comes_every_eval_steps(tmp_path):
    config = {"eval_steps": 2, "max_steps": 3, "logging_steps": 1, "output_dir": str(tmp_path), "max_new_tokens": 4}
    data = SimplePromptDataset(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warmup is longer than the run
        run = GRPOTrainer(tiny_model(), None, likes_threes, make_tokenizer(), GRPOConfig(**config), data, data)
        history = run.train()
    assert ["eval/pass@1" in row for row in history] == [False, True, True]


# --- resume ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2, "batch_size": 2, "gradient_accumulation_steps": 2},
        {"num_iterations": 2, "lora_rank": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_ends_exactly_as_the_unbroken_one(tmp_path, settings, stop):
    common = {"max_steps": 5, "save_steps": 1, "logging_steps": 2, "lr_scheduler": "linear", **settings}
    whole = make_trainer(tmp_path / "whole", **common)
    whole_history = whole.train()

    broken = make_trainer(tmp_path / "broken", **common)
    for record in broken.steps():
        if record.step == stop:
            break
    resumed = make_trainer(tmp_path / "broken", **common)
    history = resumed.train(resume=True)

    assert torch.equal(weights(whole), weights(resumed))

    def timeless(rows):
        return [{k: v for k, v in row.items() if k != "step_time"} for row in rows]

    assert timeless(history) == timeless(whole_history)
    assert (tmp_path / "broken/completions.jsonl").read_text() == (tmp_path / "whole/completions.jsonl").read_text()


def test_resuming_with_other_settings_is_refused(tmp_path):
    list(make_trainer(tmp_path, save_steps=1).steps())
    with pytest.raises(ValueError, match=r"clip_range: 0.2 -> 0.3"):
        make_trainer(tmp_path, clip_range=0.3).train(resume=True)
    with pytest.raises(ValueError, match=r"training data: \w+ -> \w+"):
        make_trainer(tmp_path, prompts=PROMPTS[:-1]).train(resume=True)
    with pytest.raises(ValueError, match=r"training data: \w+ -> \w+"):
        make_trainer(tmp_path, prompts=SimplePromptDataset(PROMPTS, answer=PROMPTS)).train(resume=True)
    with pytest.raises(ValueError, match="reward functions"):
        make_trainer(tmp_path, reward=lambda prompts, completions: [0.0] * len(completions)).train(resume=True)


def test_a_model_that_has_moved_cannot_stand_in_for_the_reference(tmp_path):
    model = tiny_model()
    first = make_trainer(tmp_path, model=model, save_steps=1)
    next(first.steps())
    with pytest.raises(ValueError, match="reference model"):  # its frozen copy would be of the trained weights
        make_trainer(tmp_path, model=model).train(resume=True)


def test_resuming_from_elsewhere_begins_a_folder_of_its_own(tmp_path):
    whole = make_trainer(tmp_path / "a", save_steps=2)
    whole.train()
    other = make_trainer(tmp_path / "b")
    other.train(resume=tmp_path / "a" / "checkpoint-2")
    assert [row["step"] for row in other.log.metrics.read()] == [3]
    assert torch.equal(weights(whole), weights(other))
    with pytest.raises(ValueError, match="results of another run"):
        make_trainer(tmp_path / "b", overwrite_output_dir=False).train(resume=tmp_path / "a" / "checkpoint-2")


def test_frozen_weights_in_half_precision_come_back_as_they_were(tmp_path):
    def model():
        half = tiny_model(tie_word_embeddings=False).bfloat16()
        half.model.embed_tokens.weight.requires_grad_(False)
        return half

    whole = make_trainer(tmp_path / "whole", model=model(), save_steps=1)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", model=model())
    resumed.train(resume=tmp_path / "whole" / "checkpoint-1")
    assert {p.dtype for p in resumed.model.parameters()} == {torch.float32, torch.bfloat16}
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
