"""Names and words that this code does without, and what to write in their place.

`TODO` lists the files that still have such a name. Files leave the list; none is added.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VAGUE = {"found", "asked", "told", "made", "held"}
"""Participles that say what happened to a thing; a name says what it is: scores, rows, missing."""
FOLDERS = ("data", "label", "train", "generate", "evaluate", "conf", "benchmarks", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted(
    {
        *SOURCES,
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")),
        *(ROOT / "conf").rglob("*.yaml"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.j2")),
        ROOT / "Makefile",
    }
    - {Path(__file__)}
)
QUOTES = {
    **dict.fromkeys(
        ("CHANGELOG.md", "conf/job.py", "tests/test_label_cli.py"), ".pictures"
    ),  # old names of settings
    "tests/helpers_golden.py": "How well does the picture show this?",
    **dict.fromkeys(
        ("data/images.py", "docs/pairs.md", "tests/test_images.py"), "not a picture of"
    ),
}
"""File -> words that golden scores depend on, or that label files hold as a reason; they stay."""

TODO = frozenset(
    {
        "benchmarks/activations.py",
        "benchmarks/effects.py",
        "benchmarks/label.py",
        "benchmarks/options.py",
        "benchmarks/peer.py",
        "benchmarks/pipeline.py",
        "benchmarks/race.py",
        "benchmarks/shapes.py",
        "benchmarks/stream.py",
        "benchmarks/train.py",
        "benchmarks/vote.py",
        "benchmarks/worlds.py",
        "conf/job.py",
        "label/metrics/backbones.py",
        "label/metrics/blip_reward.py",
        "label/metrics/hps_v3.py",
        "label/metrics/mps.py",
        "label/metrics/mps_layers.py",
        "label/metrics/preprocessing.py",
        "label/metrics/registry.py",
        "label/metrics/state_dict.py",
        "label/parity/__main__.py",
        "label/parity/references.py",
        "label/run.py",
        "label/scoring/claims.py",
        "label/scoring/embedding_cache.py",
        "label/scoring/score_sets.py",
        "label/scoring/scoring_pass.py",
        "label/scoring/shard_builder.py",
        "label/scoring/shard_scorer.py",
        "label/scoring/vae_encoder.py",
        "label/voting/label_set.py",
        "label/voting/rules.py",
        "tests/helpers_blip.py",
        "tests/helpers_docs.py",
        "tests/helpers_golden.py",
        "tests/helpers_label.py",
        "tests/rank_programs.py",
        "tests/test_adapter.py",
        "tests/test_backbone.py",
        "tests/test_blip.py",
        "tests/test_boards.py",
        "tests/test_claims.py",
        "tests/test_docs.py",
        "tests/test_docs_guide.py",
        "tests/test_docs_labels.py",
        "tests/test_drift.py",
        "tests/test_export.py",
        "tests/test_families.py",
        "tests/test_flops.py",
        "tests/test_golden.py",
        "tests/test_hps_v3.py",
        "tests/test_label_cli.py",
        "tests/test_label_failures.py",
        "tests/test_latents.py",
        "tests/test_loss.py",
        "tests/test_many_machines.py",
        "tests/test_memory.py",
        "tests/test_metrics.py",
        "tests/test_models_guide.py",
        "tests/test_mps.py",
        "tests/test_noise.py",
        "tests/test_objectives.py",
        "tests/test_order.py",
        "tests/test_parity.py",
        "tests/test_passes.py",
        "tests/test_recompute.py",
        "tests/test_samples.py",
        "tests/test_scale_out.py",
        "tests/test_score.py",
        "tests/test_stream.py",
        "tests/test_train.py",
        "tests/test_train_latents.py",
        "tests/test_validation.py",
        "tests/test_vote.py",
        "train/distributed/deepspeed_engine.py",
        "train/distributed/watch.py",
        "train/dpo/objectives.py",
        "train/execute.py",
        "train/export/model_card.py",
        "train/loader/dataset.py",
        "train/loader/image_source.py",
        "train/loader/latent_source.py",
        "train/loader/loader.py",
        "train/loader/sampler.py",
        "train/loader/source_choice.py",
        "train/models/components.py",
        "train/models/families.py",
        "train/models/flops.py",
        "train/models/lora.py",
        "train/run.py",
        "train/trainer/build.py",
        "train/trainer/checkpoint.py",
        "train/trainer/error_monitor.py",
        "train/trainer/metrics_log.py",
        "train/trainer/samples.py",
        "train/trainer/trainer.py",
        "train/trainer/validation.py",
    }
)


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that gets a name: variables, attributes, arguments, functions."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.MatchMapping(rest=str(name)):
                yield node.lineno, name


def vague_names(source: str) -> list[str]:
    """`line: name` of each vague name that this code binds."""
    names = sorted(set(bound_names(ast.parse(source))))
    return [f"{line}: {name}" for line, name in names if name in VAGUE]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p) not in TODO], ids=relative)
def test_names_say_what_a_thing_is(path: Path):
    names = vague_names(path.read_text())
    assert not names, f"name the thing in {relative(path)}: {', '.join(names)}"


@pytest.mark.parametrize(
    "source",
    [
        "found = 1", "found: int = 1", "found += 1", "a, (found, b) = c", "for found in a: pass",
        "with a as found: pass", "[found for found in a]", "if (found := 1): pass",
        "def found(): pass", "async def found(): pass", "def f(found): pass",
        "def f(*, found=1): pass", "def f(*found): pass", "lambda found: 1", "class found: pass",
        "import a as found", "from a import b as found", "self.found = 1",
        "try:\n    pass\nexcept E as found:\n    pass",
        "match a:\n    case [found, *_]:\n        pass",
        "match a:\n    case {**found}:\n        pass",
        "match a:\n    case [1, *found]:\n        pass",
    ],
)  # fmt: skip
def test_a_vague_name_is_noticed(source: str):
    assert [name.split(": ")[1] for name in vague_names(source)] == ["found"]


def test_other_names_and_words_pass():
    assert vague_names("founded = found; print('found', a.held, f(made=1))") == []


def test_an_image_is_called_an_image():
    for path in TEXTS:
        text = path.read_text().replace(QUOTES.get(relative(path), "\0"), "").lower()
        assert "picture" not in text, f"write image, not picture, in {relative(path)}"
