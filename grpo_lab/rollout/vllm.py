"""Rollouts with vLLM, an inference engine for GPUs: in this process, or as a server.

Before each rollout the policy's weights are saved to a folder from which vLLM loads them, and prompts are sent as token
ids. vLLM's kernels round differently, so its completions do not come exactly from our policy; the loss corrects this
with importance weights (`sampler_weights`). Each prompt's seed is computed from its rows of random numbers, so a run is
as repeatable as vLLM. Only our own sampler repeats bit for bit, so that a resumed run equals an uninterrupted one.

A server must see the folder under the same name (`output_dir`: on the same machine or a shared disk). Any client can
change its weights, so allow only this machine or a trusted network to connect:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --host 127.0.0.1

Not measured yet: written against vLLM's documentation and source as of version 0.31 (`LLM.generate`, the worker's
`reload_weights`, the server's /v1/completions and development endpoints), tested against a stand-in for it.
"""

import json
import math
import os
import tempfile
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grpo_lab.models.adapters import is_adapted, merged
from grpo_lab.models.loading import without_progress_bars
from grpo_lab.rollout.sampling import Rollouts, left_pad

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MAX_DIFFERENCE = 0.1  # nats, mean absolute; the effect of rounding to bfloat16 on a GPU is not measured yet


class Completion(NamedTuple):
    """One completion as vLLM returns it."""

    token_ids: list[int]
    """The sampled tokens, the end token included."""
    logprobs: list[float | None]
    """The log-probability in nats of each token when it was drawn."""
    reason: str | None
    """"stop" after an end token, "length" if it was cut off."""


class Colocated:
    """vLLM in this process, on the same GPU; it allocates its share of the memory when it starts."""

    def __init__(self, folder: str, dtype: str, gpu_memory: float):
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                'sampler "vllm" needs the package vllm, on Linux with a GPU: pip install "vllm>=0.22". '
                'Or use a running server: vllm_server="http://host:8000".'
            ) from error
        self.params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=folder, dtype=dtype, gpu_memory_utilization=gpu_memory,
            logprobs_mode="processed_logprobs",  # after the temperature: of the distribution it samples from
            generation_config="vllm",  # no defaults from the model folder
        )  # fmt: skip

    def complete(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[list[Completion]]:
        """Return the completions of each prompt, sampled with its own settings."""
        params = [self.params(**s, detokenize=False) for s in settings]
        results = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling_params=params, use_tqdm=False)
        return [[self._completion(output) for output in result.outputs] for result in results]

    @staticmethod
    def _completion(output) -> Completion:
        ids = list(output.token_ids)
        logprobs = output.logprobs or []  # a dict for each token: its own, and perhaps those of more likely ids
        return Completion(ids, [d[i].logprob for d, i in zip(logprobs, ids, strict=False)], output.finish_reason)

    def load(self, folder: str) -> bool:
        """Load the weights from a folder; return whether the prefix cache of the old ones was reset."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        return self.llm.reset_prefix_cache() is not False


class Server:
    """A `vllm serve` process at some address."""

    def __init__(self, url: str, timeout: float = 600.0):
        self.url, self.timeout = url.rstrip("/"), timeout
        with self._checked_answers():
            self.model = self._ask("/v1/models")["data"][0]["id"]
            info = self._ask("/server_info?config_format=json")["vllm_config"]["model_config"]
            mode = info["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"the vLLM server {self.url} gives {mode}, which are not of the distribution that it samples from. "
                "Start it with --logprobs-mode processed_logprobs."
            )

    @contextmanager
    def _checked_answers(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.url} does not answer like vLLM 0.22 or newer: {error!r}.") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            cure = " Start it with VLLM_SERVER_DEV_MODE=1 in its environment." if error.code == 404 else ""
            raise ConnectionError(
                f"the vLLM server {self.url} answered {error.code} to {path}: {text}{cure}"
            ) from error
        except (OSError, ValueError) as error:  # no server, a lost connection, or not vLLM
            raise ConnectionError(
                f"no vLLM server answers at {self.url}{path} ({getattr(error, 'reason', error)}). "
                "Start one with vllm serve, or correct --vllm-server."
            ) from error

    def complete(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[list[Completion]]:
        """Return the completions of each prompt, sampled with its own settings."""

        def one(prompt: list[int], settings: dict[str, Any]) -> list[Completion]:
            body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **settings}
            answer = self._ask("/v1/completions", body)
            with self._checked_answers():
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                return [
                    Completion(
                        list(c["token_ids"]), (c["logprobs"] or {}).get("token_logprobs") or [], c["finish_reason"]
                    )
                    for c in choices
                ]

        with ThreadPoolExecutor(64) as pool:  # one request per prompt, as each has its own seed; vLLM batches them
            return list(pool.map(one, prompts, settings))

    def load(self, folder: str) -> bool:
        """Load the weights from a folder; return whether the prefix cache of the old ones was reset."""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        answer = self._ask("/reset_prefix_cache", {}) or {}  # before 0.26 it is empty
        return answer.get("success") is not False


class VLLMSampler:
    """Sample with vLLM instead of the model itself, as `grpo_lab.rollout.sampling.sample` does.

    Args:
        model: the policy with its current weights.
        tokenizer: its tokenizer; saved with the weights for vLLM in this process.
        precision: "fp32", "bf16" or "fp16", in which the weights are saved.
        server: address of a running server; None starts vLLM in this process.
        folder: where the weights are saved for a server, which must see it under the same name.
        gpu_memory: share of the GPU's memory for vLLM in this process.
    Raises: ValueError if vLLM or a setting of the server is missing, ConnectionError if the server does not answer.
    """

    def __init__(
        self, model: nn.Module, tokenizer, *, precision: str, server: str | None, folder: Path, gpu_memory: float
    ):
        self.dtype = DTYPES[precision]
        if server is not None:
            self.folder: Path | None = folder.resolve()
            self.engine: Server | Colocated = Server(server)
        else:
            self.folder = None  # the system's temporary folder, TMPDIR; fastest in memory
            with self._saved(model) as saved:
                tokenizer.save_pretrained(saved)
                self.engine = Colocated(saved, self.dtype, gpu_memory)

    @contextmanager
    def _saved(self, model: nn.Module) -> Iterator[str]:
        """Save the current weights in vLLM's precision to a folder that exists within the block."""
        whole = merged(model) if is_adapted(model) else model
        copies: dict[tuple, Tensor] = {}  # tied weights stay one tensor and are saved once
        state = {}
        for name, weight in whole.state_dict().items():
            key = (weight.data_ptr(), weight.shape)
            if key not in copies:
                copies[key] = weight.to("cpu", getattr(torch, self.dtype)) if weight.is_floating_point() else weight
            state[name] = copies[key]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        # each folder has a new name, so that no cache keyed by name returns old weights
        with tempfile.TemporaryDirectory(prefix=".weights-for-vllm-", dir=self.folder) as saved:
            os.chmod(saved, 0o755)  # a server in a container is often another user
            with without_progress_bars():
                whole.save_pretrained(saved, state_dict=state)
            yield saved

    def sync(self, model: nn.Module) -> None:
        """Send the policy's current weights to vLLM, with an adapter merged."""
        with self._saved(model) as saved:
            if not self.engine.load(saved):
                raise ValueError(
                    "vLLM kept its cache of the old weights, because it is serving other requests. "
                    "Use a server for this run only."
                )

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        *,
        num_generations: int,
        uniforms: Tensor,
        end_ids: Sequence[int],
        pad_id: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Rollouts:
        """Sample K completions for each prompt with the policy's current weights.

        Args:
            model: the policy.
            prompts: P lists of token ids.
            uniforms: [P * K, T] numbers in [0, 1) from which the seeds are computed; T is the maximum length.
            others: see `sampling.sample`. The only truncation is top_k=1 (greedy): vLLM does not return which
                ids it kept, so other completions could not be scored as they were sampled.
        Returns: Rollouts on the CPU.
        Raises: ValueError for other truncation or an invalid answer; ConnectionError if the server does not answer.
        """
        greedy = top_k == 1
        if not greedy and (top_k or top_p < 1):
            raise ValueError(
                f'sampler "vllm" needs top_k 0 and top_p 1.0, or top_k 1 (greedy), got top_k={top_k}, top_p={top_p}: '
                "other completions could not be scored as they were sampled."
            )
        self.sync(model)
        number = 1 if greedy else num_generations  # vLLM refuses n > 1 for greedy sampling
        numbers = uniforms.view(len(prompts), num_generations, -1).cpu().numpy()
        common = {
            "n": number, "max_tokens": uniforms.shape[1], "temperature": 0.0 if greedy else temperature,
            "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "stop_token_ids": list(end_ids),
        }  # fmt: skip
        settings = [common | {"seed": zlib.crc32(n.tobytes())} for n in numbers]
        groups = self.engine.complete([list(p) for p in prompts], settings)
        if [len(g) for g in groups] != [number] * len(prompts):
            raise ValueError(
                f"vLLM returned {[len(g) for g in groups]} completions, expected {number} for each prompt."
            )
        vocabulary = model.get_input_embeddings().weight.shape[0]
        for completion in (c for group in groups for c in group):
            _check(completion, uniforms.shape[1], vocabulary, end_ids)
        rows = [c for group in groups for c in (group * num_generations if greedy else group)]
        return _rollouts(prompts, rows, pad_id, end_ids, greedy=greedy)


def _rollouts(prompts, rows: list[Completion], pad_id: int, end_ids: Sequence[int], *, greedy: bool) -> Rollouts:
    num_generations = len(rows) // len(prompts)
    tokens = pad_sequence([torch.tensor(c.token_ids) for c in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(c.token_ids) for c in rows])
    completion_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    logprobs = pad_sequence([torch.tensor(c.logprobs) for c in rows], batch_first=True)
    input_ids, mask = left_pad(prompts, pad_id)
    return Rollouts(
        input_ids=torch.cat([input_ids.repeat_interleave(num_generations, 0), tokens], 1),
        attention_mask=torch.cat([mask.repeat_interleave(num_generations, 0), completion_mask.long()], 1),
        completion_mask=completion_mask,
        logprobs=torch.zeros_like(logprobs) if greedy else logprobs,  # a single choice has probability 1
        kept=tokens[..., None] if greedy else None,
        ended=torch.tensor([c.token_ids[-1] in end_ids for c in rows]),
    )


def _check(completion: Completion, longest: int, vocabulary: int, end_ids: Sequence[int]) -> None:
    """Raise ValueError if vLLM did not return what was requested."""
    ids, logprobs, reason = completion
    whole = reason == "stop" or (reason == "length" and len(ids) == longest)
    if not 1 <= len(ids) <= longest or not whole:
        raise ValueError(f"vLLM stopped a completion early, after {len(ids)} of at most {longest} tokens ({reason}).")
    if (reason == "stop" and ids[-1] not in end_ids) or set(ids[:-1]) & set(end_ids):
        raise ValueError(f"vLLM did not end a completion at one of the end tokens {end_ids} ({reason}: {ids[-5:]}).")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"vLLM sampled token {max(ids)}, but the policy has {vocabulary}: vLLM runs another model.")
    if len(logprobs) != len(ids):
        raise ValueError(f"vLLM returned {len(logprobs)} log-probabilities for {len(ids)} tokens.")
    if not all(p is not None and math.isfinite(p) for p in logprobs):
        raise ValueError("vLLM's log-probabilities are not finite: the weights that it loaded are damaged.")


def warn_if_far(difference: float) -> None:
    """Warn if the mean absolute difference of vLLM's log-probabilities from ours, in nats, is more than rounding."""
    if difference > MAX_DIFFERENCE:
        warnings.warn(
            f"vLLM's log-probabilities differ from ours by {difference:.2g} nats on average, more than by rounding: "
            "its weights are not the policy's. Is it another model, or quantized? Does it see the same output_dir?",
            stacklevel=3,
        )
