from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.config import SplitConfig
from qat.data import splits
from qat.training.data import divide

SPEAKERS = [f"s{i}" for i in range(7)]
EMOTIONS = ["angry", "happy", "neutral", "sad"]


@st.composite
def tables(draw: Any, min_speakers: int = 3) -> pd.DataFrame:
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


def grid(speakers: Any = SPEAKERS, sentences: int = 10) -> pd.DataFrame:
    rows = [
        {"path": f"{speaker}/{number}-{emotion}.wav", "speaker": speaker, "emotion": emotion}
        for speaker in speakers
        for number in range(sentences)
        for emotion in EMOTIONS
    ]
    return pd.DataFrame(rows).sample(frac=1).reset_index(drop=True)


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
        (10, (7, 2, 1)),
        (8, (5, 2, 1)),  # 6, 2 and no test item: the second rule, of which 1.6 goes up
        (6, (4, 1, 1)),
        (5, (3, 1, 1)),  # the rule would leave no test item
        (4, (2, 1, 1)),
        (3, (1, 1, 1)),
    ],
)
def test_counts(items: int, expected: tuple[int, int, int]) -> None:
    assert splits.counts(items) == expected


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_cell_is_found(empty: str | None) -> None:
    table = pd.DataFrame({"path": ["a.wav", "b.wav", "c.wav"], "speaker": ["x", empty, empty]})
    message = "column 'speaker' is empty in 2 of 3 rows"
    with pytest.raises(ValueError, match=f"^{message}, the first being b.wav$"):
        splits.column(table, "speaker")
    with pytest.raises(ValueError, match=f"^{message}$"):
        splits.column(table.drop(columns="path"), "speaker")
    with pytest.raises(ValueError, match=r"^column 'session' is missing; there are 'path', 'speaker'$"):
        splits.column(table, "session")


@given(st.integers(3, 10000))
def test_counts_are_positive_and_complete(items: Any) -> None:
    sizes = splits.counts(items)
    assert sum(sizes) == items
    assert min(sizes) >= 1


@given(tables(), st.integers(0, 2**32))
def test_random_keeps_the_cuts_of_a_file_together(table: Any, seed: Any) -> None:
    split = splits.random(table, seed)
    assert_partition(table, split)
    assert_no_leak(table, split, "path")
    files = values(table, split, "path")
    assert tuple(len(files[part]) for part in splits.PARTS) == splits.counts(table["path"].nunique())


@given(tables(), st.integers(0, 2**32))
def test_by_speaker_keeps_speakers_apart(table: Any, seed: Any) -> None:
    split = splits.by_speaker(table, seed)
    assert_partition(table, split)
    assert_no_leak(table, split, "speaker")
    speakers = values(table, split, "speaker")
    assert tuple(len(speakers[part]) for part in splits.PARTS) == splits.counts(table["speaker"].nunique())


@given(tables(min_speakers=7), st.integers(0, 2**32), st.floats(0, 1))
def test_confounded_keeps_speakers_apart_and_loses_no_row(table: Any, seed: Any, leak: Any) -> None:
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


def test_order_is_the_tables() -> None:
    table = grid()
    for split in (splits.random(table, 3), splits.by_speaker(table, 3), splits.confounded(table, 3, PARTS)):
        assert all(rows == sorted(rows) for rows in split.values())


def test_seed_decides_and_nothing_else() -> None:
    table = grid()
    for rule in (splits.random, splits.by_speaker, lambda t, s: splits.confounded(t, s, PARTS)):
        assert rule(table, 1) == rule(table.copy(), 1)
        assert len({str(rule(table, seed)) for seed in range(8)}) > 4


def test_rows_of_a_chosen_part_keep_their_place_in_the_whole() -> None:
    table = grid()
    chosen = table[table["emotion"] == "sad"]
    split = splits.by_speaker(chosen, 1)
    assert set(table.loc[split["train"], "emotion"]) == {"sad"}
    assert sum(map(len, split.values())) == len(chosen)


def test_explicit_speakers() -> None:
    table = grid()
    speakers = values(table, splits.by_speaker(table, 1, PARTS), "speaker")
    assert speakers == {part: set(names) for part, names in PARTS.items()}


def test_group_column() -> None:
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
def test_bad_parts_are_named(change: Any, message: str) -> None:
    for rule in (splits.by_speaker, splits.confounded):
        with pytest.raises(ValueError, match=message):
            rule(grid(), 1, PARTS | change)


def test_too_few_items() -> None:
    table = grid(["s0", "s1"])
    with pytest.raises(ValueError, match="column 'speaker' has 2 different values"):
        splits.by_speaker(table, 1)
    with pytest.raises(ValueError, match="column 'path' has 2 different values"):
        splits.random(table[:2], 1)
    with pytest.raises(ValueError, match="items=2 cannot be split"):
        splits.counts(2)


def test_confounded_makes_the_voice_predict_the_emotion(rng: np.random.Generator) -> None:
    table = grid(sentences=16)
    seed = int(rng.integers(1000))
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


def test_the_least_leak_is_one_file_of_each_other_label() -> None:
    """The share of 10 sentences rounds to 0."""
    table = grid()
    train = table.loc[splits.confounded(table, 1, PARTS, leak=0.01)["train"]]
    kept = train.groupby(["speaker", "emotion"])["path"].nunique()
    assert len(kept) == 4 * len(EMOTIONS)
    assert sorted(set(kept)) == [1, 10]
    assert (kept == 10).sum() == 4


def test_leak_of_nothing_and_of_everything() -> None:
    table = grid()
    own = splits.own_labels(table, 1, PARTS)
    train = table.loc[splits.confounded(table, 1, PARTS, leak=0)["train"]]
    assert (train["emotion"] == train["speaker"].map(own)).all()
    assert not splits.confounded(table, 1, PARTS, leak=1)["withheld"]
    for leak in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"leak={leak} must be from 0 to 1"):
            splits.confounded(table, 1, PARTS, leak=leak)


def test_missing_and_empty_label_columns_are_named() -> None:
    table = grid()
    with pytest.raises(ValueError, match="column 'speaker' is missing"):
        splits.by_speaker(table.drop(columns="speaker"), 1)
    with pytest.raises(ValueError, match="column 'valence' is missing; there are 'path', 'speaker', 'emotion'"):
        splits.confounded(table, 1, PARTS, label="valence")
    table.loc[3, "speaker"] = ""
    with pytest.raises(ValueError, match=f"empty in 1 of {len(table)} rows, the first being"):
        splits.by_speaker(table, 1)


@st.composite
def corpora(draw: Any) -> pd.DataFrame:
    """Utterances of two speakers a session, who say the same sentences; one to three cuts each, rows in any order."""
    sessions, sentences = draw(st.integers(3, 6)), draw(st.integers(3, 5))
    rows = []
    for session in range(1, sessions + 1):
        for sex in "FM":
            said = draw(st.sets(st.integers(0, sentences - 1), min_size=1)) if session > 1 else range(sentences)
            for sentence in sorted(said):
                row = {"path": f"{session}{sex}/{sentence}.wav", "speaker": f"{session}{sex}", "session": str(session)}
                rows += [row | {"text": f"script{sentence:02}"}] * draw(st.integers(1, 3))
    return pd.DataFrame(rows, index=draw(st.permutations(range(0, 2 * len(rows), 2))))


@settings(max_examples=60)
@given(corpora(), st.integers(0, 2**32), st.sampled_from(["speaker", "session", "text"]), st.data())
def test_folds_keep_groups_apart_and_test_each_once(table: Any, seed: Any, group: Any, data: Any) -> None:
    groups = table[group].nunique()
    count = data.draw(st.sampled_from([0, *range(3, groups + 1)]))
    k = count or groups
    every = [splits.folds(table, seed, fold, count, group) for fold in range(1, k + 1)]
    for number, split in enumerate(every):
        assert_partition(table, split)
        for apart in {"speaker": ["speaker"], "session": ["session", "speaker"], "text": ["text"]}[group] + ["path"]:
            assert_no_leak(table, split, apart)
        assert split["validation"] == every[(number + 1) % k]["test"]
    assert sorted(row for split in every for row in split["test"]) == sorted(table.index)
    sizes = [len(values(table, split, group)["test"]) for split in every]
    assert max(sizes) - min(sizes) <= 1


def test_leave_one_out_goes_by_name_and_other_folds_by_seed() -> None:
    table = grid()
    for fold in (1, 4, 7):
        tested = values(table, splits.folds(table, 5, fold), "speaker")
        assert (tested["test"], tested["validation"]) == ({f"s{fold - 1}"}, {f"s{fold % 7}"})
    assert len({str(splits.folds(table, seed, 1, 3)) for seed in range(8)}) > 4
    assert splits.folds(table, 1, 2, 3) == splits.folds(table.copy(), 1, 2, 3)


@pytest.mark.parametrize(
    ("fold", "count", "message"),
    [
        (0, 3, "fold=0 must be from 1 to 3"),
        (4, 3, "fold=4 must be from 1 to 3"),
        (8, 0, "fold=8 must be from 1 to 7"),
        (1, 8, "has 7 different values; they cannot make 8 folds"),
        (1, 2, "cannot make 2 folds of 3 or more"),
    ],
)
def test_folds_that_do_not_exist(fold: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splits.folds(grid(), 1, fold, count)


@given(corpora(), st.integers(0, 2**32))
def test_a_sentence_is_in_one_part_when_sentences_are_divided(table: Any, seed: Any) -> None:
    split = splits.by_speaker(table, seed, group="text")
    assert_partition(table, split)
    assert_no_leak(table, split, "text")


@given(corpora())
def test_speakers_in_order(table: Any) -> None:
    split = splits.by_speaker(table, None)
    assert_partition(table, split)
    assert_no_leak(table, split, "speaker")
    parts = values(table, split, "speaker")
    assert max(parts["train"]) < min(parts["validation"])
    assert max(parts["validation"]) < min(parts["test"])


def test_ravdess_actors_in_order_are_17_5_and_2() -> None:
    parts = values(table := grid([f"{n:02}" for n in range(1, 25)], 1), splits.by_speaker(table, None), "speaker")
    assert parts["validation"] == {"18", "19", "20", "21", "22"}
    assert parts["test"] == {"23", "24"}
    assert splits.by_speaker(table, 0) != splits.by_speaker(table, None)  # 0 is a seed like any other


def test_the_released_codes_actors() -> None:
    """The lists in full, so that they cannot change unnoticed: IEMOCAP by sessions, RAVDESS 1-18, 19-23, 24..."""
    numbers = [f"{n:02}" for n in range(1, 25)]
    ravdess = grid(numbers, 2)
    parts = values(ravdess, splits.paper_actor(ravdess, 1, "ravdess"), "speaker")
    assert parts == {"train": set(numbers[:18]), "validation": set(numbers[18:23]), "test": {"24"}}
    emodb = grid(["03", "08", "09", "10", "11", "12", "13", "14", "15", "16"], 2)
    parts = values(emodb, splits.paper_actor(emodb, 1, "emodb"), "speaker")
    assert parts["train"] == {"03", "08", "09", "10", "11", "12", "13"}
    assert (parts["validation"], parts["test"]) == ({"14", "15"}, {"16"})
    iemocap = grid([f"{session}{sex}" for session in range(1, 6) for sex in "FM"], 2)
    iemocap["session"] = iemocap["speaker"].str[0]
    split = splits.paper_actor(iemocap, 1, "iemocap")
    assert_no_leak(iemocap, split, "speaker")
    parts = values(iemocap, split, "session")
    assert parts == {"train": {"1", "2", "3"}, "validation": {"4"}, "test": {"5"}}


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 2**32), st.data())
def test_the_released_codes_tess(older: Any, younger: Any, seed: Any, data: Any) -> None:
    said = {"OAF": older, "YAF": younger}
    rows = [{"path": f"{speaker}_{n}.wav", "speaker": speaker} for speaker in said for n in range(said[speaker])]
    rows = [row for row in rows for _ in range(data.draw(st.integers(1, 2)))]
    table = pd.DataFrame(rows, index=data.draw(st.permutations(range(len(rows)))))
    split = splits.paper_actor(table, seed, "tess")
    assert_partition(table, split)
    assert_no_leak(table, split, "path")
    assert values(table, split, "speaker") == {"train": {"OAF"}, "validation": {"YAF"}, "test": {"YAF"}}
    halves = [len(values(table, split, "path")[part]) for part in ("validation", "test")]
    assert halves == [(younger + 1) // 2, younger // 2]


def test_the_halves_of_tess_are_drawn() -> None:
    table = pd.DataFrame([{"path": f"{s}_{n}.wav", "speaker": s} for s in ("OAF", "YAF") for n in range(40)])
    drawn = {str(splits.paper_actor(table, seed, "tess")) for seed in range(5)}
    assert len(drawn) == 5
    # Which file comes first in the table has no say in it.
    halves = values(table, splits.paper_actor(table, 1, "tess"), "path")
    assert values(table[::-1], splits.paper_actor(table[::-1], 1, "tess"), "path") == halves


def test_actor_splits_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="no actor split for 'savee'; it has iemocap, ravdess, emodb, tess"):
        splits.paper_actor(grid(), 1, "savee")
    with pytest.raises(ValueError, match="the speakers of tess are OAF and YAF; there are s0, s1"):
        splits.paper_actor(grid(), 1, "tess")
    with pytest.raises(ValueError, match="speaker '01' has no row"):
        splits.paper_actor(grid(), 1, "ravdess")


@given(tables(), st.data())
def test_parts_that_the_corpus_names(table: Any, data: Any) -> None:
    speakers = sorted(set(table["speaker"]))
    named = [*splits.PARTS, *(data.draw(st.sampled_from(splits.PARTS)) for _ in speakers[3:])]
    table = table.assign(part=table["speaker"].map(dict(zip(speakers, named, strict=True))))
    split = splits.by_part(table)
    assert_partition(table, split)
    assert {part: set(table.loc[rows, "part"]) for part, rows in split.items()} == {p: {p} for p in splits.PARTS}
    assert splits.by_part(table, only_train=True) == dict.fromkeys(splits.PARTS, split["train"])


def test_parts_with_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="column 'part' has 'dev'; it must have train, validation, test"):
        splits.by_part(grid().assign(part=lambda t: t["speaker"].map(lambda s: "dev" if s == "s1" else "train")))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SplitConfig("speaker", 3, group="text"), lambda t: splits.by_speaker(t, 3, group="text")),
        (SplitConfig("speaker-in-order", 3), lambda t: splits.by_speaker(t, None)),
        (SplitConfig("speaker-in-order", 3, group="text"), lambda t: splits.by_speaker(t, None, group="text")),
        (SplitConfig("folds", 3, folds=4, fold=2), lambda t: splits.folds(t, 3, 2, 4)),
        (SplitConfig("folds", 3, fold=2, group="text"), lambda t: splits.folds(t, 3, 2, 0, "text")),
        (SplitConfig("paper-actor", 3), lambda t: splits.paper_actor(t, 3, "ravdess")),
        (SplitConfig("part"), lambda t: splits.by_part(t)),
        (SplitConfig("part-train-only"), lambda t: splits.by_part(t, only_train=True)),
    ],
)
def test_every_rule_of_the_configuration(config: Any, expected: Any) -> None:
    table = grid([f"{n:02}" for n in range(1, 25)], 2)
    table["text"] = table["path"].str[3:5] + table["emotion"]
    table["part"] = [splits.PARTS[i % 3] for i in range(len(table))]
    assert divide(table, config, "ravdess") == expected(table)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folds": 2}, "split.folds: 2 must be 0 or at least 3"),
        ({"fold": 0}, "split.fold: 0 must be at least 1"),
        ({"rule": "confounded", "group": "text"}, "split.group: 'text' must be 'speaker' with rule 'confounded'"),
    ],
)
def test_bad_settings_are_named(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig(**changed)


def test_files_of_the_same_bytes_stay_together_in_a_random_split() -> None:
    table = grid().assign(checksum=lambda t: t["path"])
    plain = splits.random(table.drop(columns="checksum"), 5)
    assert splits.random(table, 5) == plain
    copies = {plain["test"][0]: plain["train"][0], plain["validation"][0]: plain["train"][1]}
    for copy, original in copies.items():
        table.loc[[copy, original], "checksum"] = f"same {original}"
    split = splits.random(table, 5)
    assert_partition(table, split)
    parts = {row: part for part, rows in split.items() for row in rows}
    assert all(parts[copy] == parts[original] for copy, original in copies.items())
    assert sum(set(split[part]) != set(plain[part]) for part in splits.PARTS) >= 2


def test_other_splits_leave_out_files_whose_bytes_are_in_a_part_before(caplog: pytest.LogCaptureFixture) -> None:
    table = grid().assign(checksum=lambda t: t["path"])
    config = SplitConfig("speaker", 3)
    plain = divide(table, config)
    copy, original, within = plain["test"][0], plain["train"][0], plain["train"][1]
    table.loc[[copy, original, within], "checksum"] = "same"
    split = divide(table, config)
    assert split == plain | {"test": plain["test"][1:]}
    assert "1 files left out of the test part, which are also in an earlier part" in caplog.text
    assert str(table.loc[copy, "path"]) in caplog.text
    assert divide(table.assign(part="train"), SplitConfig("part-train-only"))["test"] == list(table.index)
