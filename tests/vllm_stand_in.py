"""What stands in for vLLM where there is none: a package and a server that speak as much of its interface as we use.

It really samples, from the model in the folder that it is given, and as strictly as the real one: unknown arguments are
refused, weights must fit, and what a cache remembers of old weights stays until it is told to forget.
"""

import json
import threading
import types
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self):
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")
        # what the stand-in does not do; a seed keeps it from drawing from the tests' own random numbers
        assert (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) == (0, 0, 1)
        assert (self.top_p, self.top_k, self.min_p) == (1, 0, 0)
        assert self.seed is not None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Engine:
    """A model, and what it remembers of prompts that it has read. `noise` bends its distribution away from ours."""

    def __init__(self, folder, noise: float = 0.0):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        size = self.model.get_input_embeddings().weight.shape[0]
        self.bias = noise * torch.randn(size, generator=torch.Generator().manual_seed(7))
        self.cache: dict[tuple[int, ...], torch.Tensor] = {}
        self.reloads = 0
        self.lock = threading.Lock()

    def reload_weights(self, *, weights_path: str) -> None:
        saved = {}
        for file in sorted(Path(weights_path).glob("*.safetensors")):
            saved |= load_file(file)
        if not saved:
            raise RuntimeError(f"Cannot find any model weights with `{weights_path}`")
        wanted = self.model.state_dict()
        tied = self.model.config.tie_word_embeddings
        missing = {name for name in wanted if name not in saved and not (tied and name == "lm_head.weight")}
        wrong = {name for name, weight in saved.items() if name not in wanted or weight.shape != wanted[name].shape}
        if missing or wrong:
            raise ValueError(f"weights do not fit: {sorted(missing | wrong)[:3]}")
        self.model.load_state_dict(saved, strict=False)  # casts to its own precision
        self.reloads += 1

    @torch.no_grad()
    def complete(self, prompt: list[int], params: SamplingParams) -> list[CompletionOutput]:
        ends = set(params.stop_token_ids or ())
        with self.lock:
            if tuple(prompt) not in self.cache:
                self.cache[tuple(prompt)] = self.model(torch.tensor([prompt])).logits[0, -1]
            first = self.cache[tuple(prompt)]
        outputs = []
        for index in range(params.n):
            random = torch.Generator().manual_seed(params.seed + index)
            ids, said, logits = [], [], first
            while True:
                log_p = ((logits + self.bias) / (params.temperature or 1.0)).log_softmax(-1)
                greedy = params.temperature == 0
                token = int(log_p.argmax() if greedy else torch.multinomial(log_p.exp(), 1, generator=random))
                ids.append(token)
                said.append({token: Logprob(log_p[token].item())})
                if token in ends or len(ids) == params.max_tokens:
                    break
                logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            reason = "stop" if ids[-1] in ends else "length"
            said = said if params.logprobs is not None else None
            outputs.append(CompletionOutput(index, "", ids, said, reason))
        return outputs


def package(noise: float = 0.0) -> types.ModuleType:
    """The package `vllm`, to be put into sys.modules; `package.started` lists the engines."""

    class LLM:
        def __init__(
            self, model, *, dtype="auto", gpu_memory_utilization=0.9, logprobs_mode="raw_logprobs",
            generation_config="auto",
        ):  # fmt: skip
            assert dtype in ("float32", "bfloat16", "float16")
            assert 0 < gpu_memory_utilization <= 1
            assert logprobs_mode == "processed_logprobs"
            assert generation_config == "vllm"
            AutoTokenizer.from_pretrained(model)
            self.engine = Engine(model, noise)
            module.started.append(self)

        def generate(self, prompts, sampling_params, *, use_tqdm=True):
            assert len(prompts) == len(sampling_params)
            return [
                RequestOutput(p["prompt_token_ids"], self.engine.complete(p["prompt_token_ids"], s))
                for p, s in zip(prompts, sampling_params, strict=True)
            ]

        def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            assert method == "reload_weights"
            return [self.engine.reload_weights(*args, **kwargs or {})]

        def reset_prefix_cache(self) -> bool:
            self.engine.cache.clear()
            return True

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams, module.started = LLM, SamplingParams, []
    return module


COMPLETION_FIELDS = {
    "model", "prompt", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop_token_ids", "logprobs", "return_token_ids",
}  # fmt: skip


class Server:
    """What a running `vllm serve` knows. A test may change how it answers: `answer` sees each answer last."""

    def __init__(self, folder, noise: float = 0.0):
        self.engine = Engine(folder, noise)
        self.url = ""
        self.dev_mode, self.logprobs_mode = True, "processed_logprobs"
        self.answer = lambda path, content: content

    def get(self, path: str):
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": "policy", "object": "model", "max_model_len": 64}]}
        if path == "/server_info?config_format=json" and self.dev_mode:
            return {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}
        raise LookupError(path)

    def post(self, path: str, body: dict):
        if path == "/v1/completions":
            return self.completions(body)
        if not self.dev_mode:
            raise LookupError(path)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            return {"results": [self.engine.reload_weights(**body["kwargs"])]}
        if path == "/reset_prefix_cache":
            self.engine.cache.clear()
            return {"success": True}
        raise LookupError(path)

    def completions(self, body: dict):
        assert set(body) <= COMPLETION_FIELDS, set(body) - COMPLETION_FIELDS
        assert body["model"] == "policy"
        assert body["return_token_ids"] is True
        settings = {k: v for k, v in body.items() if k not in ("model", "prompt", "return_token_ids")}
        choices = []
        for output in self.engine.complete(body["prompt"], SamplingParams(**settings)):
            at = [next(iter(place.values())).logprob for place in output.logprobs]
            logprobs = {"tokens": ["?"] * len(at), "token_logprobs": at, "top_logprobs": [{}] * len(at)}
            choices.append(
                {
                    "index": output.index, "text": "?", "logprobs": logprobs, "finish_reason": output.finish_reason,
                    "stop_reason": None, "token_ids": output.token_ids, "prompt_token_ids": body["prompt"],
                }
            )  # fmt: skip
        return {"id": "cmpl-1", "object": "text_completion", "model": "policy", "choices": choices[::-1]}


@contextmanager
def serve(folder, noise: float = 0.0):
    """Run the server on a free port of this machine."""
    server = Server(folder, noise)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(lambda: server.get(self.path))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(lambda: server.post(self.path, body))

        def reply(self, make):
            try:
                code, content = 200, server.answer(self.path, make())
            except LookupError:
                code, content = 404, {"detail": "Not Found"}
            except Exception as error:
                code, content = 500, {"error": {"message": str(error)}}
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
