"""One name for one thing: words and phrases that are never right in this package, each with its replacement.

The patterns are searched in the source, the tests, the documents, the examples and the benchmarks. Ordinary English
(row, found, label, noise, alone) is left to readers. This file is not searched.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# pattern -> what to write instead
NEVER = {
    # names that no longer exist
    r"\b(Perturbed|PerturbedBatch)\b": "NoisyBatch",
    r"\b(SingleSample|ReferenceBatch|FoundNeighbours|RecentSTFTarget|FaissTarget)\b": "DSMTarget, STFTarget, KNNTarget",
    r"\b(FullDataset|FullTarget|PrunedDataset|Banded|ByLabel|SharedOut|StreamingTarget)\b": "ExactTarget, "
    "PoolTarget, Sharded, Prefetched",
    r"\bRolling\b(?=[(`,])": 'STFTarget with references="recent"',
    r"\b(Album|Judge|Yardstick|Ledger|Laboratory)\b": "SampleStore, Scorer, Evaluator, Reader",
    r"\b(Descent|Saver|Meter|Board)\b(?=[(:`,])": "Optimization, CheckpointManager, MetricsLogger, TensorBoardWriter",
    r"\b(EDM|VE|VP|IDDPM)Scaling\b|\bPredicts\(": "EDMPreconditioning ... NoPreconditioning",
    r"\b(NoiseWeight|HeadWeight)\b|\bMinSNR\b": "SNRWeight, PredictionWeight, MinSNRWeight",
    r"\b(FloatProducts|ByteProducts)\b": "FloatMatmul, Int8Matmul",
    r"(?<![.\w])assemble\(|\bimport [\w, ]*\bassemble\b|\bmake_(denoiser|sampler|yardstick)\b": "build",
    r"\branks\.(lead|told|company|apart|first|total)\b": "on_main, reraise_lost_rank, no_sync, is_main, world_size",
    r"\blabel_dim\b": "num_classes",
    # names of configurations, metrics and options that no longer exist
    r"target\.kind ?= ?\W?(single|reference|rolling|neighbours|found|full|pruned|auto)\b": "dsm, stf, knn, exact",
    r"\btarget\.(at_once|sharded)\b": "training.target_prefetch, training.target_sharding",
    r"\[scaling\]|\bscaling\.(kind|sigma_data|head)\b": "preconditioning",
    r"\bweight\.kind ?= ?\W?(noise|head|minsnr)\b|\bweight\.head\b": "snr, prediction, min-snr; prediction_type",
    r"\btraining\.(ramp|decay|decay_from|clip|keep|micro_batch|ema_ramp_up)\b": "learning_rate_warmup, "
    "learning_rate_decay, learning_rate_decay_start, gradient_clip, keep_checkpoints, micro_batch_size, "
    "ema_rampup_ratio",
    r"\b(Progress|Loss|Loss_by_noise|Held_out|Timing|Target|Steps|Resources)/[a-z_]+\b": "metrics in lower case",
    r"\btarget/(changed|alone)\b": "target/fraction_ess_above_1.01, target/fraction_dsm",
    r"(?<![\w-])--from\b": "--init-from",
    # private words for things that have a name in the field
    r"(?i)\btold\b": "given, passed, conditioned on",
    r"(?i)\btaught\b|\blessons?\b": "target, training batch; trained on",
    r"(?i)\bmembers?\b": "data point (of a data set), candidate (of a support)",
    r"(?i)\b(albums?|judge[ds]?|yardsticks?|laborator(y|ies))\b": "sample store, score, evaluator, variance study",
    r"(?i)\b(shared out|kept apart)\b": "sharded, held out",
    r"(?i)\bfirst rank\b|\brank 0 (writes|speaks)": "main rank",
    r"(?i)\b(noise|velocity|score|x0|any|this|network's) heads?\b": "prediction type",
    r"(?i)(?<!mark.)\bparametri[sz](e|es|ed|ing|ation)\b": "prediction type",
    # phrases that have to be read twice
    r"(?i)\b(unless|if not|(if|where) nothing else is) said\b|\bsaid otherwise\b": "by default, if not set",
    r"(?i)\b(go|goes|going|gone|went) on (bit|with|where|as it|as what|from)\b": "resume, continue",
    r"(?i)(?<!there )\b(is|are) no (?!(more|less|longer|worse|better)\b|\w+er than)[a-z]+": "is not a",
    r"(?i)\ba number an? (row|example)\b|\bof so many\b|\bso many (rows|images|steps|examples)\b": "one value per "
    "example; name the number",
    r"(?i)\b(images|rows|steps|samples|lines|seconds|bytes|generator) an? (step|row|image|line|minute|batch|seed)\b": (
        "per step, one per image"
    ),
    r"(?i)\ball (data )?pass(es)?\b(?! the)": "the whole data set is streamed",
    r"(?i)\bled? away from|\bleads? away\b|\blistens? to\b|\bspeaks? (over|and)\b": "guidance; can be set; overrides",
    r"(?i)\bbut for\b": "except for",
    r'"""(Of|All|What|Whether|How|One for)\b': "a sentence or noun phrase that does not begin so",
}

# file or folder -> (patterns that are right there, reason)
ALLOWED = {
    "docs/results/cifar10-": (NEVER.keys(), "reports, as an earlier version of the program wrote them"),
    "docs/results/digits-": (NEVER.keys(), "reports, as an earlier version of the program wrote them"),
    "docs/results/fashion-mnist-": (NEVER.keys(), "reports, as an earlier version of the program wrote them"),
    "src/stablefield/interop/": ({r"\blabel_dim\b"}, "a key of EDM's pickles"),
    "tests/interop/edm/test_convert.py": ({r"\blabel_dim\b"}, "a key of EDM's pickles"),
    "tests/interop/edm/test_edm.py": ({r"\blabel_dim\b"}, "a key of EDM's pickles"),
    "tests/networks/test_networks_edm.py": ({r"\blabel_dim\b"}, "a key of EDM's pickles"),
    "tests/test_preconditioning.py": ({r"\blabel_dim\b"}, "a key of EDM's pickles"),
    "tests/config/test_config.py": (
        {r"\[scaling\]|\bscaling\.(kind|sigma_data|head)\b"},
        "a section of format 1, refused",
    ),
    "benchmarks/compare_checkouts.py": (NEVER.keys(), "translates the names of an earlier version"),
    "docs/exact.md": ({r"(?i)\bmembers?\b", r"(?i)\btold\b"}, "explains the old names in the output it quotes"),
}


SEARCHED = ("src/**/*.py", "src/**/*.toml", "tests/**/*.py", "docs/**/*.md", "examples/*", "benchmarks/*.py", "*.md")


def searched_files() -> Iterator[Path]:
    for pattern in SEARCHED:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path != Path(__file__):
                yield path


def is_below(path: Path, places: tuple[str, ...]) -> bool:
    return path.relative_to(ROOT).as_posix().startswith(places)


def allowed_patterns(path: Path) -> set[str]:
    return {p for place, (patterns, _) in ALLOWED.items() if is_below(path, (place,)) for p in patterns}


def flowing_text(path: Path) -> tuple[str, list[int], list[int]]:
    """Text of a file on one line, so that phrases are found across line ends; where each word starts, and its line."""
    words: list[str] = []
    starts, lines, end = [], [], 0
    fence = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if path.suffix == ".md" and line.startswith("```"):
            fence = "" if fence else line
        if fence == "```" or (path.name == "CHANGELOG.md" and line.startswith("|")):
            continue  # output of a program, which may be of an older version; tables of old names
        for word in line.split():
            if word != "#":
                starts.append(end)
                lines.append(number)
                words.append(word)
                end += len(word) + 1
    return " ".join(words), starts, lines


def complaints(path: Path) -> Iterator[str]:
    text, starts, lines = flowing_text(path)
    for pattern in NEVER.keys() - allowed_patterns(path):
        for match in re.finditer(pattern, text):
            line = lines[bisect_right(starts, match.start()) - 1]
            yield f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {NEVER[pattern]}"


def test_words_that_are_never_right_are_not_written() -> None:
    found = [complaint for path in searched_files() for complaint in sorted(complaints(path))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("place", [place for place, (patterns, _) in ALLOWED.items() if patterns != NEVER.keys()])
def test_every_exception_is_needed(place: str) -> None:
    files = [path for path in searched_files() if is_below(path, (place,))]
    for pattern in ALLOWED[place][0]:
        assert any(re.search(pattern, flowing_text(path)[0]) for path in files), f"{place} has no {pattern} any more"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("the network is\n    # told the class", False),
        ("goes\non bit for bit", False),
        ("there\n  is no such file", True),
        ("the file is no zip", False),
        ("100 images a step", False),
        ('"""All numbers in these features."""', False),
        ('"""Every number in these features."""', True),
    ],
)
def test_phrases_are_found_across_lines(text: str, clean: bool, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    flow = flowing_text(tmp_path / "page.md")[0]
    assert any(re.search(pattern, flow) for pattern in NEVER) != clean
