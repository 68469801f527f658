"""The metrics of the examples, against values worked out by hand or by the field's own programs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def metrics(program: Callable[[str], Any]) -> Any:
    return program("parts.metrics")


def test_macro_f1_is_the_mean_over_classes(metrics):
    # Class 0: two of three expected found, one found wrongly: F1 2/3. Class 1: F1 1/2. Class 2: never found: 0.
    assert metrics.macro_f1([0, 0, 0, 1, 2], [0, 0, 1, 1, 0]) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert metrics.macro_f1([1, 1], [1, 1]) == 1


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("I-PER I-LOC", {(0, 1, "PER"), (1, 2, "LOC")}),
        ("O I-PER I-PER", {(1, 3, "PER")}),
        ("O O", set()),
    ],
)
def test_entities_are_those_that_conlleval_counts(tags, expected, metrics):
    assert metrics.entities(tags.split()) == expected


def test_entity_f1_counts_whole_entities(metrics):
    expected = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC"]]
    result = metrics.entity_f1(expected, found)
    assert result == {
        "f1": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("found", "expected", "scores"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], (1, 1)),
        ("big tower", ["eiffel tower"], (0, 0.5)),
        ("tower", ["house", "tower"], (1, 1)),
        ("", [], (1, 1)),
        ("tower", [], (0, 0)),
        ("", ["tower"], (0, 0)),
    ],
)
def test_answers_are_scored_by_squads_rules(found, expected, scores, metrics):
    assert metrics.answer_scores(found, expected) == scores


def test_the_best_span_ends_after_it_begins_and_is_short(metrics):
    start, end = torch.tensor([0.0, 0.0, 9.0, 0.0]), torch.tensor([9.0, 0.0, 0.0, 5.0])
    assert metrics.best_span(start, end, 30)[:2] == (2, 3)
    assert metrics.best_span(start, end, 1)[:2] in {(0, 0), (2, 2)}


def test_perplexity_weighs_tokens(metrics):
    scorer = metrics.MaskedScorer()
    for count, loss in ((1, 1.0), (3, 2.0)):
        labels = torch.full((1, 4), -100)
        labels[0, :count] = 1
        scorer.add(
            [None], {"labels": labels}, SimpleNamespace(loss=torch.tensor(loss), logits=torch.eye(2)[[1] * count])
        )
    found = scorer.result()
    assert found["loss"] == pytest.approx(7 / 4)
    assert found["perplexity"] == pytest.approx(torch.tensor(7 / 4).exp().item())
    assert found["accuracy"] == 1


def test_a_model_that_saw_no_unanswerable_question_is_not_asked_for_them(program):
    module, task = program("question_answering"), program("parts.task")
    record = {"question": "what", "context": "a film", "answers": [(2, "film")]}
    for training, f1 in (([record], 1), ([record, {**record, "answers": []}], 0)):
        scorer = module.AnswerScorer(task.Data(training, [record], None), None)
        # [CLS] what [SEP] a film [SEP]: no answer is the likeliest, then "film".
        logits = torch.tensor([[9.0, 0.0, 0.0, 0.0, 5.0, 0.0]])
        feature = task.Feature({}, 0, (3, [(0, 1), (2, 6)]))
        output = SimpleNamespace(loss=torch.tensor(1.0), start_logits=logits, end_logits=logits)
        scorer.add([feature], {}, output)
        assert scorer.result()["f1"] == f1


def test_each_row_counts_the_same_in_a_step_of_unequal_batches(program):
    order = program("parts.features").Order(7, 2, 2, seed=3)
    assert order.steps_per_epoch == 2
    steps = [order.step(number) for number in range(4)]
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2], [2, 1]] * 2
    epochs = [[place for step in part for batch in step for place in batch] for part in (steps[:2], steps[2:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]
    assert program("parts.features").Order(7, 2, 2, seed=3).step(3) == steps[3]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_warms_up_and_falls(schedule, program):
    share = program("parts.loop")._share_at(SimpleNamespace(warmup=0.2, schedule=schedule), 10)
    rates = [share(step) for step in range(10)]
    assert 0 < rates[0] < rates[1] < rates[2] == 1
    if schedule == "constant":
        assert set(rates[2:]) == {1}
    else:
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert 0 < rates[-1] < 0.2


def test_biases_and_norms_do_not_decay(program):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    options = SimpleNamespace(weight_decay=0.5, learning_rate=1.0)
    groups = program("parts.loop")._optimizer(model, options).param_groups
    assert {len(group["params"]): group["weight_decay"] for group in groups} == {1: 0.5, 3: 0.0}


@pytest.mark.parametrize(("seconds", "text"), [(44.6, "45 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_are_said_as_people_say_them(seconds, text, program):
    assert program("parts.progress").duration(seconds) == text


def test_a_log_gets_a_line_with_the_time_left(program, capsys, monkeypatch):
    module = program("parts.progress")
    clock = iter([0.0, 1.0, 40.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    progress = module.Progress(110, "training", first=10)
    progress.at(11, "loss 1")
    progress.at(50, "loss 1")
    assert capsys.readouterr().err == "training: 50/110  loss 1  1 min 0 s left\n"
