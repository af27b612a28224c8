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
    """Raise TypeError if this is neither a text nor a chat, ValueError if it is empty or no valid Unicode."""
    is_chat = (
        isinstance(prompt, list)
        and prompt
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    )
    if not isinstance(prompt, str) and not is_chat:
        raise TypeError(
            f'prompt {index} must be a string or a list of {{"role": ..., "content": text}}, got {repr(prompt)[:80]}.'
        )
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError(f"prompt {index} is empty.")
    for text in [prompt] if isinstance(prompt, str) else [text for m in prompt for text in (m["role"], m["content"])]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {index} has half a character, {text[error.start]!r} at {error.start}: a lone surrogate. "
                "Remove it, or read the file anew with its true encoding."
            ) from None


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
        for index, prompt in enumerate(prompt_column(dataset)):
            check_prompt(prompt, index)
    if taken := {"prompts", "completions"} & set(dataset[0]):
        raise ValueError(
            f"{name} has a column {min(taken)!r}, the name of an argument of every reward function. Rename it."
        )
    return dataset


def prompt_column(dataset) -> Sequence[Prompt]:
    """Return the prompts of all rows."""
    if isinstance(dataset, SimplePromptDataset):
        return dataset.columns["prompt"]
    if hasattr(dataset, "column_names"):  # a datasets.Dataset reads a column much faster than rows
        return dataset["prompt"]
    return [dataset[i]["prompt"] for i in range(len(dataset))]


def encode_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Return the token ids of one prompt; see `encode_prompts`."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of texts and chats, ready for the model to go on.

    A text gets the special tokens with which the tokenizer begins texts, unless it has them already, and none of those
    with which it ends them. A chat is written in the tokenizer's template, with a generation prompt; one that ends with
    the assistant's words is left open behind them.
    Raises: ValueError for a chat if the tokenizer has no chat template, or if there are no tokens.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [chat_text(tokenizer, prompt, for_completion=True) for prompt in prompts if not isinstance(prompt, str)]
    text_ids = iter(encode_texts(tokenizer, texts, for_completion=True) if texts else ())
    # the template writes the special tokens of a chat
    chat_ids = iter(tokenizer(chats, add_special_tokens=False)["input_ids"] if chats else ())
    ids = [list(next(text_ids if isinstance(prompt, str) else chat_ids)) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise ValueError(f"the tokenizer gives no tokens for the prompt {str(prompt)[:60]!r}.")
    return ids


def encode_texts(tokenizer, texts: list[str], *, for_completion: bool = False) -> list[list[int]]:
    """Return the token ids of texts with the tokenizer's special tokens, of which none is written twice at the start.

    Args:
        for_completion: leave out the special tokens that end a text; a text without tokens then stays empty.
    """
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    probe = next((i for i, ids in enumerate(plain) if ids), 0)
    whole = tokenizer(texts[probe])["input_ids"]
    size = len(plain[probe])
    start = next((i for i in range(len(whole) - size + 1) if whole[i : i + size] == plain[probe]), None)
    if start is None:  # a tokenizer that does not merely put tokens around a text
        return tokenizer(texts)["input_ids"]
    before, after = whole[:start], whole[start + size :]
    # What ends a text, </s> or [SEP], would stand before every completion. But some models begin to write behind their
    # first token, and their tokenizer puts it after the text (ChatGLM: "[gMASK] <sop>").
    begin, *ends = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "sep", "pad"))
    if for_completion and after and (after[-1] in ends or after[-1] != begin):
        after = []
    whole = [[*(() if ids[:start] == before else before), *ids, *after] for ids in plain]
    return [ids if of_text or not for_completion else [] for ids, of_text in zip(whole, plain, strict=True)]


def chat_text(tokenizer, chat: list[dict[str, str]], *, for_completion: bool = False) -> str:
    """Return a chat as text in the tokenizer's template.

    Some templates reject a system message (Gemma's), and some drop it silently: its text is then put at the start of
    the user message.

    Args:
        for_completion: end where the model is to write: with a generation prompt, or behind the last words of the
            assistant if the chat ends with them.
    Raises: ValueError if there is no template, or it rejects the chat.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are chats, but the tokenizer has no chat template. "
            "Use text prompts, or the tokenizer of an instruct model."
        )
    roles = [message["role"] for message in chat[:2]]
    system = chat[0]["content"].strip() if roles == ["system", "user"] else ""
    try:
        text = _in_template(tokenizer, chat, for_completion)
        if not system:
            return text
        # Does the template write it? It may change white space or escape characters, so look at what another does.
        other = {**chat[0], "content": f"{system} {system}"}
        if text != _in_template(tokenizer, [other, *chat[1:]], for_completion):
            return text
    except TemplateError as error:
        if not system:
            raise ValueError(
                f"the tokenizer's chat template rejects a prompt: {error}. Change the roles of its messages."
            ) from None
    first = {**chat[1], "content": f"{system}\n\n{chat[1]['content']}"}
    return chat_text(tokenizer, [first, *chat[2:]], for_completion=for_completion)


def _in_template(tokenizer, chat: list[dict[str, str]], for_completion: bool) -> str:
    if not for_completion or chat[-1]["role"] != "assistant":
        return tokenizer.apply_chat_template(chat, add_generation_prompt=for_completion, tokenize=False)
    words = chat[-1]["content"].rstrip()
    try:
        text = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    except ValueError:  # the template does not write them as they are
        text = None
    if not words or text is None or not text.rstrip().endswith(words):
        raise ValueError(
            f"a prompt ends with the assistant's words {words[-60:]!r}, which the tokenizer's chat template does not "
            "write as they are, so they cannot be continued. Leave that message out, or give the prompt as a text."
        )
    return text


def longest_prompts(dataset, number: int = 8) -> list[Prompt]:
    """Return the longest prompts in UTF-8 bytes: nearly always the longest in tokens, without encoding all of them."""
    return sorted(prompt_column(dataset), key=num_bytes)[-number:]


def num_bytes(prompt: Prompt) -> int:
    """Return the UTF-8 bytes of a prompt's texts."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


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
