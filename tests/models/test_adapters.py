"""LoRA: frozen weights do not change, the reference is the model without its adapter, and saved adapters load."""

import copy
import json
import re
import sys

import peft
import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trainers import make_trainer, weights
from transformers import AutoModelForCausalLM

from grpo_lab.cli.main import main
from grpo_lab.models.adapters import add_lora, load_adapter, merged
from grpo_lab.models.forward import rebuilt
from grpo_lab.planning.dry_run import MemoryTracker, size_of
from grpo_lab.training.checkpoints import DamagedCheckpointError, load_weights

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def trained(folder, model=None, **settings):
    run = make_trainer(folder, model=model, lora_rank=2, save_steps=1, **settings)
    records = list(run.steps())
    return run, records


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapted_model_starts_as_it_was(name):
    before = tiny_architecture(name)(IDS).logits
    model = add_lora(tiny_architecture(name), rank=2, alpha=32, seed=0)
    assert torch.equal(before, model(IDS).logits)
    matrices = [n for n, p in model.named_parameters() if p.requires_grad]
    assert matrices
    assert all("lora_" in n for n in matrices)


def test_adding_an_adapter_draws_from_its_own_seed():
    model = tiny_model()
    before = torch.get_rng_state()
    one = add_lora(model, rank=2, alpha=32, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    same, other = (add_lora(tiny_model(), rank=2, alpha=32, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_reference_is_the_model_without_its_adapter(tmp_path):
    run, records = trained(tmp_path, max_steps=4)
    assert run.ref_model is None  # no second copy of the weights
    assert records[0].metrics["kl"] == 0
    assert records[-1].metrics["kl"] > 1e-4
    with_copy = make_trainer(tmp_path / "copy", max_steps=4, lora_rank=2, ref_model=tiny_model())
    assert [r.metrics["kl"] for r in with_copy.steps()] == [r.metrics["kl"] for r in records]
    assert torch.equal(weights(run), weights(with_copy))


def test_only_the_adapter_is_trained_and_only_it_is_saved(tmp_path):
    run, _ = trained(tmp_path)
    before = dict(tiny_model().named_parameters())
    for name, weight in run.model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_a_checkpoint_loads_with_peft_and_the_final_model_with_transformers_alone(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    run, _ = trained(tmp_path / "run", model=base)
    expected = run.model(IDS).logits
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(adapted(IDS).logits, expected)
    monkeypatch.setitem(sys.modules, "peft", None)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final_model")
    torch.testing.assert_close(final(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert (final(IDS).logits - tiny_model()(IDS).logits).abs().max() > 0.01


def test_merging_neither_changes_nor_moves_the_model():
    model = add_lora(tiny_model(), rank=2, alpha=32, seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    before, places, logits = weights_of(model), [p.data_ptr() for p in model.parameters()], model(IDS).logits
    torch.testing.assert_close(merged(model)(IDS).logits, logits)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(model), strict=True))
    assert [p.data_ptr() for p in model.parameters()] == places


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_gives_the_bits_of_peft_and_shares_what_has_no_adapter(name):
    model = add_lora(tiny_architecture(name), rank=2, alpha=32, seed=0)
    for part, weight in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(weight, std=0.1)
    ours = dict(merged(model).named_parameters())
    own = {part.data_ptr() for part in model.parameters()}
    expected = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    adapted = {part.split(".lora_A")[0].removeprefix("base_model.model.") + ".weight"
               for part, _ in model.named_parameters() if ".lora_A" in part}  # fmt: skip
    for part, weight in expected.named_parameters():
        assert torch.equal(ours[part], weight), part
        assert (ours[part].data_ptr() in own) == (part not in adapted), part


class BytesByDevice(MemoryTracker):
    """Count bytes by device; the tensors are fake, so any device can be used."""

    def __init__(self):
        super().__init__()
        self.live = {"cuda": 0, "cpu": 0}
        self.peaks = {"start": dict(self.live)}

    def _category(self, tensor):
        return tensor.device.type


def test_merging_takes_nothing_on_a_gpu():
    tracker = BytesByDevice()

    def on_a_gpu(tensor):
        with tracker.fake_mode:
            return torch.empty(tensor.shape, device="cuda")

    model = rebuilt(add_lora(tiny_model(), rank=2, alpha=32, seed=0), on_a_gpu)
    tracker.exclude(model)
    with tracker, torch.no_grad():
        plain = merged(model)
    assert all(live["cuda"] == 0 for live in tracker.peaks.values())
    assert max(live["cpu"] for live in tracker.peaks.values()) >= size_of(plain.parameters())
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def test_a_model_with_an_adapter_is_trained_as_it_is(tmp_path):
    ours, _ = trained(tmp_path / "a")
    given = make_trainer(tmp_path / "b", model=add_lora(tiny_model(), rank=2, alpha=32, seed=0))
    list(given.steps())
    assert torch.equal(weights(ours), weights(given))
    with pytest.raises(ValueError, match="already has an adapter"):
        make_trainer(tmp_path / "c", model=given.model, lora_rank=2)


def given(name="default", config=None):
    return get_peft_model(tiny_model(), config or LoraConfig(r=2, target_modules="all-linear"), adapter_name=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_an_inactive_second_adapter_is_ignored(tmp_path):
    model = given()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    run = make_trainer(tmp_path / "run", model=model, save_steps=1)
    list(run.steps())
    again = given()
    load_weights(again, tmp_path / "run" / "checkpoint-3")
    torch.testing.assert_close(again(IDS).logits, run.model(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_an_adapter_that_could_not_be_saved_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(ValueError, match='must be named "default" and be the only active one, got mine'):
        make_trainer(tmp_path, model=given("mine"))
    with pytest.raises(ValueError, match="virtual prompt tokens cannot be merged"):
        make_trainer(tmp_path, model=given(config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
def test_an_adapter_that_was_loaded_frozen_is_refused(tmp_path):
    given().save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"all weights of the model are frozen.*is_trainable=True"):
        make_trainer(tmp_path / "run", model=frozen)


def test_a_damaged_adapter_is_named_and_the_previous_checkpoint_is_used(tmp_path):
    trained(tmp_path)
    file = tmp_path / "checkpoint-3" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    run = make_trainer(tmp_path, lora_rank=2)
    with pytest.warns(UserWarning, match=r"adapter_model.safetensors has changed.*Going on from checkpoint-2"):
        run.train(resume=True)
    assert run.step == 3


def test_another_adapter_or_another_model_under_it_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(ValueError, match="lora_rank: 2 -> 4"):
        make_trainer(tmp_path, lora_rank=4).train(resume=True)
    with pytest.raises(ValueError, match=r"model under the adapter: \w+ -> \w+"):
        make_trainer(tmp_path, lora_rank=2, model=tiny_model(seed=1)).train(resume=True)
    with pytest.raises(ValueError, match="end of a run and holds no optimizer state"):
        make_trainer(tmp_path, lora_rank=2).train(resume=tmp_path / "final_model")


def test_an_adapter_of_other_shapes_is_refused(tmp_path):
    trained(tmp_path)
    folder = tmp_path / "checkpoint-3"
    saved = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight[:1].contiguous() for name, weight in saved.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(DamagedCheckpointError, match="the adapter does not fit"):
        load_weights(add_lora(tiny_model(), rank=2, alpha=32, seed=0), folder)


def test_the_scale_is_alpha_over_rank():
    model = add_lora(tiny_model(), rank=4, alpha=8, seed=0)
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {2.0}


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        add_lora(tiny_model(), rank=2, alpha=32, seed=0)


OLD_TORCHAO = (
    "Found an incompatible version of torchao. Found version 0.10.0, but only versions above 0.16.0 are supported"
)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OLD_TORCHAO, f"peft refuses the installed torchao ({OLD_TORCHAO}): "
                      "pip uninstall -y torchao, or pip install -U torchao."),
        ("cannot import name 'X'", "peft cannot be used (cannot import name 'X'): pip install -U peft."),
    ],
)  # fmt: skip
def test_where_peft_refuses_what_is_installed_one_sentence_says_the_cure(tmp_path, monkeypatch, error, cure):
    def refuse(*_, **__):
        raise ImportError(error)

    model = add_lora(tiny_model(), rank=2, alpha=32, seed=0)
    model.save_pretrained(tmp_path)
    for name in ("get_peft_model", "set_peft_model_state_dict"):
        monkeypatch.setattr(peft, name, refuse)
    with pytest.raises(ValueError, match=f"^{re.escape(cure)}$"):
        add_lora(tiny_model(), rank=2, alpha=32, seed=0)
    with pytest.raises(ValueError, match=f"^{re.escape(cure)}$"):
        load_adapter(model, tmp_path)


def test_the_command_line_trains_an_adapter(tmp_path, model_folder):
    flags = ["--model-name", model_folder, "--lora-rank", "2", "--max-steps", "1", "--max-new-tokens", "4",
             "--warmup-steps", "0", "--output-dir", str(tmp_path / "out"), "--save-steps", "1"]  # fmt: skip
    assert main(["train", *flags, "--reward", "format:3"]) == 0
    config = json.loads((tmp_path / "out" / "checkpoint-1" / "adapter_config.json").read_text())
    assert config["r"] == 2
