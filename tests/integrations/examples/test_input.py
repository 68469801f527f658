"""What cannot be used is named before any work, with what was expected and what mends it; and nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def refused(program: Callable[[str], Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run an example that must refuse; return what it says."""

    def refused(name: str, *arguments: str) -> str:
        from parts.recipe import run

        capsys.readouterr()
        output = tmp_path / "output"
        assert run(program(name).TASK, ["--device", "cpu", *arguments, "--output", str(output)]) == 2
        assert not output.exists()
        return capsys.readouterr().err

    return refused


def test_a_column_that_is_not_there(refused, table):
    said = refused("sequence_classification", "--data", table(("review", "label"), ("good", 1), ("bad", 0)))
    assert 'has no column "text"; its columns are: review, label. ' in said
    assert "--text-column review" in said


def test_a_named_column_that_could_be_left_out(refused, table):
    file = table(("text", "label"), ("good", 1), ("bad", 0))
    said = refused("sequence_classification", "--data", file, "--pair-column", "second")
    assert 'has no column "second"' in said


def test_rows_that_are_empty_have_their_lines(refused, table, train, checkpoint, capsys):
    rows = [("one\nover two lines", 0), ("", 1), ("fine", ""), ("last", 1)] + [("a film", 1), ("a text", 0)] * 4
    file = table(("text", "label"), *rows)
    said = refused("sequence_classification", "--data", file)
    assert "2 of 12 rows cannot be used:\n  line 4: text is empty or missing\n  line 5: label is empty" in said
    assert "--skip-bad-rows" in said
    options = ("--length", "16", "--steps", "1", "--skip-bad-rows", "--model", checkpoint())
    train("sequence_classification", "--data", file, *options, output="kept")
    captured = capsys.readouterr()
    assert "left out 2 of 12 rows" in captured.err
    assert "9 records to train on, 1 to evaluate on" in captured.out


def test_only_the_first_bad_rows_are_listed(refused, table):
    file = table(("text", "label"), *[("", 1)] * 30, ("fine", 0))
    said = refused("sequence_classification", "--data", file)
    assert said.count("line ") == 10
    assert "and 20 more" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "there is no file"),
        ("rows.xlsx", "x", "must end in .csv, .tsv, .jsonl, .ndjson, .json or .txt"),
        ("empty.csv", "text,label\n", "has no rows"),
        ("rows.csv", "text,label\none, two,1\n", "line 2: more fields than the header's 2 (text, label); put texts"),
        ("rows.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 is not JSON"),
        ("rows.jsonl", '{"text": "a", "label": 1}\n["a", 1]\n', "line 2 must be an object with named values, got list"),
        ("rows.json", '{"text": "a"}\n{"text": "b"}', "ends in .jsonl"),
        ("rows.json", '{"rows": 1}', "must hold a list of objects, got dict"),
        ("rows.csv", b"text,label\ncaf\xe9,1\n", "is not UTF-8 (byte 14); try: iconv"),
        ("rows.csv", "text,label\n,\n,\n", "none of its 2 rows can be used"),
        ("rows.csv", "text,label\na,1\nb,1\n", "every label is '1'; there must be two or more"),
        (
            "rows.jsonl",
            '{"text": "a", "label": 0.5}\n{"text": "b", "label": 1}\n',
            "line 1: label 0.5 is a number with a",
        ),
        ("rows.jsonl", '{"text": "a", "label": [1]}\n{"text": "b", "label": 1}\n', "neither a name nor a whole number"),
        ("rows.csv", "text,label\n" + "".join(f"a,row {n}\n" for n in range(40)), "40 different labels"),
    ],
)
def test_files_that_cannot_be_used(name, content, message, refused, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refused("sequence_classification", "--data", str(tmp_path / name))


def test_a_table_with_a_mark_of_byte_order(train, checkpoint, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "a good film,x\na bad film,y\n" * 4, encoding="utf-8-sig")
    train("sequence_classification", "--data", str(tmp_path / "rows.csv"), "--steps", "1", "--model", checkpoint())


def test_a_label_that_only_the_validation_file_has(refused, table):
    data = table(("text", "label"), ("a", "good"), ("b", "bad"), name="data.csv")
    other = table(("text", "label"), ("a", "good"), ("b", "godo"), name="other.csv")
    said = refused("sequence_classification", "--data", data, "--validation", other)
    assert "other.csv, line 3 has the label 'godo', which" in said
    assert "its labels are: bad, good" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 1: 2 tokens but 1 tags"),
        ({"tokens": {"a": 1}, "tags": ["O"]}, "must be lists"),
        ({"tokens": ["a"], "tags": [7]}, "tag '7' is not the number of one of the 2 --tag-names"),
    ],
)
def test_tags_that_do_not_fit(row, message, refused, json_lines):
    assert message in refused("token_classification", "--data", json_lines([row] * 3), "--tag-names", "O,B-X")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("house", "line 1: the answer 'house' is not in the context"),
        ({"text": ["film"], "answer_start": [3]}, "'film' does not stand at character 3 of the context"),
        ({"text": ["film"]}, "answers must have text and answer_start, got text"),
        ({"text": ["film"], "answer_start": ["x"]}, "answer_start must be a whole number"),
    ],
)
def test_answers_that_do_not_fit(answers, message, refused, json_lines):
    row = {"question": "what?", "context": "a bad film", "answers": answers}
    assert message in refused("question_answering", "--data", json_lines([row] * 3))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"endings": ["a"], "label": 0}, "line 1: endings must be a list of two or more texts"),
        ({"endings": ["a", " "], "label": 0}, "one of the endings is empty"),
        ({"endings": ["a", "b"], "label": 2}, "label '2' must be a number from 0 to 1, or a letter from A on"),
    ],
)
def test_choices_that_do_not_fit(row, message, refused, json_lines):
    assert message in refused("multiple_choice", "--data", json_lines([{"context": "x", **row}] * 3))


def test_choices_of_different_numbers(refused, json_lines):
    rows = [{"context": "x", "endings": ["a", "b"], "label": "B"}, {"context": "x", "endings": "a|b|c", "label": 0}]
    said = refused("multiple_choice", "--data", json_lines(rows))
    assert "line 2 has 3 endings, line 1 2; all rows must have as many" in said or "line 1 has 2 endings" in said


LABELS = ("text", "label"), ("a good film", "good"), ("a bad film", "bad")


def test_labels_that_the_head_has_not(refused, table, checkpoint):
    model = checkpoint("DebertaV2ForSequenceClassification")
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", model)
    assert "has 2 labels (LABEL_0, LABEL_1), the data 2 (bad, good), and they are not the same" in said
    assert "--new-head" in said


def test_numbers_beyond_the_head(refused, table, checkpoint):
    model = checkpoint("DebertaV2ForSequenceClassification")
    file = table(("text", "label"), *[("a", n) for n in range(3)])
    assert "has 2 labels (LABEL_0, LABEL_1), the data 3 (0, 1, 2)" in refused(
        "sequence_classification", "--data", file, "--model", model
    )


def test_a_folder_without_a_checkpoint(refused, table, tmp_path):
    (tmp_path / "nothing").mkdir()
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", str(tmp_path / "nothing"))
    assert "cannot be loaded; the folder has no config.json" in said


def test_another_kind_of_model(refused, table, checkpoint):
    folder = Path(checkpoint())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", str(folder))
    assert "must be a DeBERTa (v1, v2, v3 or mDeBERTa), got a model of type 'bert'" in said


def test_weights_of_another_size(refused, table, checkpoint):
    folder = Path(checkpoint())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", str(folder))
    assert "weights of its encoder, the first deberta.encoder.layer.2." in said


@pytest.mark.parametrize(("head", "change"), [("DebertaV2Model", "hidden_size"), ("DebertaV2Model", "vocab_size")])
def test_weights_of_another_shape(head, change, refused, table, checkpoint):
    folder = Path(checkpoint(head))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, change: 2 * config[change]}))
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", str(folder))
    assert "has not the shape (" in said
    assert "that its config.json asks for; they are not of the same model" in said


def test_a_tokenizer_of_another_checkpoint(refused, table, checkpoint):
    model = checkpoint(vocab_size=20)
    said = refused("sequence_classification", "--data", table(*LABELS), "--model", model)
    assert "has 30 tokens, its model 20; they are not of the same checkpoint" in said


def test_texts_longer_than_the_positions(refused, table, checkpoint):
    said = refused("masked_lm", "--data", table(*LABELS), "--model", checkpoint(), "--length", "100")
    assert "--length must be at most 64, the absolute positions of this model, got 100" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--validation", "x.csv"), "--validation needs --data"),
        (("--new-head",), "--new-head needs --model"),
        (("--device", "nowhere"), "--device nowhere cannot be used"),
    ],
)
def test_options_that_do_not_go_together(arguments, message, refused):
    assert message in refused("sequence_classification", *arguments)


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--validation-share", "1"), ("--learning-rate", "0")])
def test_numbers_out_of_range(arguments, program, capsys):
    from parts.recipe import run

    with pytest.raises(SystemExit):
        run(program("masked_lm").TASK, list(arguments))
    assert f"argument {arguments[0]}: must be" in capsys.readouterr().err


def test_texts_that_are_cut_are_counted(train, checkpoint, table, capsys):
    rows = [("a good film " * 9, "good"), ("a bad film", "bad")] * 5
    options = ("--model", checkpoint(), "--length", "16", "--steps", "1", "--validation-share", "0.2", "--seed", "1")
    train("sequence_classification", "--data", table(("text", "label"), *rows), *options)
    found = re.findall(r"(\d+) of (\d+) texts are longer than --length 16; they were cut", capsys.readouterr().out)
    assert sum(int(cut) for cut, _ in found) == 5


def test_pairs_share_the_room(program, checkpoint):
    import transformers
    from parts.vocabulary import Encoder

    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(checkpoint()))
    encode = program("sequence_classification").encode
    for first, second, kept in ((20, 20, (7, 6)), (2, 20, (2, 11)), (20, 2, (11, 2)), (3, 4, (3, 4))):
        record = {"text": "good " * first, "pair": "bad " * second, "label": "x"}
        [(inputs, _)] = encode(record, encoder, SimpleNamespace(length=16), {"x": 0})
        ids = inputs["input_ids"].tolist()
        good, bad = encoder.ids("good bad")
        assert ids == [1, *[good] * kept[0], 2, *[bad] * kept[1], 2]


def test_an_output_that_cannot_be_made(program, tmp_path, capsys):
    from parts.recipe import run

    (tmp_path / "file").write_text("x")
    assert run(program("masked_lm").TASK, ["--output", str(tmp_path / "file")]) == 2
    assert "must be a folder, got a file" in capsys.readouterr().err
    assert run(program("masked_lm").TASK, ["--output", str(tmp_path / "file" / "below")]) == 2
    assert "is no folder that can be written to" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(table, checkpoint, monkeypatch, program, capsys):
    from parts import loop, recipe

    monkeypatch.setattr(loop.math, "isfinite", lambda value: False)
    arguments = ("--data", table(*LABELS, *LABELS[1:]), "--model", checkpoint(), "--length", "16", "--device", "cpu")
    assert recipe.run(program("sequence_classification").TASK, list(arguments)) == 2
    assert "at step 1; try a lower --learning-rate." in capsys.readouterr().err


def test_spaces_behind_the_commas_of_a_header_are_no_part_of_its_names(train, program, checkpoint, tmp_path):
    (tmp_path / "rows.csv").write_text("text, label\n" + 'a good film, x\n"a bad, bad film", y\n' * 4, encoding="utf-8")
    train("sequence_classification", "--data", str(tmp_path / "rows.csv"), "--steps", "1", "--model", checkpoint())
    file_parts = program("file_parts")
    parts = file_parts.cut(str(tmp_path / "rows.csv"), ["text", "label"], 3)
    assert [file_parts.read(part, ["label"])["label"] for part in parts] == [list("xyx"), list("yxy"), list("xy")]


@pytest.mark.parametrize("name", ["sequence_classification", "zero_shot", "batch_inference", "batch_spark"])
def test_a_tilde_behind_an_equals_sign_is_the_home_folder(name, program, checkpoint, monkeypatch):
    model = Path(checkpoint())
    monkeypatch.setenv("HOME", str(model.parent))
    (model.parent / "in.txt").write_text("a good film\n", encoding="utf-8")
    given = [f"--model=~/{model.name}"]
    if name == "sequence_classification":
        given += ["--data=~/in.txt", "--validation=~/in.txt", "--output=~/out"]
        options, _ = program("parts.options").parse(program(name).TASK, given)
        paths = [options.data, options.validation, options.output]
    elif name == "zero_shot":
        options = program(name).parse([*given, "--labels=a,b", "--file=~/in.txt", "--output=~/out"])
        paths = [options.file, options.output]
    else:
        options = program(name).parse([*given, "--input=~/in.txt", "--output=~/out"])
        paths = [*getattr(options, "files", [options.input]), options.output]
    assert [Path(path).parent for path in (options.model, *paths)] == [model.parent] * (1 + len(paths))
