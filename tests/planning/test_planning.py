"""Plans: bytes by hand, a dry run that equals the real run, and a verdict that stops a run that cannot fit."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_architecture, tiny_model
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from grpo_lab import GRPOConfig
from grpo_lab.cli import main as cli
from grpo_lab.models.adapters import add_lora
from grpo_lab.models.preparation import disable_dropout, enable_checkpointing
from grpo_lab.planning import machines, phases
from grpo_lab.planning import plan as planning
from grpo_lab.planning.dry_run import MemoryTracker, empty_copy, size_of
from grpo_lab.planning.plan import MACHINES, SHAPES, nearest, plan, what_fits, without_weights
from grpo_lab.rewards.reward_models import CausalLMReward
from grpo_lab.rollout.scoring import completion_scores
from grpo_lab.tasks.pocket.make import make_tokenizer

GIB = 2**30
CONFIG = GRPOConfig(num_generations_per_prompt=4, max_new_tokens=12, batch_size=2, gradient_accumulation_steps=2,
                    temperature=1.0, top_k=0, top_p=1.0)  # fmt: skip
PROMPT = 10
ROOMY = replace(MACHINES["laptop"], taken=0.0, reserve=0.0)


def planned(config=CONFIG, model=None, **settings):
    return plan(config, model or tiny_model(), **{"machine": ROOMY, "prompt_tokens": PROMPT} | settings)


# --- bytes ----------------------------------------------------------------------------------------------------


def test_static_bytes_by_hand():
    model = tiny_model()
    V = model.config.vocab_size
    # embedding and head; q, k, v with biases, and o; three matrices of the MLP; norms
    layer = (32 * 32 + 32) + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    weights = 2 * V * 32 + 2 * layer + 32
    buffers = 2 * 4 * 4  # the rotary frequencies, stored twice
    found = planned(model=model).phases["sampling"]
    assert found["weights"] == found["reference"] == 4 * weights + buffers
    assert (found["gradients"], found["optimizer"]) == (0, 8 * weights)  # gradients are freed after each step


def test_the_cache_by_hand():
    # keys and values of 2 layers, for 4 prompts x 4 completions, 2 heads of 8; the last token is never read
    assert planned().phases["sampling"]["cache"] == 2 * 2 * (4 * 4) * 2 * 8 * (PROMPT + 12 - 1) * 4


def test_the_last_micro_batch_starts_with_gradients_and_a_single_one_without():
    several, single = planned(), planned(CONFIG.replace(gradient_accumulation_steps=1))
    weights = 4 * sum(p.numel() for p in tiny_model().parameters())
    assert several.phases["update"]["gradients"] >= weights > single.phases["update"]["gradients"]


def test_the_tokens_left_by_top_k_are_stored_with_the_rollouts():
    without, kept = planned(), planned(CONFIG.replace(top_k=5))
    # 5 ids of 8 bytes for each token of 2 x 2 prompts x 4 completions, twice
    assert kept.phases["update"]["rollouts"] - without.phases["update"]["rollouts"] == 2 * (16 * 12) * 5 * 8


def test_a_reference_costs_nothing_where_there_is_no_kl_or_an_adapter():
    assert planned(CONFIG.replace(kl_coef=0.0)).phases["update"]["reference"] == 0
    adapted = planned(CONFIG.replace(lora_rank=2)).phases["update"]
    model = add_lora(tiny_model(), rank=2, alpha=32, seed=0)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (adapted["reference"], adapted["optimizer"]) == (0, 2 * trained)
    assert trained <= adapted["gradients"] < 2 * trained
    assert planned(model=model).phases["update"] == adapted


def test_frozen_weights_stay_as_they_were_loaded_and_trained_ones_become_float32():
    half = tiny_model()
    for weight in half.parameters():  # but no buffer, as from_pretrained does
        weight.data = weight.data.bfloat16()
    assert planned(model=half).phases["update"]["weights"] == planned().phases["update"]["weights"]
    frozen = planned(CONFIG.replace(lora_rank=2), half).phases["sampling"]["weights"]
    assert frozen < planned(CONFIG.replace(lora_rank=2)).phases["sampling"]["weights"]


def test_a_reward_model_counts_unless_it_is_the_policy():
    judge = Qwen2ForSequenceClassification(Qwen2Config(**tiny_model().config.to_dict() | {"num_labels": 1}))
    weights = size_of([*judge.parameters(), *judge.buffers()])
    model = tiny_model()
    assert planned(model=model, reward_model=[judge, len]).phases["scoring"]["reward model"] == weights
    assert planned(model=model, reward_model=model).phases["scoring"]["reward model"] == 0


def test_8_bit_moments_have_a_scale_per_256_and_small_weights_keep_float32():
    model = tiny_model(intermediate_size=256)
    large = 2 * 3 * 32 * 256  # the matrices of the MLP, of 8192 weights each
    small = sum(p.numel() for p in model.parameters()) - large
    found = planned(CONFIG.replace(optimizer="adamw_8bit"), model).phases["update"]["optimizer"]
    assert found == 8 * small + 2 * large + 2 * 4 * large // 256


def test_a_model_wrapped_in_a_reward_counts_like_the_model():
    judge = tiny_model(seed=1)
    with pytest.warns(UserWarning, match="is a demonstration"):
        reward = CausalLMReward(judge, make_tokenizer())
    wrapped = planned(reward_model=[len, reward])
    assert wrapped.phases == planned(reward_model=judge).phases


def test_an_adapter_is_merged_in_main_memory_and_not_on_the_gpu():
    config = CONFIG.replace(lora_rank=2)
    found = planned(config).phases
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # two layers, without embedding and head
    assert found["saving"]["weights"] - found["sampling"]["weights"] == 4 * matrices
    assert "saving" not in planned(config, machine="H100").phases
    assert "saving" not in planned().phases


def test_vllm_takes_its_part_of_the_gpu_and_our_kv_cache_is_not_needed():
    config = CONFIG.replace(sampler="vllm", vllm_gpu_memory=0.25)
    found, alone = (planned(c, machine="H100") for c in (config, CONFIG))
    assert found.phases["update"]["cache"] == found.phases["sampling"]["cache"] == 0
    assert found.machine.taken - alone.machine.taken == 0.25 * alone.machine.memory
    elsewhere = planned(config.replace(vllm_server="http://elsewhere:8000"), machine="H100")
    assert elsewhere.machine.taken == alone.machine.taken


def test_each_process_has_its_part_of_the_prompts_and_of_the_main_memory():
    two = planned(CONFIG.replace(batch_size=2, gradient_accumulation_steps=1), processes=2)
    assert two.phases == planned(CONFIG.replace(batch_size=1, gradient_accumulation_steps=1)).phases
    odd = planned(CONFIG.replace(batch_size=1, gradient_accumulation_steps=5), processes=2)  # 2 and 3 prompts
    assert odd.phases == planned(CONFIG.replace(batch_size=1, gradient_accumulation_steps=3)).phases
    laptop, gpu = (planned(machine=name, processes=2).machine.memory for name in ("laptop", "H100"))
    assert (laptop, gpu) == (6 * GIB, MACHINES["H100"].memory)
    assert planned(machine="T4", processes=2).on("H100").processes == 2
    assert ", each of 2 processes" in two.verdict
    with pytest.raises(ValueError, match=r"at most 4, .* got 5"):
        planned(processes=5)


def test_bytes_of_shards_and_full_copy_by_hand():
    config = CONFIG.replace(fsdp=True)
    whole, shards = (planned(config, processes=number).phases for number in (1, 2))
    assert whole == planned(CONFIG).phases
    weights = 4 * sum(p.numel() for p in tiny_model().parameters())
    static, before = shards["sampling"], whole["sampling"]
    assert static["optimizer"] == weights  # two moments, of half the weights
    assert static["weights"] - before["weights"] == weights // 2
    assert static["reference"] == before["reference"]
    # FSDP gathers what belongs to no layer, and two layers, here the whole model; as weights and as gradients
    assert shards["update"]["weights"] - static["weights"] == weights
    assert shards["update"]["gradients"] >= weights // 2 + weights
    assert shards["saving"]["weights"] - static["weights"] == 2 * weights  # the gathered optimizer state


# --- the dry run and the real run -----------------------------------------------------------------------------


def tracked(model, config, precision) -> MemoryTracker:
    """Run a micro-batch on real tensors, and count."""
    shape = phases.Shape.of(config, model, precision, PROMPT)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    disable_dropout(model)
    inputs, options = shape.micro_batch()
    tracker = MemoryTracker(fake=False)
    tracker.exclude(model)
    model.train()
    with tracker:
        with shape.autocast():
            logprobs = completion_scores(model, *inputs, **options).logprobs
        tracker.is_backward = True
        logprobs.sum().backward()
    return tracker


@pytest.mark.parametrize(
    ("name", "precision", "changes"),
    [
        ("qwen2", "fp32", {}),
        ("qwen2", "bf16", {}),
        ("qwen2", "fp32", {"gradient_checkpointing": True}),
        ("qwen2", "fp32", {"lora_rank": 2}),
        ("qwen2", "fp32", {"top_k": 5}),
        ("gpt2", "fp32", {}),
        ("bloom", "fp32", {}),
        ("gemma2", "fp32", {}),  # caps its logits, so its head cannot be called separately
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else v,
)
def test_a_dry_run_counts_the_memory_and_flops_of_a_real_run(name, precision, changes):
    config = CONFIG.replace(gradient_accumulation_steps=1, **changes)
    model = tiny_architecture(name, vocab_size=200)
    shape = phases.Shape.of(config, model, precision, PROMPT)
    found = phases._update(phases._prepare(empty_copy(model), config), shape)
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=0)
    phases.completion_states(model, *2 * [torch.ones(1, 2, dtype=torch.long)], 1)  # cache the head check
    real = tracked(model, config, precision)
    [(_, operations)] = found.operations
    peak = max(sum(live.values()) for live in real.peaks.values())
    assert sum(found.peak.values()) == pytest.approx(peak, rel=0.02)
    assert sum(op.flops for op in operations) == pytest.approx(sum(op.flops for op in real.operations), rel=0.02)


def test_a_plan_leaves_the_model_as_it_was():
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    planned(CONFIG.replace(lora_rank=2, gradient_checkpointing=True), model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# --- machines and models --------------------------------------------------------------------------------------


def test_a_machine_is_named_in_any_case_and_an_unknown_one_is_refused():
    assert planned(machine="t4").machine is MACHINES["T4"]
    with pytest.raises(ValueError, match=r"there is no machine 'T5'\. Use one of T4, L4"):
        planned(machine="T5")


@pytest.mark.parametrize(("name", "precision"), [("T4", "fp16"), ("H100", "bf16"), ("laptop", "fp32")])
def test_auto_precision_follows_the_machine(name, precision):
    assert planned(machine=name).precision == precision


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_on_a_gpu_a_cache_of_fixed_size_is_there_while_it_samples(precision, size):
    found = planned(machine="H100", config=CONFIG.replace(precision=precision, max_new_tokens=40))
    # keys and values of 2 layers, for 4 prompts x 4 completions, 2 heads of 8
    assert found.phases["sampling"]["cache"] == 2 * 2 * (4 * 4) * 2 * 8 * (PROMPT + 40) * size
    assert found.phases["update"]["cache"] == 0
    assert found.phases["update"]["everything else"] > 0.6 * GIB


def test_this_machine_is_measured_and_counts_what_python_has_taken():
    found = planned(machine=None)
    assert found.machine.measured
    assert found.machine.memory > found.machine.taken > 0.1 * GIB
    live = sum(found.phases["update"].values()) - found.phases["update"]["everything else"]
    assert found.phases["update"]["everything else"] == int(found.machine.taken + 0.2 * live)
    given_back = planned(CONFIG.replace(gradient_checkpointing=True), machine=None)
    assert given_back.phases["update"]["everything else"] == int(given_back.machine.taken)
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_a_plan_moves_to_a_machine_of_its_kind_without_another_dry_run():
    slow = planned(machine="T4")
    fast = slow.on("H100")
    assert (fast.precision, fast.machine.name, fast.peak) == ("bf16", "H100", slow.peak)
    assert fast.seconds["update"] <= slow.seconds["update"]
    with pytest.raises(ValueError, match=r"cannot be moved to laptop \(cpu"):
        slow.on("laptop")


@pytest.mark.parametrize(
    ("name", "weights"),  # from the model cards: 0.49, 1.54, 3.09 and 7.61 billion
    list(zip(SHAPES, (494_032_768, 1_543_714_304, 3_085_938_688, 7_615_616_512), strict=True)),
)
def test_known_shapes_have_as_many_weights_as_their_cards_say(name, weights):
    model = without_weights(name)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_a_folder_gives_its_shape_and_a_name_without_a_config_is_refused(model_folder, tmp_path):
    assert without_weights(model_folder).config.hidden_size == 32
    assert without_weights(model_folder, judges=True).config.num_labels == 2
    with pytest.raises(ValueError, match=r"could not read the config of .* a folder with a config\.json, pocket, Qwen"):
        without_weights(str(tmp_path))


@pytest.mark.parametrize("tokens", [0, 53])
def test_lengths_that_the_model_does_not_take_are_refused(tokens):
    with pytest.raises(ValueError, match=f"a prompt of {tokens} tokens and max_new_tokens 12 do not fit .* of 64"):
        planned(prompt_tokens=tokens)
    assert planned(prompt_tokens=None).prompt_tokens == 52


# --- the verdict ----------------------------------------------------------------------------------------------


def on(memory: float):
    return replace(ROOMY, name="here", memory=memory)


def test_the_table_says_what_it_is_for_and_fits_a_screen():
    found = planned(name="tiny")
    text = str(found)
    assert text.startswith("tiny on laptop: K 4 × 2 prompts at a time, 10 + 12 tokens, fp32\n")
    assert "It fits: 0.00 of 12.00 GiB on laptop, highest in update; up to " in text
    assert "looked up, its efficiency assumed" in text
    assert "reward model" not in text  # there is none
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_a_peak_that_is_nearly_all_there_is_barely_fits():
    peak = planned().peak
    assert planned(machine=on(peak * 1.2)).verdict.startswith("fits: ")
    assert planned(machine=on(peak * 1.1)).verdict.startswith("fits, but barely: ")
    assert planned(machine=on(peak * 0.99)).verdict.startswith("does not fit: ")


def test_smaller_micro_batches_come_first_and_keep_the_step_as_it_is():
    config, model = CONFIG.replace(batch_size=4), tiny_model()
    halved = planned(config.replace(batch_size=2, gradient_accumulation_steps=4), model).peak
    found = planned(config, model, machine=on(halved + 1))
    near = nearest(found, model)
    assert (near.config, near.fits) == (config.replace(batch_size=2, gradient_accumulation_steps=4), True)
    assert what_fits(found, model).startswith("What fits: --batch-size 2 --gradient-accumulation-steps 4 (0.00 GiB)")


def test_then_activations_are_recomputed_then_an_adapter_is_trained_then_k_falls():
    config, model = CONFIG.replace(batch_size=1, gradient_accumulation_steps=4), tiny_model()
    settings = {"gradient_checkpointing": True}, {"lora_rank": 16}, {"lora_rank": 16, "gradient_checkpointing": True}
    recomputed, adapted, both = (planned(config.replace(**changes), model).peak for changes in settings)
    assert both < recomputed
    near = nearest(planned(config, model, machine=on(recomputed)), model)
    assert near.config == config.replace(gradient_checkpointing=True)
    near = nearest(planned(config, model, machine=on(both)), model)
    expected = settings[1] if adapted <= both else settings[2]
    assert near.config == config.replace(**expected)
    near = nearest(planned(config, model, machine=on(both - 1)), model)
    assert near.config == config.replace(**settings[2], num_generations_per_prompt=2)
    assert near.config.kl_coef == config.kl_coef


def test_where_nothing_fits_a_larger_machine_is_named():
    model = tiny_model()
    found = planned(model=model, machine=on(1000))
    assert nearest(found, model) is None
    assert what_fits(found, model) == "Nothing near it fits on here: a smaller model, or a machine like T4."


# --- the command line -----------------------------------------------------------------------------------------

QUICK = ["--max-steps", "1", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--max-new-tokens", "4",
         "--warmup-steps", "0", "--num-generations", "2", "--reward", "format:."]  # fmt: skip


def run(capsys, *arguments):
    status = cli.main([*arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plan_prints_the_table_and_its_status_is_the_verdict(capsys, model_folder, tmp_path):
    status, out, _ = run(capsys, "plan", "--model-name", model_folder, "--machine", "binder", "--max-new-tokens", "8")
    assert status == 0
    assert f"{model_folder} on binder: K 4 × 4 prompts at a time, 120 + 8 tokens, fp32" in out
    _, out, _ = run(capsys, "plan", "--model-name", model_folder, "--max-new-tokens", "8", "--machine", "T4",
                    "--processes", "2")  # fmt: skip
    assert f"{model_folder} on T4, each of 2 processes: K 4" in out
    wide = Qwen2Config(hidden_size=4096, intermediate_size=32768, num_hidden_layers=1, vocab_size=150000)
    wide.save_pretrained(tmp_path)
    status, out, _ = run(capsys, "plan", "--model-name", str(tmp_path), "--machine", "binder", "--max-new-tokens", "2")
    assert status == 1
    assert "Nothing near it fits on binder: a smaller model, or a machine like A100-" in out


def test_plan_says_what_is_wrong_in_a_sentence(capsys, tmp_path):
    for arguments, message in (
        (["--machine", "T5"], "there is no machine 'T5'"),
        (["--model-name", str(tmp_path / "nowhere")], "there is no folder"),
        (["--prompt-tokens", "60"], "do not fit into the model's context of 64"),
    ):
        status, _, complaint = run(capsys, "plan", *arguments)
        assert status == 2
        assert message in complaint


def test_train_says_its_plan_and_stops_if_it_cannot_fit_unless_forced(capsys, monkeypatch, model_folder, tmp_path):
    train = ["train", "--model-name", model_folder, *QUICK]
    status, out, _ = run(capsys, *train, "--output-dir", str(tmp_path / "a"))
    assert (status, "Plan: it fits: " in out) == (0, True)
    monkeypatch.setattr(machines, "free_memory", lambda device: 1000)
    status, out, complaint = run(capsys, *train, "--output-dir", str(tmp_path / "b"))
    assert (status, "Before training" in out, (tmp_path / "b").exists()) == (2, False, False)
    assert complaint.startswith("grpo-lab: the run does not fit: ")
    assert "Nothing near it fits" in complaint
    assert "--force trains all the same." in complaint
    status, out, _ = run(capsys, *train, "--output-dir", str(tmp_path / "b"), "--force")
    assert (status, "Plan: it does not fit" in out) == (0, True)


def test_a_plan_that_cannot_be_made_stops_nothing(capsys, monkeypatch, model_folder, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("an operation without a fake")

    monkeypatch.setattr(planning, "plan", broken)
    status, out, _ = run(capsys, "train", "--model-name", model_folder, *QUICK, "--output-dir", str(tmp_path / "out"))
    assert status == 0
    assert "Plan: none could be made (RuntimeError: an operation without a fake)" in out
