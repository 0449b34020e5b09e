"""``qat corpus``: make, fetch and check corpora; and ``qat prepare``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from qat.commands.parser import Commands
from qat.config import CorpusConfig, Experiment, SpectrogramConfig
from qat.files import problems_in_a_line


def add_corpus(commands: Commands) -> None:
    group = commands.group("corpus", "Make, fetch and check corpora.")
    group.add("list", run_list, "List the supported corpora.")
    _add_name_and_folder(group.add("make", run_make, "Synthesise a corpus."))
    fetch = group.add("fetch", run_fetch, "Fetch recorded human speech from Debian's archive.")
    _add_name_and_folder(fetch)
    fetch.add_argument("--from", type=Path | None, default=None, help="folder of packages that were downloaded before")
    text = (
        "Compare a folder with the published corpus, and try to read every file. `problems` are files that are missing "
        "or cannot be used; the exit code is then 1. `remarks` are files that are not part of the corpus, or are "
        "duplicates."
    )
    check = group.add("check", run_check, text)
    check.add_argument("name", type=str, help="name of the corpus, see `qat corpus list`")
    folder = "folder of the corpus (for csv the manifest file)"
    check.add_argument("dir", type=Path | None, nargs="?", default=None, help=folder)
    check.add_argument("--folder", type=Path | None, default=None, help="the same as DIR")
    check.add_argument("--options", type=dict[str, Any], default={}, help="options of the reader, e.g. '{words: 500}'")
    add_strict(check)


def add_strict(parser: ArgumentParser) -> None:
    parser.add_argument("--strict", action="store_true", help="a file that cannot be used is an error")


def _add_name_and_folder(parser: ArgumentParser) -> None:
    parser.add_argument("name", type=str, help="name of the corpus, see `qat corpus list`")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the corpus")


def run_list(options: Namespace) -> Any:
    from qat.data import corpora

    described = {
        name: dataclasses.asdict(about) | {"options": ", ".join(corpora.options(name))}
        for name, about in corpora.CORPORA.items()
    }
    if options.json:
        return described
    return {
        name: "\n    ".join([about.pop("what"), *(f"{key}: {value}" for key, value in about.items() if value)])
        for name, about in described.items()
    }


def run_make(options: Namespace) -> Any:
    return _counts(_maker(options.name, "make", "fetch")(options.folder))


def run_fetch(options: Namespace) -> Any:
    return _counts(_maker(options.name, "fetch", "make")(options.folder, from_dir=options["from"]))


def _maker(name: str, verb: str, other: str) -> Callable[..., Any]:
    """The function ``make`` or ``fetch`` of a corpus."""
    from qat.data.corpora import CORPORA, module

    corpus = module(name)
    if not hasattr(corpus, verb):
        source = CORPORA[name].source
        advice = f"use `{source}`" if hasattr(corpus, other) else f"get it from {source}"
        raise ValueError(f"{name}: not supported by `corpus {verb}`; {advice}")
    function: Callable[..., Any] = getattr(corpus, verb)
    return function


def run_check(options: Namespace) -> Any:
    from qat.data import corpora

    folder = options.dir or options.folder
    if folder is None or (options.dir and options.folder):
        raise ValueError(f"name the folder of {options.name} once: `qat corpus check {options.name} DIR`")
    checked = corpora.check(options.name, folder, **options.options)
    tables: dict[str, Any] = {name: getattr(checked, name).to_dict("records") for name in ("problems", "remarks")}
    if options.strict and tables["problems"]:
        raise ValueError(problems_in_a_line(tables["problems"]))
    return _counts(checked.manifest) | {"unusable": len(checked.problems)} | tables


def _counts(manifest: Any) -> dict[str, Any]:
    table = manifest.table
    segments = {"segments": len(table)} if "start" in table else {}
    return {
        "corpus": manifest.name,
        "folder": manifest.root,
        "files": table["path"].nunique(),
        **segments,
        "hours": round(float(table["duration"].sum()) / 3600, 3),
        "speakers": table["speaker"].nunique(),
        "emotions": {k: int(n) for k, n in table["emotion"].value_counts().items() if k},
    }


def add_prepare(commands: Commands) -> None:
    parser = commands.add("prepare", run_prepare, "Decode a corpus and store its spectrograms.")
    parser.add_class_arguments(CorpusConfig, "corpus")
    parser.add_class_arguments(SpectrogramConfig, "features")
    parser.add_argument("--cache", type=Path, default=Experiment().cache, help="folder of prepared spectrograms")
    add_strict(parser)


def run_prepare(options: Namespace) -> Any:
    from qat.data.store import prepare
    from qat.training.data import problems_of, read_corpus

    store = prepare(read_corpus(options.corpus), options.features, options.cache)
    problems = problems_of(store, options.strict)
    return {"store": store.folder, "cuts": len(store), "skipped": len(problems), "problems": problems}
