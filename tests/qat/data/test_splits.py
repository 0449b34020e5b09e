import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.data import splits

SPEAKERS = [f"s{i}" for i in range(7)]
EMOTIONS = ["angry", "happy", "neutral", "sad"]


@st.composite
def tables(draw, min_speakers: int = 3) -> pd.DataFrame:
    """Files of several speakers with one to three cuts each, in any order and with gaps in the row labels."""
    speakers = draw(st.integers(min_speakers, 12))
    rows = []
    for speaker in range(speakers):
        for number in range(draw(st.integers(1, 5))):
            emotion = draw(st.sampled_from(EMOTIONS))
            path = f"{speaker}/{number}.wav"
            rows += [{"path": path, "speaker": f"s{speaker}", "emotion": emotion}] * draw(st.integers(1, 3))
    labels = draw(st.permutations(range(0, 2 * len(rows), 2)))
    return pd.DataFrame(rows, index=labels)


def grid(speakers=SPEAKERS, sentences: int = 10) -> pd.DataFrame:
    rows = [
        {"path": f"{speaker}/{number}-{emotion}.wav", "speaker": speaker, "emotion": emotion}
        for speaker in speakers
        for number in range(sentences)
        for emotion in EMOTIONS
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=np.random.default_rng()).reset_index(drop=True)


PARTS = {"train": SPEAKERS[:4], "validation": SPEAKERS[4:5], "test": SPEAKERS[5:]}


def assert_partition(table: pd.DataFrame, split: splits.Split) -> None:
    rows = [row for part in split.values() for row in part]
    assert len(rows) == len(set(rows))
    assert set(rows) == set(table.index)
    assert all(split[part] for part in splits.PARTS)


def values(table: pd.DataFrame, split: splits.Split, column: str) -> dict[str, set[str]]:
    return {part: set(table.loc[rows, column]) for part, rows in split.items()}


def assert_no_leak(table: pd.DataFrame, split: splits.Split, column: str) -> None:
    sets = [values(table, split, column)[part] for part in splits.PARTS]
    assert sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (1440, (1008, 288, 144)),
        (2800, (1960, 560, 280)),
        (4490, (3143, 898, 449)),
        (25, (18, 5, 2)),  # 17.5 goes to the even 18
        (15, (10, 3, 2)),  # 10.5 goes to the even 10
        (45, (32, 9, 4)),  # 31.5, although 0.7 * 45 is below it in floating point
        (5, (3, 1, 1)),  # the rule would leave no test item
        (4, (2, 1, 1)),
        (3, (1, 1, 1)),
    ],
)
def test_counts(items, expected):
    assert splits.counts(items) == expected


@given(st.integers(3, 10000))
def test_counts_are_positive_and_complete(items):
    sizes = splits.counts(items)
    assert sum(sizes) == items
    assert min(sizes) >= 1


@given(tables(), st.integers(0, 2**32))
def test_random_keeps_the_cuts_of_a_file_together(table, seed):
    split = splits.random(table, seed)
    assert_partition(table, split)
    assert_no_leak(table, split, "path")
    files = values(table, split, "path")
    assert tuple(len(files[part]) for part in splits.PARTS) == splits.counts(table["path"].nunique())


@given(tables(), st.integers(0, 2**32))
def test_by_speaker_keeps_speakers_apart(table, seed):
    split = splits.by_speaker(table, seed)
    assert_partition(table, split)
    assert_no_leak(table, split, "speaker")
    speakers = values(table, split, "speaker")
    assert tuple(len(speakers[part]) for part in splits.PARTS) == splits.counts(table["speaker"].nunique())


@given(tables(min_speakers=7), st.integers(0, 2**32), st.floats(0, 1))
def test_confounded_keeps_speakers_apart_and_loses_no_row(table, seed, leak):
    everybody = sorted(set(table["speaker"]))
    parts = {"train": everybody[3:], "validation": everybody[:1], "test": everybody[1:3]}
    split = splits.confounded(table, seed, parts, leak)
    assert set(split) == {*splits.PARTS, "withheld"}
    rows = [row for part in split.values() for row in part]
    assert len(rows) == len(set(rows))
    assert set(rows) == set(table.index)
    speakers, files = values(table, split, "speaker"), values(table, split, "path")
    for part in ("validation", "test"):
        assert speakers[part] == set(parts[part])
    assert speakers["train"] | speakers["withheld"] == set(parts["train"])
    assert not files["train"] & files["withheld"]


def test_order_is_the_tables():
    table = grid()
    for split in (splits.random(table, 3), splits.by_speaker(table, 3), splits.confounded(table, 3, PARTS)):
        assert all(rows == sorted(rows) for rows in split.values())


def test_seed_decides_and_nothing_else():
    table = grid()
    for rule in (splits.random, splits.by_speaker, lambda t, s: splits.confounded(t, s, PARTS)):
        assert rule(table, 1) == rule(table.copy(), 1)
        assert len({str(rule(table, seed)) for seed in range(8)}) > 4


def test_rows_of_a_chosen_part_keep_their_place_in_the_whole():
    table = grid()
    chosen = table[table["emotion"] == "sad"]
    split = splits.by_speaker(chosen, 1)
    assert set(table.loc[split["train"], "emotion"]) == {"sad"}
    assert sum(map(len, split.values())) == len(chosen)


def test_explicit_speakers():
    table = grid()
    speakers = values(table, splits.by_speaker(table, 1, PARTS), "speaker")
    assert speakers == {part: set(names) for part, names in PARTS.items()}


def test_group_column():
    table = grid().assign(session=lambda t: t["speaker"].str[1].astype(int).floordiv(2).astype(str))
    split = splits.by_speaker(table, 1, {"train": ["0", "1"], "validation": ["2"], "test": ["3"]}, group="session")
    assert values(table, split, "speaker")["validation"] == {"s4", "s5"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ["s5"]}, "speaker 's6' is in no part"),
        ({"test": ["s0", "s5", "s6"]}, "speaker 's0' is listed twice"),
        ({"test": ["s5", "s6", "s9"]}, "speaker 's9' has no row; there are s0, s1"),
        ({"train": [*SPEAKERS[:5]], "validation": []}, "the validation part lists no speaker"),
        ({"dev": ["s1"]}, "parts must be train, validation, test, got train, validation, test, dev"),
    ],
)
def test_bad_parts_are_named(change, message):
    for rule in (splits.by_speaker, splits.confounded):
        with pytest.raises(ValueError, match=message):
            rule(grid(), 1, PARTS | change)


def test_too_few_items():
    table = grid(["s0", "s1"])
    with pytest.raises(ValueError, match="column 'speaker' has 2 different values"):
        splits.by_speaker(table, 1)
    with pytest.raises(ValueError, match="column 'path' has 2 different values"):
        splits.random(table[:2], 1)
    with pytest.raises(ValueError, match="items=2 cannot be split"):
        splits.counts(2)


def test_confounded_makes_the_voice_predict_the_emotion():
    table = grid(sentences=16)
    seed = int(np.random.default_rng().integers(1000))
    split = splits.confounded(table, seed, PARTS)
    own = splits.own_labels(table, seed, PARTS)
    assert set(own) == set(PARTS["train"])
    assert set(own.values()) == set(EMOTIONS)  # 4 speakers, 4 emotions: dealt round
    counts = table.loc[split["train"]].value_counts(["speaker", "emotion"])
    for speaker in PARTS["train"]:
        for emotion in EMOTIONS:
            assert counts[speaker, emotion] == (16 if emotion == own[speaker] else 2)
    withheld = table.loc[split["withheld"]]
    assert len(withheld) == 4 * 3 * 14
    assert (withheld["emotion"] != withheld["speaker"].map(own)).all()
    assert len(split["validation"]) == 1 * 64


def test_leak_of_nothing_and_of_everything():
    table = grid()
    own = splits.own_labels(table, 1, PARTS)
    train = table.loc[splits.confounded(table, 1, PARTS, leak=0)["train"]]
    assert (train["emotion"] == train["speaker"].map(own)).all()
    assert not splits.confounded(table, 1, PARTS, leak=1)["withheld"]
    for leak in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"leak={leak} must be from 0 to 1"):
            splits.confounded(table, 1, PARTS, leak=leak)


def test_missing_and_empty_label_columns_are_named():
    table = grid()
    with pytest.raises(ValueError, match="column 'speaker' is missing"):
        splits.by_speaker(table.drop(columns="speaker"), 1)
    with pytest.raises(ValueError, match="column 'valence' is missing; there are 'path', 'speaker', 'emotion'"):
        splits.confounded(table, 1, PARTS, label="valence")
    table.loc[3, "speaker"] = ""
    with pytest.raises(ValueError, match=f"empty in 1 of {len(table)} rows, the first being"):
        splits.by_speaker(table, 1)
