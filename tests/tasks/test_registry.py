"""Tasks: GSM8K in its own form, as a file where the Hub would be, and whatever flags put in its place."""

import json
import re
from argparse import Namespace
from dataclasses import replace

import pytest
from conftest import TEMPLATE
from transformers import AutoTokenizer

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.cli import main as cli
from grpo_lab.cli import parser
from grpo_lab.cli import train as train_command
from grpo_lab.cli.loading import choose_model, load_data
from grpo_lab.rewards.verifiable import countdown, final_number, marked_answer, numeric_answer
from grpo_lab.rollout import prompts
from grpo_lab.tasks import gym
from grpo_lab.tasks.countdown import countdown_dataset
from grpo_lab.tasks.gsm8k import MARK_THE_ANSWER, check_numbers, gsm8k
from grpo_lab.tasks.registry import TASKS, find_task
from grpo_lab.tasks.task import QWEN
from grpo_lab.training.config import PRESETS

datasets = pytest.importorskip("datasets")

# in GSM8K's form: a calculator's notes in << >>, thousands with a comma, a minus, and the answer behind ####
PROBLEMS = [
    ("Natalia has 48 clips and gives half away. How many?", "She gives 48/2 = <<48/2=24>>24 clips.\n#### 24", 24),
    (
        "A car costs $1,000 and a van $200 more.",
        "The van costs 1000 + 200 = $<<1000+200=1200>>1,200.\n#### 1,200",
        1200,
    ),
    ("It is 3 degrees and falls by 10.", "It is then 3 - 10 = <<3-10=-7>>-7 degrees.\n#### -7", -7),
]
QUICK = ["--max-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--max-new-tokens", "4"]
QUICK += ["--warmup-steps", "0", "--num-generations", "2", "--eval-steps", "1"]


def gsm8k_rows(copies: int = 1) -> "datasets.Dataset":
    """Its two columns, with problems that are different and alike."""
    rows = [(f"{question} ({copy})", answer) for copy in range(copies) for question, answer, _ in PROBLEMS]
    return datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    gsm8k_rows(2).to_json(str(file))
    return str(file)


@pytest.fixture
def hub(monkeypatch):
    """What load_dataset is asked for, and rows in GSM8K's form as its answer."""
    asked = []

    def load_dataset(**where):
        asked.append(where)
        return gsm8k_rows({"train": 4, "test": 5}[where["split"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(scope="session")
def chat_model(model_folder, tmp_path_factory):
    """The tiny model, with room for a system prompt and a template for chats."""
    from conftest import tiny_model

    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(chat_model, tmp_path, capsys):
    """Run `grpo-lab train` on the tiny chat model: (exit status, what it printed, its complaint)."""

    def run(*arguments, model=chat_model):
        status = cli.main(["train", "--model-name", model, "--output-dir", str(tmp_path / "out"), *QUICK, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, " ".join(s for s in captured.err.splitlines() if s.startswith("grpo-lab:"))

    return run


def parse(*arguments):
    return cli.make_parser().parse_args(["train", *arguments])


def data(options, task, rewards, seed):
    return load_data(task, rewards, seed, **{name: getattr(options, name) for name in train_command.DATA_FLAGS})


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- GSM8K -----------------------------------------------------------------------------------------------


def test_gsm8k_is_two_splits_of_the_hub_as_chats_and_its_test_problems_are_drawn_by_the_seed(hub):
    training, held_out = gsm8k(seed=0)
    assert sorted((w["path"], w["name"], w["split"]) for w in hub) == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
    ]
    assert (len(training), len(held_out)) == (12, 15)
    system, user = training[1]["prompt"]
    assert system == {"role": "system", "content": MARK_THE_ANSWER}
    assert user == {"role": "user", "content": f"{PROBLEMS[1][0]} (0)"}

    def order(seed):
        rows = gsm8k(seed=seed)[1]
        return [rows[i]["prompt"][1]["content"] for i in range(len(rows))]

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))


@pytest.mark.parametrize(("question", "answer", "number"), PROBLEMS)
def test_the_answers_of_gsm8k_are_read_as_the_number_behind_the_mark(question, answer, number):
    assert final_number(answer) == number
    completions = [f"So\n#### {number:,}", f"It is {number}.", f"#### {number + 1}\n{number}", "#### "]
    assert numeric_answer([question] * 4, completions, answer=[answer] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert marked_answer([question] * 4, completions) == [1.0, 0.0, 0.0, 0.0]


def test_what_the_model_is_asked_for_is_what_the_form_rewards():
    example = MARK_THE_ANSWER.splitlines()[-1]
    assert marked_answer(["?"], [f"6 * 7 = 42\n{example}"]) == numeric_answer(["?"], [example], answer=[42]) == [1.0]


def test_before_during_and_after_the_run_held_out_problems_are_judged_by_the_number_alone(train, problems, tmp_path):
    # the tiny model never answers rightly, so rewards of ours stand in for a model that is right and misses the form
    (tmp_path / "mine.py").write_text(
        "def right(prompts, completions, answer):\n"
        "    return [float('Natalia' in p[-1]['content']) for p in prompts]\n"
        "def form(prompts, completions, answer):\n    return [1.0 for c in completions]\n"
    )
    mine = [f"{tmp_path / 'mine.py'}:{name}" for name in ("right", "form")]
    arguments = ["--preset", "gsm8k", "--dataset", problems, "--eval-dataset", problems, "--max-eval-samples", "3"]
    rewards = ["--reward", mine[0], "--reward", mine[1], "--reward-weights", "1", "0.2"]
    status, out, complaint = train(*arguments, *rewards)
    assert (status, complaint) == (0, "")
    words = r"right, {}: 33\.3%   \(95 %: 6\.1% to 79\.2%\)"  # one of three, by Wilson
    for label in ("sampled", "greedy", "at least one of 2"):
        assert len(re.findall(words.format(label), out)) == 4  # before, after each of two steps, after
    assert out.count("on prompts kept for evaluation") == 2
    assert (
        out.index("Before training") < out.index("After step 1,") < out.index("After step 2,") < out.index("After tr")
    )
    rows = lines_of(tmp_path / "out/metrics.jsonl")
    assert [row["eval/pass@1"] for row in rows] == [1 / 3, 1 / 3]
    assert [row["eval/reward"] for row in rows] == pytest.approx([1 / 3 + 0.2] * 2)


def test_the_preset_trains_the_model_of_a_flag_on_gsm8k_with_its_two_rewards(train, hub, tmp_path):
    status, out, complaint = train("--preset", "gsm8k")
    assert (status, complaint) == (0, "")
    assert "Settings: preset gsm8k; changed: " in out
    assert "12 prompts · 2 optimizer steps of 2 prompts × 2 completions" in out
    assert "on 15 prompts kept for evaluation" in out
    row = lines_of(tmp_path / "out/completions.jsonl")[0]
    assert set(row["rewards"]) == {"numeric_answer", "marked_answer"}
    assert row["reward"] == pytest.approx(row["rewards"]["numeric_answer"] + 0.2 * row["rewards"]["marked_answer"])
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


def test_the_last_evaluation_of_the_run_is_not_made_twice(train, problems, monkeypatch):
    evaluations, evaluate = [], GRPOTrainer.evaluate

    def counted(self, *arguments, **settings):
        evaluations.append(self.step)
        return evaluate(self, *arguments, **settings)

    monkeypatch.setattr(GRPOTrainer, "evaluate", counted)
    assert train("--preset", "gsm8k", "--dataset", problems, "--eval-dataset", problems)[0] == 0
    assert evaluations == [0, 1, 2]


def test_the_task_in_python_is_four_names(hub, chat_model, tmp_path):
    from transformers import AutoModelForCausalLM

    task = find_task("gsm8k")
    training, held_out = task.data(0)
    quick = {"max_new_tokens": 4, "max_steps": 1, "warmup_steps": 0, "output_dir": str(tmp_path / "out")}
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(chat_model), None, list(task.rewards),
        AutoTokenizer.from_pretrained(chat_model), GRPOConfig.preset("gsm8k", **quick), training,
        held_out.select([0, 1]),
    )  # fmt: skip
    assert "eval/pass@8_high" in trainer.train()[-1]


# --- which task, which settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "task", "model", "settings"),
    [
        ([], "pocket", "pocket", "pocket"),
        (["--model-name", "pocket"], "pocket", "pocket", "pocket"),
        (["--preset", "pocket", "--model-name", "some/model"], "pocket", "some/model", "pocket"),
        (["--dataset", "x.txt"], None, "pocket", "pocket"),
        (["--model-name", "some/model"], None, "some/model", "grpo"),
        (["--preset", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k", "--preset", "gsm8k"], "gsm8k", QWEN, "gsm8k"),
        (["--task", "gsm8k", "--model-name", "some/model"], "gsm8k", "some/model", "gsm8k"),
        (["--preset", "gsm8k", "--dataset", "x.jsonl"], "gsm8k", QWEN, "gsm8k"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_command_trains(arguments, task, model, settings):
    options = parse(*arguments)
    assert parser.task_from(options) is (TASKS[task] if task else None)
    assert choose_model(options.model_name, parser.task_from(options)) == model
    assert parser.config_from(options)[0] == GRPOConfig.preset(settings)


def test_a_variant_is_laid_over_a_task_and_flags_over_both():
    config, source = parser.config_from(parse("--task", "gsm8k", "--preset", "dr_grpo", "--kl-coef", "0.5"))
    assert config == GRPOConfig(**PRESETS["gsm8k"] | PRESETS["dr_grpo"] | {"kl_coef": 0.5})
    assert source == "preset gsm8k + preset dr_grpo; changed: kl_coef=0.5"


def test_the_weights_of_a_task_are_for_its_own_rewards():
    assert len(PRESETS["gsm8k"]["reward_weights"]) == len(TASKS["gsm8k"].rewards)
    assert parser.config_from(parse("--preset", "gsm8k", "--reward", "exact_answer"))[0].reward_weights is None
    assert parser.config_from(parse("--task", "pocket", "--preset", "gsm8k"))[0].reward_weights is None
    given = parse("--preset", "gsm8k", "--reward", "exact_answer", "--reward-weights", "3")
    assert parser.config_from(given)[0].reward_weights == (3.0,)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_where_it_comes_from_and_has_a_preset(name, capsys):
    task = TASKS[name]
    assert task.preset in PRESETS
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert task.source in " ".join(capsys.readouterr().out.split())


def test_the_pocket_task_is_the_default_run():
    task = TASKS["pocket"]
    training, held_out = task.data(3)
    assert (len(training), len(held_out), task.rewards) == (2048, 400, (countdown,))
    assert training[0] == countdown_dataset(2048, seed=3)[0]
    assert not set(training.columns["prompt"]) & set(held_out.columns["prompt"])


# --- any dataset -----------------------------------------------------------------------------------------


def test_any_file_with_prompts_and_answers_is_three_flags(train, tmp_path):
    file = tmp_path / "sums.csv"
    file.write_text("sum,result,answer\n1+1=,2,wrong\n2+2=,4,wrong\n")
    columns = ["--prompt-column", "sum", "--answer-column", "result"]
    arguments = ["--dataset", str(file), "--eval-dataset", str(file), *columns]
    status, out, complaint = train(*arguments, "--reward", "numeric_answer", "--system-prompt", "Be brief.")
    assert (status, complaint) == (0, "")
    assert "on 2 prompts kept for evaluation" in out
    row = lines_of(tmp_path / "out/completions.jsonl")[0]
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    options = Namespace(**vars(parse(*arguments)) | {"eval_dataset": None})
    read, _ = data(options, None, [numeric_answer], 0)
    assert list(read["answer"]) == [2, 4]


def test_a_system_prompt_takes_the_place_of_the_one_that_is_there(hub):
    chats = prompts.as_chats(gsm8k()[0], "Be brief.")
    assert [m["role"] for m in chats[0]["prompt"]] == ["system", "user"]
    assert chats[0]["prompt"][0]["content"] == "Be brief."
    talk = [
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "?"},
    ]
    assert prompts.as_chats(SimplePromptDataset([talk], answer=["4"]), "Be brief.")[0] == {
        "prompt": [{"role": "system", "content": "Be brief."}, *talk],
        "answer": "4",
    }


def test_the_evaluation_of_a_hub_dataset_takes_its_test_split(hub):
    options = parse("--task", "gsm8k", "--dataset", "a/b", "--eval-dataset", "c/d:e")
    training, held_out = data(options, TASKS["gsm8k"], [numeric_answer], 0)
    assert [(w["path"], w["name"], w["split"]) for w in hub] == [("a/b", None, "train"), ("c/d", "e", "test")]
    assert (len(training), len(held_out)) == (12, 15)
    assert training[0]["prompt"][0]["content"] == MARK_THE_ANSWER


def test_a_task_evaluates_on_as_many_as_it_says_unless_a_flag_says_how_many(hub, monkeypatch):
    def sizes(*arguments):
        return [len(rows) for rows in data(parse(*arguments), TASKS["gsm8k"], [numeric_answer], 0)]

    assert sizes("--max-train-samples", "5") == [5, 15]
    monkeypatch.setitem(TASKS, "gsm8k", replace(TASKS["gsm8k"], max_eval_samples=4))
    assert sizes() == [12, 4]
    assert sizes("--max-eval-samples", "7") == [12, 7]
    assert sizes("--max-eval-samples", "700") == [12, 15]


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (
            [{}],
            ["--prompt-column", "ask"],
            "no column 'ask', only question, answer. Name the right one with --prompt-c",
        ),
        (
            [{}],
            ["--answer-column", "gold"],
            "no column 'gold', only prompt, answer. Name the right one with --answer-c",
        ),
        ([{}, {"answer": "seven"}], [], "answer 1 has no number: 'seven'"),
        ([{}, {"answer": " "}], [], "answer 1 is empty"),
        ([{}, {"answer": None}], ["--reward", "exact_answer"], "answer 1 is empty"),
        ([{"question": ""}], [], "prompt 0 is empty"),
        ([{"completions": 3}], [], "a column 'completions', the name of an argument of every reward function. Rename"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_named_with_what_is_wrong(train, tmp_path, rows, arguments, message):
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(json.dumps({"question": "a", "answer": "#### 1"} | row) for row in rows))
    status, _, complaint = train("--preset", "gsm8k", "--dataset", str(file), "--eval-dataset", str(file), *arguments)
    assert status == 2
    assert message in complaint


@pytest.mark.parametrize("reward", ["numeric_answer", "exact_answer"])
def test_a_reward_that_compares_says_at_once_that_there_is_nothing_to_compare_with(train, tmp_path, reward):
    (tmp_path / "prompts.txt").write_text("1+1=")
    status, _, complaint = train("--dataset", str(tmp_path / "prompts.txt"), "--reward", reward)
    assert status == 2
    assert "has no column 'answer', only prompt. Name the right one with --answer-column" in complaint


def test_a_task_with_data_of_ones_own_says_what_evaluation_needs(train, problems):
    status, _, complaint = train("--preset", "gsm8k", "--dataset", problems)
    assert status == 2
    assert "eval_steps is 1, but there is no eval_dataset to evaluate on (--eval-dataset)" in complaint


def test_answers_without_a_reward_to_compare_them_are_an_error(train, problems):
    status, _, complaint = train("--dataset", problems, "--prompt-column", "question", "--answer-column", "answer")
    assert status == 2
    assert "--answer-column needs a reward that compares with the answers: --reward numeric_answer" in complaint


def test_without_the_hub_the_cure_is_a_file(train, monkeypatch):
    def no_network(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    status, _, complaint = train("--preset", "gsm8k")
    assert status == 2
    assert "could not read the dataset openai/gsm8k:main: Couldn't reach" in complaint
    assert "give files: --dataset FILE --eval-dataset FILE" in complaint


def test_without_the_hub_the_cure_for_the_model_is_a_folder(train, problems, monkeypatch):
    from transformers import AutoTokenizer

    def no_network(*_, **__):
        raise OSError("We couldn't connect to the Hub\nand more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", no_network)
    data = ["--dataset", problems, "--eval-dataset", problems]
    status, _, complaint = train("--preset", "gsm8k", *data, model="Qwen/Qwen2.5-0.5B-Instruct")
    assert status == 2
    assert "could not load the model Qwen/Qwen2.5-0.5B-Instruct (OSError: We couldn't connect to the Hub)" in complaint
    assert "Without a network, give a folder" in complaint


def test_a_tokenizer_without_a_chat_template_is_said(train, problems, model_folder):
    status, _, complaint = train(
        "--task", "gsm8k", "--dataset", problems, "--eval-dataset", problems, model=model_folder
    )
    assert status == 2
    assert "the tokenizer has no chat template" in complaint


def test_an_unknown_task_lists_those_there_are(train):
    status, _, complaint = train("--task", "GSM8K")
    assert status == 2
    assert "there is no task 'GSM8K'. Tasks: pocket, countdown4, gsm8k, reasoning-gym:NAME." in complaint


def test_the_first_answer_without_a_number_is_named():
    check_numbers(SimplePromptDataset(["a", "b"], answer=["#### 1", 2.5]), "mine")
    with pytest.raises(
        ValueError, match=r"^mine: answer 1 has no number: 'x{60}'\. For texts there is --reward exact_ans"
    ):
        check_numbers(SimplePromptDataset(["a", "b"], answer=["1", "x" * 99]), "mine")


# --- reasoning-gym ---------------------------------------------------------------------------------------


@pytest.fixture
def few_problems(monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(gym, "GYM_PROMPTS", 6)
    monkeypatch.setattr(gym, "GYM_HELD_OUT", 4)


def test_a_task_of_reasoning_gym_is_made_from_the_seed_and_scored_by_its_own_rule(few_problems):
    task = find_task("reasoning-gym:basic_arithmetic")
    training, held_out = task.data(5)
    assert (len(training), len(held_out)) == (6, 4)
    again, other = task.data(5)[0], task.data(6)[0]
    assert [training[i] for i in range(6)] == [again[i] for i in range(6)]
    assert not {str(other[i]["prompt"]) for i in range(6)} & {str(training[i]["prompt"]) for i in range(6)}
    for row in (training[5], held_out[0]):
        answers = [f"I think.\n#### {row['answer']}", row["answer"], "#### 1e9", ""]
        scores = task.rewards[0](["?"] * 4, answers, problem=[row["problem"]] * 4, answer=[row["answer"]] * 4)
        assert scores[:2] == [1.0, 1.0]
        assert max(scores[2:]) < 1


def test_what_is_held_out_never_occurs_in_training(few_problems, monkeypatch):
    monkeypatch.setattr(gym, "GYM_PROMPTS", 60)
    training, held_out = find_task("reasoning-gym:leg_counting").data(0)
    some = find_task("reasoning-gym:coin_flip").data(0)  # few coins: many of its problems come twice
    for first, second in ((training, held_out), some):
        assert not set(map(str, first.columns["prompt"])) & set(map(str, second.columns["prompt"]))


def test_a_task_with_one_problem_has_nothing_to_hold_out(few_problems, monkeypatch):
    import reasoning_gym

    one = [{"question": "2+2=", "answer": 4}]
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, seed, size: one * size)
    with pytest.raises(ValueError, match="has too few problems: all held-out ones occur in training too"):
        find_task("reasoning-gym:leg_counting").data(0)


def test_a_task_of_reasoning_gym_trains(train, few_problems, tmp_path):
    status, out, complaint = train("--task", "reasoning-gym:leg_counting")
    assert (status, complaint) == (0, "")
    assert "6 prompts · 2 optimizer steps" in out
    assert "on 4 prompts kept for evaluation" in out
    assert set(lines_of(tmp_path / "out/completions.jsonl")[0]["rewards"]) == {"leg_counting"}


def test_an_unknown_task_of_reasoning_gym_gets_a_likely_one(train, few_problems):
    status, _, complaint = train("--task", "reasoning-gym:countdwon")
    assert status == 2
    assert "reasoning-gym has no task 'countdwon'. Did you mean countdown" in complaint


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        (["--task", "reasoning-gym:countdown"], "reasoning_gym", "reasoning-gym"),
        (["--reward", "math_answer"], "math_verify", "math-verify"),
    ],
)
def test_a_package_that_is_not_there_is_one_command_away(train, problems, monkeypatch, arguments, module, package):
    from grpo_lab.rewards import isolated as apart

    there = apart.importlib.util.find_spec
    monkeypatch.setattr(apart.importlib.util, "find_spec", lambda name: None if name == module else there(name))
    apart.GraderProcess.of.cache_clear()
    status, _, complaint = train("--dataset", problems, "--prompt-column", "question", *arguments)
    assert status == 2
    assert f"needs one more package: pip install -c constraints.txt {package}" in complaint
