"""Prompts: a dataset class, chat templates, and encoding."""

from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

Prompt = str | list[dict[str, str]]
Row = dict[str, Any]


class SimplePromptDataset:
    """Prompts, with columns for the reward functions.

    Args:
        prompts: strings or chats; a chat is a list of {"role": ..., "content": ...}.
        **columns: lists with one value per prompt, passed to the reward functions by name.
    Raises: ValueError if there is no prompt or a column has another length; TypeError for an invalid prompt.

    >>> SimplePromptDataset(["2+2=", "3+3="], answer=["4", "6"])[1]
    {'prompt': '3+3=', 'answer': '6'}
    """

    def __init__(self, prompts: Sequence[Prompt], **columns: Sequence):
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got one string. One prompt? Use [prompt].")
        for name, values in columns.items():
            if isinstance(values, str):
                raise TypeError(f"column {name!r} must be a list with one value per prompt, got one string.")
        self.columns = {"prompt": list(prompts), **{name: list(values) for name, values in columns.items()}}
        if "prompt" in columns:
            raise ValueError('the column name "prompt" is reserved for the prompts. Rename the other column.')
        size = len(self.columns["prompt"])
        if size == 0:
            raise ValueError("the dataset is empty: at least one prompt is needed.")
        for i, prompt in enumerate(self.columns["prompt"]):
            check_prompt(prompt, i)
        for name, values in self.columns.items():
            if len(values) != size:
                raise ValueError(f"column {name!r} has {len(values)} values for {size} prompts.")

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, index: int) -> Row:
        return {name: values[index] for name, values in self.columns.items()}

    def select(self, indices: Iterable[int]) -> "SimplePromptDataset":
        """Return some of the rows, like `datasets.Dataset.select`."""
        rows = [self[i] for i in indices]
        return SimplePromptDataset(**{("prompts" if n == "prompt" else n): [r[n] for r in rows] for n in self.columns})


def check_prompt(prompt: Any, index: int) -> None:
    """Raise TypeError if this is neither a text nor a chat, ValueError if it is empty."""
    is_chat = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) and isinstance(m["content"], str) for m in prompt)
    )
    if not isinstance(prompt, str) and not is_chat:
        raise TypeError(
            f'prompt {index} must be a string or a list of {{"role": ..., "content": text}}, got {repr(prompt)[:80]}.'
        )
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(f"prompt {index} is empty.")


def checked_dataset(dataset, name: str):
    """Return the dataset if a trainer can use it; otherwise raise TypeError or ValueError with the cure."""
    if isinstance(dataset, str | dict) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        got = f"{type(dataset).__name__}: take one split of it" if isinstance(dataset, dict) else repr(dataset)
        raise TypeError(f"{name} must be a SimplePromptDataset or a datasets.Dataset, got {got}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: at least one prompt is needed.")
    if not isinstance(dataset[0], dict) or "prompt" not in dataset[0]:
        found = ", ".join(dataset[0]) if isinstance(dataset[0], dict) else type(dataset[0]).__name__
        raise ValueError(f'{name} needs a column "prompt", found {found}. Plain strings? SimplePromptDataset(prompts).')
    if not isinstance(dataset, SimplePromptDataset):  # that class has checked its prompts
        for index, prompt in enumerate(dataset["prompt"]):
            check_prompt(prompt, index)
    if taken := {"prompts", "completions"} & set(dataset[0]):
        raise ValueError(
            f"{name} has a column {min(taken)!r}, the name of an argument of every reward function. Rename it."
        )
    return dataset


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids of a text, or of a chat in the tokenizer's template with a generation prompt.

    Raises: ValueError for a chat if the tokenizer has no chat template, or if there are no tokens.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are chats, but the tokenizer has no chat template. "
                "Use text prompts, or the tokenizer of an instruct model."
            )
        text = chat_text(tokenizer, prompt, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template adds them
    if not ids:
        raise ValueError(f"the tokenizer gives no tokens for the prompt {str(prompt)[:60]!r}.")
    return list(ids)


def chat_text(tokenizer, chat: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    """Return a chat as text in the tokenizer's template.

    Some templates reject a system message (Gemma's), and some drop it silently: its text is then put at the start of
    the user message.
    Raises: ValueError if the template rejects the chat.
    """
    roles = [message["role"] for message in chat[:2]]
    system = chat[0]["content"].strip() if roles == ["system", "user"] else ""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, tokenize=False)
        if system in text:
            return text
    except TemplateError as error:
        if not system:
            raise ValueError(
                f"the tokenizer's chat template rejects a prompt: {error}. Change the roles of its messages."
            ) from None
    first = {**chat[1], "content": f"{system}\n\n{chat[1]['content']}"}
    return chat_text(tokenizer, [first, *chat[2:]], add_generation_prompt=add_generation_prompt)


def longest_prompts(dataset, number: int = 8) -> list[Prompt]:
    """Return the longest prompts by characters: nearly always the longest in tokens, without encoding all of them."""
    prompts = [dataset[i]["prompt"] for i in range(len(dataset))]
    return sorted(prompts, key=lambda prompt: len(str(prompt)))[-number:]


def as_chats(dataset, system_prompt: str) -> SimplePromptDataset:
    """Return the rows with prompts as chats that begin with this system prompt; it replaces an existing one.

    >>> as_chats(SimplePromptDataset(["2+2="]), "Be brief.")[0]["prompt"]
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '2+2='}]
    """

    def chat(prompt: Prompt) -> Prompt:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": system_prompt}, *messages[messages[0]["role"] == "system" :]]

    rows = [dataset[i] for i in range(len(checked_dataset(dataset, "the dataset")))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return SimplePromptDataset([chat(prompt) for prompt in columns.pop("prompt")], **columns)
