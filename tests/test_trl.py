"""TRL computes the same numbers from the same completions; where the two differ on purpose, a test says how.

TRL's trainers run unchanged, from tokenizing the prompts to the backward pass. Only the sampled token ids come from our
sampler, and the settings from `to_trl`, which is tested by this. Weights are float64, to make rounding errors small;
TRL rounds each log-probability to float32, hence the tolerance of 1e-6.
"""

from dataclasses import dataclass

import pytest
import torch
import vllm_stand_in
from conftest import tiny_architecture, tiny_model
from torch import Tensor
from torch.testing import assert_close

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.algorithm.kl import kl_estimate
from grpo_lab.algorithm.losses import aggregate, importance_ratio
from grpo_lab.interop import to_trl
from grpo_lab.rollout.scoring import completion_logprobs
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.tasks.registry import TASKS
from grpo_lab.training.config import PRESETS

trl = pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")

# TRL uses the old name of this property of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = ["1,2,3:2=", "1,2,12:10=", "7,8,9:24=", "11,12,13:0="]  # of several lengths, hence left padding
SETTINGS = {
    "num_generations_per_prompt": 4, "max_new_tokens": 12, "temperature": 0.8, "top_k": 0, "top_p": 1.0,
    "seed": 3, "num_iterations": 3, "learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_steps": 0,
    "max_grad_norm": 1e9, "device": "cpu", "overwrite_output_dir": True,
}  # fmt: skip
# from TRL's paper index and the documentation of its GRPOConfig
RECIPES = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group", "importance_sampling_level": "token"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0},
    "bnpo": {"loss_type": "dapo"},  # over the whole batch, where TRL's "bnpo" takes its mean over a micro-batch
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence",
        "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}  # fmt: skip
# learning rates with which later updates find some tokens clipped and others not
RATE = {"gspo": 3e-6, "cispo": 1e-2}
KL = 0.1
UNEVEN = {"seed": 42}  # TRL deals completions to micro-batches at random; with this seed the halves differ


@pytest.fixture(autouse=True)
def nothing_leaves_the_machine(monkeypatch):
    from trl.trainer.base_trainer import _BaseTrainer

    monkeypatch.setattr(_BaseTrainer, "_send_telemetry", lambda self: None)


# --- the same run in both libraries -----------------------------------------------------------------------


def by_text(prompts, completions, **_):
    """Return a number that differs between completions; a reward function for both libraries."""
    return [sum(map(ord, c)) % 7 / 4 for c in completions]


def fixed(*columns):
    """Return reward functions that give these numbers for any completions; None: not scored."""

    def function(name, values):
        def reward(prompts, completions, **_):
            return values

        reward.__name__ = name
        return reward

    return [function(f"column_{i}", values) for i, values in enumerate(columns)]


@dataclass
class Step:
    """Loss, gradient and metrics of one optimizer step."""

    loss: float
    gradient: Tensor
    metrics: dict[str, float]


def same(one: Step, other: Step, *, to: float = 1e-6) -> bool:
    """Compare loss (a mean of terms of size 1 that nearly cancel, so absolutely) and gradient (relatively)."""
    return abs(one.loss - other.loss) < to and distance(one.gradient, other.gradient) < to


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradient(model) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in model.parameters()])


def exact(model):
    """Convert weights and rotary angles to float64.

    TRL counts padding as positions. That shifts all angles equally, but rounds them differently in float32.
    """

    def rotary(x, position_ids):
        angles = position_ids[..., None].double() * frequencies.double()
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    if model is not None:
        frequencies = model.double().model.rotary_emb.inv_freq
        model.model.rotary_emb.forward = rotary
    return model


def collected(folder, preset="grpo", *, reward=by_text, parts=1, **changes):
    """Return our trainer and its first batch, in `parts` micro-batches, with the models in float64 afterwards."""
    sizes = {"batch_size": len(PROMPTS) // parts, "gradient_accumulation_steps": parts, "output_dir": str(folder)}
    rate = {"learning_rate": RATE.get(preset, 1e-3)}
    config = GRPOConfig(**SETTINGS | rate | PRESETS[preset] | sizes | changes)
    run = GRPOTrainer(
        tiny_model(), tiny_model(seed=7), reward, make_tokenizer(), config, SimplePromptDataset(PROMPTS)
    )  # fmt: skip
    batch = run.collect(range(len(PROMPTS)))
    exact(run.model), exact(run.ref_model)
    for part in batch.parts:
        part.ref_logprobs = run.components.models.reference_logprobs(part.rollouts)
    return run, batch


def our_update(run, batch) -> Step:
    kept = []
    hook = run.components.engine.optimizer.optimizer.register_step_pre_hook(lambda *_: kept.append(gradient(run.model)))
    metrics = run.update(batch) | batch.metrics | {"num_tokens": run.num_tokens}
    hook.remove()
    run.step += 1
    return Step(metrics["loss"], kept[0], metrics)


def completion_ids(batch) -> list[list[int]]:
    return [row["completion_ids"] for row in batch.completions]


class Twins:
    """Our trainer and TRL's, with the same policy, reference, rewards and completions.

    Args:
        parts, their_parts: micro-batches per optimizer step.
        trainer: "GRPO" or "RLOO".
        theirs: settings of TRL that replace the converted ones; with top_k, both use the same sampled tokens, and TRL
            scores them under the whole distribution.
    """

    def __init__(
        self, folder, preset="grpo", *, reward=by_text, parts=1, their_parts=1, trainer="GRPO", theirs=None, **changes
    ):
        self.run, self.batch = collected(folder / "ours", preset, reward=reward, parts=parts, **changes)
        self.rows = [
            {"prompt": prompt} for prompt in PROMPTS for _ in range(self.run.config.num_generations_per_prompt)
        ]
        settings = {
            "per_device_train_batch_size": len(self.rows) // their_parts, "gradient_accumulation_steps": their_parts,
            "output_dir": str(folder / "theirs"),
        } | (theirs or {})  # fmt: skip
        translate = to_trl if trainer == "GRPO" else to_rloo
        self.trl = trl_trainer(
            folder, reward, PROMPTS, translate(self.run.config.replace(top_k=0), **settings), trainer, exact
        )  # fmt: skip
        self.trl.current_gradient_accumulation_steps = self.trl.args.gradient_accumulation_steps
        ids = completion_ids(self.batch)
        self.trl._generate_single_turn = lambda *_: ids if trainer == "RLOO" else (ids, None)

    def advantages(self) -> tuple[Tensor, Tensor]:
        self.trl.model.train()
        theirs = self.trl._generate_and_score_completions(self.rows)["advantages"]
        return torch.tensor([row["advantage"] for row in self.batch.completions]), theirs

    def update(self) -> tuple[Step, Step]:
        """Do one optimizer step in both, from our weights. TRL's metrics are means over its micro-batches."""
        model = self.trl.model
        model.load_state_dict(self.run.model.state_dict())
        model.zero_grad()
        self.trl._metrics["train"].clear()
        loss = sum(
            self.trl.training_step(model, self.rows, None).item()
            for _ in range(self.trl.args.gradient_accumulation_steps)
        )
        metrics = {name: sum(values) / len(values) for name, values in self.trl._metrics["train"].items()}
        return our_update(self.run, self.batch), Step(loss, gradient(model), metrics)


def to_rloo(config, **changes):
    """Return our settings as a `trl.RLOOConfig`."""
    settings = {
        "num_generations": config.num_generations_per_prompt, "max_completion_length": config.max_new_tokens,
        "temperature": config.temperature, "num_iterations": config.num_iterations, "beta": config.kl_coef,
        "epsilon": config.clip_range, "epsilon_high": config.clip_range_high, "learning_rate": config.learning_rate,
    }  # fmt: skip
    machine = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none"}
    return trl.RLOOConfig(disable_dropout=True, **settings | machine | changes)


def trl_trainer(folder, reward, prompts, args, kind="GRPO", prepare=lambda model: model):
    """Return TRL's trainer with the policy `tiny_model()` and the reference `tiny_model(seed=7)`."""
    policy = prepare(tiny_model())
    tiny_model(seed=7).save_pretrained(folder / "reference")
    policy.config.name_or_path = str(folder / "reference")  # TRL loads its reference from here
    made = getattr(trl, f"{kind}Trainer")(
        policy, reward, args, datasets.Dataset.from_dict({"prompt": prompts}), processing_class=make_tokenizer()
    )
    prepare(made.ref_model)
    return made


# --- what agrees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", RECIPES)
def test_a_preset_is_the_recipe_that_trl_gives(preset):
    config = GRPOConfig.preset(preset, top_k=0, top_p=1.0, device="cpu")
    assert RECIPES[preset].items() <= vars(to_trl(config)).items()


REWARDS = [
    [1.0, 0.0, 0.0, 1.0] + [0.7] * 4 + [0.1, None, -0.4, 3.0] + [None, None, None, 2.0],
    [0.5, 0.25, None, 2.0] + [0.3] * 4 + [None, None, 1.0, 1.5] + [None] * 4,
]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("number", [1, 2])
def test_advantages_agree_with_groups_that_are_dead_and_completions_that_were_not_scored(tmp_path, scale, number):
    weights = {"reward_weights": (1.0, 0.3)} if number == 2 else {}
    ours, theirs = Twins(tmp_path, reward=fixed(*REWARDS[:number]), scale_rewards=scale, **weights).advantages()
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.count_nonzero() == 7  # 4 + 0 + 3 + 0: of the last group only one completion was scored


CASES = [(preset, {"kl_coef": kl}) for preset in RECIPES for kl in (0.0, KL)] + [
    ("grpo", {"clip_range": 0.1, "clip_range_high": 0.5, "scale_rewards": "batch"}),
    ("grpo", {"importance": "sequence", "clip_range": 0.05, "kl_coef": KL}),
    ("dapo", {"importance": "sequence", "clip_range": 0.05, "clip_range_high": 0.1}),
    ("cispo", {"importance": "sequence", "clip_range_high": 0.05, "learning_rate": 1e-3, "kl_coef": KL}),
]
SHARED = {
    "reward", "rewards/by_text/mean", "frac_reward_zero_std", "entropy", "num_tokens",
    "completions/mean_length", "completions/min_length", "completions/max_length",
}  # fmt: skip
CLIPPED = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}


@pytest.mark.parametrize(
    ("preset", "changes", "parts", "their_parts"),
    [(*case, *parts) for case in CASES for parts in ((1, 1), (4, 1), (1, 2))],
    ids=str,
)
def test_loss_gradient_and_metrics_agree_at_every_update_of_a_rollout(tmp_path, preset, changes, parts, their_parts):
    theirs = {"loss_type": "bnpo"} if preset == "bnpo" and their_parts == 1 else {}  # to_trl converts it to dapo
    twins = Twins(tmp_path, preset, parts=parts, their_parts=their_parts, theirs=theirs, **changes)
    config = twins.run.config
    per_update = {"entropy"} | ({"kl"} if config.kl_coef else set())
    if config.surrogate == "clip" and config.importance == "token":
        per_update |= CLIPPED
    for names in (SHARED | per_update, per_update, per_update):
        ours, theirs = twins.update()
        assert same(ours, theirs)
        assert ours.metrics["grad_norm"] == pytest.approx(theirs.gradient.norm().item(), rel=1e-6)
        if their_parts == 1:
            for name in names:
                assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-6, abs=1e-6), name
    assert 0 < ours.metrics["clip_ratio/region_mean"] < 1  # so that later updates test clipping
    assert len(set(map(len, completion_ids(twins.batch)))) > 5


@pytest.mark.parametrize("preset", ["grpo", "dapo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("correction", ["sequence", "token"])
def test_what_vllm_sampled_is_weighed_alike(tmp_path, correction, preset):
    settings = {"sampler": "vllm", "sampler_correction": correction, "sampler_ratio_cap": 1.1, "kl_coef": 0.0}
    tiny_model().save_pretrained(tmp_path / "served")
    with vllm_stand_in.serve(tmp_path / "served", noise=0.1) as server:
        twins = Twins(tmp_path, preset, theirs={"use_vllm": False}, vllm_server=server.url, **settings)
    twins.trl.use_vllm = True  # as if its own vLLM had sampled them
    ids, sampled = completion_ids(twins.batch), {}
    for part in twins.batch.parts:
        lists = part.rollouts.logprobs.tolist()
        sampled |= {row: lists[i][: len(ids[row])] for i, row in enumerate(part.rows.tolist())}
    twins.trl._generate_single_turn = lambda *_: (ids, [sampled[row] for row in range(len(ids))])
    ours, theirs = twins.update()
    assert same(ours, theirs)
    sampling = {name for name in theirs.metrics if name.startswith("sampling/")}
    assert len(sampling) == 5
    assert {name: ours.metrics[name] for name in sampling} == pytest.approx(
        {name: theirs.metrics[name] for name in sampling}, rel=1e-6
    )
    assert ours.metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1.1)
    assert ours.metrics["sampling/importance_sampling_ratio/min"] < 0.95
    assert same(*twins.update())


def test_a_whole_run_in_float32_ends_with_the_same_weights(tmp_path):
    """Two rollouts of two updates of two micro-batches; AdamW, gradient clipping, warmup and schedule as well."""
    common = {"learning_rate": 1e-3, "num_iterations": 2, "max_steps": 4, "warmup_steps": 1, "max_grad_norm": 1.0}
    config = GRPOConfig(
        **SETTINGS | common | {"batch_size": 1, "gradient_accumulation_steps": 2, "lr_scheduler": "linear"},
        output_dir=str(tmp_path / "ours"),
    )
    run = GRPOTrainer(
        tiny_model(), tiny_model(seed=7), by_text, make_tokenizer(), config, SimplePromptDataset(PROMPTS)
    )  # fmt: skip
    collect, batches = run.collect, []
    run.collect = lambda indices: batches.append(collect(indices)) or batches[-1]
    records = [record.metrics for record in run.steps()]

    prompts = [row["prompt"] for batch in batches for row in batch.completions[:: config.num_generations_per_prompt]]
    args = to_trl(
        config, shuffle_dataset=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
        output_dir=str(tmp_path / "theirs"),
    )  # fmt: skip
    theirs = trl_trainer(tmp_path, by_text, prompts, args)
    ids = iter([completion_ids(batch) for batch in batches])
    theirs._generate_single_turn = lambda *_: (next(ids), None)
    theirs.train()

    for ours, logged in zip(records, theirs.state.log_history[:-1], strict=True):  # the last is a summary
        shared = {"loss", "grad_norm", "learning_rate", "reward", "num_tokens"} & logged.keys()  # some only per rollout
        assert {name: ours[name] for name in shared} == pytest.approx({name: logged[name] for name in shared}, rel=1e-5)
    start, ours, theirs = (
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (tiny_model(), run.model, theirs.model)
    )
    assert (theirs - start).abs().max() > 1e-3
    # not all: one weight of 20,064 has a first gradient of 2e-8, a rounding error, which AdamW normalises to 1
    assert ((ours - theirs).abs() < 1e-6).float().mean() > 0.999


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in TASKS])  # a task's is grpo in another size
def test_micro_batches_change_neither_loss_nor_gradient(tmp_path, preset):
    changes = {"kl_coef": 0.0} if preset == "rloo" else {}  # a KL in the reward is the sampler's, in float32
    whole, *split = [collected(tmp_path, preset, parts=parts, **changes) for parts in (1, 2, 4)]
    for _ in range(2):
        expected = our_update(*whole)
        assert all(same(our_update(*some), expected, to=1e-12) for some in split)


# --- what differs on purpose ------------------------------------------------------------------------------


def test_trl_multiplies_the_kl_by_the_ratio_unless_told_not_to(tmp_path):
    twins = Twins(tmp_path, theirs={"use_bias_correction_kl": True})
    ours, theirs = twins.update()
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)  # the ratio is 1, but its gradient is not 0
    assert distance(ours.gradient, theirs.gradient) > 0.1

    (part,), model = twins.batch.parts, twins.run.model
    r, mask = part.rollouts, part.rollouts.completion_mask
    logprobs = completion_logprobs(model, r.input_ids, r.attention_mask, r.num_tokens, temperature=0.8)
    ratio = importance_ratio(logprobs, part.old_logprobs, mask)
    extra = KL * aggregate(kl_estimate(logprobs, part.ref_logprobs, mask) * (ratio - 1), mask)
    extra_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(extra, list(model.parameters()))])
    ours, theirs = twins.update()
    assert not same(ours, theirs)
    assert same(Step(ours.loss + extra.item(), ours.gradient + extra_gradient, {}), theirs)


def test_the_cap_of_cispo_is_one_plus_clip_range_high_here_and_epsilon_high_in_trl(tmp_path):
    ours, theirs = Twins(tmp_path, "cispo", clip_range_high=0.3, theirs={"epsilon_high": 0.3}).update()
    assert distance(0.3 * ours.gradient, theirs.gradient) < 1e-6  # min(1, 0.3) where ours has min(1, 1.3)


def test_bnpo_of_trl_depends_on_the_micro_batches(tmp_path):
    ours, theirs = Twins(tmp_path, "bnpo", parts=2, their_parts=2, theirs=UNEVEN | {"loss_type": "bnpo"}).update()
    assert distance(ours.gradient, theirs.gradient) > 0.01
    _, whole = Twins(tmp_path, "bnpo", theirs={"loss_type": "bnpo"}).update()
    assert same(ours, whole)


def test_dapo_of_trl_divides_each_of_several_updates_by_their_mean_number_of_tokens(tmp_path):
    """TRL may cut one generation into several optimizer steps; here every step uses the whole rollout."""
    twins = Twins(tmp_path, "dapo", theirs={"per_device_train_batch_size": 8, "steps_per_generation": 2})
    loss = sum(twins.trl.training_step(twins.trl.model, twins.rows, None).item() for _ in range(2))
    assert same(our_update(twins.run, twins.batch), Step(loss / 2, gradient(twins.trl.model) / 2, {}))


def test_trl_scores_truncated_samples_under_the_whole_distribution(tmp_path):
    ours, theirs = Twins(tmp_path, top_k=3, kl_coef=0.0, theirs={"top_k": 3}).update()
    assert distance(ours.gradient, theirs.gradient) > 0.1
    twins = Twins(tmp_path, top_k=3, kl_coef=0.0, theirs={"top_k": 3})
    twins.batch.parts[0].rollouts.kept = None
    with pytest.warns(UserWarning, match="ratio should be 1"):
        assert same(*twins.update())


def test_trl_lets_padding_count_as_positions(tmp_path):
    """Rotary embeddings depend on differences of positions; learned positions of a padded prompt are shifted."""
    from trl.trainer.utils import add_fused_lm_head

    twins, model = Twins(tmp_path), tiny_architecture("gpt2")
    r = twins.batch.parts[0].rollouts
    ours = completion_logprobs(model, r.input_ids, r.attention_mask, r.num_tokens)
    add_fused_lm_head(model)
    theirs, *_ = twins.trl._get_per_token_logps_and_entropies(model, r.input_ids, r.attention_mask, r.num_tokens)
    off = (ours - theirs).where(r.completion_mask, 0.0).abs().amax(1)
    padded = r.attention_mask[:, 0] == 0
    assert off[~padded].max() < 1e-5
    assert off[padded].min() > 0.01


def test_rloo_agrees_on_policy_and_weighs_the_later_updates_by_another_ratio(tmp_path):
    """RLOOTrainer's ratio is that of the whole completion; ours is its geometric mean over the tokens."""
    twins = Twins(tmp_path, "rloo", trainer="RLOO")
    # the KL is in the reward of both: here from the log-probabilities of the sampler, which are float32
    assert_close(*twins.advantages(), rtol=1e-6, atol=5e-6)
    advantages, lengths = twins.batch.parts[0].advantages, torch.tensor([len(i) for i in completion_ids(twins.batch)])
    ours, theirs = twins.update()
    assert distance(ours.gradient, theirs.gradient) < 1e-6
    for name in ("kl", "entropy", "reward"):
        assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-6)
    assert theirs.loss == pytest.approx(-advantages.mean().item(), abs=1e-6)
    assert ours.loss == pytest.approx(-(lengths * advantages).mean().item(), abs=1e-6)  # a sum over tokens

    whole = whole_ratio(twins)
    ours, theirs = twins.update()
    assert distance(ours.gradient, theirs.gradient) > 0.1
    clipped = torch.minimum(whole * advantages, whole.clamp(0.8, 1.2) * advantages)
    assert theirs.loss == pytest.approx(-clipped.mean().item(), rel=1e-5)


def whole_ratio(twins) -> Tensor:
    """Return [B] the probability ratio of each whole completion: our ratio to the power of its length."""
    (part,) = twins.batch.parts
    r = part.rollouts
    now = completion_logprobs(twins.run.model, r.input_ids, r.attention_mask, r.num_tokens, temperature=0.8)
    ratio = importance_ratio(now.detach(), part.old_logprobs, r.completion_mask, "sequence")
    return ratio.squeeze(1) ** r.completion_mask.sum(1)


def test_equal_rewards_are_exactly_zero_here_and_a_rounding_error_in_trl(tmp_path):
    """(0.9 + 0.9 + 0.9) / 3 is not 0.9, and dividing by a std of almost 0 makes the rounding error large."""
    ours, theirs = Twins(tmp_path, reward=fixed([0.9] * 12), num_generations_per_prompt=3).advantages()
    assert ours.count_nonzero() == 0
    assert 1e-5 < theirs.abs().max() < 1e-2


# --- metrics that carry TRL's names and mean something else -----------------------------------------------


def test_reward_std_is_within_groups_here_and_over_the_batch_in_trl(tmp_path):
    twins = Twins(tmp_path)
    ours, theirs = twins.update()
    rewards = torch.tensor([row["reward"] for row in twins.batch.completions]).view(4, 4)
    assert ours.metrics["reward_std"] == pytest.approx(rewards.std(1).mean().item())
    assert theirs.metrics["reward_std"] == pytest.approx(rewards.std().item())
    assert ours.metrics["reward_std"] != pytest.approx(theirs.metrics["reward_std"], rel=0.01)


def test_a_dead_group_is_counted_whatever_scales_the_advantage_and_so_is_one_with_a_single_score(tmp_path):
    found = []
    for last, scale in (([1.0, 2.0, 3.0, None], "group"), (REWARDS[0][12:], "group"), (REWARDS[0][12:], "batch")):
        rewards = fixed(REWARDS[0][:12] + last)
        ours, theirs = (s.metrics for s in Twins(tmp_path, reward=rewards, scale_rewards=scale, kl_coef=0.0).update())
        found.append((ours["frac_reward_zero_std"], theirs["frac_reward_zero_std"]))
        assert ours["reward"] == ours["rewards/column_0/mean"] == pytest.approx(theirs["reward"], rel=1e-6)
    # the second of four groups is constant; of a single score TRL knows no std; its batch has one std for all
    assert found == [(0.25, 0.25), (0.5, 0.25), (0.5, 0.0)]


def test_a_completion_cut_off_after_a_padding_token_has_ended_for_trl(tmp_path):
    twins = Twins(tmp_path)
    ours, theirs = twins.update()
    last = [ids[-1] for ids in completion_ids(twins.batch)]  # 0 pads, 1 ends; a random model samples both
    assert 0 in last
    assert ours.metrics["completions/clipped_ratio"] == sum(i != 1 for i in last) / 16
    assert theirs.metrics["completions/clipped_ratio"] == sum(i not in (0, 1) for i in last) / 16


def test_sequence_clip_ratios_are_shares_of_tokens_here_and_of_completions_in_trl(tmp_path):
    twins = Twins(tmp_path, "gspo")
    twins.update()
    ours, theirs = (step.metrics["clip_ratio/region_mean"] for step in twins.update())
    tokens = sum(map(len, completion_ids(twins.batch)))
    assert ours * tokens == pytest.approx(round(ours * tokens))
    assert theirs * 16 == round(theirs * 16)
    assert ours != pytest.approx(theirs, rel=0.01)


def test_the_share_of_capped_tokens_of_cispo_counts_both_signs_here_and_positive_advantages_in_trl(tmp_path):
    twins = Twins(tmp_path, "cispo", clip_range_high=0.3)
    twins.update()
    ours, theirs = twins.update()
    assert ours.metrics["clip_ratio/high_mean"] > theirs.metrics["cispo_clip_ratio"] > 0


def test_metrics_of_trl_are_means_over_micro_batches(tmp_path):
    ours, theirs = Twins(tmp_path, their_parts=2, theirs=UNEVEN).update()
    _, whole = Twins(tmp_path).update()
    assert ours.metrics["entropy"] == pytest.approx(whole.metrics["entropy"], rel=1e-6)
    assert ours.metrics["entropy"] != pytest.approx(theirs.metrics["entropy"], rel=1e-4)
