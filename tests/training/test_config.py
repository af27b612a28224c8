"""Settings: the seed's names and defaults, and nothing impossible gets past the constructor."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from grpo_lab.training.config import _RANGES, PRESETS, GRPOConfig, field_types

DEFAULTS = {field.name: field.default for field in fields(GRPOConfig)}

# The "Configuration Parameters" of the document that the project starts from.
SEED = {
    "num_generations_per_prompt": (int, 4),
    "max_new_tokens": (int, 256),
    "temperature": (float, 0.7),
    "top_k": (int, 50),
    "top_p": (float, 0.9),
    "learning_rate": (float, 1e-6),
    "batch_size": (int, 4),
    "num_epochs": (int, 3),
    "gradient_accumulation_steps": (int, 4),
    "max_grad_norm": (float, 1.0),
    "warmup_steps": (int, 100),
    "kl_coef": (float, 0.1),
    "clip_range": (float, 0.2),
    "gamma": (float, 1.0),
    "logging_steps": (int, 10),
    "save_steps": (int, 500),
    "output_dir": (str, "./grpo_checkpoints"),
    "use_wandb": (bool, False),
    "wandb_project": (str, DEFAULTS["wandb_project"]),  # the document gives no defaults for these two
    "wandb_run_name": (type(None), None),
}


@pytest.mark.parametrize("name", SEED)
def test_names_types_and_defaults_are_those_of_the_seed(name):
    kind, default = SEED[name]
    assert getattr(GRPOConfig(), name) == default
    assert type(getattr(GRPOConfig(), name)) is kind


def test_the_defaults_pass_their_own_checks_unchanged():
    assert {name: getattr(GRPOConfig(), name) for name in DEFAULTS} == DEFAULTS
    assert all(type(getattr(GRPOConfig(), name)) is type(value) for name, value in DEFAULTS.items())


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_generations_per_prompt", 1, "at least 2, got 1: one completion has no group"),
        ("max_new_tokens", 0, "at least 1, got 0"),
        ("temperature", 0.0, "greater than 0 and at most 100, got 0.0"),
        ("temperature", -1, "greater than 0 and at most 100, got -1.0"),
        ("top_k", -1, "at least 0, got -1"),
        ("top_p", 0.0, "greater than 0 and at most 1, got 0.0"),
        ("top_p", 1.01, "greater than 0 and at most 1, got 1.01"),
        ("vllm_gpu_memory", 0.0, "greater than 0 and at most 1"),
        ("sampler_ratio_cap", 0.9, "at least 1, got 0.9"),
        ("learning_rate", 0.0, "greater than 0"),
        ("learning_rate", math.nan, "greater than 0 and at most 10, got nan"),
        ("learning_rate", math.inf, "at most 10, got inf"),
        ("batch_size", 0, "at least 1"),
        ("num_epochs", 0, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("max_grad_norm", 0.0, "greater than 0"),
        ("max_grad_norm", math.nan, "greater than 0"),
        ("warmup_steps", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_steps", 0, "at least 1"),
        ("num_iterations", 0, "at least 1 and at most 1000"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most"),
        ("kl_coef", -0.1, "at least 0"),
        ("clip_range", 0.0, "greater than 0 and at most 1"),
        ("clip_range", 1.5, "greater than 0 and at most 1"),
        ("clip_range_high", 0.0, "greater than 0"),
        ("gamma", 0.0, "greater than 0 and at most 1"),
        ("gamma", 1.1, "greater than 0 and at most 1"),
        ("std_eps", 0.0, "greater than 0"),
        ("aggregation_constant", 0.0, "greater than 0"),
        ("reward_timeout", 0.0, "greater than 0"),
        ("logging_steps", 0, "at least 1"),
        ("save_steps", 0, "at least 1"),
        ("save_total_limit", 0, "at least 1"),
        ("eval_steps", 0, "at least 1"),
        ("success_reward", math.nan, "at least -1e"),
        ("max_skipped_steps", 0, "at least 1"),
        ("lora_rank", 0, "at least 1"),
        ("lora_alpha", 0.0, "greater than 0"),
        ("reward_weights", (1.0, math.inf), r"finite numbers, got \(1.0, inf\)"),
        ("reward_weights", ("much",), "finite numbers"),
        ("aggregation", "mean", "one of 'sequence-mean', 'token-mean', 'constant', got 'mean'"),
        ("lr_scheduler", "steps", "one of 'linear', 'cosine'"),
        ("precision", None, "one of 'auto', 'fp32', 'bf16', 'fp16', got None"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(name, value, message):
    with pytest.raises(ValueError, match=f"^{name} must be .*{message}"):
        GRPOConfig(**{name: value})


def test_every_range_is_tested_above():
    mark = next(m for m in test_a_value_out_of_range_is_named_with_its_range.pytestmark if m.name == "parametrize")
    assert _RANGES.keys() <= {name for name, _, _ in mark.args[1]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0), ("top_p", 1.0), ("kl_coef", 0.0), ("gamma", 1.0), ("warmup_steps", 0), ("weight_decay", 0.0),
        ("max_grad_norm", math.inf), ("clip_range", 1.0), ("num_generations_per_prompt", 2), ("success_reward", -1.0),
        ("save_total_limit", None), ("clip_range_high", 5.0), ("seed", 2**32 - 1), ("reward_weights", (-1.0, 0.0)),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(name, value):
    assert getattr(GRPOConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_value_of_another_type_is_named_with_its_type(name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be .*got <object"):
        GRPOConfig(**{name: object()})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", 4.0, "int, got 4.0"),
        ("batch_size", "4", "int, got '4'"),
        ("batch_size", True, "int, got True"),  # bool is a subclass of int
        ("learning_rate", "1e-6", "float, got '1e-6'"),
        ("learning_rate", True, "float, got True"),
        ("learning_rate", None, "float, got None"),
        ("use_wandb", 1, "bool, got 1"),
        ("max_steps", 2.5, "int or None, got 2.5"),
        ("output_dir", None, "str, got None"),
        ("report_to", "tensorboard", "tuple, got 'tensorboard'"),
        ("reward_weights", 1.0, "tuple or None, got 1.0"),
    ],
)
def test_types_are_not_guessed(name, value, message):
    with pytest.raises(TypeError, match=f"^{name} must be {message}"):
        GRPOConfig(**{name: value})


def test_an_int_will_do_for_a_float_and_a_list_for_a_tuple():
    config = GRPOConfig(kl_coef=0, reward_weights=[1, 2], report_to=["tensorboard"])
    assert (type(config.kl_coef), config.reward_weights, config.report_to) == (float, (1, 2), ("tensorboard",))


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"baseline": "none"}, 'needs scale_rewards "none"'),
        ({"aggregation_constant": 10.0}, "aggregation_constant needs aggregation \"constant\", not 'sequence-mean'"),
        ({"kl_in": "reward"}, "got 'k3'. Set kl_estimator \"k1\" too"),
    ],
)
def test_what_does_not_go_together_says_how_to_mend_it(settings, cure):
    with pytest.raises(ValueError, match=cure):
        GRPOConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "none", "scale_rewards": "none"},
        {"aggregation": "constant", "aggregation_constant": 10.0},
        {"kl_in": "reward", "kl_estimator": "k1"},
        {"kl_estimator": "k1"},
    ],
)
def test_and_the_cure_works(settings):
    assert GRPOConfig(**settings).to_dict().items() >= settings.items()


def test_settings_do_not_change_under_a_run_but_can_be_copied_with_changes():
    config = GRPOConfig()
    with pytest.raises(FrozenInstanceError):
        config.kl_coef = 0.0
    with pytest.raises(TypeError):  # by name only: positions would be guesswork
        GRPOConfig(4)
    with pytest.raises(TypeError, match="learning_rat"):
        GRPOConfig(learning_rat=1e-6)
    assert config.replace(kl_coef=0.5) == GRPOConfig(kl_coef=0.5) != config
    with pytest.raises(ValueError, match=r"^kl_coef must be"):
        config.replace(kl_coef=-1.0)


# --- what is made of them -------------------------------------------------------------------------------

WHOLE_COMPLETION = {"aggregation": "constant", "aggregation_constant": 1.0, "scale_rewards": "none"}


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("grpo", {}),
        ("dr_grpo", {"scale_rewards": "none", "aggregation": "constant", "kl_coef": 0.0}),
        ("dapo", {"aggregation": "token-mean", "clip_range_high": 0.28, "kl_coef": 0.0}),
        ("bnpo", {"aggregation": "token-mean"}),
        ("gspo", {"importance": "sequence", "clip_range": 3e-4, "clip_range_high": 4e-4, "kl_coef": 0.0}),
        ("cispo", {"surrogate": "cispo", "clip_range_high": 4.0, "aggregation": "token-mean", "kl_coef": 0.0}),
        (
            "rloo",
            WHOLE_COMPLETION
            | {"baseline": "leave-one-out", "kl_in": "reward", "kl_estimator": "k1", "importance": "sequence"},
        ),
        ("reinforce", WHOLE_COMPLETION | {"baseline": "none", "kl_coef": 0.0}),
    ],
)
def test_a_preset_differs_from_grpo_as_its_paper_says_and_in_nothing_else(name, differences):
    preset = GRPOConfig.preset(name).to_dict()
    assert {k: v for k, v in preset.items() if v != GRPOConfig().to_dict()[k]} == differences
    assert GRPOConfig.preset(name, seed=7) == GRPOConfig(**PRESETS[name], seed=7)


def test_a_preset_can_be_changed_and_an_unknown_one_lists_those_there_are():
    assert GRPOConfig.preset("dapo", kl_coef=0.05).kl_coef == 0.05
    with pytest.raises(ValueError, match=r"no preset 'ppo'\. Presets: grpo, dr_grpo, dapo, bnpo, gspo, cispo, rloo"):
        GRPOConfig.preset("ppo")


def test_derived_sizes():
    config = GRPOConfig(batch_size=3, gradient_accumulation_steps=5, num_generations_per_prompt=7)
    assert config.prompts_per_step == 15


@pytest.mark.parametrize(
    ("use_wandb", "report_to", "trackers"),
    [
        (False, [], ()),
        (True, [], ("wandb",)),
        (True, ["wandb", "aim"], ("wandb", "aim")),
        (False, ["wandb"], ("wandb",)),
    ],
)
def test_nothing_is_reported_twice_and_nothing_unless_asked(use_wandb, report_to, trackers):
    assert GRPOConfig(use_wandb=use_wandb, report_to=report_to).trackers == trackers


def test_every_field_has_a_docstring_that_is_a_sentence():
    docs = GRPOConfig.docs()
    assert list(docs) == list(DEFAULTS)
    assert all(len(text) > 10 and text[0].isupper() and text[-1] in ".…" for text in docs.values())
    assert docs["batch_size"].startswith("Prompts per micro-batch")
    assert docs["num_generations_per_prompt"].startswith("Completions per prompt (K)")


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_json(preset):
    config = GRPOConfig.preset(preset, reward_weights=(1.0, 2.0), report_to=("tensorboard",), max_steps=5)
    plain = config.to_dict()
    assert list(plain) == list(DEFAULTS)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert GRPOConfig(**plain) == config


def test_field_types_for_the_command_line():
    types = field_types()
    assert types["batch_size"] == ((int,), ())
    assert types["use_wandb"] == ((bool,), ())
    assert types["max_steps"] == ((int, type(None)), ())
    assert types["kl_in"] == ((str,), ("loss", "reward"))
    assert types["reward_weights"] == ((tuple, type(None)), ())
    assert types["report_to"] == ((tuple,), ())
