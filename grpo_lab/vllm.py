"""Rollouts through vLLM, an inference engine for GPUs that batches and caches: in this process, or as a server.

Before each rollout the policy's weights are saved to a folder from which vLLM reads them, and prompts go over as token
ids. What comes back was drawn by vLLM's kernels in vLLM's rounding, so not quite from our policy: the loss weighs it
(`grpo_lab.losses.sampler_weights`). Each prompt's seed is made of its row of random numbers, so a run repeats as far
as vLLM does; the same numbers bit for bit, and so a resumed run equal to an unbroken one, come only from our sampler.

A server must see the folder too (`output_dir`: the same machine or a shared disk) and have its weights changed by
whoever reaches it, so only in a network that is trusted:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm

Not measured yet: written against the documented interface of vLLM 0.31 (`collective_rpc("reload_weights")`, its
OpenAI-compatible server and its development endpoints), and tested against a stand-in that speaks it.
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

from grpo_lab.adapters import is_adapted, merged
from grpo_lab.checkpoints import without_progress_bars
from grpo_lab.sampling import Rollouts, left_pad

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FAR = 0.1  # nats; rounding to bfloat16 makes a few hundredths on average


class Completion(NamedTuple):
    """What vLLM says of one completion."""

    token_ids: list[int]
    """Its tokens, the end token included."""
    logprobs: list[float | None]
    """The log-probability in nats with which each was drawn."""
    reason: str | None
    """"stop" after an end token, "length" if it was cut off."""


class Colocated:
    """vLLM in this process, on the same GPU: it takes a share of the memory when it starts."""

    def __init__(self, folder: Path, dtype: str, gpu_memory: float):
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                'sampler "vllm" needs the package vllm, on Linux with a GPU: pip install "grpo-lab[vllm]". '
                'Or name a server that runs elsewhere: vllm_server="http://host:8000".'
            ) from error
        self.params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=str(folder), dtype=dtype, gpu_memory_utilization=gpu_memory,
            logprobs_mode="processed_logprobs",  # of what it sampled from: after the temperature
            generation_config="vllm",  # nothing but what is asked for
        )  # fmt: skip

    def complete(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[list[Completion]]:
        """The completions of each prompt, under its own settings."""
        params = [self.params(**s, detokenize=False) for s in settings]
        results = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling_params=params, use_tqdm=False)
        return [[self._completion(output) for output in result.outputs] for result in results]

    @staticmethod
    def _completion(output) -> Completion:
        ids = list(output.token_ids)
        said = output.logprobs or []  # a dict at each place: the drawn token's, and perhaps likelier ones'
        return Completion(ids, [at[i].logprob for at, i in zip(said, ids, strict=False)], output.finish_reason)

    def load(self, folder: str) -> None:
        """Take the weights from a folder, and forget what was computed with the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if self.llm.reset_prefix_cache() is False:
            raise RuntimeError("vLLM kept its cache of the old weights: it is still at work on other requests.")


class Server:
    """`vllm serve` at some address, spoken to in JSON."""

    def __init__(self, url: str, timeout: float = 600.0):
        self.url, self.timeout = url.rstrip("/"), timeout
        with self._understood():
            self.model = self._ask("/v1/models")["data"][0]["id"]
            info = self._ask("/server_info?config_format=json")["vllm_config"]["model_config"]
            mode = info["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"the vLLM server {self.url} gives {mode}, which are not of the distribution that it samples from. "
                "Start it with --logprobs-mode processed_logprobs."
            )

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise RuntimeError(f"{self.url} answers, but not as vLLM 0.22 or newer does: {error!r}.") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            cure = " Start it with VLLM_SERVER_DEV_MODE=1 in its environment." if error.code == 404 else ""
            raise RuntimeError(f"the vLLM server {self.url} answered {error.code} to {path}: {said}{cure}") from error
        except (OSError, ValueError) as error:  # nobody there, nobody any more, or no vLLM
            raise RuntimeError(
                f"no vLLM server answers at {self.url}{path} ({getattr(error, 'reason', error)}). "
                "Start one with vllm serve, or correct --vllm-server."
            ) from error

    def complete(self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]]) -> list[list[Completion]]:
        """The completions of each prompt, under its own settings."""

        def one(prompt: list[int], settings: dict[str, Any]) -> list[Completion]:
            body = {"model": self.model, "prompt": prompt, "return_token_ids": True, **settings}
            answer = self._ask("/v1/completions", body)
            with self._understood():
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                said = [(c["logprobs"] or {}).get("token_logprobs") or [] for c in choices]
                return [
                    Completion(list(c["token_ids"]), p, c["finish_reason"]) for c, p in zip(choices, said, strict=True)
                ]

        with ThreadPoolExecutor(64) as pool:  # a request has one seed, so each prompt is one; vLLM batches them itself
            return list(pool.map(one, prompts, settings))

    def load(self, folder: str) -> None:
        """Take the weights from a folder, and forget what was computed with the old ones."""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        if (self._ask("/reset_prefix_cache", {}) or {}).get("success") is False:
            raise RuntimeError("vLLM kept its cache of the old weights: it is still at work on other requests.")


class VLLMSampler:
    """Samples with vLLM what `grpo_lab.sampling.sample` samples with the model itself.

    Args:
        model: the policy as it is now.
        tokenizer: its tokenizer; saved beside the weights for a vLLM in this process.
        server: the address of a server, "http://host:8000"; None starts vLLM in this process.
        folder: where weights are left for the server for a moment; both must see it under the same name.
        precision: "fp32", "bf16" or "fp16", in which weights go over.
        gpu_memory: the share of the GPU's memory that a vLLM in this process takes.
    Raises: ValueError or RuntimeError that says what is missing.
    """

    def __init__(self, model: nn.Module, tokenizer, *, server: str | None, folder: Path, precision: str, gpu_memory):
        self.dtype = DTYPES[precision]
        if server is not None:
            self.folder: Path | None = folder.resolve()
            self.engine = Server(server)
        else:
            self.folder = None  # the system's, TMPDIR: best one in memory
            with self._saved(model) as saved:
                tokenizer.save_pretrained(saved)
                self.engine = Colocated(Path(saved), self.dtype, gpu_memory)

    def _saved(self, model: nn.Module) -> tempfile.TemporaryDirectory:
        # never twice the same name, so that no cache by name can keep old weights
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        saved = tempfile.TemporaryDirectory(prefix=".weights-for-vllm-", dir=self.folder)
        os.chmod(saved.name, 0o755)  # a server in a container is often another user
        whole = merged(model) if is_adapted(model) else model
        copies: dict[tuple, Tensor] = {}  # what is tied stays one tensor, and is saved once
        state = {}
        for name, weight in whole.state_dict().items():
            key = (weight.data_ptr(), weight.shape)
            if key not in copies:
                copies[key] = weight.to("cpu", getattr(torch, self.dtype)) if weight.is_floating_point() else weight
            state[name] = copies[key]
        with without_progress_bars():
            whole.save_pretrained(saved.name, state_dict=state)
        return saved

    def sync(self, model: nn.Module) -> None:
        """Give vLLM the policy's weights as they are now; an adapter's merged in."""
        with self._saved(model) as saved:
            self.engine.load(saved)

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        num_generations: int,
        uniforms: Tensor,
        vocabulary: int,
        end_ids: Sequence[int],
        pad_id: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Rollouts:
        """K completions for each prompt.

        Args:
            prompts: P lists of token ids.
            uniforms: [P * K, T] numbers in [0, 1): the seeds are made of them, and T is the maximum length.
            vocabulary: how many tokens the policy knows.
            others: as `grpo_lab.sampling.sample`. Of truncation only top_k=1 (greedy) is possible: vLLM does not
                say which tokens it kept, so the others could not be scored as they were sampled.
        Returns: Rollouts on the CPU.
        Raises: ValueError for what vLLM cannot do; RuntimeError for an answer that is not what was asked for.
        """
        greedy = top_k == 1
        if not greedy and (top_k or top_p < 1):
            raise ValueError(f'sampler "vllm" cannot score what is truncated: top_k={top_k}, top_p={top_p}.')
        number = 1 if greedy else num_generations  # vLLM refuses to be greedy twice
        numbers = uniforms.view(len(prompts), num_generations, -1).cpu().numpy()
        common = {
            "n": number, "max_tokens": uniforms.shape[1], "temperature": 0.0 if greedy else temperature,
            "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "stop_token_ids": list(end_ids),
        }  # fmt: skip
        settings = [common | {"seed": zlib.crc32(n.tobytes())} for n in numbers]
        groups = self.engine.complete([list(p) for p in prompts], settings)
        if [len(g) for g in groups] != [number] * len(prompts):
            raise RuntimeError(f"vLLM gave {[len(g) for g in groups]} completions, asked for {number} of each prompt.")
        for completion in (c for group in groups for c in group):
            _check(completion, uniforms.shape[1], vocabulary, end_ids)
        rows = [c for group in groups for c in (group * num_generations if greedy else group)]

        tokens = pad_sequence([torch.tensor(c.token_ids) for c in rows], batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(c.token_ids) for c in rows])
        completion_mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        logprobs = pad_sequence([torch.tensor(c.logprobs) for c in rows], batch_first=True)
        input_ids, mask = left_pad(prompts, pad_id)
        return Rollouts(
            input_ids=torch.cat([input_ids.repeat_interleave(num_generations, 0), tokens], 1),
            attention_mask=torch.cat([mask.repeat_interleave(num_generations, 0), completion_mask.long()], 1),
            completion_mask=completion_mask,
            logprobs=torch.zeros_like(logprobs) if greedy else logprobs,  # the only choice
            kept=tokens[..., None] if greedy else None,
            ended=torch.tensor([c.reason == "stop" for c in rows]),
        )


def _check(completion: Completion, longest: int, vocabulary: int, end_ids: Sequence[int]) -> None:
    """Is this what was asked for? Raises RuntimeError that says what is not."""
    ids, logprobs, reason = completion
    if not 1 <= len(ids) <= longest or reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM broke off a completion after {len(ids)} tokens of at most {longest}: {reason!r}.")
    if (reason == "stop") != (ids[-1] in end_ids):
        raise RuntimeError(f"vLLM ended a completion ({reason}) with token {ids[-1]}; the end tokens are {end_ids}.")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise RuntimeError(f"vLLM drew token {max(ids)}, but the policy knows {vocabulary}: it runs another model.")
    if len(logprobs) != len(ids):
        raise RuntimeError(f"vLLM gave {len(logprobs)} log-probabilities for {len(ids)} tokens.")
    if not all(p is not None and math.isfinite(p) for p in logprobs):
        raise RuntimeError("vLLM's log-probabilities are not finite: the weights that it was given are damaged.")


def warn_if_far(difference: float) -> None:
    """Is it rounding that parts vLLM's log-probabilities from ours? difference: mean of the absolute one, in nats."""
    if difference > FAR:
        warnings.warn(
            f"vLLM's log-probabilities are {difference:.2g} nats from ours on average, which is more than rounding: "
            "its weights are not the policy's. Is it another model, or quantized? Does it see the same output_dir?",
            stacklevel=3,
        )
