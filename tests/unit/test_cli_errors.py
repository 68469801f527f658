"""What the commands say of wrong arguments, missing packages and broken surroundings: one short line, at once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deberta_kernels
from deberta_kernels.__main__ import main
from deberta_kernels.bench.options import parser
from deberta_kernels.demo import arguments, checkpoint

ROOT = Path(deberta_kernels.__file__).resolve().parents[1]
USAGE, FAILED = 2, 1
LONGEST = 400  # characters of an error


def start(*words, code=None, **options):
    """Start the command line, or other code, as a user does."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    state = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    given = ["-m", "deberta_kernels"] if code is None else ["-c", code]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, *given, *words], env=state, stdin=subprocess.DEVNULL, **options)


def ended(words):
    """Return the exit status of one command."""
    try:
        return main(words)
    except SystemExit as stopped:
        return stopped.code


WRONG = {
    "": "the following arguments are required: demo | info | bench | explain",
    "fly": "invalid choice: 'fly'",
    "--verbose info": "",
    "info --xml": "unrecognized arguments: --xml",
    "demo --lengths 8,x": "argument --lengths: must be an integer from 1 to 2147483647, got 'x'",
    "demo --lengths 8,,9": "argument --lengths: must be an integer from 1 to 2147483647, got ''",
    "demo --lengths 2,8": "argument --lengths: must be 3 tokens or more, got '2'",
    "demo --max-length 0": "argument --max-length: must be an integer from 1",
    "demo --max-length 2": "argument --max-length: must be 3 tokens or more, got '2'",
    "demo --threads 0": "argument --threads: must be an integer from 1",
    "demo --threads -1": "argument --threads: must be an integer from 1",
    "demo --dtype float16": "argument --dtype: invalid choice: 'float16'",
    "demo --backend tpu": "argument --backend: invalid choice: 'tpu'",
    "demo --name ../x": "argument --name: must be a file name without folders, got '../x'; --output has the folder",
    f"demo --name {'x' * 201}": "argument --name: must be a name of at most 200 bytes, got 'xxxxxxxxxxxxxxxxxxxx' ...",
    "demo --threads 1025": "argument --threads: must be an integer from 1 to 1024, got '1025'",
    "demo one two": "unrecognized arguments: two",
    "bench --model x": "the following arguments are required: --text",
    "bench --model x --text y --batch-size 0": "argument --batch-size: must be an integer from 1",
    "bench --model x --text y --threads 100000": "argument --threads: must be an integer from 1 to 1024",
    "bench --model x --text y --dtype int3": "argument --dtype: invalid choice: 'int3'",
    "explain --length -3": "argument --length: must be an integer from 1 to 2147483647, got '-3'",
    "explain --batch 0": "argument --batch: must be an integer from 1",
    "explain --heads 2147483647 --length 2147483647": "--batch 1 --heads 2147483647 --length 2147483647: a tensor has",
    "explain --heads 99999999999999999999": "argument --heads: must be an integer from 1",
    "explain --head-dim ²": "argument --head-dim: must be an integer from 1",
    "explain --max-relative-positions 0": "argument --max-relative-positions: must be an integer from 1",
    "explain --position-buckets x": "argument --position-buckets: invalid int value: 'x'",
    "explain --dropout 1.5": "argument --dropout: must be a number in [0, 1), got '1.5'",
    "explain --dropout nan": "argument --dropout: must be a number in [0, 1), got 'nan'",
    "explain --dropout much": "argument --dropout: must be a number in [0, 1), got 'much'",
    "explain --dtype int3": "argument --dtype: invalid choice: 'int3'",
    "explain --mask all": "argument --mask: invalid choice: 'all'",
    "explain --backend fastest": "argument --backend: invalid choice: 'fastest'",
    "explain --device gpu": "--device must be a device of torch, got 'gpu'; write cuda, or cuda:0 for the first GPU",
    "explain --device nowhere": "--device must be a device of torch, got 'nowhere'; write cpu or cuda",
    "explain --device cuda:x": "--device must be a device of torch, got 'cuda:x'",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_one_line_and_status_2(words, capsys):
    assert ended(words.split()) == USAGE
    said = capsys.readouterr()
    assert WRONG[words] in said.err
    assert said.out == ""
    assert said.err.startswith("deberta-kernels")
    assert said.err.count("\n") == 1
    assert len(said.err) < LONGEST


@pytest.mark.parametrize("words", ["--lengths 4,x", "--threads 0", "--seconds -1", "--seconds nan", "--size 3"])
def test_wrong_arguments_of_the_installed_benchmark_are_named(words, capsys):
    from deberta_kernels.bench import core

    with pytest.raises(SystemExit) as stopped:
        core.run(words.split())
    assert stopped.value.code == USAGE
    assert words.split()[0] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_named_and_nothing_else_is_listed(capsys):
    import torch

    device = f"cuda:{torch.cuda.device_count()}"
    assert ended(["explain", "--device", device]) == FAILED
    said = capsys.readouterr().err
    assert said.startswith(f"deberta-kernels explain: --device {device}: torch ")
    assert said.count("\n") == 1
    assert len(said) < LONGEST


def write(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(content)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A current folder with every kind of wrong directory in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "empty")
    write(tmp_path / "other", notes="x", a="", b="", c="", d="")
    write(tmp_path / "bert", config_json='{"model_type": "bert"}')
    write(tmp_path / "nameless", config_json="{}")
    write(tmp_path / "list", config_json="[]")
    write(tmp_path / "cut", config_json='{"model_type"')
    write(tmp_path / "binary", config_json="")
    (tmp_path / "binary" / "config.json").write_bytes(b"\xff\xfe\x00")
    write(tmp_path / "adapter", adapter_config_json="{}")
    write(tmp_path / "weightless", config_json='{"model_type": "deberta-v2"}')
    write(tmp_path / "file")
    (tmp_path / "file" / "model.bin").write_text("x")
    return tmp_path


MODELS = {
    "nosuchdir": "model 'nosuchdir' is neither a directory (",
    "nosuch/model": "HF_HUB_OFFLINE is set, so the hub is not asked",
    "./nosuchdir": "model './nosuchdir': there is no such directory; give a directory with config.json and weights",
    "/nowhere/model": "model '/nowhere/model': there is no such directory",
    "one/two/three": "there is no such directory",
    "nosuchdir/": "there is no such directory",
    "C:\\models": "there is no such directory",
    "two words": "model must be a directory with config.json and weights, or a hub id such as microsoft/deberta-v3-",
    "x" * 97: "model must be a directory",
    "empty": "model directory empty has no config.json (it is empty)",
    "other": "model directory other has no config.json (it holds a, b, c, d ...)",
    "bert": "config.json: model_type must be 'deberta' or 'deberta-v2', got 'bert'",
    "nameless": "config.json: model_type must be 'deberta' or 'deberta-v2', got None",
    "list": "config.json: model_type must be 'deberta' or 'deberta-v2', got None",
    "cut": "config.json cannot be read: ",
    "binary": "config.json cannot be read: ",
    "adapter": "model directory adapter holds an adapter alone; merge it into its model and save that",
    "weightless": "model directory weightless has no weights (model.safetensors or pytorch_model.bin)",
    "file/model.bin": "model 'file/model.bin' is a file; give the directory that it is in",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_had_is_named_before_anything_is_loaded(name, places, capsys):
    assert ended(["demo", name]) == FAILED
    said = capsys.readouterr()
    assert MODELS[name] in said.err
    assert said.err.startswith("deberta-kernels demo: model") or "config.json" in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not (places / "demo-results").exists()


@pytest.mark.parametrize("folder", ["file/model.bin", "file/model.bin/below"])
def test_a_folder_for_results_that_is_a_file_is_named_before_anything_else(folder, places, capsys):
    assert ended(["demo", "nosuchdir", "--output", folder]) == FAILED
    expected = f"--output must be a folder, and {places / 'file' / 'model.bin'} is a file; name another folder.\n"
    assert capsys.readouterr().err == f"deberta-kernels demo: {expected}"


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_else(places, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert ended(["demo", "nosuchdir"]) == FAILED
    assert f"--output must be a folder to write to, and {places} is not; " in capsys.readouterr().err


def test_an_output_that_cannot_take_the_files_is_refused_before_the_work(places, capsys):
    (places / "link").symlink_to(places / "gone")
    assert ended(["demo", "nosuchdir", "--output", "link"]) == FAILED
    assert f"--output must be a folder, and {places / 'link'} is a broken link; " in capsys.readouterr().err
    (places / "taken" / "demo.csv").mkdir(parents=True)
    assert ended(["demo", "nosuchdir", "--output", "taken"]) == FAILED
    assert "--output taken needs room for demo.csv, a folder there; name another folder." in capsys.readouterr().err
    (places / "taken" / "bench.png").mkdir()
    assert ended(["bench", "--model", "nosuchdir", "--text", "nosuch.txt", "--output", "taken"]) == FAILED
    assert "--output taken needs room for bench.png, a folder there; name another folder." in capsys.readouterr().err


def test_a_directory_that_may_not_be_read_is_named(places, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert ended(["demo", "empty"]) == FAILED
    assert "model directory empty cannot be read: Permission denied" in capsys.readouterr().err


def hub_client(folder, monkeypatch, body):
    """Put a hub client in place whose `model_info` has this body."""
    (folder / "client").mkdir()
    (folder / "client" / "huggingface_hub.py").write_text(
        "import time\n"
        "class constants: HF_HUB_OFFLINE = False\n"
        "class errors:\n    class RepositoryNotFoundError(Exception): pass\n"
        "def try_to_load_from_cache(name, file): return '/cache' if name == 'cached/model' else None\n"
        f"def model_info(name, timeout): {body}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "client"))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return {}", None),
        ("raise errors.RepositoryNotFoundError('404')", "the hub has no such model, or it is private"),
        ("raise OSError('no route')", "the hub cannot be reached (OSError)"),
        ("time.sleep(60)", "the hub did not answer within 1 s"),
    ],
)
def test_the_hub_is_asked_once_and_not_for_long(body, expected, tmp_path, monkeypatch):
    hub_client(tmp_path, monkeypatch, body)
    if "sleep" in body:
        monkeypatch.setattr(checkpoint, "_HUB_SECONDS", 1)
    found = checkpoint.hub_problem("some/model")
    assert found is None if expected is None else found.startswith(expected)
    assert checkpoint.hub_problem("cached/model") is None


@pytest.mark.packages("transformers")
def test_a_name_that_is_nothing_is_refused_within_seconds(tmp_path):
    begin = time.monotonic()
    process = start("demo", "nosuchdir", cwd=tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert "model 'nosuchdir' is neither a directory" in said
    assert time.monotonic() - begin < 15  # the hub's client retried for 25 s; a busy machine starts a process in some


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch", ["explain"]),
        ("torch", ["demo"]),
        ("torch", ["bench"]),
        ("torch", ["warmup"]),
        ("transformers", ["demo"]),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert ended(words) == FAILED
    said = capsys.readouterr().err
    assert re.fullmatch(rf"deberta-kernels {words[0]}: {name} is not installed; run `pip install \S+`\n", said)


def test_a_package_that_does_not_import_is_no_traceback(monkeypatch, capsys):
    def broken(*given):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr("deberta_kernels.__main__.show_explanation", broken)
    assert ended(["explain"]) == FAILED
    assert capsys.readouterr().err == (
        "deberta-kernels explain: libgomp.so.1: cannot open shared object file; "
        "`deberta-kernels info` shows what is installed\n"
    )


def test_a_tokenizer_without_its_packages_says_which(tmp_path, monkeypatch):
    from deberta_kernels.demo.model import find_encoder

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    _, remark = find_encoder(str(tmp_path), 100)
    assert 'sentencepiece is not installed; run `pip install "deberta-kernels[demo]"`' in remark


def test_every_package_that_can_be_missing_has_a_command():
    assert set(arguments._INSTALLS) == {"torch", "transformers", "sentencepiece", "google.protobuf"}


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None
sys.argv[0] = "deberta-kernels"
runpy.run_module("deberta_kernels", run_name="__main__")
"""


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["demo", "--help"], ["info"], ["info", "--json"]])
def test_it_works_without_torch(words):
    process = start(*words, code=WITHOUT_TORCH)
    said, wrong = process.communicate(timeout=120)
    assert (process.returncode, wrong) == (0, "")
    if words == ["--version"]:
        assert said == f"deberta-kernels {deberta_kernels.__version__}\n"
    elif words == ["info", "--json"]:
        found = json.loads(said)
        assert found["torch"] == "torch is not installed; install it: `pip install torch`"
        assert found["auto"] is None
        assert set(found["backends"].values()) == {found["torch"]}
        assert found["cpu"]["threads"] is None
    elif words == ["info"]:
        assert "  torch        torch is not installed; install it: `pip install torch`\n" in said
        assert "  backends     none runs without torch\n" in said


def test_nothing_that_needs_no_torch_imports_it():
    code = "import sys\nfrom deberta_kernels.__main__ import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for words in (["--version"], ["explain", "--length", "0"], ["demo", "./nowhere"]):
        process = start(*words, code=code)
        said, _ = process.communicate(timeout=120)
        assert said.splitlines()[-1] == "False"


SLOW = """
import signal, sys, time
from deberta_kernels import __main__ as cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
def wait(*given):
    print("begun", flush=True)
    for _ in range(600):
        time.sleep(0.1)  # a signal that comes before a sleep does not shorten it
cli.show_info = wait
sys.exit(cli.main(["info"]))
"""


def test_an_interrupt_is_no_traceback():
    process = start(code=SLOW)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "\ndeberta-kernels: interrupted\n")


def test_a_reader_that_leaves_is_no_traceback():
    receive, send = os.pipe()
    os.close(receive)
    process = start("info", stdout=send)
    os.close(send)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (FAILED, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_named():
    with open("/dev/full", "w") as full:
        process = start("info", stdout=full)
        _, said = process.communicate(timeout=120)
    assert process.returncode == FAILED
    assert said.startswith("deberta-kernels info: [Errno 28] No space left on device")


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    given = ["--model", "m", "--text=~/texts.txt", "--output=~/found"]
    found = parser().parse_args(given)
    assert (str(found.text), str(found.output)) == ("/somewhere/texts.txt", "/somewhere/found")


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ([], FAILED, "warmup: torch sees no GPU; run it on the machine that will compute"),
        (["--device", "cpu"], FAILED, "warmup: kernels are compiled for GPUs, not for cpu"),
        (["--device", "gpu"], USAGE, "warmup: --device must be cuda or cuda:N, got 'gpu'"),
    ],
)
def test_warming_up_without_a_gpu_is_refused_in_one_line(given, status, said, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["warmup", *given]) == status
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
