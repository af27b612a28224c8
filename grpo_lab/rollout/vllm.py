"""Rollouts through vLLM, an inference engine for GPUs that batches and caches: in this process, or as a server.

Before each rollout the policy's weights are saved to a folder from which vLLM reads them, and prompts go over as token
ids. What comes back was drawn by vLLM's kernels in vLLM's rounding, so not quite from our policy: the loss weighs it
(`sampler_weights`). Each prompt's seed is made of its rows of random numbers, so a run repeats as far as
vLLM does; bit for bit, and so that a resumed run equals an unbroken one, only our own sampler repeats it.

A server must see the folder under the same name (`output_dir`: the same machine or a shared disk). Whoever reaches it
can change its weights, so let only this machine or a trusted network reach it:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --host 127.0.0.1

Not measured yet: written against vLLM's documentation and source as of version 0.31 (`LLM.generate`, the worker's
`reload_weights`, the server's /v1/completions and development endpoints), tested against a stand-in that speaks it.
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
FAR = 0.1  # nats, on average; what rounding to bfloat16 makes of it on a GPU is not measured yet


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

    def __init__(self, folder: str, dtype: str, gpu_memory: float):
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                'sampler "vllm" needs the package vllm, on Linux with a GPU: pip install "vllm>=0.22". '
                'Or name a server that runs elsewhere: vllm_server="http://host:8000".'
            ) from error
        self.params = vllm.SamplingParams
        self.llm = vllm.LLM(
            model=folder, dtype=dtype, gpu_memory_utilization=gpu_memory,
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

    def load(self, folder: str) -> bool:
        """Take the weights from a folder; has all been forgotten that was computed with the old ones?"""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        return self.llm.reset_prefix_cache() is not False


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
            raise ValueError(f"{self.url} answers, but not as vLLM 0.22 or newer does: {error!r}.") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            cure = " Start it with VLLM_SERVER_DEV_MODE=1 in its environment." if error.code == 404 else ""
            raise ConnectionError(
                f"the vLLM server {self.url} answered {error.code} to {path}: {said}{cure}"
            ) from error
        except (OSError, ValueError) as error:  # nobody there, nobody any more, or no vLLM
            raise ConnectionError(
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

    def load(self, folder: str) -> bool:
        """Take the weights from a folder; has all been forgotten that was computed with the old ones?"""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        return (self._ask("/reset_prefix_cache", {}) or {}).get("success") is not False  # before 0.26 it says nothing


class VLLMSampler:
    """Samples with vLLM what `grpo_lab.rollout.sampling.sample` samples with the model itself.

    Args:
        model: the policy as it is now.
        tokenizer: its tokenizer; saved beside the weights for a vLLM in this process.
        precision: "fp32", "bf16" or "fp16", in which weights go over.
        server: address of a running server; None starts vLLM in this process.
        folder: where the weights are written for a server, which must see it under the same name.
        gpu_memory: share of the GPU's memory for a vLLM in this process.
    Raises: ValueError or ConnectionError that says what is missing.
    """

    def __init__(
        self, model: nn.Module, tokenizer, *, precision: str, server: str | None, folder: Path, gpu_memory: float
    ):
        self.dtype = DTYPES[precision]
        if server is not None:
            self.folder: Path | None = folder.resolve()
            self.engine: Server | Colocated = Server(server)
        else:
            self.folder = None  # the system's, TMPDIR: best one in memory
            with self._saved(model) as saved:
                tokenizer.save_pretrained(saved)
                self.engine = Colocated(saved, self.dtype, gpu_memory)

    @contextmanager
    def _saved(self, model: nn.Module) -> Iterator[str]:
        """A folder with the weights as they are now, in vLLM's precision, for as long as they are read."""
        whole = merged(model) if is_adapted(model) else model
        copies: dict[tuple, Tensor] = {}  # what is tied stays one tensor, and is saved once
        state = {}
        for name, weight in whole.state_dict().items():
            key = (weight.data_ptr(), weight.shape)
            if key not in copies:
                copies[key] = weight.to("cpu", getattr(torch, self.dtype)) if weight.is_floating_point() else weight
            state[name] = copies[key]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        # each has a name of its own, so that no cache by name keeps old weights
        with tempfile.TemporaryDirectory(prefix=".weights-for-vllm-", dir=self.folder) as saved:
            os.chmod(saved, 0o755)  # a server in a container is often another user
            with without_progress_bars():
                whole.save_pretrained(saved, state_dict=state)
            yield saved

    def sync(self, model: nn.Module) -> None:
        """Give vLLM the policy's weights as they are now; an adapter's merged in."""
        with self._saved(model) as saved:
            if not self.engine.load(saved):
                raise ValueError("vLLM kept its cache of the old weights: it is still at work on other requests.")

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
        """K completions for each prompt, under the policy's weights of this moment.

        Args:
            model: the policy.
            prompts: P lists of token ids.
            uniforms: [P * K, T] numbers in [0, 1): the seeds are made of them, and T is the maximum length.
            others: as `sampling.sample`. Of truncation only top_k=1 (greedy) is possible: vLLM does not
                say which tokens it kept, so the others could not be scored as they were sampled.
        Returns: Rollouts on the CPU.
        Raises: ValueError for what vLLM cannot do, and for an answer that is not what was asked for; ConnectionError.
        """
        greedy = top_k == 1
        if not greedy and (top_k or top_p < 1):
            raise ValueError(f'sampler "vllm" cannot score what is truncated: top_k={top_k}, top_p={top_p}.')
        self.sync(model)
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
            raise ValueError(f"vLLM gave {[len(g) for g in groups]} completions, asked for {number} of each prompt.")
        vocabulary = model.get_input_embeddings().weight.shape[0]
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
            ended=torch.tensor([c.token_ids[-1] in end_ids for c in rows]),
        )


def _check(completion: Completion, longest: int, vocabulary: int, end_ids: Sequence[int]) -> None:
    """Is this what was asked for? Raises ValueError that says what is not."""
    ids, logprobs, reason = completion
    whole = reason == "stop" or (reason == "length" and len(ids) == longest)
    if not 1 <= len(ids) <= longest or not whole:
        raise ValueError(f"vLLM broke off a completion after {len(ids)} of at most {longest} tokens ({reason}).")
    if (reason == "stop" and ids[-1] not in end_ids) or set(ids[:-1]) & set(end_ids):
        raise ValueError(f"vLLM ends completions elsewhere ({reason}: {ids[-5:]}) than at the end tokens {end_ids}.")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"vLLM drew token {max(ids)}, but the policy knows {vocabulary}: it runs another model.")
    if len(logprobs) != len(ids):
        raise ValueError(f"vLLM gave {len(logprobs)} log-probabilities for {len(ids)} tokens.")
    if not all(p is not None and math.isfinite(p) for p in logprobs):
        raise ValueError("vLLM's log-probabilities are not finite: the weights that it was given are damaged.")


def warn_if_far(difference: float) -> None:
    """Is it rounding that parts vLLM's log-probabilities from ours? difference: mean of the absolute one, in nats."""
    if difference > FAR:
        warnings.warn(
            f"vLLM's log-probabilities are {difference:.2g} nats from ours on average, which is more than rounding: "
            "its weights are not the policy's. Is it another model, or quantized? Does it see the same output_dir?",
            stacklevel=3,
        )
