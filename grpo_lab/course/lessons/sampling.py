"""Notebook 02: what the pocket model samples, how it is scored, and the figures of both."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from grpo_lab.algorithm.logprobs import token_entropies, token_logprobs, truncate
from grpo_lab.models.forward import accepts
from grpo_lab.rollout.prompts import encode_prompt
from grpo_lab.rollout.sampling import Rollouts, end_token_ids, left_pad, pad_token_id, sample
from grpo_lab.rollout.scoring import completion_logprobs

MODEL, DRAWN, END = "#BBBBBB", "#0072B2", "#E69F00"  # Okabe and Ito's, and grey for what is given
FILL = {"prompt": "#DDDDDD", "completion": "#9FD0F0", "end": END, "padding": "white"}
SHOWN = 9  # tokens whose probabilities are drawn
VIEWS = ("token", "attention mask", "position", "completion mask", "log-probability")


@torch.no_grad()
def next_logits(model: nn.Module, tokenizer, text: str) -> Tensor:
    """Return the model's logits for the token after the text. [V]"""
    return model(torch.tensor([encode_prompt(tokenizer, text)])).logits[0, -1]


def sampler(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the probability of sampling each token, 0 for those that are cut. logits [V] -> [V]"""
    kept = truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    ids = torch.arange(len(logits)) if kept is None else kept[kept >= 0]
    same = logits.expand(1, len(ids), -1)
    allowed = None if kept is None else kept.expand(1, len(ids), -1)
    chances = token_logprobs(same, ids[None], temperature=temperature, kept=allowed)[0].exp()
    return torch.zeros(len(logits)).index_put((ids,), chances)


def answer_probability(model: nn.Module, tokenizer, prompt: str, answer: str, **settings) -> float:
    """Return the probability of sampling this answer and then the end token: a product over its tokens."""
    chance = 1.0
    tokens = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    for t, token in enumerate(tokens):
        chance *= sampler(next_logits(model, tokenizer, prompt + answer[:t]), **settings)[token].item()
    return chance


def roll(model: nn.Module, tokenizer, prompts: Sequence[str], K: int, *, longest: int = 12, seed: int = 0, **settings):
    """Sample K completions of each prompt; the same seed gives the same uniform numbers."""
    pad = pad_token_id(tokenizer, model)
    ids, mask = left_pad([encode_prompt(tokenizer, prompt) for prompt in prompts], pad)
    uniforms = torch.rand(len(prompts) * K, longest, generator=torch.Generator().manual_seed(seed))
    ends = end_token_ids(model, tokenizer)
    return sample(model, ids, mask, num_generations=K, uniforms=uniforms, end_ids=ends, pad_id=pad, **settings)


def texts(rollouts: Rollouts, tokenizer) -> list[str]:
    """Return the completions as a reward function sees them."""
    rows = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]


@torch.no_grad()
def ratios(model: nn.Module, rollouts: Rollouts, *, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """Return pi_scorer / pi_sampler of every sampled token, before any update. [number of tokens]"""
    ids, mask, T = rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens
    scored = completion_logprobs(model, ids, mask, T, temperature=temperature, kept=kept)
    return (scored - rollouts.logprobs)[rollouts.completion_mask].exp()


@torch.no_grad()
def padding_error(model: nn.Module, row: Tensor, T: int, pads: int, *, mask: bool = True, positions: bool = True):
    """Return the largest change of the last T log-probabilities, in nats, with `pads` columns on the left. row: [S]"""
    padded = torch.cat([torch.zeros(pads, dtype=torch.long), row])[None]
    columns = torch.arange(padded.shape[1])[None]
    real = columns >= pads
    given = {"attention_mask": real.long() if mask else torch.ones_like(columns)}
    if accepts(model, "position_ids"):
        given["position_ids"] = (columns - pads).clamp(min=0) if positions else columns
    logits = model(padded, **given).logits[:, -T - 1 : -1]
    alone = model(row[None]).logits[:, -T - 1 : -1]
    return (token_logprobs(logits, row[None, -T:]) - token_logprobs(alone, row[None, -T:])).abs().max().item()


def push(sampled: Tensor, scored: Tensor) -> Tensor:
    """Return E of d log pi_scored(w) / d logit_v over sampled words: p_sampled(v) - p_scored(v), 0 if equal. [V]"""
    return sampled - scored


def ground_of_distribution(figure: Figure) -> None:
    """Draw what does not depend on any control in `draw_distribution`."""
    panel = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.17, top=0.95)
    panel.set(xlim=(-0.6, SHOWN - 0.4), ylim=(0, 1.1), xticks=range(SHOWN), xticklabels=[])
    panel.set(xlabel="\nnext token, the likeliest first", ylabel="probability")
    handles = [Patch(color=MODEL, label="model, temperature 1"), Patch(color=DRAWN, label="sampler")]
    panel.legend(handles=handles, frameon=False, loc="upper right")
    panel.spines[["top", "right"]].set_visible(False)


def draw_distribution(figure: Figure, after: str, temperature: float, top_k: int, top_p: float, *,
                      logits: Mapping[str, Tensor], names: Sequence[str]) -> str:  # fmt: skip
    """Draw the model's distribution after a text, and the sampler's."""
    (panel,) = figure.axes
    z = logits[after]
    model, drawn = z.softmax(-1), sampler(z, temperature=temperature, top_k=top_k, top_p=top_p)
    order = model.argsort(descending=True)[:SHOWN].tolist()
    x = np.arange(SHOWN)
    panel.bar(x - 0.2, model[order].tolist(), 0.4, color=MODEL)
    panel.bar(x + 0.2, drawn[order].tolist(), 0.4, color=DRAWN)
    for i, token in enumerate(order):
        text = f"{drawn[token]:.2f}" if drawn[token] > 0 else "cut"
        panel.text(i + 0.2, drawn[token].item() + 0.02, text, ha="center", fontsize=9, color=DRAWN)
        panel.text(i, -0.045, names[token], ha="center", va="top")
    kept = [token for token in drawn.argsort(descending=True).tolist() if drawn[token] > 0]
    entropy = token_entropies(z.view(1, 1, -1), temperature=temperature).item()
    return (
        f"likeliest to be drawn: {', '.join(f'{names[t]!r} {drawn[t]:.3f}' for t in kept[:4])}\n"
        f"{len(kept)} of {len(z)} tokens kept; those cut had {1 - model[kept].sum().clamp(max=1):.3f} of the model's "
        f"probability; entropy at this temperature, before the cut: {entropy:.2f} nats"
    )


def cells(rollouts: Rollouts, names: Sequence[str], show: str) -> tuple[list[list[str]], list[list[str]]]:
    """Return the text of each cell of a batch, and its kind; one row per completion."""
    ids, real, T = rollouts.input_ids, rollouts.attention_mask.bool(), rollouts.num_tokens
    position = (real.long().cumsum(1) - 1).clamp(min=0)
    kinds, values = [], []
    for r in range(len(ids)):
        kinds.append([])
        values.append([])
        last = int(real[r].nonzero().max())
        for c in range(ids.shape[1]):
            t = c - (ids.shape[1] - T)
            ends = c == last and bool(rollouts.ended[r])
            kind = "padding" if not real[r, c] else "end" if ends else "completion" if t >= 0 else "prompt"
            token = {"padding": "·", "end": "end"}.get(kind, names[ids[r, c]])
            value = {
                "token": token, "attention mask": str(int(real[r, c])), "position": str(int(position[r, c])),
                "completion mask": str(int(rollouts.completion_mask[r, t])) if t >= 0 else "",
                "log-probability": f"{rollouts.logprobs[r, t].round(decimals=1) + 0.0:.1f}" if t >= 0 else "",
            }[show]  # fmt: skip
            kinds[-1].append(kind)
            values[-1].append(value)
    return values, kinds


def ground_of_batch(figure: Figure, rows: int, columns: int) -> None:
    """Draw the empty table of `draw_batch`, with at most this many columns."""
    panel = figure.subplots()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.03, top=0.9)
    panel.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def draw_batch(figure: Figure, show: str, temperature: float, *, roll, names: Sequence[str]) -> str:
    """Draw a batch as a table of tokens, coloured by kind. roll(temperature) gives the Rollouts."""
    rollouts = roll(temperature)
    values, kinds = cells(rollouts, names, show)
    (panel,) = figure.axes
    rows, columns, T = len(values), len(values[0]), rollouts.num_tokens
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value:
                panel.text(c, r, value, ha="center", va="center", fontsize=10)
    fill = [[to_rgb(FILL[kind]) for kind in row] for row in kinds]
    panel.pcolormesh(range(columns), range(rows), fill, edgecolors="white", linewidth=1.5)
    panel.axvline(columns - T - 0.5, color="black", linewidth=2)
    panel.text(columns - T - 0.6, -0.75, "prompt, padded left", ha="right")
    panel.text(columns - T - 0.4, -0.75, "completion, padded right", ha="left")
    count = {kind: sum(row.count(kind) for row in kinds) for kind in FILL}
    lengths = rollouts.completion_mask.sum(1).tolist()
    return (
        f"{show}: {rows} rows of {columns} columns; " + ", ".join(f"{n} {kind}" for kind, n in count.items())
        + f" tokens\nlengths of the completions, the end included: {', '.join(map(str, lengths))}"
    )  # fmt: skip


def ground_of_ratios(figure: Figure) -> None:
    """Draw what does not depend on any control in `draw_ratios`."""
    panel = figure.subplots()
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.17, top=0.95)
    panel.axvspan(0.8, 1.2, color="#009E73", alpha=0.15, label="0.8 to 1.2: never clipped")
    panel.set(xlabel="π_scorer / π_sampler (2: 2 and above)", ylabel="share of the tokens drawn")
    panel.set(xlim=(-0.025, 2.025), ylim=(0, 1.03))
    panel.legend(frameon=False, loc="upper left")
    panel.spines[["top", "right"]].set_visible(False)


def draw_ratios(figure: Figure, temperature: float, top_p: float, scorer: str, *, roll, model) -> str:
    """Draw pi_scorer / pi_sampler before any update. roll(temperature, top_p) gives the Rollouts."""
    rollouts = roll(temperature, top_p)
    same = {"temperature": temperature, "kept": rollouts.kept} if scorer == "as sampled" else {}
    ratio = ratios(model, rollouts, **same)
    counts, edges = np.histogram(ratio.clamp(max=2.0), 41, (-0.025, 2.025))  # a bin of its own for 1
    figure.axes[0].stairs(counts / len(ratio), edges, fill=True, color=DRAWN)
    outside = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    off = (ratio - 1).abs().max()
    return (
        f"{len(ratio)} tokens; outside 0.8 to 1.2: {outside:.1%}; smallest ratio {ratio.min():.2f}, "
        f"largest {ratio.max():.2f}\nevery ratio is 1 within 0.0001: {bool(off < 1e-4)}"
    )
