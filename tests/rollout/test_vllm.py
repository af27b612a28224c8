"""Rollouts with vLLM in this process and with a server: both against a stand-in with its interface."""

import math
import sys
import warnings

import pytest
import torch
import vllm_stand_in
from conftest import tiny_model
from torch.testing import assert_close
from trainers import PROMPTS, make_trainer

from grpo_lab import GRPOConfig
from grpo_lab.rollout.scoring import completion_logprobs
from grpo_lab.rollout.vllm import VLLMSampler
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training import step
from grpo_lab.training.evaluation import uniforms_for
from grpo_lab.training.samplers import ModelSampler
from grpo_lab.training.trainer import GRPOTrainer

SETTINGS = {"sampler": "vllm", "top_k": 0, "top_p": 1.0, "temperature": 0.8}
RATIO = "sampling/importance_sampling_ratio"
DIFFERENCE = "sampling/sampling_logp_difference"


class Stand:
    """One of the two ways to use vLLM: its settings for a run, and its engine once it has started."""

    def __init__(self, settings, engine, server=None):
        self.settings, self._engine, self.server = SETTINGS | settings, engine, server

    @property
    def engine(self) -> vllm_stand_in.Engine:
        return self._engine()


@pytest.fixture(params=["here", "server"])
def stand(request, tmp_path, monkeypatch):
    """Make a `Stand`; noise changes its distribution from the policy's. The server starts with other weights."""
    open_servers = []

    def make(noise: float = 0.0, model=None) -> Stand:
        if request.param == "here":
            package = vllm_stand_in.package(noise)
            monkeypatch.setitem(sys.modules, "vllm", package)
            return Stand({}, lambda: package.started[-1].engine)
        folder = tmp_path / "served"
        (model or tiny_model(seed=5)).save_pretrained(folder)
        running = vllm_stand_in.serve(folder, noise)
        open_servers.append(running)
        server = running.__enter__()
        return Stand({"vllm_server": server.url}, lambda: server.engine, server)

    yield make
    for running in open_servers:
        running.__exit__(None, None, None)


# --- rollouts -----------------------------------------------------------------------------------------------


def test_rollouts_have_the_shape_and_the_log_probabilities_of_our_own(tmp_path, stand):
    run = make_trainer(tmp_path / "run", **stand().settings)
    rollouts = run.sample(["1,2,3:6=", "2,5:7="], uniforms_for(run.components, 8, "rollout", 0), 4)
    mask, ids = rollouts.completion_mask, rollouts.completion_ids
    lengths = mask.sum(1)
    assert 1 < lengths.min() < lengths.max() == 6  # of several lengths, some cut off
    assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
    assert torch.equal(ids[~mask], torch.full_like(ids[~mask], run.components.pad_id))
    ends = ids[torch.arange(8), lengths - 1] == run.components.end_ids[0]
    assert torch.equal(rollouts.ended, ends)
    assert (
        not (ids[:, :-1] == run.components.end_ids[0])
        .where(torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1, False)
        .any()
    )
    assert rollouts.attention_mask[4:, 0].sum() == 0  # the shorter prompt is padded on the left
    assert rollouts.kept is None
    ours = completion_logprobs(run.model, rollouts.input_ids, rollouts.attention_mask, ids.shape[1], temperature=0.8)
    assert_close(rollouts.logprobs, ours.where(mask, 0.0), atol=1e-4, rtol=0)
    assert len({tuple(row) for row in ids.tolist()}) > 4


def test_the_same_numbers_give_the_same_completions_and_other_numbers_others(tmp_path, stand):
    run = make_trainer(tmp_path / "run", **stand().settings)
    one = run.sample(PROMPTS[:2], uniforms_for(run.components, 8, "rollout", 0), 4)
    again = run.sample(PROMPTS[:2], uniforms_for(run.components, 8, "rollout", 0), 4)
    other = run.sample(PROMPTS[:2], uniforms_for(run.components, 8, "rollout", 1), 4)
    assert torch.equal(one.input_ids, again.input_ids)
    assert one.input_ids.shape != other.input_ids.shape or not torch.equal(one.input_ids, other.input_ids)
    twice = run.sample([PROMPTS[0]] * 2, uniforms_for(run.components, 8, "rollout", 0), 4).completion_ids
    assert not torch.equal(twice[:4], twice[4:])  # each prompt has its own seed


def test_greedy_equals_our_own_sampler(tmp_path, stand):
    run = make_trainer(tmp_path / "run", **stand().settings)
    uniforms = uniforms_for(run.components, 6, "evaluate", 0)
    theirs = run.sample(PROMPTS[:3], uniforms, 2, top_k=1)
    run.components.sampler = ModelSampler(run.components.models)
    ours = run.sample(PROMPTS[:3], uniforms, 2, top_k=1)
    for name in ("input_ids", "attention_mask", "completion_mask", "logprobs", "kept", "ended"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name


def test_it_samples_from_the_distribution_that_it_reports(tmp_path, stand):
    """Of 400 first tokens, each token's share is within 4.5 standard deviations: wrong by luck once in 5,000 runs."""
    run = make_trainer(tmp_path / "run", **stand(noise=0.5).settings, max_new_tokens=1)
    rollouts = run.sample(PROMPTS[:1], uniforms_for(run.components, 400, "rollout", 0), 400)
    p = rollouts.logprobs.exp().squeeze(1)
    tokens = rollouts.completion_ids.squeeze(1)
    assert not torch.allclose(p, torch.ones_like(p) / 22, atol=0.01)
    for token in tokens.unique():
        share, expected = (tokens == token).float().mean().item(), p[tokens == token][0].item()
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 400)


# --- its weights are the policy's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "learning_rate": 0.1}], ids=["all", "LoRA"])
def test_its_weights_follow_the_policy_after_each_update(tmp_path, stand, settings):
    here = stand()
    # always the same prompts: a prefix cache that is not reset would be of old weights
    run = make_trainer(tmp_path / "run", prompts=PROMPTS[:4], max_steps=3, **here.settings | settings)
    before = None
    for record in run.steps():
        assert record.metrics[f"{DIFFERENCE}/max"] < 1e-4  # we score them with the current weights
        assert record.metrics[f"{RATIO}/min"] == pytest.approx(1, abs=1e-3)
        assert record.metrics[f"{RATIO}/max"] == pytest.approx(1, abs=1e-3)
        now = torch.cat([w.flatten() for w in here.engine.model.state_dict().values()])
        assert before is None or not torch.equal(before, now)
        before = now
    assert here.engine.reloads == 3
    assert not list((tmp_path / "run").glob(".weights-for-vllm-*"))


def test_several_updates_on_one_rollout_use_the_same_importance_weights(tmp_path, monkeypatch, stand):
    used, loss = [], step.grpo_loss
    monkeypatch.setattr(step, "grpo_loss", lambda *a, **k: used.append(k["weights"]) or loss(*a, **k))
    here = stand(noise=0.1)
    run = make_trainer(tmp_path / "run", num_iterations=2, max_steps=4, **here.settings)
    records = list(run.steps())
    assert here.engine.reloads == 2
    for first, second in (used[:2], used[2:]):
        assert torch.equal(first, second)
        assert not torch.equal(first, torch.ones_like(first))
    assert [f"{RATIO}/mean" in record.metrics for record in records] == [True, False, True, False]
    assert records[2].metrics[f"{RATIO}/mean"] == pytest.approx(used[2].mean().item())
    assert records[2].metrics[f"{RATIO}/min"] == used[2].min().item()
    assert records[2].metrics[f"{RATIO}/max"] == used[2].max().item()


def test_micro_batches_and_a_checkpoint_within_a_rollout_change_nothing(tmp_path, monkeypatch):
    package = vllm_stand_in.package(noise=0.1)
    monkeypatch.setitem(sys.modules, "vllm", package)
    runs = []
    for size in (4, 1):
        sizes = {"batch_size": size, "gradient_accumulation_steps": 4 // size, "num_iterations": 2, "max_steps": 4}
        run = make_trainer(tmp_path / str(size), **SETTINGS | sizes)
        runs.append([record.metrics for record in run.steps()])
    for whole, parts in zip(*runs, strict=True):
        for name in {"loss", "grad_norm", f"{RATIO}/min", f"{RATIO}/mean", f"{RATIO}/max"} & whole.keys():
            assert parts[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5)

    run = make_trainer(tmp_path / "1", **SETTINGS | sizes, save_steps=1)
    for _ in zip(range(3), run.steps(), strict=False):
        pass
    again = make_trainer(tmp_path / "1", **SETTINGS | sizes, save_steps=1)
    (last,) = again.steps(resume=True)
    for name in ("loss", "grad_norm"):
        assert last.metrics[name] == runs[1][3][name]


def test_tied_weights_and_half_precision_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", vllm_stand_in.package())
    model = tiny_model(tie_word_embeddings=True)
    sampler = VLLMSampler(model, make_tokenizer(), precision="bf16", server=None, folder=tmp_path, gpu_memory=0.3)
    sampler.sync(model)
    theirs = sampler.engine.llm.engine.model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(theirs[name], weight.bfloat16().float())


def test_evaluation_samples_with_it_and_the_current_weights(tmp_path, stand):
    run = make_trainer(tmp_path / "run", **stand().settings)
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(1.1)
    theirs = run.evaluate(run.train_dataset)
    run.components.sampler = ModelSampler(run.components.models)
    assert theirs["eval/pass@1_greedy"] == run.evaluate(run.train_dataset)["eval/pass@1_greedy"]
    assert math.isfinite(theirs["eval/reward"])


# --- its log-probabilities are corrected ------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["sequence", "token"])
def test_training_learns_from_a_sampler_with_another_distribution(tmp_path, stand, uniform_model, correction):
    settings = stand(noise=0.5, model=tiny_model(tie_word_embeddings=False)).settings
    run = make_trainer(
        tmp_path / "run", model=uniform_model, max_steps=20, learning_rate=3e-2, kl_coef=0.01,
        sampler_correction=correction, **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "vLLM's log-probabilities differ")
        records = list(run.steps())
    rewards = [record.metrics["reward"] for record in records]
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])
    assert max(record.metrics[f"{RATIO}/max"] for record in records) == 2.0  # the cap acts


def test_a_difference_larger_than_rounding_gives_a_warning(tmp_path, stand):
    run = make_trainer(tmp_path / "run", max_steps=1, **stand(noise=1.0).settings)
    with pytest.warns(UserWarning, match="nats on average, more than by rounding"):
        list(run.steps())


def test_a_run_without_vllm_has_no_importance_weights_and_imports_no_vllm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    (record,) = make_trainer(tmp_path, max_steps=1).steps()
    assert not any(name.startswith(RATIO) for name in record.metrics)


# --- errors, each in one sentence -----------------------------------------------------------------------------


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r'pip install "vllm>=0\.22"'):
        make_trainer(tmp_path, **SETTINGS)


def test_a_missing_server_is_noticed_before_training(tmp_path):
    with pytest.raises(ConnectionError, match=r"no vLLM server answers at http://127\.0\.0\.1:9/v1/models"):
        make_trainer(tmp_path, vllm_server="http://127.0.0.1:9", **SETTINGS)


@pytest.fixture
def server(tmp_path):
    tiny_model(seed=5).save_pretrained(tmp_path / "served")
    with vllm_stand_in.serve(tmp_path / "served") as running:
        yield running


def through(server, tmp_path, **settings) -> GRPOTrainer:
    return make_trainer(tmp_path / "run", max_steps=1, vllm_server=server.url, **SETTINGS | settings)


def test_a_server_that_cannot_load_weights_or_returns_raw_log_probabilities_is_refused(tmp_path, server):
    server.dev_mode = False
    with pytest.raises(ConnectionError, match="VLLM_SERVER_DEV_MODE=1"):
        through(server, tmp_path)
    server.dev_mode, server.logprobs_mode = True, "raw_logprobs"
    with pytest.raises(ValueError, match=r"raw_logprobs, which are not of the distribution .*processed_logprobs"):
        through(server, tmp_path)


def test_a_server_of_another_model_is_noticed_before_its_first_completion(tmp_path, server):
    run = through(server, tmp_path)
    server.engine.model = tiny_model(hidden_size=16)
    with pytest.raises(ConnectionError, match=r"answered 500 to /collective_rpc: .*weights do not fit"):
        next(run.steps())
    assert run.step == 0


def test_a_server_other_than_vllm_is_refused(tmp_path, server):
    server.answer = lambda path, content: "hello"
    with pytest.raises(ValueError, match=r"does not answer like vLLM 0\.22 or newer"):
        through(server, tmp_path)


FAULTS = {
    "one too few": (lambda c: c.pop(), r"completions, expected 4 for each prompt"),
    "no log-probabilities": (lambda c: c[0].update(logprobs=None), r"returned 0 log-probabilities for"),
    "a missing one": (lambda c: c[0]["logprobs"]["token_logprobs"].pop(), r"log-probabilities for \d tokens"),
    "null": (lambda c: c[0]["logprobs"]["token_logprobs"].__setitem__(0, None), "not finite"),
    "nan": (lambda c: c[0]["logprobs"]["token_logprobs"].__setitem__(0, math.nan), "not finite"),
    "unknown token": (lambda c: c[0].update(token_ids=[999] * 6, finish_reason="length"), r"token 999, but the policy"),
    "another end": (
        lambda c: c[0].update(token_ids=[5], finish_reason="stop"),
        r"did not end a completion at one of the end tokens \[1\] \(stop: \[5\]\)",
    ),
    "wrote on": (
        lambda c: c[0].update(token_ids=[1] * 6, finish_reason="length"),
        r"end tokens \[1\] \(length: \[1, 1",
    ),
    "context too short": (lambda c: c[0].update(token_ids=[5] * 3, finish_reason="length"), r"after 3 of at most 6"),
    "broken off": (lambda c: c[0].update(finish_reason="abort"), r"stopped a completion early.*\(abort\)"),
    "empty": (lambda c: c[0].update(token_ids=[]), r"after 0 of at most 6 tokens"),
    "no token ids": (lambda c: c[0].pop("token_ids"), r"not answer like vLLM 0\.22 or newer: KeyError\('token_ids'\)"),
    "too long": (lambda c: c[0].update(token_ids=[5] * 7), r"after 7 of at most 6 tokens"),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_an_invalid_answer_is_refused(tmp_path, server, spoil, words):
    run = through(server, tmp_path)

    def answer(path, content):
        if path == "/v1/completions":
            spoil(content["choices"])
        return content

    server.answer = answer
    with pytest.raises(ValueError, match=words):
        next(run.steps())


def test_an_end_token_at_the_maximum_length_ends_the_completion(tmp_path, server):
    run = through(server, tmp_path, max_new_tokens=1)

    def answer(path, content):
        for choice in content["choices"] if path == "/v1/completions" else ():
            choice.update(token_ids=run.components.end_ids, finish_reason="length")
        return content

    server.answer = answer
    assert run.sample(PROMPTS[:1], uniforms_for(run.components, 2, "rollout", 0), 2).ended.all()


def test_a_cache_that_is_kept_is_an_error(tmp_path, server):
    run = through(server, tmp_path)
    server.answer = lambda path, content: {"success": False} if path == "/reset_prefix_cache" else content
    with pytest.raises(ValueError, match="kept its cache of the old weights"):
        next(run.steps())


def test_invalid_settings_are_refused_with_the_reason():
    for truncation in ({"top_k": 50, "top_p": 1.0}, {"top_k": 0, "top_p": 0.9}):
        with pytest.raises(ValueError, match=r"needs top_k 0 and top_p 1\.0.*could not be scored"):
            GRPOConfig(sampler="vllm", **truncation)
    with pytest.raises(ValueError, match="must start with http://"):
        GRPOConfig(**SETTINGS, vllm_server="localhost:8000")
    with pytest.raises(ValueError, match='needs sampler "vllm"'):
        GRPOConfig(vllm_server="http://localhost:8000")


def test_truncation_in_a_single_call_is_refused_too(tmp_path, stand):
    run = make_trainer(tmp_path / "run", **stand().settings)
    with pytest.raises(ValueError, match="got top_k=5"):
        run.sample(PROMPTS[:1], uniforms_for(run.components, 1, "x", 0), 1, top_k=5)
