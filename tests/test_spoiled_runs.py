"""Nothing spoiled in a run folder becomes a result: what one stage leaves and a later one opens.

A tiny run is written once, as the stages write it but without their work. Each case spoils one file
of it, lets a stage open the run, and puts the file back. The stage must refuse with a ValueError
that names the file, make the part again, or come to the same as from the sound run.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from conf.job import Job, composed, settings
from data.artifacts import schemas
from data.artifacts.atomic import remove, sha256_of, write_bytes, write_json
from data.artifacts.latents import KIND as LATENTS
from data.artifacts.latents import GroupWriter
from data.artifacts.parquet_io import SETTINGS_KEY, write_table
from data.images import UnreadableImageError, decode, encode_png, to_pixels
from data.pairs import open_pairs
from data.pairs.schema import image_key, pair_key
from evaluate.judging.scores import judge
from evaluate.plan import ComparisonPlan
from evaluate.reporting.label_facts import label_facts
from evaluate.reporting.results import finished, report
from evaluate.run import new_plan, recorded_plan
from evaluate.steps import check_sample_folder, score_images, write_model_scores
from generate.image_files import missing
from generate.model_process import check_folder
from label.run import main as label
from label.run import score_sets, voting_rule_of
from label.scoring.score_sets import FACTS, ScoreSets
from label.voting.label_set import LabelSet, label_settings, make_labels
from tests.helpers_spoil import ANY_FILE, Spoil
from tests.helpers_train import SIDE, write_pairs
from train.dpo.auto_beta import AutoBeta
from train.loader.dataset import decided_pairs
from train.loader.latent_source import latents_of
from train.loader.order import Position
from train.run import describe, is_done
from train.trainer.checkpoint import State, latest_valid, load_state, reference_file
from train.trainer.metrics_log import read_lines

pytestmark = pytest.mark.slow

BASE = Path(__file__).parent.parent / "data" / "miniature" / "weights" / "base"
PROMPTS = ("a red cat", "a blue dog")


class AgainError(Exception):
    """A stage begins its work: a part is made again."""


# --- a sound run ---------------------------------------------------------------------------------


class Panel:
    """Judges that look at the brightness alone; loading them means that scores are made again."""

    names = ("clip",)

    @classmethod
    def load(cls, *_: object, **__: object) -> "Panel":
        raise AgainError

    def provenance(self) -> dict[str, Any]:
        return {}

    def score(
        self, images: Any, prompts: Any, *, batch: int = 64, workers: int = 0
    ) -> dict[str, np.ndarray]:
        def brightness(content: bytes) -> float:
            try:
                return float(to_pixels(decode(content)).mean())
            except UnreadableImageError:
                return float("nan")

        return {"clip": np.array([brightness(content) for content in images], np.float32)}


def write_model(folder: Path) -> Path:
    """The miniature's folder with weights that nobody loads."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("unet", "vae", "text_encoder"):
        name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        (folder / part / f"{name}.safetensors").write_bytes(b"no weights")
    return folder


def write_scores(job: Job, sets: ScoreSets) -> None:
    """Facts, scores and latents of every pair, without a network."""
    source = open_pairs(job.pairs)
    for shard in sets.shards:
        rows = pa.concat_tables(source.read(shard)).to_pylist()
        ids = [
            pair_key(image_key(row["image_0"]), image_key(row["image_1"]), row["prompt"]) + "-0"
            for row in rows
        ]
        ok = ["ok"] * len(rows)
        facts = {
            "pair_id": ids, "prompt": [row["prompt"] for row in rows],
            "source": [shard.name] * len(rows), "row": [row["row"] for row in rows],
            "image_0": [row["uid_0"] for row in rows], "image_1": [row["uid_1"] for row in rows],
            **{name: [SIDE] * len(rows) for name in ("width_0", "height_0", "width_1", "height_1")},
            "human": [1.0] * len(rows), "status": ok, "reason": [""] * len(rows),
        }  # fmt: skip
        scores = {
            "pair_id": ids, "score_0": [float(i % 3) for i in range(len(ids))],
            "score_1": [1.0] * len(ids), "status_0": ok, "status_1": ok,
        }  # fmt: skip
        for name, columns, schema in (
            (FACTS, facts, schemas.PAIR_FACTS), ("clip", scores, schemas.SCORES),
        ):  # fmt: skip
            table = pa.Table.from_pydict(columns, schema=schema)
            write_table(sets.path(name, shard), table, sets.settings(name, shard))
        assert sets.latents is not None
        blobs = pa.array([bytes(sets.latents.bytes)] * len(ids), pa.binary(sets.latents.bytes))
        schema = sets.latents.schema
        writer = GroupWriter(sets.path(LATENTS, shard), schema, sets.settings(LATENTS, shard))
        writer.write(
            pa.Table.from_arrays([pa.array(ids), pa.array(ok), blobs, blobs], schema=schema)
        )
        writer.close()


def write_labels(job: Job) -> None:
    rule, pairs = voting_rule_of(job), open_pairs(job.pairs)
    sets = score_sets(job, pairs, rule)
    write_scores(job, sets)
    sets.declare_complete({}, since=0.0)
    vote = label_settings(rule, settings(job.vote), sets.metrics, pairs.shards)
    make_labels(LabelSet(job.folder / "labels" / "majority", vote), sets, rule, {}, since=0.0)


def write_training(job: Job) -> None:
    run = describe(job)
    write_json(run.folder / "config.json", {"settings": run.settings})
    for step in (2, 4):
        write_checkpoint(run.folder / f"step-{step:07d}", step)
    line = {"loss": 0.69, "accuracy": 0.5, "pairs_per_s": 2.0, "data_wait_s": 0.1, "margin": 0.0}
    lines = [json.dumps({"step": step} | line) for step in range(1, 5)]
    (run.folder / "journal.jsonl").write_text("".join(f"{text}\n" for text in lines))
    write_model(run.pipeline)
    write_json(run.pipeline / "balanceddpo.json", {"settings": run.settings, "step": 4})


def write_checkpoint(folder: Path, step: int) -> None:
    folder.mkdir()
    beta, position = AutoBeta(5000.0), Position(0, step)
    state = State(step=step, position=position, beta=beta, reference_version=1, world=1)
    write_json(folder / "state.json", asdict(state))
    save_file({"w": torch.full((4,), float(step))}, reference_file(folder, 0, 1))
    write_bytes(folder / "engine" / "shard.pt", bytes([step]) * 64)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size, "sha256": sha256_of(path)
        }
        for path in files
    }  # fmt: skip
    write_json(folder / "manifest.json", {"files": entries})


def write_comparison(job: Job, facts: Mapping[str, Any] | None) -> None:
    plan, numbers = new_plan(job), count()
    for model in plan.models:
        check_sample_folder(plan, model)
        for sample in plan.images[model.name]:
            pixels = np.full((SIDE, SIDE, 3), 9 * next(numbers), np.uint8)
            write_bytes(sample.path, encode_png(pixels))
        images = plan.images[model.name]
        scores = judge(images, Panel(), batch=4, workers=0, advance=lambda _: None)
        write_model_scores(plan, model.name, plan.model_scores(model.name), images, scores)
    write_json(plan.judges_json, {"judges": {}, "device": "cpu", "packages": {}})
    score_images(plan, job.metrics, Console(quiet=True))
    report(plan, facts, {}, job.folder / "train" / "journal.jsonl")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    root = tmp_path_factory.mktemp("sound")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    job = composed([
        f"runs={root / 'runs'}", "run=r", "pairs=pickapic",
        f"pairs.root={write_pairs(root / 'pairs', (8, 6), 4)}", "panel.voters=[clip]",
        "panel.held_out=[]", "panel.oracle=[]", f"model.path={write_model(root / 'base')}",
        f"model.resolution={SIDE}", "latents=model", "label.device=cpu", "prompts=lines",
        f"evaluate.prompts.path={root / 'prompts.txt'}", "evaluate.device=cpu",
        "evaluate.resamples=20", "train.device=cpu",
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("label.scoring.panel.Panel", Panel)
        patch.setattr("label.run.score", lambda *_: stop())
        patch.setattr("evaluate.reporting.report.write_report", write_little)
        write_labels(job)
        write_training(job)
        write_comparison(job, label_facts(job.folder / "labels" / "majority"))
        yield job


def stop() -> None:
    raise AgainError


def write_little(folder: Path, *_: object, **__: object) -> None:
    write_bytes(folder / "report.html", b"a report")


# --- how stages open it --------------------------------------------------------------------------


def labels(job: Job) -> Any:
    """Stage one again: are the labels there?"""
    label(job)
    folder = job.folder / "labels" / "majority"
    return [pq.read_table(path).to_pylist() for path in sorted(folder.glob("part-*.parquet"))]


def vote(job: Job) -> Any:
    """Stage one with another vote, which counts the scores that are there."""
    place = job.folder / "labels" / "again"
    job.vote.name = place.name
    try:
        label(job)
        return [pq.read_table(path).to_pylist() for path in sorted(place.glob("part-*.parquet"))]
    finally:
        job.vote.name = "majority"
        remove(place)


def trained(job: Job) -> Any:
    """Stage two again: is the result there?"""
    if not is_done(describe(job)):
        raise AgainError
    return True


def train(job: Job) -> Any:
    """Stage two without its result, up to its first batch."""
    remove(job.folder / "train" / "pipeline" / "balanceddpo.json")
    run = describe(job)
    done, pairs = is_done(run), decided_pairs(run.labels, open_pairs(run.pairs))
    if run.latents is None:
        raise AgainError  # the run's first line says so
    latents = latents_of(run.latents, pairs, mirrored=False)
    read = [latents.read(group)["latent_0"].shape for group in range(len(latents.places))]
    return done, pairs.table.to_pylist(), read


def resume(job: Job) -> Any:
    """Stage two where it continues."""
    folder = job.folder / "train"
    newest, problems = latest_valid(folder)
    if newest is None:
        raise AgainError
    state = load_state(newest)
    with safe_open(reference_file(newest, 0, 1), framework="pt") as file:
        weights = file.get_tensor("w").tolist()
    if problems:
        assert (state.step, weights) == (2, [2.0] * 4)  # an older one, and said
        raise AgainError
    return state, weights


def journal(job: Job) -> Any:
    """The log, where training continues."""
    lines = read_lines(job.folder / "train" / "journal.jsonl")
    if len(lines) < 4:
        raise AgainError  # the lines of torn and missing files are written again, or left out
    return lines


def compare(job: Job) -> Any:
    """Stage three."""
    plan = new_plan(job)
    if (summary := finished(plan)) is None:
        facts = label_facts(job.folder / "labels" / "majority")
        for model in plan.models:
            check_folder(model, plan.spec.scheduler, plan.spec.steps, plan.size)
            check_sample_folder(plan, model)
        if any(map(missing, plan.images.values())):
            raise AgainError
        score_images(plan, job.metrics, Console(quiet=True))
        summary = report(plan, facts, {}, job.folder / "train" / "journal.jsonl")
    return result_of(plan, summary)


def result_of(plan: ComparisonPlan, summary: Mapping[str, Any]) -> Any:
    (comparison,) = summary["comparisons"]
    return comparison["rates"][0]["win_rate"], summary["settings"], plan.candidates


def compare_again(job: Job) -> Any:
    """Stage three, before its report was written."""
    (job.folder / "evaluate" / "report.html").unlink(missing_ok=True)
    return compare(job)


def score_again(job: Job) -> Any:
    """Stage three, when the images are there and no scores."""
    plan = new_plan(job)
    images = [image for of_model in plan.images.values() for image in of_model]
    if missing(images):
        raise AgainError
    return judge(images, Panel(), batch=4, workers=0, advance=lambda _: None)["clip"].tolist()


def statistics(job: Job) -> Any:
    """Stage three from its scores alone."""
    plan = recorded_plan(job)
    return result_of(plan, finished(plan) or report(plan, None, {}, Path("nowhere")))


# --- what is spoiled -----------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (None, [], "x", -7, [1])
MOST = 24
"""Ways to spoil the content of one file, evenly chosen among all."""


def spoiled_json(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The value with one part that is missing or of another type, three levels deep."""
    for name in list(value) if isinstance(value, dict) else range(min(1, len(value))):
        where = f"{path}.{name}"
        if isinstance(value, dict):
            yield f"{where} missing", {key: part for key, part in value.items() if key != name}
        parts: list[tuple[str, Any]] = [(f"{where}={wrong!r}", wrong) for wrong in WRONG]
        if isinstance(value[name], dict | list) and path.count(".") < 2:
            parts += spoiled_json(value[name], where)
        for what, part in parts:
            if type(part) is type(value[name]) and not isinstance(part, dict | list):
                continue  # another value, which nobody can notice
            yield what, put(value, name, part)


def put(value: Any, name: Any, part: Any) -> Any:
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[name] = part
    return changed


def spoiled_parquet(path: Path) -> Iterator[tuple[str, Spoil]]:
    table = pq.read_table(path)
    for name in table.column_names:
        at = table.schema.get_field_index(name)
        yield f"{name} missing", writes(table.drop_columns([name]))
        yield f"{name} null", writes(table.set_column(at, name, pa.nulls(len(table))))
        texts = pa.array([["a"]] * len(table))
        yield f"{name} as {texts.type}", writes(table.set_column(at, name, texts))
        yield f"{name} twice", writes(table.append_column(name, table[name]))
    yield "no rows", writes(table.slice(0, 0))
    yield "a row less", writes(table.slice(1))
    for footer in (b"", b"[]", b"{", b"{}", b'{"kind": 7, "source": []}'):
        yield f"footer {footer!r}", writes(table.replace_schema_metadata({SETTINGS_KEY: footer}))
    yield "no footer", writes(table.replace_schema_metadata(None))


def writes(table: pa.Table) -> Spoil:
    return lambda path: pq.write_table(table, path)


def swaps(other: Path) -> Spoil:
    def swap(path: Path) -> None:
        path.write_bytes(other.read_bytes())

    return swap


@dataclass(frozen=True, slots=True)
class Case:
    """A file of the run, what is done to it, and who opens the run then."""

    path: Path
    what: str
    spoil: Spoil
    opened: Callable[[Job], Any]


def of_file(path: Path, *openings: Callable[[Job], Any], content: bool = True) -> Iterator[Case]:
    any_file = [(spoil.__name__, spoil) for spoil in ANY_FILE]
    ways: list[tuple[str, Spoil]] = []
    if content and path.suffix == ".parquet":
        ways += spoiled_parquet(path)
    if content and path.suffix == ".json":
        sound = json.loads(path.read_text())
        for what, value in [("a list", [1, 2]), ("a number", 7), *spoiled_json(sound)]:
            ways.append((what, lambda place, value=value: place.write_text(json.dumps(value))))
    chosen = ways[:: -(-len(ways) // MOST)] if ways else []
    for opened in openings:
        yield from (Case(path, what, spoil, opened) for what, spoil in [*any_file, *chosen])


def label_cases(run: Path) -> Iterator[Case]:
    for name in ("scores/pairs", "scores/clip"):
        first, second = run / name / "part-00000.parquet", run / name / "part-00001.parquet"
        yield from of_file(first, vote)
        yield Case(first, "swapped", swaps(second), vote)
        yield from of_file(run / name / "manifest.json", vote)
    yield from of_file(run / "scores" / "weights.json", labels)
    first, second = (run / "labels/majority" / f"part-0000{i}.parquet" for i in (0, 1))
    yield from of_file(first, labels, train, compare_again)
    yield Case(first, "swapped", swaps(second), train)
    yield from of_file(run / "labels/majority/manifest.json", labels, train, compare_again)
    (latents,) = (run / "latents").iterdir()
    yield from of_file(latents / "part-00000.parquet", train)
    yield from of_file(latents / "manifest.json", labels, train)


def train_cases(run: Path) -> Iterator[Case]:
    newest = run / "train" / "step-0000004"
    yield from of_file(newest / "manifest.json", resume)
    yield from of_file(newest / "state.json", resume)
    yield from of_file(newest / "engine" / "shard.pt", resume)
    yield from of_file(newest / "reference-00000-of-00001.safetensors", resume)
    older = run / "train" / "step-0000002"
    for name in ("manifest.json", "state.json", "reference-00000-of-00001.safetensors"):
        yield Case(newest / name, "swapped", swaps(older / name), resume)
    yield from of_file(run / "train" / "journal.jsonl", journal, compare_again)
    for number, text in enumerate(("[]", "7", '{"step": "x"}', '{"step": 2}', "{", "\0\0")):
        yield Case(run / "train" / "journal.jsonl", f"line {number}", second_line(text), journal)
    yield from of_file(run / "train" / "config.json", train, trained)
    yield from of_file(run / "train" / "pipeline" / "balanceddpo.json", trained)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        yield from of_file(run / "train" / "pipeline" / name, compare, content=False)


def second_line(text: str) -> Spoil:
    def spoil(path: Path) -> None:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")

    return spoil


def evaluate_cases(run: Path) -> Iterator[Case]:
    folder = run / "evaluate"
    image, *_ = sorted((folder / "samples" / "base").glob("*.png"))
    yield from of_file(image, score_again)
    yield from of_file(folder / "samples" / "base" / "settings.json", compare_again)
    yield from of_file(folder / "scores.parquet", compare, statistics)
    yield from of_file(folder / "judges.json", compare_again)
    yield from of_file(folder / "winrates.json", compare)


# --- the attempt ---------------------------------------------------------------------------------


def fault(case: Case, job: Job, sound: Any) -> str:
    """What is wrong with how a case ends; empty where it ends as it should."""
    try:
        case.spoil(case.path)
        outcome = case.opened(job)
    except AgainError:
        return ""
    except ValueError as error:
        named = str(case.path) in str(error) or str(case.path.parent) in str(error)
        return "" if named or case.path.name in str(error) else f"names nothing: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "" if outcome == sound else "was read as something else"


def restored(files: Mapping[Path, bytes], run: Path) -> None:
    """Put every file of the run back."""
    for path in sorted(run.rglob("*"), reverse=True):
        if path not in files and (
            path.is_symlink() or not path.is_dir() or not any(path.iterdir())
        ):
            remove(path)
    for path, content in files.items():
        if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
            remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.mark.parametrize("cases_of", [label_cases, train_cases, evaluate_cases])
def test_nothing_spoiled_in_a_run_becomes_a_result(
    job: Job, cases_of: Callable[[Path], Iterator[Case]], capsys: pytest.CaptureFixture[str]
):
    run = job.folder
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    cases = list(cases_of(run))
    sound = {}
    for opened in dict.fromkeys(case.opened for case in cases):
        sound[opened] = opened(job)
        restored(files, run)
    faults = []
    for case in cases:
        if problem := fault(case, job, sound[case.opened]):
            where = case.path.relative_to(run)
            faults.append(f"{case.opened.__name__}: {where} {case.what}: {problem}")
        restored(files, run)
    with capsys.disabled():
        print(f"\n{len(cases)} spoiled files of runs tried ({cases_of.__name__})")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
