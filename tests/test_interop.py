"""Which settings are converted for TRL, which are refused, and that none is missing; test_trl.py compares numbers."""

import math
import re
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import CHAT, TEMPLATE, starting_tokenizer, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from grpo_lab import CausalLMReward, GRPOConfig, SimplePromptDataset, interop
from grpo_lab.interop import ELSEWHERE, NAMES, to_trl, to_trl_reward
from grpo_lab.rewards.reward_models import Rewards
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training.config import PRESETS, field_types

trl = pytest.importorskip("trl", minversion="1.16")

# TRL uses the old name of this property of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAGE = (Path(__file__).parents[1] / "docs" / "MOVING_ON.md").read_text(encoding="utf-8")
BASE = GRPOConfig(top_k=0, top_p=1.0, device="cpu", precision="fp32", aggregation="token-mean")


# --- settings ---------------------------------------------------------------------------------------------

# another value of each field, with other fields that it needs; `another` makes up the rest
ANOTHER = {
    "top_p": {"top_p": 0.9}, "gamma": {"gamma": 0.9}, "clip_range": {"clip_range": 0.1},
    "clip_range_high": {"clip_range_high": 0.28}, "max_steps": {"max_steps": 7}, "lora_rank": {"lora_rank": 4},
    "kl_in": {"kl_in": "reward", "kl_estimator": "k1"}, "reward_weights": {"reward_weights": (1.0, 0.5)},
    "aggregation_constant": {"aggregation": "constant", "aggregation_constant": 1.0},
    "reward_timeout": {"reward_timeout": 5.0}, "save_total_limit": {"save_total_limit": 2},
    "eval_steps": {"eval_steps": 5}, "report_to": {"report_to": ("tensorboard",)}, "precision": {"precision": "bf16"},
    "device": {"device": "cuda"}, "vllm_gpu_memory": {"vllm_gpu_memory": 0.5},
    "vllm_server": {"vllm_server": "http://localhost:8000", "sampler": "vllm", "kl_coef": 0.0},
}  # fmt: skip


def another(name):
    value, words = getattr(BASE, name), field_types()[name][1]
    if name in ANOTHER:
        return ANOTHER[name]
    if isinstance(value, bool):
        return {name: not value}
    if isinstance(value, int | float):
        return {name: value + 1}
    return {name: next((word for word in words if word != value), "another")}


@pytest.mark.parametrize("name", [field.name for field in fields(GRPOConfig)])
def test_every_setting_is_translated_or_refused_or_listed_as_meaning_nothing_there(monkeypatch, name):
    monkeypatch.setattr(interop, "resolve_device", {"cpu": "cpu", "cuda": "cuda"}.get)  # as if a GPU were available
    changed = BASE.replace(**another(name))
    try:
        said = to_trl(changed).to_dict() != to_trl(BASE).to_dict()
    except ValueError as error:
        said = f"\n- {name}={getattr(changed, name)!r}: " in str(error)
    assert said == (name not in ELSEWHERE)


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_what_has_a_name_there_has_the_same_value(ours, theirs):
    changed = BASE if ours in ("top_k", "top_p") else BASE.replace(**another(ours))
    assert getattr(to_trl(changed), theirs) == getattr(changed, ours)


# settings, the name in the error, and the cure in the error
REFUSED = [
    ({"top_k": 50}, "top_k", {"top_k": 0}),
    ({"top_p": 0.9}, "top_p", {"top_p": 1.0}),
    ({"keep_special_tokens": True}, "keep_special_tokens", {"keep_special_tokens": False}),
    ({"gamma": 0.99}, "gamma", {"gamma": 1.0}),
    ({"baseline": "leave-one-out"}, "baseline", {"baseline": "mean"}),
    ({"baseline": "none", "scale_rewards": "none"}, "baseline", {"baseline": "mean"}),
    ({"std_eps": 1e-6}, "std_eps", {"std_eps": 1e-4}),
    ({"std_eps": 1e-6, "scale_rewards": "batch"}, "std_eps", {"std_eps": 1e-4}),
    ({"kl_in": "reward", "kl_estimator": "k1"}, "kl_in", {"kl_in": "loss", "kl_estimator": "k3"}),
    ({"kl_estimator": "k2"}, "kl_estimator", {"kl_estimator": "k3"}),
    ({"surrogate": "cispo", "aggregation": "sequence-mean"}, "aggregation", {"aggregation": "token-mean"}),
    ({"surrogate": "cispo", "aggregation": "constant"}, "aggregation", {"aggregation": "token-mean"}),
    (
        {"aggregation": "constant", "aggregation_constant": 100.0},
        "aggregation_constant",
        {"aggregation_constant": None},
    ),
    ({"sampler": "vllm"}, "sampler", {"kl_coef": 0.0}),
    ({"lora_rank": 16}, "lora_rank", {"lora_rank": None}),
    ({"reward_timeout": 60.0}, "reward_timeout", {"reward_timeout": None}),
]


@pytest.mark.parametrize(("settings", "name", "advice"), REFUSED, ids=str)
def test_what_trl_computes_otherwise_is_refused_by_name_with_an_advice_that_helps(settings, name, advice):
    config = BASE.replace(**settings)
    with pytest.raises(ValueError, match=re.escape(f"settings.\n- {name}=")) as caught:
        to_trl(config)
    assert str(caught.value).count("\n- ") == 1
    for key, value in advice.items():
        words = f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
        assert ("Leave it out" if value is None else words) in str(caught.value)
    to_trl(config.replace(**advice))


def test_every_refusal_is_named_at_once():
    with pytest.raises(
        ValueError, match=r"(?s)- top_k=50: .*\n- top_p=0\.9: .*\n- gamma=0\.9: .*\n- lora_rank=8: "
    ) as e:
        to_trl(GRPOConfig(gamma=0.9, lora_rank=8, lora_alpha=16))
    assert "LoraConfig(r=8, lora_alpha=16.0, target_modules='all-linear')" in str(e.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"std_eps": 1e-6, "scale_rewards": "none"},
        {"kl_coef": 0.0, "kl_estimator": "k2"},
        {"kl_coef": 0.0, "kl_estimator": "k1", "kl_in": "reward"},
        {"aggregation": "constant", "aggregation_constant": 256.0},
    ],
    ids=str,
)
def test_a_setting_that_does_not_act_is_not_refused(settings):
    to_trl(BASE.replace(**settings))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_that_subtract_the_mean_move_on_and_the_others_say_why_not(preset):
    config = GRPOConfig.preset(preset, top_k=0, top_p=1.0, device="cpu")
    if config.baseline == "mean":
        assert to_trl(config).beta == config.kl_coef
    else:
        with pytest.raises(ValueError, match=r"- baseline="):
            to_trl(config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"aggregation": "sequence-mean"}, ("grpo", 0.2)),
        ({"aggregation": "constant", "clip_range_high": 0.3}, ("dr_grpo", 0.3)),
        ({"aggregation": "token-mean", "clip_range": 0.1}, ("dapo", 0.1)),
        ({"surrogate": "cispo", "clip_range_high": 4.0}, ("cispo", 5.0)),
        ({"surrogate": "cispo", "clip_range": 0.1}, ("cispo", 1.1)),
    ],
    ids=str,
)
def test_the_loss_has_another_name_and_the_cap_of_cispo_is_measured_from_0(settings, expected):
    args = to_trl(BASE.replace(**settings))
    assert (args.loss_type, args.epsilon_high) == expected
    assert not args.use_bias_correction_kl


def test_a_step_has_as_many_completions():
    args = to_trl(BASE.replace(batch_size=3, num_generations_per_prompt=5, gradient_accumulation_steps=2))
    assert (args.per_device_train_batch_size, args.generation_batch_size) == (15, 30)


def test_off_is_off_in_the_words_of_trl():
    args = to_trl(BASE.replace(max_grad_norm=float("inf")))
    assert (args.max_grad_norm, args.max_steps, args.report_to) == (0.0, -1, [])
    assert (args.top_k, args.top_p, args.eval_strategy) == (0, 1.0, "no")
    assert not args.gradient_checkpointing  # TRL's default is True


def test_the_optimizer_is_ours():
    args = to_trl(BASE)
    ours = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (*ours["betas"], ours["eps"])
    assert args.optim in ("adamw_torch", "adamw_torch_fused")


def test_what_only_trl_has_is_off():
    args = to_trl(BASE)
    off = {
        "mask_truncated_completions": False, "delta": None, "entropy_coef": 0.0, "use_adaptive_entropy": False,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "sync_ref_model": False, "min_p": None,
        "repetition_penalty": 1.0, "multi_objective_aggregation": "sum_then_normalize", "use_vllm": False,
        "generation_kwargs": None, "neftune_noise_alpha": None, "label_smoothing_factor": 0.0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in off} == off


def test_changes_are_taken_as_they_are_under_the_names_of_trl():
    args = to_trl(BASE, top_k=50, learning_rate=0.5, use_bias_correction_kl=True)
    assert (args.top_k, args.learning_rate, args.use_bias_correction_kl) == (50, 0.5, True)
    with pytest.raises(TypeError, match="kl_coef"):
        to_trl(BASE, kl_coef=0.1)


def test_the_8_bit_optimizer_is_that_of_the_same_package_there():
    assert to_trl(BASE.replace(optimizer="adamw_8bit")).optim == "adamw_bnb_8bit"
    assert "adamw_torch" in to_trl(BASE).optim  # "adamw_torch_fused" where that is the default


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_has_the_precision_of_our_trainer(monkeypatch, precision):
    seen = {}
    monkeypatch.setattr(interop, "resolve_device", lambda name: "cuda")
    monkeypatch.setattr(trl, "GRPOConfig", lambda **settings: seen.update(settings))
    to_trl(BASE.replace(precision=precision))
    assert (seen["use_cpu"], seen["bf16"], seen["fp16"]) == (False, precision == "bf16", precision == "fp16")


def test_an_older_transformers_gets_the_older_name_of_checkpointing(monkeypatch):
    seen = {}
    monkeypatch.setattr(trl, "GRPOConfig", lambda **settings: seen.update(settings))
    to_trl(BASE.replace(gradient_checkpointing=True))
    assert seen["gradient_checkpointing"] is True
    assert "activation_checkpointing" not in seen


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install trl"):
        to_trl(BASE)


# --- rewards ----------------------------------------------------------------------------------------------

# what TRL passes besides prompts, completions and columns
EXTRAS = {"completion_ids": [[3], [4]], "trainer_state": object(), "log_extra": print, "log_metric": print}


def said(*texts):
    """Return completions as TRL passes those of chats."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def length(prompts, completions, answer):
    return [None if a is None else len(c) + len(a) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize("completions", [["12", "345"], said("12", "345")], ids=["text", "chat"])
def test_a_reward_gets_texts_and_the_columns_it_names(completions):
    columns = {"answer": ["7", None], "source": ["a", "b"]}
    values = to_trl_reward(length)(prompts=["1+1=", "2+2="], completions=completions, **columns, **EXTRAS)
    ours = Rewards(length, None)(["1+1=", "2+2="], ["12", "345"], columns).total
    assert_close(torch.tensor(values), ours, equal_nan=True)
    assert_close(ours, torch.tensor([3.0, math.nan]), equal_nan=True)


def test_a_reward_that_takes_every_column_gets_the_columns_of_the_dataset_alone():
    def seen(prompts, completions, **columns):
        assert columns == {"answer": ["7", "8"]}
        assert prompts == [CHAT, CHAT]
        return [0.0] * len(completions)

    to_trl_reward(seen)(prompts=[CHAT, CHAT], completions=said("1", "2"), answer=["7", "8"], **EXTRAS)


def test_a_reward_keeps_its_name_and_its_checks():
    class Strict:
        def __call__(self, prompts, completions):
            return [float("inf")] * len(completions)

    assert to_trl_reward(length).__name__ == "length"
    assert to_trl_reward(Strict()).__name__ == "Strict"
    with pytest.raises(ValueError, match=r"'Strict' returned inf for the completion '12'"):
        to_trl_reward(Strict())(prompts=["1+1="], completions=said("12"), **EXTRAS)


def test_a_reward_can_be_stopped():
    def hang(prompts, completions):
        threading.Event().wait(5)  # not forever, if nothing stops it

    with pytest.raises(TimeoutError, match=r"'hang' on 1 completions did not return within 0\.05 s"):
        to_trl_reward(hang, timeout=0.05)(prompts=["1+1="], completions=["2"])


@pytest.mark.parametrize("several", [[length, length], tiny_model(), "length"], ids=["list", "model", "name"])
def test_what_is_not_one_function_is_refused(several):
    with pytest.raises(TypeError, match=r"takes one function, got (list|Qwen2ForCausalLM|str)\. .*SequenceClassifierR"):
        to_trl_reward(several)


def test_a_model_that_was_wrapped_is_a_function():
    with pytest.warns(UserWarning, match="demonstration"):
        judge = CausalLMReward(tiny_model(), make_tokenizer())
    values = to_trl_reward(judge)(prompts=["1,2,3:6="] * 2, completions=["1+2+3", "3+2"], **EXTRAS)
    assert values == pytest.approx(judge(["1,2,3:6="] * 2, ["1+2+3", "3+2"]))


# --- the page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["1,2,3:2=", "7,8,9:24=", "1,2,4:8="], [CHAT] * 3], ids=["text", "chat"])
def test_the_example_of_the_page_trains_two_steps(tmp_path, monkeypatch, prompts):
    from trl.trainer.base_trainer import _BaseTrainer

    monkeypatch.setattr(_BaseTrainer, "_send_telemetry", lambda self: None)
    seen = []

    def by_text(prompts, completions, answer):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [sum(map(ord, c)) % 7 / 4 for c in completions]

    tiny_model().save_pretrained(tmp_path / "model")  # TRL loads the reference from the model's name
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        "tokenizer": starting_tokenizer(TEMPLATE) if prompts[0] is CHAT else make_tokenizer(),
        "reward": by_text,
        "dataset": SimplePromptDataset(prompts, answer=["2", "24", "8"]),
        "config": BASE.replace(
            num_generations_per_prompt=2, max_new_tokens=4, batch_size=1, gradient_accumulation_steps=2, max_steps=2,
            learning_rate=1e-3, warmup_steps=0, logging_steps=1, output_dir=str(tmp_path / "out"),
        ),
    }  # fmt: skip
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(example, names)

    *logged, _ = names["trainer"].state.log_history
    assert [row["step"] for row in logged] == [1, 2]
    assert all({"loss", "kl", "rewards/by_text/mean"} <= row.keys() for row in logged)
    assert len(seen) == 8  # two steps of two prompts with two completions each
    assert all(isinstance(completion, str) for _, completion, _ in seen)
    assert {(str(p), a) for p, _, a in seen} <= {(str(p), a) for p, a in zip(prompts, ["2", "24", "8"], strict=True)}
    before, after = tiny_model().state_dict(), names["model"].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_names_of_the_page_exist_and_are_those_that_to_trl_writes():
    rows = [
        [re.findall(r"`(\w+)", cell) for cell in line.split("|")[1:3]] for line in PAGE.splitlines() if "| `" in line
    ]
    ours, theirs = ({name for row in rows for name in row[i]} for i in (0, 1))
    assert len(rows) > 15
    assert ours <= {field.name for field in fields(GRPOConfig)}
    assert theirs <= {field.name for field in fields(trl.GRPOConfig)} | {"peft_config"}
    for left, right in rows:
        assert {NAMES[name] for name in left if name in NAMES} <= set(right)
