"""GSM8K: grade-school word problems, from the Hugging Face Hub."""

from random import Random

from grpo_lab.rewards.verifiable import final_number

MARK_THE_ANSWER = """\
Think step by step. Then finish with a line that holds only #### and the answer, a single number, like this:
#### 42"""


def gsm8k(seed: int = 0):
    """Load GSM8K from the Hub: its 7,473 training problems, and its 1,319 test problems in an order drawn by the seed.

    Prompts are chats whose system turn asks for the format of GSM8K's answers, a last line `#### 42`.
    Source: Cobbe et al., *Training Verifiers to Solve Math Word Problems* (arXiv 2110.14168).
    """
    from grpo_lab.rollout.prompts import as_chats
    from grpo_lab.tasks.files import load_prompts

    def split(name: str):
        rows = load_prompts("openai/gsm8k:main", prompt_column="question", answer_column="answer", split=name)
        check_numbers(rows, f"GSM8K's split {name!r}")
        return as_chats(rows, MARK_THE_ANSWER)

    held_out = split("test")
    return split("train"), held_out.select(Random(f"{seed}/gsm8k").sample(range(len(held_out)), len(held_out)))


def check_numbers(dataset, name: str) -> None:
    """Raise ValueError that names the first answer without a number, before training starts."""
    for i in range(len(dataset)):
        answer = str(dataset[i]["answer"])
        if final_number(answer) is None:
            raise ValueError(
                f"{name}: answer {i} has no number: {answer[:60]!r}. For texts there is "
                "--reward exact_answer, for LaTeX math_answer."
            )
