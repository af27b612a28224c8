"""Sampling: the uniform numbers decide the tokens, and the scorer agrees with the sampler."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_model
from rollouts import PROMPTS, TRUNCATIONS, K, P, T, draw, texts, uniforms

from grpo_lab.algorithm.logprobs import truncate
from grpo_lab.rollout.sampling import end_token_ids, left_pad, pad_token_id, sample, sample_token
from grpo_lab.rollout.scoring import completion_logprobs

# --- one distribution for both --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_the_scorer_agrees_with_the_sampler(any_model, settings):
    rollouts = draw(any_model, **settings)
    lengths = rollouts.completion_mask.sum(1)
    assert lengths.min() < lengths.max()  # some rows ended early and left the cache
    rows = (any_model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens)
    again = completion_logprobs(*rows, temperature=settings["temperature"], kept=rollouts.kept, dedup=False)
    assert again.isfinite().all()
    assert (again - rollouts.logprobs).where(rollouts.completion_mask, 0.0).abs().max() < 1e-5
    assert (rollouts.logprobs[~rollouts.completion_mask] == 0).all()
    assert (rollouts.kept is None) == (settings == {"temperature": 1.0})
    if rollouts.kept is not None:
        drawn = (rollouts.kept == rollouts.completion_ids[..., None]).any(-1)
        assert drawn[rollouts.completion_mask].all()
        full = completion_logprobs(*rows, temperature=settings["temperature"])
        assert (full < rollouts.logprobs)[rollouts.completion_mask].float().mean() > 0.5  # the silent bug would show


# --- what a completion is -------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1], ids=["pad", "pad == end"])
@pytest.mark.parametrize("ends", [[1], [4, 1, 7], []], ids=str)
def test_a_completion_ends_with_its_first_end_token_which_belongs_to_it(model, ends, pad):
    rollouts = draw(model, numbers=uniforms(60), k=20, ends=ends, pad=pad)
    ids, mask, width = rollouts.completion_ids.tolist(), rollouts.completion_mask.tolist(), rollouts.num_tokens
    for row, real, ended in zip(ids, mask, rollouts.ended.tolist(), strict=True):
        length = next((t + 1 for t, token in enumerate(row) if token in ends), width)
        assert real == [True] * length + [False] * (width - length)
        assert row[length:] == [pad] * (width - length)
        assert ended == (row[length - 1] in ends)
    assert rollouts.ended.any() == bool(ends)
    assert not rollouts.ended.all()
    prompt_mask = left_pad(PROMPTS, pad)[1].repeat_interleave(20, 0)
    assert torch.equal(rollouts.attention_mask, torch.cat([prompt_mask, rollouts.completion_mask.long()], 1))


def test_rollouts_are_as_wide_as_their_longest_completion(model):
    everything_ends = draw(model, ends=range(model.config.vocab_size))
    assert everything_ends.num_tokens == 1
    assert everything_ends.ended.all()
    assert draw(model, ends=[]).num_tokens == T


def test_a_completion_that_ends_with_the_very_last_token_has_ended(model):
    free = draw(model, [[5]], k=1, ends=[])
    last = free.completion_ids[0, -1].item()
    assert draw(model, [[5]], uniforms(1), k=1, ends=[last]).ended.all()
    assert not free.ended.any()


# --- randomness is an argument --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_a_completion_depends_on_its_own_numbers_only(any_model, settings):
    numbers = uniforms(P * K)
    together = texts(draw(any_model, numbers=numbers, **settings))
    for i, prompt in enumerate(PROMPTS):  # each prompt alone, each completion alone
        rows = slice(i * K, (i + 1) * K)
        assert texts(draw(any_model, [prompt], numbers[rows], **settings)) == together[rows]
        for number, expected in zip(numbers[rows], together[rows], strict=True):
            assert texts(draw(any_model, [prompt], number[None], k=1, **settings)) == [expected]
    backwards = draw(any_model, PROMPTS[::-1], numbers.view(P, K, T).flip(0).reshape(P * K, T), **settings)
    assert texts(backwards) == [text for i in (2, 1, 0) for text in together[i * K : (i + 1) * K]]


def test_other_numbers_give_other_completions_and_global_seeds_do_not_matter(model):
    torch.manual_seed(1)
    first, other = draw(model), draw(model, numbers=uniforms(P * K, seed=1))
    torch.manual_seed(2)
    assert texts(first) == texts(draw(model))
    assert texts(first) != texts(other)


def test_rows_that_are_equal_so_far_are_computed_once(model, monkeypatch):
    """Of twelve rows, the even ones have the same numbers; the odd ones each have their own."""
    numbers, sizes, whole = uniforms(P * K), [], model.forward
    numbers[::2] = numbers[0]
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **rest: sizes.append(len(input_ids)) or whole(input_ids, **rest)
    )
    together = draw(model, numbers=numbers, ends=[])
    monkeypatch.undo()
    written = [(i // K, *ids) for i, ids in enumerate(texts(together))]
    assert sizes == [P] + [len({row[: n + 1] for row in written}) for n in range(1, T)]
    assert max(sizes) < P * K
    apart = draw(model, [p for p in PROMPTS for _ in range(K)], numbers, k=1, ends=[])
    assert texts(together) == texts(apart)
    assert torch.allclose(together.logprobs, apart.logprobs, atol=1e-5)


def test_the_completions_of_a_prompt_are_adjacent(model):
    rollouts = draw(model)
    assert torch.equal(rollouts.input_ids[:, :7], left_pad(PROMPTS, 0)[0].repeat_interleave(K, 0))
    same = draw(model, numbers=uniforms(1).expand(P * K, T))  # equal numbers: K equal completions of each prompt
    assert all(len({tuple(t) for t in texts(same)[i * K : (i + 1) * K]}) == 1 for i in range(P))


def test_uniforms_for_another_number_of_rows_are_refused(model):
    with pytest.raises(ValueError, match=r"\[P \* K, T\] = \[12, T\], got \[11, 8\]"):
        draw(model, numbers=uniforms(11))


@pytest.mark.parametrize("ends", [[1], [4, 1, 7]], ids=str)
def test_greedy_decoding_is_that_of_transformers(any_model, ends):
    input_ids, mask = left_pad(PROMPTS, 0)
    theirs = any_model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=T, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    ours = draw(any_model, k=1, ends=ends, top_k=1, temperature=0.3)
    assert torch.equal(ours.input_ids, theirs)
    assert (ours.logprobs == 0).all()  # one choice has probability 1


# --- drawing one token ----------------------------------------------------------------------------------


def chi_squared_p(counts, probs):
    """Return the probability of counts at least this far from n * probs, if they were drawn from probs."""
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    expected = counts.sum() * probs[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((possible.sum() - 1) / 2, statistic / 2).item()


def counts_of(tokens, vocab):
    return torch.bincount(tokens, minlength=vocab).double()


def truncated(logits, temperature, top_k=0, top_p=1.0):
    """The specification, for one row: walk down the sorted tokens."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    kept, mass, total = [], 0.0, probs[order].sum().item()
    for token in order:
        if mass / total >= top_p:
            break
        kept.append(token)
        mass += probs[token].item()
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_frequencies_are_those_of_the_truncated_distribution(settings):
    # fails by luck for one seed in a million; the seed is fixed
    n, logits = 20_000, torch.randn(22, generator=torch.Generator().manual_seed(0))
    rows = logits.expand(n, 22)
    tokens = sample_token(
        rows, uniforms(n, 1)[:, 0], temperature=settings["temperature"], kept=truncate(rows, **settings)
    )
    right = truncated(logits, **settings)
    assert chi_squared_p(counts_of(tokens, 22), right) > 1e-6
    if settings["temperature"] != 1.0:  # the test can tell: numbers drawn without the temperature fail it
        wrong = sample_token(rows, uniforms(n, 1)[:, 0], kept=truncate(rows, **settings))
        assert chi_squared_p(counts_of(wrong, 22), right) < 1e-6


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=str)
def test_first_tokens_of_a_model_have_its_frequencies(model, settings):
    # fails by luck for one seed in a million; the seed is fixed
    rollouts = draw(model, [[5, 6]], uniforms(4000, 1), k=4000, **settings)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1]
    assert chi_squared_p(counts_of(rollouts.completion_ids[:, 0], len(logits)), truncated(logits, **settings)) > 1e-6


def test_sample_token_inverts_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    numbers = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.99])
    assert sample_token(logits.expand(6, 3), numbers).tolist() == [0, 0, 1, 1, 2, 2]
    # among the kept 2 and 1, in this order, each has one half
    assert sample_token(logits.expand(6, 3), numbers, kept=torch.tensor([[2, 1, -1]] * 6)).tolist() == [
        2,
        2,
        1,
        1,
        1,
        1,
    ]
    # at temperature 1/2 the odds are squared: 4 : 1 : 1, so the first token reaches 2/3
    assert sample_token(logits.expand(2, 3), torch.tensor([0.66, 0.67]), temperature=0.5).tolist() == [0, 1]


@pytest.mark.parametrize("number", [0.0, 2**-24, 0.5, 1 - 2**-24, 1 - 2**-53])  # the last one is 1 in float32
@pytest.mark.parametrize("impossible", [[0], [21], [0, 1, 20, 21], list(range(1, 22))], ids=str)
def test_a_token_of_probability_zero_is_never_drawn(number, impossible):
    logits = torch.randn(50, 22, generator=torch.Generator().manual_seed(0))
    logits[:, impossible] = -torch.inf
    logits[25:, impossible] = -1e4  # not minus infinity, but exp rounds it to 0
    numbers = torch.full((50,), number, dtype=torch.float64)
    assert not torch.isin(sample_token(logits, numbers), torch.tensor(impossible)).any()
    kept = torch.tensor([[4, 2, -1, -1]]).expand(50, 4)
    assert torch.isin(sample_token(torch.zeros(50, 22), numbers, kept=kept), torch.tensor([2, 4])).all()


# --- small helpers --------------------------------------------------------------------------------------


def test_left_padding_ends_every_prompt_in_the_last_column():
    input_ids, mask = left_pad([[3], [4, 5, 6], [7, 8]], pad_id=9)
    assert input_ids.tolist() == [[9, 9, 3], [4, 5, 6], [9, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert left_pad([[9, 9]], pad_id=9)[1].tolist() == [[1, 1]]  # a real token that equals the padding is real


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [(5, 1, 5), (0, 1, 0), (None, 1, 1), (None, 0, 0), (None, None, 0), (10**6, 1, 1), (-1, 1, 1)],
)
def test_there_is_a_padding_id_for_any_tokenizer(pad, eos, expected):
    # a pad token that was added only to the tokenizer has no embedding in the model
    assert pad_token_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos), tiny_model()) == expected


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "expected"),
    [
        ((7, 4), 4, [4, 7]),
        (torch.tensor([7, 9]), 4, [4, 7, 9]),
        (torch.tensor(7), 4, [4, 7]),
        (-1, 4, [4]),
        ([7, 4], 4, [4, 7]),
        ([7, 9], 4, [4, 7, 9]),
        (7, 4, [4, 7]),
        (0, None, [0]),
        (None, 4, [4]),
        (None, None, []),
    ],
)
def test_the_end_ids_are_those_of_the_model_and_of_the_tokenizer(of_model, of_tokenizer, expected):
    model, tokenizer = tiny_model(), SimpleNamespace(eos_token_id=of_tokenizer)
    model.generation_config.eos_token_id = of_model
    assert end_token_ids(model, tokenizer) == expected
    assert end_token_ids(torch.nn.Linear(1, 1), tokenizer) == ([of_tokenizer] if of_tokenizer is not None else [])


def test_rollouts_move_to_a_device_with_all_fields(model):
    for rollouts in (draw(model), draw(model, top_k=3)):
        moved = rollouts.to("cpu")
        assert moved.num_tokens == rollouts.num_tokens
        assert (moved.kept is None) == (rollouts.kept is None)
        assert torch.equal(moved.input_ids, rollouts.input_ids)


@pytest.mark.parametrize("name", ["Qwen3Next", "Lfm2", "Mamba", "Mamba2"])
def test_hybrid_models_are_sampled_too_and_recurrent_ones_are_refused(name):
    """A cache that is not only keys and values; sizes small enough to be made here."""
    small = {"vocab_size": 21, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0, "eos_token_id": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    extra = {
        "Qwen3Next": heads | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                              "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
                              "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "Lfm2": heads | {"layer_types": ["conv", "full_attention"] * 2},
        "Mamba": {"state_size": 4},
        "Mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**small | extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids, mask = left_pad([[3, 4, 5], [6, 7]], pad_id=0)
    arguments = {"num_generations": 3, "uniforms": torch.rand(6, 5), "end_ids": [1], "pad_id": 0}
    if name.startswith("Mamba"):
        with pytest.raises(ValueError, match=f"{name}ForCausalLM keeps no KV cache"):
            sample(model, ids, mask, **arguments)
        return
    one = sample(model, ids[:1], mask[:1], **arguments | {"uniforms": arguments["uniforms"][:3]})
    scored = completion_logprobs(model, one.input_ids, one.attention_mask, one.num_tokens)
    torch.testing.assert_close(scored.where(one.completion_mask, 0.0), one.logprobs, atol=1e-4, rtol=0)


def test_a_float64_model_can_be_sampled():
    ids, mask = left_pad([[3, 4, 5]], pad_id=0)
    arguments = {"num_generations": 2, "uniforms": torch.rand(2, 4), "end_ids": [1], "pad_id": 0}
    double = sample(tiny_model().double(), ids, mask, **arguments)
    assert torch.equal(double.input_ids, sample(tiny_model(), ids, mask, **arguments).input_ids)
