"""HTML for notebooks: a table of completions and a progress bar."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_lab.training.figures import COLOURS


def completions_table(rows: Sequence[Mapping[str, Any]], tokenizer=None) -> str:
    """Return rows of completions.jsonl as an HTML table: prompt, completion, reward, advantage.

    With a tokenizer, and if the row has log-probabilities, each token is shaded by its log-ratio to the reference.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.get("rewards", {})))
    names = names if len(names) > 1 else []  # a single reward function is the reward itself
    text, number = "padding:2px 2em 2px 0; text-align:left", "padding:2px 1em; text-align:right"
    head = {"prompt": text, "completion": text, **dict.fromkeys(("reward", *names, "advantage"), number)}
    lines = []
    for row in rows:
        parts, advantage = [row["rewards"].get(name) for name in names], row["advantage"]
        cells = [
            f"<td style='{text}'><code>{_text(row['prompt'])}</code></td>",
            f"<td style='{text}'><code>{_completion(row, tokenizer)}</code></td>",
            *(f"<td style='{number}'>{'' if v is None else f'{v:.2f}'}</td>" for v in (row["reward"], *parts)),
            f"<td style='{number}; background:{_shade((advantage or 0.0) / 2)}'>"
            f"{'' if advantage is None else f'{advantage:+.2f}'}</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th style='{style}'>{html.escape(title)}</th>" for title, style in head.items())
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return html.escape(prompt if isinstance(prompt, str) else prompt[-1]["content"])


def _completion(row: Mapping[str, Any], tokenizer) -> str:
    if tokenizer is None or "completion_ids" not in row or "ref_logprobs" not in row:
        return html.escape(row["completion"])
    ratios = [ours - theirs for ours, theirs in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
    return "".join(
        f"<span title='{ratio:+.2f} nats' style='background:{_shade(ratio / 3)}'>"
        f"{html.escape(tokenizer.decode([token]))}</span>"
        for token, ratio in zip(row["completion_ids"], ratios, strict=True)
    )


def _shade(value: float) -> str:
    """Return blue for positive, orange for negative, transparent for zero; full strength at 1."""
    strength = min(1.0, abs(value)) * 0.6
    return f"rgba(0,114,178,{strength:.2f})" if value >= 0 else f"rgba(230,159,0,{strength:.2f})"


def progress_bar(done: int, total: int, seconds_left: float) -> str:
    """Return the progress of a run as HTML."""
    share = done / total
    words = f"step {done} of {total}" + (f", about {seconds_left:.0f} s left" if done < total else "")
    return (
        "<div style='background:#ddd; width:320px; height:8px; border-radius:4px; margin:4px 0'>"
        f"<div style='background:{COLOURS['reward']}; width:{share:.0%}; height:8px; border-radius:4px'></div></div>"
        f"<div>{words}</div>"
    )
