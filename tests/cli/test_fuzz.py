"""Bad input of every kind gets one plain sentence: no traceback, no code run, no hang, no flood of memory."""

import ast
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from itertools import product
from pathlib import Path

import datasets
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_lab import GRPOConfig, GRPOTrainer, SimplePromptDataset
from grpo_lab.cli import main as cli
from grpo_lab.cli import train
from grpo_lab.rewards.verifiable import BUILT_IN, evaluate_expression, final_number, matches_format
from grpo_lab.rollout.prompts import check_prompt
from grpo_lab.tasks.files import load_prompts
from grpo_lab.tasks.pocket.make import make_tokenizer
from grpo_lab.training import checkpoints, output_dir

SECONDS = 2.0  # of processor time, which other work on the machine does not change
MEGABYTES = 1000  # more than at the start of the module
fuzz = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@contextmanager
def at_once():
    """What stands inside takes no more than SECONDS."""

    def stop(*_):
        raise AssertionError("still running after 30 seconds")  # a TimeoutError, the code itself might answer

    has_alarm = hasattr(signal, "setitimer")  # not on Windows
    if has_alarm:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 30)
    began = time.process_time()
    try:
        yield
    finally:
        if has_alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < SECONDS


def attempt(function, *arguments, **keywords):
    """What the function returns, and None; or None, and why it refused."""
    try:
        return function(*arguments, **keywords), None
    except (ValueError, TypeError) as error:
        return None, str(error)


def memory(name: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process, in megabytes; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 1000
    return 0.0


@pytest.fixture(autouse=True, scope="module")
def memory_stays_small():
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < MEGABYTES


# --- the command line ------------------------------------------------------------------------------------

NO_INT = ["nan", "inf", "1e3", "", " ", "1.0", "0x10", "\0", "None", "½", "-1", "0", "-0", "9" * 20, "9" * 5000, "--"]
NO_RATE = ["nan", "inf", "-inf", "1e999", "1e-999", "-0", "", "1,5", "0x1p3", "9" * 400, "\ud800", "-1", "11"]
NO_PATH = ["", " ", "\0", "a\0b", "file", "file/x", "loop", "x" * 5000, "\ud800", "/dev/null"]
NO_FILE = ["", ":", "dir", "file", "loop", "..", ".txt", "dir.txt", "none.txt", "a\0b.txt", "*.txt",
           "x" * 5000 + ".txt", "empty.csv", "blank.txt", "binary.json", "\ud800.txt"]  # fmt: skip
NO_REWARD = [
    "", " ", "COUNTDOWN", "countdown:", "format", "format:", "format:(", "format:[", "format:*", "format:\\",
    "format:(?P<n", "format:a{9999999999999}", "format:" + "(" * 5000, "format:" + "(?=x" * 3000, "mine.py", "mine.py:",
    "mine.py:nothing", "mine.py:f:g", "mine.py:__name__", "none.py:f", "dir.py:f", "exit.py:f", "own.py:f", "loop.py:f",
    "binary.py:f", "deep.py:f", "\0.py:f", ".py:f", "https://x/y.py:f", "__import__('os').system('true')",
]  # fmt: skip
NO_MODEL = ["", "\0", "dir", "./file", "loop/", "~/none", "../none", "a/b/c", "C:\\x", "a b", "x" * 500, "\ud800", "-x"]
NO_COMMAND = [[], [""], ["Train"], ["help"], ["eval"], ["train\0"], ["--train"], ["train", "train"], ["train", "@file"]]
TOGETHER = """
--baseline none | --kl-in reward | --aggregation-constant 3 | --preset rloo --kl-estimator k3 | --resume | --resume dir
--preset reinforce --scale-rewards group | --precision fp16 --device cpu | --reward-weights 1 2 3 | --reward-weights nan
--reward-weights | --reward-weights 1e999 | --reward-weights x | --max-new-tokens 1000 | --temperature 1e-9 | -x | x
--use-wandb=1 | --wandb x | --no-batch-size 3 | --batch | --preset GRPO | --preset grpo,dapo | --kl-estimator K3
--device cuda:99 | --device gpu | --device CPU | --report-to none_such | --report-to wandb none_such | --gamma 0
--lora-rank 0 | --reward-timeout 0 | --reward-timeout nan | --max-train-samples 0 | --max-train-samples nan | --dataset
--resume none | --resume file | --eval-dataset none.txt | --clip-range 2 | --top-p 1.5 | --seed -1 | --num-generations 1
--num-generations 99999999999 | --precision fp64 | --dataset ok.txt --eval-steps 1 | --dataset ok.csv --prompt-column no
--dataset ok.txt --reward exact_answer | --dataset ok.txt --reward countdown | --dataset ok.csv --reward numeric_answer
--task | --task none | --task GSM8K | --task gsm8k --dataset none.jsonl | --task pocket --dataset ok.csv
--preset gsm8k --dataset ok.csv | --dataset ok.csv --answer-column answer | --preset gsm8k --dataset ok.txt
--dataset ok.csv --answer-column none --reward exact_answer | --dataset ok.txt --answer-column answer --reward format:.
--max-eval-samples 0 | --max-eval-samples nan | --dataset ok.txt --system-prompt brief | --prompt-column
"""
CLI = [
    *(["train", "--batch-size", text] for text in NO_INT),
    *(["train", "--learning-rate", text] for text in NO_RATE),
    *(["train", "--output-dir", text] for text in NO_PATH),
    *(["train", "--dataset", text] for text in NO_FILE),
    *(["train", "--reward", text] for text in NO_REWARD),
    *(["train", "--model-name", text] for text in NO_MODEL),
    *(["train", "--reward-model", text] for text in NO_MODEL),
    *(["train", *words.split()] for words in TOGETHER.strip().replace("\n", " | ").split(" | ")),
    *NO_COMMAND,
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a few files in the way."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "file": b"x", "ok.txt": b"1+1=\n2+2=\n", "ok.csv": b"prompt,answer\n1+1=,two\n2+2=,four\n", "empty.csv": b"",
        "blank.txt": b" \n\n", "binary.json": bytes(range(256)), "binary.py": b"\0\xff", "exit.py": b"raise SystemExit",
        "own.py": b"class Own(BaseException): pass\nraise Own", "deep.py": b"def f(): f()\nf()",
        "mine.py": b"def f(prompts, completions): return [0.0] * len(completions)",
    }.items():  # fmt: skip
        Path(name).write_bytes(content)
    for name in ("dir", "dir.txt", "dir.py"):
        Path(name).mkdir()
    with suppress(OSError):  # Windows asks for rights
        Path("loop").symlink_to("loop")
    return tmp_path


def command_line(arguments, capsys) -> tuple[int, str]:
    """Exit status and complaint."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:  # argparse's way
        status = stop.code
    return status, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", CLI, ids=lambda a: ascii(" ".join(a[1:]))[1:40])
def test_a_bad_command_line_gets_one_sentence_and_status_2(here, capsys, monkeypatch, arguments):
    monkeypatch.setattr(train, "_show", lambda *_: None)
    with at_once():
        status, complaint = command_line(arguments, capsys)
    last = [line for line in complaint.splitlines() if line.startswith("grpo-lab")][-1]
    assert status == 2, complaint
    assert "Traceback" not in complaint
    assert len(last) > 20
    assert "unexpected" not in last


class _AcceptedError(Exception):
    pass


FLAGS = ["--" + field.name.replace("_", "-") for field in fields(GRPOConfig)]
VALUES = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(str), st.sampled_from(NO_INT + NO_RATE)
)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(FLAGS), VALUES), min_size=1, max_size=4))
def test_any_flags_are_taken_or_refused(capsys, monkeypatch, pairs):
    def stop(*_):
        raise _AcceptedError

    with monkeypatch.context() as patch, at_once():
        patch.setattr(train, "make_trainer", stop)  # nothing is trained
        patch.setattr(output_dir, "refuse_results", lambda *_: None)
        status, complaint = command_line(["train", *(word for pair in pairs for word in pair)], capsys)
    assert status == 2 or (status, "_AcceptedError" in complaint) == (1, True), complaint
    assert "Traceback" not in complaint


# --- settings --------------------------------------------------------------------------------------------


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no repr")


STRANGE = [
    None, True, 0, -1, 10**400, -(10**400), 10**5000, 0.5, math.nan, math.inf, -math.inf, 5e-324, 2j, "", "\0",
    "\ud800",
    "x" * 10**6, b"bytes", [], (), {}, {1}, [[]], (1, 2), [math.nan], (10**400,), (None,), (Unshowable(),), object(),
    int,
    len, Unshowable(), Decimal("NaN"), Fraction(1, 3), numpy.ones(3), numpy.float32(1), torch.ones(2), Path("x"),
    range(3),
]  # fmt: skip
SETTINGS = list(product([field.name for field in fields(GRPOConfig)], range(len(STRANGE))))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def refuses_or_round_trips(name, value):
    config, refusal = attempt(GRPOConfig, **{name: value})
    if refusal is not None:
        assert name in refusal
        assert len(refusal) < 500
    else:
        assert GRPOConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", [field.name for field in fields(GRPOConfig)])
def test_a_strange_setting_is_refused_by_name_or_survives_json(name):
    with at_once():
        for value in STRANGE:
            refuses_or_round_trips(name, value)


@fuzz
@given(st.sampled_from([field.name for field in fields(GRPOConfig)]), ANYTHING)
def test_any_setting_is_refused_by_name_or_survives_json(name, value):
    refuses_or_round_trips(name, value)


# --- dataset files ---------------------------------------------------------------------------------------


def parquet(columns) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


DEEP = b"[" * 10**5 + b"]" * 10**5
GOOD = parquet({"prompt": ["1+1=", "2+2="]})
FILES = {
    ".txt": [b"", b" \n\n", b"\xff\xfe\0", "2+2=".encode("utf-16"), "caf\xe9".encode("latin-1"), bytes(range(256))],
    ".jsonl": [
        b"", b"\xff", "{}".encode("utf-16"), b"hello", b"null", b"\nnull\n{}", b"1", b'"a"', b"[]", b"{}", b"true",
        b"NaN",
        b'{"prompt"', b'{"prompt": "a"', b'{"prompt": "a"}\n{"pro', b'{"prompt": "a"}\nnull', b'{"prompt": "a"}\0\0\0',
        b'{"prompt": "a"} {"prompt": "b"}', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\\ud800"}', b'{"": "a"}',
        b'{"prompt": null}', b'{"prompt": 1}', b'{"prompt": true}', b'{"prompt": {"a": 1}}', b'{"prompt": ["a"]}',
        b'{"prompt": ""}', b'{"prompt": "a"}\n{"prompt": 7}', b'{"prompt": "a"}\n{"answer": 7}', b'{"text": "a"}',
        b'{"prompt": [{"role": "user"}]}', b'{"prompt": [{"role": "user", "content": null}]}', b'{"prompt": [[]]}',
        b'{"prompt": %s}' % DEEP, b'{"prompt": ' * 10**5, b'{"prompt": "a", "x": %s}' % DEEP,
        b'{"x":' * 99 + b"1" + b"}" * 99,
        b'{"prompt": "a", "x": NaN}', b'{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', b"x" * 10**7,
        b'{"prompt": "' + b"x" * 10**7,
    ],
    ".json": [
        b"", b"[", b"{", b"{}", b"[]", b"nul", b"null", b"[1, 2]", b"[null]", b"[[[]]]", b'"prompt"',
        b'{"prompt": ["a"]}',
        b'{"data": [{"prompt": "a"}]}', b'[{"prompt": "a"}, 3]', b'[{"prompt": "a"}, null]', b'[{"prompt": "a"},\n{]',
        DEEP,
        DEEP[: 10**5], b'[{"prompt": 1}]', b'[{"prompt": "a"}',
    ],
    ".csv": [
        b"", b"prompt", b"prompt\n", b'prompt\n"unclosed\n', b"a,b\n1,2,3\n4\n", b"\0\1\2",
        "prompt\ncaf\xe9".encode("latin-1"),
        "prompt\na".encode("utf-16"), b"prompt\n\n\n", b",,,\n,,,\n", b"prompt\n,\n",
        b"prompt;answer\na;b\n",
        b"prompt\none, two, three\n", b"text\na\n", b"prompt,answer\na,1\n,2\n",
    ],
    ".parquet": [
        b"", b"PAR1", bytes(500), b"PAR1" + b"\xff" * 100 + b"PAR1", GOOD[:-1], GOOD[: len(GOOD) // 2], GOOD[4:],
        GOOD[:-8],
        parquet({"text": ["a"]}), parquet({"prompt": [1]}), parquet({"prompt": ["a", None]}),
        parquet({"prompt": [b"\xff"]}),
        parquet({"prompt": pyarrow.array([], pyarrow.string())}), parquet({"prompt": [["a"]]}),
    ],
}  # fmt: skip


@pytest.fixture
def dataset_file(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(suffix, content):
        path = tmp_path / f"prompts{suffix}"
        path.write_bytes(content)
        return str(path)

    return write


BAD_FILES = [(suffix, content) for suffix, contents in FILES.items() for content in contents]


unclosed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # by pandas, where it raises


@unclosed
@pytest.mark.parametrize(
    ("suffix", "content"), BAD_FILES, ids=[f"{suffix} {content[:20]!a}" for suffix, content in BAD_FILES]
)
def test_a_bad_dataset_file_gets_one_sentence_with_its_name(dataset_file, suffix, content):
    with at_once(), pytest.raises(ValueError, match=f"prompts{suffix}") as caught:
        load_prompts(dataset_file(suffix, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


TEXT_FILES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(ANYTHING | st.fixed_dictionaries({"prompt": ANYTHING}), max_size=3).map(
        lambda rows: "\n".join(json.dumps(row, default=repr) for row in rows).encode()
    ),
    st.tuples(st.integers(0, 40), st.integers(0, 255)).map(
        lambda at: b'{"prompt": "1+1=", "answer": [2, null]}\n'.replace(b"n", bytes([at[1]]))[at[0] :]
    ),
)


@unclosed
@fuzz
@given(st.sampled_from([".txt", ".jsonl", ".json", ".csv"]), TEXT_FILES)
def test_any_text_file_is_a_dataset_of_prompts_or_refused(dataset_file, suffix, content):
    with at_once():
        dataset, refusal = attempt(load_prompts, dataset_file(suffix, content))
    if refusal is not None:
        assert f"prompts{suffix}" in refusal
    else:
        for i, prompt in enumerate(dataset["prompt"]):
            check_prompt(prompt, i)


# --- checkpoints -----------------------------------------------------------------------------------------

OPENED = []  # what a pickle managed to run


class Bomb:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


BOMBS = [
    Bomb(OPENED.append, 1), Bomb(os.system, "true"), Bomb(eval, "1"), Bomb(exec, ""), Bomb(open, os.devnull),
    Bomb(__import__, "this"), Bomb(getattr, "", "join"), Bomb(Path, "x"), Bomb(numpy.ones, 3), Bomb(ast.parse, "1"),
]  # fmt: skip
DAMAGE = {
    "empty": lambda good: b"",
    "cut in half": lambda good: good[: len(good) // 2],
    "cut by one": lambda good: good[:-1],
    "a first bit": lambda good: bytes([good[0] ^ 1]) + good[1:],
    "a middle bit": lambda good: (
        good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :]
    ),
    "a last bit": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
    "grown": lambda good: good + b"x",
    "twice": lambda good: good + good,
    "zeros": lambda good: bytes(len(good)),
    "gone": lambda good: None,
}
CHECKPOINT_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                    "tokenizer_config.json", checkpoints.STATE_FILE]  # fmt: skip
STATE_KEYS = ["step", "num_tokens", "skipped_steps", "skipped_in_a_row", "optimizer", "scheduler", "order", "batch",
              "unlogged", "random", "run"]  # fmt: skip
WRONG = [-1, math.nan, "x", [[]], {"a": 1}, torch.ones(2)]


def make_trainer(folder) -> GRPOTrainer:
    config = GRPOConfig(
        batch_size=2, gradient_accumulation_steps=1, num_generations_per_prompt=2, max_new_tokens=3, num_iterations=2,
        max_steps=4, warmup_steps=0, logging_steps=4, output_dir=str(folder), overwrite_output_dir=True,
    )  # fmt: skip
    return GRPOTrainer(
        tiny_model(), None, lambda prompts, completions: [float(len(c)) for c in completions], make_tokenizer(), config,
        SimplePromptDataset(["1+1=", "2+2="]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is one step old, and in the middle of a rollout; its checkpoint is "whole"."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    next(trainer.steps())
    trainer.save(folder / "whole")
    return trainer


@pytest.fixture
def checkpoint(run, tmp_path):
    return shutil.copytree(run.output_dir / "whole", tmp_path / "checkpoint-1")


def everything(run) -> str:
    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    return repr(plain([run._state(), run.model.state_dict()]))


def test_these_are_the_files_and_the_state_of_a_checkpoint(run):
    assert sorted(path.name for path in (run.output_dir / "whole").iterdir()) == sorted(CHECKPOINT_FILES)
    assert set(run._state()) == {*STATE_KEYS, "scaler", "unfinished"}


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_damaged_file_is_noticed_or_harmless(run, checkpoint, file):
    good, before = (checkpoint / file).read_bytes(), everything(run)
    for damage in DAMAGE.values():
        content = damage(good)
        (checkpoint / file).unlink() if content is None else (checkpoint / file).write_bytes(content)
        with at_once():
            _, refusal = attempt(run.load, checkpoint)
        assert refusal is None or "checkpoint-1" in refusal
        assert everything(run) == before
        (checkpoint / file).write_bytes(good)
    if file in ("model.safetensors", checkpoints.STATE_FILE):
        (checkpoint / file).write_bytes(DAMAGE["a middle bit"](good))
        with pytest.raises(checkpoints.DamagedCheckpointError, match="has changed"):
            run.load(checkpoint)


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_state_that_lacks_something_or_holds_nonsense_is_refused(run, checkpoint, key):
    good = torch.load(checkpoint / checkpoints.STATE_FILE, weights_only=True)
    for wrong in ["absent", *WRONG]:
        state = {name: value for name, value in good.items() if name != key or wrong != "absent"}
        torch.save(state if wrong == "absent" else state | {key: wrong}, checkpoint / checkpoints.STATE_FILE)
        with at_once(), pytest.raises(ValueError, match="checkpoint"):
            run.load(checkpoint)
    run.load(run.output_dir / "whole")


@pytest.mark.parametrize("state", [None, 1, "x", [], {}, torch.ones(2), {"checksums": 1}, {1: 2}], ids=repr)
def test_a_state_that_is_no_state_is_refused(run, checkpoint, state):
    torch.save(state, checkpoint / checkpoints.STATE_FILE)
    with at_once(), pytest.raises(checkpoints.DamagedCheckpointError, match="checkpoint-1 cannot be used"):
        run.load(checkpoint)


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.call[0].__name__)
@pytest.mark.parametrize("form", ["zip", "old zip", "bare pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(run, checkpoint, form, bomb):
    file = checkpoint / checkpoints.STATE_FILE
    if form == "bare pickle":
        file.write_bytes(pickle.dumps({"step": bomb}))
    else:
        torch.save({"step": bomb}, file, _use_new_zipfile_serialization=form == "zip")
    with at_once(), pytest.raises(checkpoints.DamagedCheckpointError, match="checkpoint-1 cannot be used"):
        run.load(checkpoint)
    assert not OPENED
    assert "this" not in sys.modules


def test_a_zip_that_unpacks_to_a_flood_is_refused(run, checkpoint):
    with zipfile.ZipFile(checkpoint / checkpoints.STATE_FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**27))
        archive.writestr("archive/version", "3")
    with at_once(), pytest.raises(checkpoints.DamagedCheckpointError, match="checkpoint-1 cannot be used"):
        run.load(checkpoint)


# --- rewards ---------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "\0", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "-1e999", "9**9**9**9", "9" * 10**6,
    "1" + "0" * 5000,
    "(" * 10**6, ")" * 10**6, "(" * 49 + "3" + ")" * 49, "-" * 10**6, "3-" * 10**5, "~" * 99 + "3", "not " * 20 + "3",
    "3/0", "0/0", "3//0", "3%0", "1/(5-5)", "3<<99999999", "3 if 1 else 3", "٣*٥+٧", "３*５＋７", "³*5", "①", "½", "Ⅻ",
    "3*5+7" + "\u200b", "3*5+7\0", "\ud800", "\U0010ffff" * 1000, "é" * 10**6, "#### " * 10**5, "####", "#### ,",
    "$-", "1,,2",
    "." * 10**6, "1." * 10**5, "0x17", "1_7", "1j", "True", "None", "[22]", "{22}", "'22'", "lambda: 22", "(yield)",
    "f'{22}'",
    "__import__('os').system('true')", "exec('1')", "open('/etc/passwd')", "22\n" * 10**5 + "x", "a" * 10**6,
    "ab" * 10**5 + "!", "####" * 10**6, "\n" * 10**6 + "####", "####\n22", "22 #### 22", "#### 22\n#### 22", "##### 22",
    "#### 22\nor so", "\n#### \u200b",
]  # fmt: skip
PATTERNS = [
    ("(a+)+b", "a" * 2000), ("(a+)+$", "a" * 2000 + "!"), (r"(.*)*x", "a" * 2000), (r"(\w+\s?)*:",
    "word " * 2000 + "!"),
    ("((a*)*)*c", "a" * 2000), (r"(.*a){25}", "b" * 9999), (r"(x+x+)+y", "x" * 2000), (r"([^0-9]|\D)*7", "a" * 2000),
]  # fmt: skip
ENDLESS = [
    (r"<think>(.|\s)*</think>", "<think>" + " " * 60 + "!"), ("(a|aa)+$", "a" * 60 + "!"), ("(.*?,){30}x", "1," * 60),
    ("^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 2000 + "!"), ("(?R)|b", "a"),
]  # fmt: skip


def scores(text: str) -> list[float]:
    """Of all but math_answer, which has a process and hostile texts of its own in test_isolated.py."""
    columns = {"answer": ["-4242.5"]}
    return [reward(["3,5,7:22="], [text], **columns)[0] for name, reward in BUILT_IN.items() if name != "math_answer"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:16]))
def test_rubbish_scores_zero_at_once(text):
    with at_once():
        assert set(scores(text)) == {0.0}


@fuzz
@given(st.text() | st.text("0123456789+-*/()., #$nafi\u2212٣", max_size=200) | st.floats().map(str))
def test_any_text_scores_zero_or_one(text):
    with at_once():
        assert set(scores(text)) <= {0.0, 1.0}
        assert isinstance(final_number(text), Fraction | None)
        assert evaluate_expression(text) is None or isinstance(evaluate_expression(text)[0], Fraction)


@pytest.mark.parametrize(("pattern", "text"), PATTERNS + ENDLESS, ids=[pattern for pattern, _ in PATTERNS + ENDLESS])
def test_a_pattern_that_tries_for_ever_is_given_up_with_a_warning(pattern, text):
    warns = pytest.warns(RuntimeWarning, match=r"takes more than 0\.5 s .* score 0\.")
    with at_once(), warns if (pattern, text) in ENDLESS else nullcontext():
        assert matches_format(pattern)(["?"], [text]) == [0.0]


# --- how many --------------------------------------------------------------------------------------------

INPUTS = {
    "command lines": len(CLI),
    "settings": len(SETTINGS),
    "dataset files": len(BAD_FILES),
    "checkpoints": len(CHECKPOINT_FILES) * len(DAMAGE) + len(STATE_KEYS) * (1 + len(WRONG)) + 8 + 3 * len(BOMBS) + 1,
    "texts and patterns for rewards": len(TEXTS) + len(PATTERNS) + len(ENDLESS),
}


def test_there_are_more_than_two_hundred_without_counting_what_is_generated(record_property):
    for kind, number in INPUTS.items():
        record_property(kind, number)
        print(f"{number} {kind}")
        assert number >= 50
    assert len({*map(tuple, CLI)}) == len(CLI)
    assert len({*TEXTS}) == len(TEXTS)
    assert len({*BAD_FILES}) == len(BAD_FILES)
