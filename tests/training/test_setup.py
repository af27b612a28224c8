"""What a trainer looks at before it trains: lengths of prompts, columns, and the text that reward functions get."""

import functools

import pytest
import torch
from conftest import tiny_model
from tokenizers import pre_tokenizers
from trainers import PROMPTS, likes_threes, make_trainer
from transformers import GenerationConfig

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.rollout.prompts import encode_prompts
from grpo_lab.rollout.sampling import Rollouts
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training import setup


def byte_tokenizer():
    """One token per byte of UTF-8; ids 0 and 1 are the pocket model's."""
    return make_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()))


def byte_trainer(folder, prompts, eval_dataset=None, reward=likes_threes, **settings):
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    config = GRPOConfig(output_dir=str(folder), max_new_tokens=6, max_steps=1, warmup_steps=0, **settings)
    dataset = SimplePromptDataset(prompts)
    return GRPOTrainer(model, None, reward, tokenizer, config, dataset, eval_dataset)


def test_the_longest_prompt_is_the_one_of_most_tokens(tmp_path):
    ascii_prompts = ["a" * 100] * 9  # more characters, fewer tokens
    chinese = "五" * 90
    with pytest.raises(ValueError, match=r"270 tokens.*context of 256.*Shorten.*in a new run: one that is resumed"):
        byte_trainer(tmp_path, [*ascii_prompts, chinese])
    with pytest.raises(ValueError, match=r"251 tokens and max_new_tokens 6 do not fit"):
        byte_trainer(tmp_path, [*["五" * 70] * 20, "1" * 251])
    byte_trainer(tmp_path, [*ascii_prompts, chinese[:83]])


@pytest.mark.parametrize("long", ["五" * 90, [{"role": "user", "content": "五" * 40}] * 2], ids=["text", "chat"])
def test_of_many_prompts_those_that_could_be_too_long_are_looked_at(monkeypatch, long):
    monkeypatch.setattr(setup, "EVERY_PROMPT", 100)
    tokenizer, encoded = byte_tokenizer(), []
    tokenizer.chat_template = "{% for m in messages %}--{{ m.role }}--{{ m.content }}{% endfor %}"
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    short = ["12+"] * 1000 if isinstance(long, str) else [[{"role": "user", "content": "12+"}]] * 1000
    # fewer tokens than the chat, whose template adds 8 per message, but more bytes
    fit = ["1" * 249] if isinstance(long, str) else [[{"role": "user", "content": "1" * 241}]]
    monkeypatch.setattr(
        setup, "encode_prompts", lambda t, prompts: encoded.extend(prompts) or encode_prompts(t, prompts)
    )
    setup.longest_prompt(SimplePromptDataset(short), tokenizer, model, 6)
    assert 10 <= len(encoded) < 20
    with pytest.raises(ValueError, match=r"tokens and max_new_tokens 6 do not fit into the model's context of 256"):
        setup.longest_prompt(SimplePromptDataset([*short[:555], long, *short, *fit]), tokenizer, model, 6)
    assert setup.longest_prompt(SimplePromptDataset([*short, *fit, *short]), tokenizer, model, 6)[0] == 249


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_prompt_of_a_million_characters_is_refused_at_once(as_chat):
    tokenizer, model, encoded = byte_tokenizer(), tiny_model(vocab_size=300), []
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    call = tokenizer._encode_plus

    def counted(text, *arguments, **named):
        encoded.extend(map(len, [text] if isinstance(text, str) else text))
        return call(text, *arguments, **named)

    tokenizer._encode_plus = counted
    prompt = [{"role": "user", "content": "1" * 10**6}] if as_chat else "1" * 10**6
    with pytest.raises(ValueError, match="a prompt of 1000000 characters and max_new_tokens 6 do not fit"):
        setup.longest_prompt(SimplePromptDataset([prompt]), tokenizer, model, 6)
    assert 0 < max(encoded) <= 16 * 64  # the whole text takes seconds


def wants(*names):
    """A reward function that needs these columns."""
    return eval(f"lambda prompts, completions, {', '.join(names)}: [1.0] * len(completions)")


@pytest.mark.parametrize(
    ("evaluated", "message"),
    [
        (SimplePromptDataset(["1" * 300], answer=[1]), "300 tokens .*do not fit"),
        (SimplePromptDataset([[{"role": "user", "content": "1"}]], answer=[1]), "no chat template"),
        (SimplePromptDataset(["1"]), "'<lambda>' needs the column 'answer', and eval_dataset has prompt"),
    ],
    ids=["too long", "a chat", "a column"],
)
def test_an_evaluation_that_cannot_be_is_said_before_training(tmp_path, evaluated, message):
    fine = SimplePromptDataset(["1+1="], answer=[2])
    for held_out in (fine, evaluated):
        tokenizer = byte_tokenizer()
        model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256)
        config = GRPOConfig(output_dir=str(tmp_path), max_new_tokens=6, eval_steps=3)
        arguments = (model, None, wants("answer"), tokenizer, config, fine, held_out)
        if held_out is fine:
            GRPOTrainer(*arguments)
        else:
            with pytest.raises(ValueError, match=message):
                GRPOTrainer(*arguments)


@pytest.mark.parametrize(
    ("reward", "missing"),
    [
        (wants("answer"), "answer"),
        (wants("*", "level"), "level"),
        (wants("answer=None"), None),
        (wants("**columns"), None),
        (lambda p, c, answer: [1.0] * len(c), "answer"),
        (lambda p, c: [1.0] * len(c), None),
        (lambda completions, prompts, **columns: [1.0] * len(completions), None),
        (lambda completions, solution: [1.0] * len(completions), "solution"),
        (functools.partial(wants("answer"), answer=1), None),
        (max, None),
    ],
)
def test_a_column_that_a_reward_function_needs_is_missed_before_training(tmp_path, reward, missing):
    if missing is None:
        make_trainer(tmp_path, reward=reward)
    else:
        with pytest.raises(ValueError, match=f"needs the column '{missing}', and train_dataset has prompt"):
            make_trainer(tmp_path, reward=reward)


@pytest.mark.parametrize("keep", [False, True])
def test_rewards_see_a_text_without_its_end_and_with_special_tokens_if_asked(tmp_path, keep):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<turn>"])  # ends the model's turn, but the tokenizer does not call it special
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    turn, think = tokenizer.convert_tokens_to_ids(["<turn>", "<think>"])
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [1, turn]
    config = GRPOConfig(output_dir=str(tmp_path), max_new_tokens=6, keep_special_tokens=keep)
    run = GRPOTrainer(model, None, likes_threes, tokenizer, config, SimplePromptDataset(PROMPTS))
    four, two = tokenizer.convert_tokens_to_ids(["4", "2"])
    completions = [[think, four, two, turn], [four, two, 1], [four, two, four, two], [turn]]
    lengths = torch.tensor([len(ids) for ids in completions])
    ids = torch.tensor([[four, *ids, *[1] * (4 - len(ids))] for ids in completions])
    mask = torch.arange(4) < lengths[:, None]
    rollouts = Rollouts(ids, ids.clamp(max=1), mask, mask.float(), None, mask[:, -1])
    assert run.decode(rollouts) == ["<think>42" if keep else "42", "42", "4242", ""]


@pytest.mark.parametrize("ends", [(1, 4), torch.tensor([1, 4]), torch.tensor(4)], ids=repr)
def test_a_model_whose_end_ids_are_a_tensor_is_trained_and_saved(tmp_path, ends):
    model = tiny_model()
    model.generation_config.eos_token_id = ends
    run = make_trainer(tmp_path, model=model, max_steps=1)
    assert run.components.end_ids == [1, 4]
    run.train()
    assert GenerationConfig.from_pretrained(tmp_path / "final_model").eos_token_id in ([1, 4], 4)
