"""Reward models and functions: a padded batch scores like its rows, and errors name the function."""

import functools
import math
import warnings
from itertools import count

import pytest
import torch
from conftest import CHAT, TEMPLATE, starting_tokenizer, tiny_architecture, tiny_model
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from grpo_lab.rewards.reward_models import CausalLMReward, Rewards, SequenceClassifierReward
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.tasks.pocket.make import make_tokenizer

PROMPTS = ["3,5,7:22=", "1+1=", CHAT, "9", "2,2,2:6="]
COMPLETIONS = ["3*5+7", "2", "", "(9-9)*9+9/9-9", "2+2+2"]


def classifier(num_labels=1, **changes):
    settings = {
        "vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(Qwen2Config(num_labels=num_labels, **settings | changes)).eval()


def causal_lm_reward(model, tokenizer=None):
    with pytest.warns(UserWarning, match="is a demonstration"):
        return CausalLMReward(model, tokenizer or starting_tokenizer(TEMPLATE))


def score(reward, completions=("a", "bb"), columns=None, **settings):
    prompts = [f"prompt {i}" for i in range(len(completions))]
    return Rewards(reward, make_tokenizer(), **settings)(prompts, list(completions), columns or {})


# --- sequence classifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, None], ids=["its own padding", "none"])
def test_a_classifier_gives_its_logit_and_a_batch_equals_its_rows(pad):
    tokenizer, model = starting_tokenizer(TEMPLATE), classifier(pad_token_id=pad)
    reward = SequenceClassifierReward(model, tokenizer)
    together = reward(PROMPTS, COMPLETIONS)
    alone = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    # by hand, without padding: the logit at the last token of the whole text
    texts = {0: "<eos>3,5,7:22=3*5+7", 2: "<eos>2+2=::"}  # a text; a chat of two turns, with one start and not two
    for i, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.score(model.model(ids).last_hidden_state)[0, -1, 0].item()
        assert together[i] == pytest.approx(expected, abs=1e-5)


def test_a_classifier_has_its_own_tokenizer():
    theirs = make_tokenizer()
    theirs.add_tokens(["3*5"])  # one token where the policy's tokenizer has three
    model = classifier(vocab_size=len(theirs))
    own, policys = SequenceClassifierReward(model, theirs), SequenceClassifierReward(model, make_tokenizer())
    assert Rewards(own, make_tokenizer())(["3,5,7:22="], ["3*5+7"], {}).total.tolist() == own(["3,5,7:22="], ["3*5+7"])
    assert own(["3,5,7:22="], ["3*5+7"]) != pytest.approx(policys(["3,5,7:22="], ["3*5+7"]))


def test_a_chat_without_a_template_is_joined_by_newlines_and_an_empty_text_is_scored():
    reward = SequenceClassifierReward(classifier(), starting_tokenizer())
    assert reward([CHAT], ["4"]) == pytest.approx(reward(["2+2=\n"], ["4"]))
    assert math.isfinite(SequenceClassifierReward(classifier(), make_tokenizer())([""], [""])[0])


def test_a_classifier_reads_the_first_token_once_and_the_last():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    reward = SequenceClassifierReward(classifier(), tokenizer)
    plain = SequenceClassifierReward(classifier(), make_tokenizer())
    assert reward(["2+2="], ["4"]) == reward(["<eos>2+2="], ["4"]) == plain(["<eos>2+2="], ["4<eos>"])
    assert reward([""], [""]) == plain(["<eos>"], ["<eos>"])


def test_a_completion_goes_on_with_the_words_that_its_chat_ends_with():
    reward = SequenceClassifierReward(classifier(), starting_tokenizer(TEMPLATE))
    begun = [*CHAT, {"role": "assistant", "content": "1+"}]
    assert reward([begun], ["3"]) == reward([CHAT], ["1+3"])


@pytest.mark.parametrize("pad", [-1, 10**6])
def test_a_padding_id_that_the_classifier_does_not_have_is_none(pad):
    model = classifier(pad_token_id=None)
    expected = SequenceClassifierReward(model, make_tokenizer())(["3,5,7:22=", "1"], ["3*5+7", "1"])
    model.config.pad_token_id = pad
    found = SequenceClassifierReward(model, make_tokenizer())(["3,5,7:22=", "1"], ["3*5+7", "1"])
    assert found == pytest.approx(expected)


def learned_positions(kind: str):
    """Reward models with 16 places for tokens, each with a learned position, and their tokenizer's tokens."""
    settings = {
        "vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
        "num_labels": 1, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    places = 18 if kind == "roberta" else 16  # its positions begin behind the id of padding, 1
    config = AutoConfig.for_model(kind, **settings, max_position_embeddings=places)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta"])
def test_a_text_longer_than_the_classifiers_positions_is_said(kind):
    reward = SequenceClassifierReward(learned_positions(kind), make_tokenizer())
    assert math.isfinite(reward(["2" * 10], ["3" * 6])[0])
    message = r"a prompt of 17 tokens with its completion does not fit into the 16 positions of the reward model"
    with pytest.raises(ValueError, match=message):
        Rewards(reward, make_tokenizer())(["2" * 10, "1"], ["3" * 7, "1"], {})
    reward.check_prompts(["2" * 10], 6)
    with pytest.raises(ValueError, match=r"10 tokens and max_new_tokens 7 does not fit.*Shorten"):
        reward.check_prompts(["1", "2" * 10], 7)


def test_a_text_longer_than_the_language_models_positions_is_said():
    reward = causal_lm_reward(tiny_architecture("gpt2", max_position_embeddings=16), make_tokenizer())
    assert math.isfinite(reward(["2" * 10], ["3" * 6])[0])
    with pytest.raises(ValueError, match=r"17 tokens with its completion does not fit into the 16 positions"):
        reward(["2" * 10], ["3" * 7])
    with pytest.raises(ValueError, match=r"10 tokens and max_new_tokens 7 does not fit"):
        reward.check_prompts(["2" * 10], 7)


@pytest.mark.parametrize("wrap", [SequenceClassifierReward, CausalLMReward])
def test_tokens_that_a_reward_model_does_not_know_are_said(wrap):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["x"])
    model = classifier(vocab_size=21) if wrap is SequenceClassifierReward else tiny_model()
    reward = wrap(model, tokenizer) if wrap is SequenceClassifierReward else causal_lm_reward(model, tokenizer)
    with pytest.raises(ValueError, match=r"gives token 21, but the reward model knows only 21\. Wrap it with its own"):
        reward(["2"], ["x"])


def test_a_classifier_with_two_outputs_is_refused():
    with pytest.raises(ValueError, match=r"one output, Qwen2ForSeq\w+ has 2\. Load it with num_labels=1"):
        Rewards(classifier(num_labels=2), make_tokenizer())


# --- causal language models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_lm_gives_the_mean_log_probability_per_completion_token(name):
    model, tokenizer = tiny_architecture(name), starting_tokenizer(TEMPLATE)
    found = causal_lm_reward(model)(PROMPTS, COMPLETIONS)
    for prompt, completion, value in zip(PROMPTS, COMPLETIONS, found, strict=True):
        head = encode_prompt(tokenizer, prompt)
        tail = tokenizer(completion, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        logprobs = []
        for t, token in enumerate(tail):  # the specification: token by token, without padding
            with torch.no_grad():
                logits = model(torch.tensor([head + tail[:t]])).logits[0, -1]
            logprobs.append(logits.log_softmax(-1)[token].item())
        assert value == pytest.approx(sum(logprobs) / len(logprobs), abs=1e-5)


def test_a_causal_lm_warns_when_it_is_made_and_not_again(model, tokenizer):
    with pytest.warns(UserWarning, match="demonstration: it rewards what the model finds likely") as caught:
        rewards = Rewards(model, tokenizer)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewards(["2+2="] * 2, ["4", "5"], {}).parts["mean_logprob"].max() < 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["classifier", "causal_lm"])
def test_models_score_without_dropout_and_keep_their_mode(kind, training):
    noisy = {"attention_dropout": 0.5}
    model = classifier(**noisy) if kind == "classifier" else tiny_model(**noisy)
    reward = SequenceClassifierReward(model, make_tokenizer()) if kind == "classifier" else causal_lm_reward(model)
    model.train(training)
    assert reward(["2+2="], ["4"]) == reward(["2+2="], ["4"])
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


# --- callables ------------------------------------------------------------------------------------------


def lengths(prompts, completions):
    return [float(len(c)) for c in completions]


def matches(prompts, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def all_columns(prompts, completions, **columns):
    return [float("".join(columns) == "answerlevel")] * len(completions)


class Reward:
    def __call__(self, prompts, completions, *, level):
        return torch.tensor(level)


@pytest.mark.parametrize(
    ("reward", "expected", "name"),
    [
        (lengths, [1.0, 2.0], "lengths"),
        (matches, [0.0, 1.0], "matches"),
        (all_columns, [1.0, 1.0], "all_columns"),
        (Reward(), [3.0, 4.0], "Reward"),
        (lambda prompts, completions: [prompts[1] == "prompt 1", 0], [1.0, 0.0], "<lambda>"),
        (functools.partial(matches, answer=["a", "x"]), [1.0, 0.0], "partial"),
    ],
)
def test_a_function_gets_the_columns_that_it_asks_for(reward, expected, name):
    columns = {"answer": ["x", "bb"], "level": [3, 4]}
    if isinstance(reward, functools.partial):
        columns.pop("answer")  # it has its own answers
    scored = score(reward, columns=columns)
    assert scored.total.tolist() == expected
    assert list(scored.parts) == [name]


def positional_only(prompts, completions, /, answer):
    return matches(prompts, completions, answer)


def turned(completions, prompts, **columns):
    return [float(len(c)) + 10 * (p == "prompt 1") for c, p in zip(completions, prompts, strict=True)]


def turned_with_a_column(answer, completions):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def with_a_default(completions, solution=None):
    return [float(len(c)) if solution is None else math.nan for c in completions]


def by_keyword_alone(*, completions, prompts):
    return turned(completions, prompts)


def everything_by_name(**columns):
    return turned(columns["completions"], columns["prompts"]) if "answer" in columns else []


@functools.wraps(lengths)
def wrapper(p, c):
    return lengths(p, c)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (turned, [1.0, 12.0]),
        (by_keyword_alone, [1.0, 12.0]),
        (everything_by_name, [1.0, 12.0]),
        (lambda completions, prompts: turned(completions, prompts), [1.0, 12.0]),
        (lambda completions, **columns: turned(completions, columns["prompts"]), [1.0, 12.0]),
        (lambda prompts, **columns: turned(columns["completions"], prompts), [1.0, 12.0]),
        (lambda p, c: turned(c, p), [1.0, 12.0]),
        (lambda p, c, **columns: turned(c, p), [1.0, 12.0]),
        (lambda prompts, c: turned(c, prompts), [1.0, 12.0]),
        (lambda p, completions: turned(completions, p), [1.0, 12.0]),
        (lambda *both: turned(*both[::-1]), [1.0, 12.0]),
        (lambda completions: lengths(None, completions), [1.0, 2.0]),
        (functools.partial(lambda scale, completions: [scale * len(c) for c in completions], 2.0), [2.0, 4.0]),
        (with_a_default, [1.0, 2.0]),
        (turned_with_a_column, [0.0, 1.0]),
        (positional_only, [0.0, 1.0]),
        (wrapper, [1.0, 2.0]),
    ],
)
def test_names_decide_the_order_of_the_arguments_and_places_where_there_are_none(reward, expected):
    assert score(reward, columns={"answer": ["x", "bb"]}).total.tolist() == expected


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda texts, answer: [1.0, 1.0], "takes no completions"),  # as completions, the answers would be wrong
        (lambda answer, texts: [1.0, 1.0], "needs the column 'texts'"),
        (lambda completions, texts: [1.0, 1.0], "needs the column 'texts'"),
        (lambda prompts, solution=None: [1.0, 1.0], "takes no completions"),
        (lambda prompts: [1.0, 1.0], "takes no completions"),
        (lambda c, **columns: [1.0, 1.0], "takes no completions"),
    ],
)
def test_arguments_that_cannot_be_told_apart_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        score(reward, columns={"answer": ["x", "bb"]})


def test_several_functions_are_weighted_and_one_that_does_not_score_is_left_out():
    some = {"first": [1.0, None, None, 2.0], "second": [10.0, 10.0, math.nan, None]}
    rewards = [lambda prompts, completions, values=v: values for v in some.values()]
    scored = score(rewards, "abcd", weights=[2, 0.5])
    # 2 * 1 + 0.5 * 10 = 7;  0.5 * 10 = 5;  nobody scored: NaN, which is not 0;  2 * 2 = 4
    assert scored.total.tolist() == pytest.approx([7.0, 5.0, math.nan, 4.0], nan_ok=True)
    assert scored.total.dtype == torch.float32
    assert list(scored.parts) == ["<lambda>_0", "<lambda>_1"]  # two of one name are numbered
    assert scored.parts["<lambda>_1"].tolist() == pytest.approx([10, 10, math.nan, math.nan], nan_ok=True)  # unweighted
    assert score((lengths, lengths)).total.tolist() == [2.0, 4.0]  # without weights: 1 each


@pytest.mark.filterwarnings("ignore:A causal LM")
def test_models_and_functions_may_stand_side_by_side(tokenizer):
    scored = Rewards([lengths, classifier(), tiny_model()], tokenizer)(["2+2="], ["4"], {"answer": ["4"]})
    assert list(scored.parts) == ["lengths", "reward_model", "mean_logprob"]
    assert scored.total.item() == pytest.approx(sum(v.item() for v in scored.parts.values()))


def broken(prompts, completions):
    return [1.0, {}["answer"]]


def returning(*values):
    def reward(prompts, completions):
        return values if len(values) != 1 else values[0]

    return reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (broken, "'broken' raised KeyError: 'answer'"),
        (matches, "'matches' raised LookupError: .*needs the column 'answer', and the dataset has prompt"),
        (returning(0.5), "'reward' must return a list with one number per completion, got 0.5"),
        (returning(1.0), "'reward' must return a list .*got 1.0"),
        (returning(None), "'reward' must return a list .*got None"),
        (returning([1.0]), "'reward' returned 1 values for 2 completions"),
        (returning({0: 1.0, 1: 0.0}), r"'reward' must return a list .*got \{0: 1.0"),
        (returning({1.0, 2.0}), r"'reward' must return a list .*got \{1.0"),
        (returning({0: 1.0, 1: 0.0}.keys()), "'reward' must return a list .*got dict_keys"),
        (returning(b"ab"), "'reward' must return a list .*got b'ab'"),
        (returning(count()), "'reward' returned 3 or more values for 2 completions"),
        (returning(1.0, 10**5000), "'reward' returned inf for the completion 'bb'"),
        (returning(1.0, "2"), "'reward' must return numbers or None, got '2'"),
        (returning(1.0, [2.0]), r"'reward' must return numbers or None, got \[2.0\]"),
        (returning(1.0, 2j), "'reward' must return numbers or None, got 2j"),
        (returning(torch.ones(2, 2)), "'reward' must return numbers or None, got tensor"),
        (returning(1.0, math.inf), "'reward' returned inf for the completion 'bb'"),
        (returning(-math.inf, 1.0), "'reward' returned -inf for the completion 'a'"),
        (returning(1.0, 1e39), r"'reward' returned 1e\+39 for the completion 'bb'"),  # infinite in float32
    ],
)
def test_a_broken_reward_function_is_named(reward, message):
    with pytest.raises(ValueError, match=f"the reward function {message}"):
        score([lengths, reward])


@pytest.mark.parametrize(
    ("reward", "weights", "error", "message"),
    [
        ([lengths, matches], [1.0], ValueError, "got 1 reward_weights for 2 reward functions"),
        ([], None, ValueError, "at least one reward function is needed"),
        ("accuracy", None, TypeError, r"a model or a callable f\(prompts, completions, \*\*columns\), got 'accuracy'"),
        ([lengths, None], None, TypeError, "got None"),
    ],
)
def test_what_is_neither_a_model_nor_a_callable_is_refused(reward, weights, error, message):
    with pytest.raises(error, match=message):
        Rewards(reward, make_tokenizer(), weights)


def test_a_classifier_without_a_padding_token_scores_at_the_last_token(tokenizer):
    """Its tokenizer pads with the end token, and the texts end in it: the last token must not count as padding."""
    from grpo_lab import SequenceClassifierReward

    model, tokenizer = classifier(pad_token_id=None), tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    tokenizer.pad_token = "<eos>"
    chats = [[{"role": "user", "content": "1+1="}], [{"role": "user", "content": "2*3-1="}]]
    got = SequenceClassifierReward(model, tokenizer)(chats, ["2", "5"])
    for chat, answer, score in zip(chats, ["2", "5"], got, strict=True):
        ids = tokenizer(f"{chat[0]['content']}<eos>{answer}<eos>", return_tensors="pt")["input_ids"]
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        assert score == pytest.approx(model.score(hidden).item(), abs=1e-5)


@pytest.mark.parametrize("reward", [1e16, -1e20, 1e39])
def test_a_reward_whose_square_would_overflow_is_refused(tokenizer, reward):
    def huge(prompts, completions):
        return [reward] * len(completions)

    with pytest.raises(ValueError, match=r"'huge' returned .* must be finite, and at most 1e"):
        Rewards(huge, tokenizer)(["1+1="], ["2"], {})
