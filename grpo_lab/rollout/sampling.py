"""Sample K completions for each prompt. Random numbers are an argument: same numbers, same completions.

One uniform number per token is drawn before sampling starts, so a completion depends only on its own row
of numbers: not on other rows, the batch size, or the order in which rows finish.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grpo_lab.algorithm.logprobs import token_logprobs, truncate
from grpo_lab.rollout.decoding import decoder


@dataclass
class Rollouts:
    """B = P * K sampled completions; the K rows of a prompt are adjacent."""

    input_ids: Tensor
    """[B, S] long, rows of [left-padded prompt | right-padded completion]."""
    attention_mask: Tensor
    """[B, S] long, 1 where a token is real, the end token included."""
    completion_mask: Tensor
    """[B, T] bool, True where a token was sampled, the end token included."""
    logprobs: Tensor
    """[B, T] float32, log-probability in nats of each token when it was drawn; 0 at padding."""
    kept: Tensor | None
    """[B, T, k] long, the ids that could have been drawn, -1 for padding; None if any id could."""
    ended: Tensor
    """[B] bool, False where the completion was cut off at the maximum length."""

    @property
    def num_tokens(self) -> int:
        """T, the number of completion columns."""
        return self.completion_mask.shape[1]

    @property
    def completion_ids(self) -> Tensor:
        """[B, T] long, the completion columns of `input_ids`."""
        return self.input_ids[:, -self.num_tokens :]

    @classmethod
    def join(cls, parts: Sequence["Rollouts"], pad_id: int) -> "Rollouts":
        """Concatenate the rows of all parts, padded to the widest prompt and completion."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.input_ids.shape[1] - part.num_tokens for part in parts)
        tokens = max(part.num_tokens for part in parts)
        most = max((part.kept.shape[2] for part in parts if part.kept is not None), default=0)

        def wide(part: "Rollouts") -> dict[str, Tensor | None]:
            right = tokens - part.num_tokens
            both = (width + tokens - part.input_ids.shape[1] - right, right)
            return {
                "input_ids": pad(part.input_ids, both, value=pad_id),
                "attention_mask": pad(part.attention_mask, both),
                "completion_mask": pad(part.completion_mask, (0, right)),
                "logprobs": pad(part.logprobs, (0, right)),
                "kept": None
                if part.kept is None
                else pad(part.kept, (0, most - part.kept.shape[2], 0, right), value=-1),
                "ended": part.ended,
            }

        rows = [wide(part) for part in parts]
        return cls(**{k: None if v is None else torch.cat([row[k] for row in rows]) for k, v in rows[0].items()})

    def select(self, rows: Tensor) -> "Rollouts":
        """Return some rows, without the columns that are padding in all of them. rows: [b] long."""
        width = self.input_ids.shape[1] - self.num_tokens
        mask = self.attention_mask[rows]
        left = int(mask.argmax(1).min())  # every prompt has at least one token
        columns = slice(left, width + int(self.completion_mask[rows].sum(1).max()))
        tokens = slice(0, columns.stop - width)
        return Rollouts(
            input_ids=self.input_ids[rows, columns],
            attention_mask=mask[:, columns],
            completion_mask=self.completion_mask[rows, tokens],
            logprobs=self.logprobs[rows, tokens],
            kept=None if self.kept is None else self.kept[rows, tokens],
            ended=self.ended[rows],
        )

    def to(self, device) -> "Rollouts":
        """Return the same rollouts on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollouts(**{name: v.to(device) if v is not None else None for name, v in values.items()})


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return input_ids [P, N] and attention_mask [P, N] of prompts padded on the left.

    >>> left_pad([[5], [6, 7]], pad_id=0)
    (tensor([[0, 5],
            [6, 7]]), tensor([[0, 1],
            [1, 1]]))
    """
    width = max(len(ids) for ids in prompts)
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return input_ids, mask


def check_context(model: nn.Module, prompts: Sequence, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError, with the cure, for a prompt with unknown token ids or without room for a completion.

    Args:
        prompts: named in the error.
        ids: the token ids of each prompt.
    """
    context = context_of(model)
    known = model.get_input_embeddings().weight.shape[0]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if max(tokens) >= known:
            raise ValueError(
                f"the tokenizer gives token {max(tokens)} for {str(prompt)[:60]!r}, but the model knows only "
                f"{known}. Use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer))."
            )
        if context and len(tokens) + max_new_tokens > context:
            raise too_long(prompt, f"{len(tokens)} tokens", max_new_tokens, context)


def context_of(model: nn.Module) -> int | None:
    """Return the positions that the model has, in tokens; None if its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def too_long(prompt: Any, size: str, max_new_tokens: int, context: int) -> ValueError:
    """Return the error for a prompt that leaves no room for a completion.

    Args:
        size: of the prompt, in words.
    """
    return ValueError(
        f"a prompt of {size} and max_new_tokens {max_new_tokens} do not fit into the model's context of {context}: "
        f"{str(prompt)[:60]!r}. Shorten the prompt or lower --max-new-tokens, in a new run: one that is resumed must "
        "keep both."
    )


def pad_token_id(tokenizer, model: nn.Module) -> int:
    """Return an id for padding. Padding is masked everywhere, so any id that the model has will do."""
    known = model.get_input_embeddings().weight.shape[0]  # an id that was added only to the tokenizer has no embedding
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in candidates if i is not None and 0 <= i < known)  # some configs say -1 for none


def end_token_ids(model: nn.Module, tokenizer) -> list[int]:
    """Return all ids that end a completion: the model's (chat models have several) and the tokenizer's."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids.flatten().tolist() if isinstance(ids, Tensor) else ids
    ids = ids if isinstance(ids, Iterable) else [ids]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None and i >= 0})


def sample_token(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """Draw one token from each row: the first whose cumulative probability exceeds the uniform number.

    Args:
        logits: [B, V].
        uniforms: [B] numbers in [0, 1).
        kept: [B, k] the ids to choose from, from `truncate`; None means all.
    Returns: [B] ids; a token of probability 0 is never drawn.
    """
    if kept is not None:
        logits = logits.gather(-1, kept.clamp(min=0)).masked_fill(kept < 0, -torch.inf)
    reached = (logits.float() / temperature).softmax(-1).cumsum(-1)
    total = reached[:, -1:]  # 1 up to rounding
    choice = torch.searchsorted(reached, uniforms[:, None].to(reached) * total, right=True)
    choice = torch.minimum(choice, (reached < total).sum(-1, keepdim=True))  # never past the last possible token
    return (choice if kept is None else kept.gather(-1, choice)).squeeze(-1)


@torch.no_grad()
def sample(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    num_generations: int,
    uniforms: Tensor,
    end_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Rollouts:
    """Sample K completions for each prompt; each prompt is computed once.

    Args:
        model: a causal LM in eval mode, so that dropout is off.
        input_ids, attention_mask: [P, N] left-padded prompts.
        num_generations: K.
        uniforms: [P * K, T] numbers in [0, 1); T is the maximum length of a completion.
        end_ids: a completion ends with the first of these, which is part of it.
        pad_id: pads finished rows; may equal an end id.
        temperature, top_k, top_p: see `truncate`. top_k=1 is greedy decoding.
    Returns: Rollouts, as wide as its longest completion, on the model's device.
    """
    device, rows = input_ids.device, input_ids.shape[0] * num_generations
    if uniforms.shape[0] != rows:
        raise ValueError(f"uniforms must be [P * K, T] = [{rows}, T], got {list(uniforms.shape)}")
    uniforms, ends = uniforms.to(device), torch.tensor(list(end_ids), device=device)
    tokens, logprobs, kept, lengths = _sample_tokens(
        model, input_ids, attention_mask, num_generations, uniforms, ends, pad_id,
        temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    width = int(lengths.max())
    columns = torch.arange(width, device=device)
    completion_mask = columns < lengths[:, None]
    tokens = tokens[:, :width]
    ended = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), ends)
    return Rollouts(
        input_ids=torch.cat([input_ids.repeat_interleave(num_generations, 0), tokens], 1),
        attention_mask=torch.cat([attention_mask.repeat_interleave(num_generations, 0), completion_mask.long()], 1),
        completion_mask=completion_mask,
        logprobs=logprobs[:, :width],
        kept=kept,
        ended=ended,
    )


def _sample_tokens(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_generations: int,
    uniforms: Tensor,
    ends: Tensor,
    pad_id: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    # tokens [B, T], their log-probabilities [B, T], the kept ids [B, t, k], and lengths [B]; t is the greatest length
    device, (rows, longest) = uniforms.device, uniforms.shape
    tokens = torch.full((rows, longest), pad_id, device=device)
    logprobs = torch.zeros(rows, longest, device=device)
    kept_steps: list[Tensor] = []
    lengths = torch.full((rows,), longest, device=device)

    active = torch.arange(rows, device=device)  # the unfinished rows
    decoder_state = decoder(model, input_ids, attention_mask, num_generations, longest)
    for step in range(longest):
        logits = decoder_state.logits[decoder_state.row_index]
        kept = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        chosen = sample_token(logits, uniforms[active, step], temperature=temperature, kept=kept)
        tokens[active, step] = chosen
        one_step = None if kept is None else kept[:, None]
        drawn = token_logprobs(logits[:, None], chosen[:, None], temperature=temperature, kept=one_step)
        logprobs[active, step] = drawn.squeeze(1).float()  # also from a float64 model
        if kept is not None:
            # a finished row has one choice, the padding: its log-probability is then 0, not NaN
            all_rows = torch.full((rows, kept.shape[1]), -1, device=device)
            all_rows[:, 0] = pad_id
            all_rows[active] = kept
            kept_steps.append(all_rows)

        finished = torch.isin(chosen, ends)
        lengths[active[finished]] = step + 1
        if finished.all() or step + 1 == longest:
            break
        decoder_state.step(~finished, chosen)
        active = active[~finished]
    return tokens, logprobs, _stack(kept_steps), lengths


def _stack(kept_steps: list[Tensor]) -> Tensor | None:
    # top-p keeps a different number of tokens at each step: [B, k_t] * T -> [B, T, max k_t]
    if not kept_steps:
        return None
    width = max(k.shape[1] for k in kept_steps)
    return torch.stack([pad(k, (0, width - k.shape[1]), value=-1) for k in kept_steps], 1)
