"""algorithms/collect/sentiment.py: what is drawn, scored and labelled, and what is refused."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import load_script

pytest.importorskip("transformers", reason="the package transformers is missing: make language")
pytest.importorskip("vaderSentiment", reason="the package vaderSentiment is missing: make language")
from words import END, save_model, tiny_gpt2, tiny_model

script = load_script("collect/sentiment.py")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sentiment.py", *map(str, arguments)])
    status = 0
    try:
        script.main(script.make_pairs)
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.equation(1)
@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
def test_continuations_are_as_frequent_as_the_model_says(make):
    """Two tokens after prompts of two lengths, padded beside each other: 3,000 draws of each."""
    model, prompts = make(), [[3, 5, 7], [4]]
    drawn = script.continue_prompts(model, prompts * 3000, 2, END, 1000, (0,))
    for row, prompt in enumerate(prompts):
        found = drawn[row::2]
        with torch.no_grad():
            first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
            likeliest = int(first.argmax())
            second = model(torch.tensor([[*prompt, likeliest]])).logits[0, -1].double().softmax(-1).numpy()
        counts = np.bincount([y[0] for y in found], minlength=len(first))
        deviation = np.sqrt(len(found) * first * (1 - first))
        assert (np.abs(counts - len(found) * first) < 4.5 * deviation).all()
        after = [y[1] for y in found if y[0] == likeliest]
        counts = np.bincount(after, minlength=len(first))
        deviation = np.sqrt(len(after) * second * (1 - second))
        assert (np.abs(counts - len(after) * second) < 4.5 * deviation).all()


def test_a_continuation_ends_with_the_end_and_is_drawn_by_its_seed():
    drawn = script.continue_prompts(tiny_model(), [[3]] * 200, 6, END, 64, (0,))
    assert {len(y) for y in drawn} == {1, 2, 3, 4, 5, 6}
    assert all(END not in y[:-1] for y in drawn)
    assert all(len(y) == 6 or y[-1] == END for y in drawn)
    assert script.continue_prompts(tiny_model(), [[3]] * 200, 6, END, 64, (0,)) == drawn
    assert script.continue_prompts(tiny_model(), [[3]] * 200, 6, END, 64, (1,)) != drawn


@pytest.mark.equation(2)
def test_the_judge_is_vader():
    """Of one word with valence v the compound is v / sqrt(v^2 + 15): good has 1.9, bad -2.5."""
    score = script.load_judge()
    assert score("the film was good") == pytest.approx(1.9 / math.sqrt(1.9**2 + 15), abs=1e-4)
    assert score("the film was bad") == pytest.approx(-2.5 / math.sqrt(2.5**2 + 15), abs=1e-4)
    assert score("the film was there") == 0


@pytest.mark.equation(3)
@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_labels_are_drawn_by_bradley_and_terry(scale):
    rng = np.random.default_rng(0)
    rows = [script.label_pair([" a", " b"], [0.3, 0.1], scale, rng) for _ in range(4000)]
    first = np.mean([row["chosen"] == " a" for row in rows])
    assert first == pytest.approx(1 / (1 + math.exp(-scale * 0.2)), abs=0.03)
    scores = {" a": 0.3, " b": 0.1}
    for row in rows[:100]:
        assert scores[row["chosen"]] == row["chosen_score"]
        assert scores[row["rejected"]] == row["rejected_score"]


def test_equal_scores_make_no_pair_and_change_no_label_of_the_rest():
    labels = []
    for scores in ([0.1, 0.2], [0.2, 0.2]):
        rng = np.random.default_rng(0)
        first = script.label_pair([" a", " b"], scores, 4.0, rng)
        labels.append(script.label_pair([" a", " b"], [0.0, 0.1], 4.0, rng))
    assert first == {}
    assert labels[0] == labels[1]


def test_our_prompts_and_whole_subjects_held_out():
    groups = script.our_prompts()
    flat = [prompt for group in groups for prompt in group]
    assert len(flat) == len(set(flat)) == 180
    train, test = script.hold_out(groups, 0.2, 0)
    assert sorted(train + test) == sorted(flat)
    assert len(test) == 5 * round(0.2 * 36)
    for group in groups:
        assert set(group) <= set(train) or set(group) <= set(test)
    assert script.hold_out(groups, 0.2, 1) != (train, test)


def test_files(model_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.txt").write_text("good film\nbad food\nthe hotel was\n\ngood film\nthe food is\n")
    options = ["--model", model_folder, "--prompts", tmp_path / "own.txt", "--device", "cpu"]
    options += ["--samples", 30, "--held_out", 0.25, "--new_tokens", 5]
    for name in ("one", "two"):
        status, out, _ = call(monkeypatch, capsys, *options, "--folder", tmp_path / name)
        assert status == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert {*files} == {"train.jsonl", "test.jsonl", "prompts.jsonl"}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    train, test = lines(tmp_path / "one/train.jsonl"), lines(tmp_path / "one/test.jsonl")
    assert {row["prompt"] for row in test} == {row["prompt"] for row in lines(tmp_path / "one/prompts.jsonl")}
    assert len({row["prompt"] for row in train}) == 3
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    score = script.load_judge()
    for row in train + test:
        assert row["chosen_score"] == score(row["prompt"] + row["chosen"])
        assert row["rejected_score"] == score(row["prompt"] + row["rejected"]) != row["chosen_score"]
    agree = np.mean([row["chosen_score"] > row["rejected_score"] for row in train])
    assert f"train: {len(train)} pairs" in out
    assert f"agrees with the score in {agree:.1%}" in out

    status, out, _ = call(monkeypatch, capsys, *options, "--folder", tmp_path / "one", "--seed", 1)
    assert (status, out) == (0, f"{tmp_path}/one is there; to make it anew, remove it\n")
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "3"], "samples: 3 do not make pairs"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--model", "models/nowhere"], "make language"),
    ],
)
def test_errors_are_one_line(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    options = ["--folder", tmp_path / "made", "--model", model_folder, "--device", "cpu", *arguments]
    status, _, err = call(monkeypatch, capsys, *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("package", ["transformers", "vaderSentiment.vaderSentiment"])
def test_a_missing_package_is_one_line(model_folder, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = call(monkeypatch, capsys, "--folder", tmp_path / "made", "--model", model_folder)
    assert (status, err.count("\n")) == (2, 1)
    assert "make language brings" in err
    assert not (tmp_path / "made").exists()
