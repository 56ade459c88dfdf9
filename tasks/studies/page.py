"""The page of a study in docs/studies/, written from its results: a section for each benchmark that it was run on."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffguard.utils.names import readable
from tasks.common.files import write_whole
from tasks.common.text import markdown_table
from tasks.config import project
from tasks.config.changes import CHANGES
from tasks.config.study import Compare, Study, split_measure, where
from tasks.studies.cams import CAPTION as CAMS
from tasks.studies.failures import CAPTION as FAILURES
from tasks.studies.failures import failure_table
from tasks.studies.figure import SHARES, label, measure_label, scale_of
from tasks.studies.points import left_out_lines

_SECTION = re.compile(r"<!-- benchmark: (.+?) -->\n(.*?)<!-- end of benchmark -->\n", re.DOTALL)
_SUMMARY = re.compile(r"^## .+\n\n(.+)\n", re.MULTILINE)


VERDICTS = {
    "yes": "the claim is borne out here",
    "no": "the claim is not borne out here, but its opposite",
    "open": "the interval includes 0, so that the claim is neither borne out nor refuted here",
}


def docs_folder() -> Path:
    """docs/studies/."""
    return project.ROOT / "docs" / "studies"


def write_page(study: Study, results: Mapping[str, Any], figures: Mapping[str, bytes]) -> Path:
    """Write a study's page with these results in place of the benchmark's former ones, and the index.

    Args:
        figures: PNG files by their names; they go beside the page.
    """
    name, folder = results["study"], docs_folder()
    path = folder / f"{name}.md"
    sections = dict(_SECTION.findall(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    sections[results["benchmark"]] = section(study, results, list(figures))
    order = [each for each in study.benchmarks if each in sections]
    order += [each for each in sections if each not in order]
    text = head(study, name) + "".join(
        f"\n<!-- benchmark: {each} -->\n{sections[each]}<!-- end of benchmark -->\n" for each in order
    )
    for file, content in figures.items():
        write_whole(folder / file, lambda target, content=content: target.write_bytes(content))  # type: ignore[misc]
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    write_whole(folder / "index.md", lambda target: target.write_text(index(folder), encoding="utf-8"))
    return path


def head(study: Study, name: str) -> str:
    """What a study asks, and how it is run."""
    lines = [
        f"# {study.title}",
        "",
        study.question,
        "",
        f"**The claim** ({study.claim.source}): {study.claim.says}.",
        "",
        "```bash",
        f"make study STUDY={name}",
        "```",
        "",
        f"Its points, measures and figure are set in `{where(name)}`; this page is written from the results.",
    ]
    for line, grid in study.variants.items():
        axes = "; ".join(f"{_axis_name(axis)}: {_values(values)}" for axis, values in grid.grid.items())
        lines += [*([""] if line == next(iter(study.variants)) else []), f"- `{line}`" + (f", {axes}" if axes else "")]
    more = []
    if study.models is not None:
        more += [f"- under models, {_axis_name(axis)}: {_values(values)}" for axis, values in study.models.grid.items()]
    for kind, strengths in (study.changes or {}).items():
        more.append(f"- {kind}, {CHANGES[kind].title}: {_values(strengths)}")
    for by, grouping in (study.groups or {}).items():
        how = "as the benchmark's files have them" if grouping.file is None else f"as in `{grouping.file}`"
        if grouping.row is not None:
            how = f"{grouping.parts} parts of equal size by the score of `{grouping.row}`, 1 with the lowest"
        more.append(f"- OOD images by {by}: {how}")
    if more:
        lines += ["", *more] if not study.variants else more
    return "\n".join(lines) + "\n"


def section(study: Study, results: Mapping[str, Any], figures: Sequence[str]) -> str:
    """What came out on one benchmark."""
    benchmark = results["benchmark"]
    parts = [f"## {benchmark}", conclusion(study, results)]
    parts += [f"![{study.title} on {benchmark}]({figures[0]})"]
    parts.append(figure_caption(study))
    if failures := failure_table(results):
        parts += [FAILURES, failures]
    parts.append(table(study, results))
    if results["left_out"]:
        lines = [line.replace(str(Path.home()), "~") for line in left_out_lines(results["left_out"])]
        parts += [readable(f"{_sentence_case(line)}.") for line in lines]
    if results["differences"]:
        parts += [difference_summary(study, results), difference_table(study, results)]
    if "curve" in results:
        parts += [
            "### Similarity along the inversion",
            curve_conclusion(results["curve"]),
            f"![Similarity by noise level on {benchmark}]({figures[1]})",
            "Bands are 95 % intervals of the mean; the dotted line is the level that is compared.",
        ]
    if study.cams is not None:
        parts += ["### Where the classifiers look", f"![GradCAM on {benchmark}]({figures[-1]})", CAMS]
    return "\n\n".join([*parts, provenance(results)]) + "\n\n"


def conclusion(study: Study, results: Mapping[str, Any]) -> str:
    """Two sentences from the numbers: what was measured, and whether it bears out the claim.

    Of several classifiers, the first.
    """
    claim, found = study.claim, results["claim"][0]
    measure = label(claim.measure)
    if found["value"] is None:
        return f"{measure} of `{found['of']}` is not known on {results['benchmark']}. So it says nothing of the claim."
    chosen = f", chosen on validation among {_selected(claim.of)}," if found["of"] in found["chosen"] else ""
    first = f"{_sentence_case(measure)} of `{found['of']}`{chosen} is {shown(claim.measure, found['value'])}"
    difference = shown_difference(claim.measure, found["difference"])
    if "to" in found:
        among = f", chosen likewise among {_selected(claim.bound)}," if found["to"] in found["chosen"] else ""
        first = f"{first}; that of `{found['to']}`{among} is {shown(claim.measure, found['to_value'])}"
        second = f"The paired difference is {difference}"
    else:
        bound = f"{scale_of(claim.measure) * found['bound']:g}{_unit(claim.measure)}"
        second = f"Against the {bound} of the claim that is {difference}"
    return f"{first}. {second}: {VERDICTS[found['verdict']]}."


def table(study: Study, results: Mapping[str, Any]) -> str:
    """Every point with 95 % intervals, as a Markdown table."""
    several = len(results["classifiers"]) > 1
    heads = [*(["classifier"] if several else []), "point", *(measure_label(each) for each in study.measure)]
    rows = []
    for point in results["points"]:
        cells = [cell(measure, point["measures"][measure]) for measure in study.measure]
        rows.append([*([point["classifier"]] if several else []), f"`{point['name']}`", *cells])
    return markdown_table(heads, rows)


def difference_table(study: Study, results: Mapping[str, Any]) -> str:
    """Paired differences with 95 % intervals, as a Markdown table."""
    several = len(results["classifiers"]) > 1
    heads = [*(["classifier"] if several else []), "difference", *(measure_label(each) for each in study.measure)]
    rows = []
    for entry in results["differences"]:
        cells = [cell(measure, entry["measures"][measure], signed=True) for measure in study.measure]
        rows.append([*([entry["classifier"]] if several else []), f"`{entry['of']}` − `{entry['to']}`", *cells])
    return markdown_table(heads, rows)


def difference_summary(study: Study, results: Mapping[str, Any]) -> str:
    """How many paired differences of the claim's measure have a whole interval above, and below, 0."""
    compare = study.compare
    assert isinstance(compare, Compare)
    measure = study.claim.measure
    found = [entry["measures"][measure] for entry in results["differences"]]
    known = [each for each in found if each is not None]
    higher, lower = sum(each["low"] > 0 for each in known), sum(each["high"] < 0 for each in known)
    return (
        f"Paired differences to `{compare.to}`: of {len(known)}, {label(measure)} is higher with its whole interval in "
        f"{higher}, lower in {lower}, and neither in {len(known) - higher - lower}."
    )


def curve_conclusion(curve: Mapping[str, Any]) -> str:
    """Whether InD images lose similarity faster than OOD images, a sentence for each similarity."""
    sentences = []
    for similarity, of_datasets in curve["difference"].items():
        unit = " dB" if similarity == "psnr" else ""
        name = "PSNR" if similarity == "psnr" else f"1 − {similarity}"
        differences = ", ".join(
            f"{each['value']:+.3g}{unit} against {dataset} ({each['low']:+.3g} to {each['high']:+.3g})"
            for dataset, each in of_datasets.items()
        )
        faster = [dataset for dataset, each in of_datasets.items() if each["high"] < 0]
        slower = [dataset for dataset, each in of_datasets.items() if each["low"] > 0]
        says = "; ".join(
            text
            for text in (
                f"InD images lose more than {', '.join(faster)}" if faster else "",
                f"less than {', '.join(slower)}" if slower and faster else "",
                f"InD images lose less than {', '.join(slower)}" if slower and not faster else "",
            )
            if text
        )
        sentences.append(
            f"At level {curve['at']} the mean {name} of InD images differs by {differences}: "
            f"{says or 'no interval leaves out 0'}."
        )
    return " ".join(
        [*sentences, "The paper has InD images lose more, so that one threshold serves both (section 3.3)."]
    )


def provenance(results: Mapping[str, Any]) -> str:
    """What the figures of a section are of."""
    counts = ", ".join(
        f"{count:,} {'InD' if role == 'ind' else f'{role}-OOD'}" for role, count in results["images"].items()
    )
    limit = "" if results["limit"] is None else f" (at most {results['limit']:,} of each dataset)"
    seeds = len(results["seeds"])
    return (
        f"Of {counts} test images{limit}, classifier {' and '.join(results['classifiers'])}, "
        f"{seeds} training seed{'s' if seeds > 1 else ''}; 95 % intervals of {results['draws']:,} bootstrap draws; "
        f"diffguard {results['version']}, method {results['method_version']}."
    )


def figure_caption(study: Study) -> str:
    """What the figure shows."""
    if study.figure.x is None:
        return "Bars are 95 % bootstrap intervals."
    has_axes = study.models is not None or study.changes is not None or study.groups is not None
    rows = " Dashed lines are rows of params.yaml." if study.rows and not has_axes else ""
    promised = " The dotted line is the rate promised." if "promised" in study.measure else ""
    kind = "exact 95 % intervals (Clopper and Pearson)" if study.changes is not None else "95 % bootstrap intervals"
    return f"Bars are {kind}.{rows}{promised}"


def index(folder: Path) -> str:
    """The page that lists all studies that were run, each with its question and what came out."""
    lines = [
        "# Studies",
        "",
        "Each page is one experiment of the paper, or an open question of it, on the benchmarks of this project, and "
        "is written from the results of its study. `make study STUDY=name BENCHMARK=glyphs` runs one again; without "
        "`BENCHMARK`, on the first of the study's. A study of your own is one more file in `data/studies/`.",
        "",
    ]
    for path in sorted(folder.glob("*.md")):
        if path.name == "index.md":
            continue
        text = path.read_text(encoding="utf-8")
        title, question = text.splitlines()[0].removeprefix("# "), text.splitlines()[2]
        lines += [f"## {title}", "", f"{question} [All of it]({path.name})", ""]
        for benchmark, content in _SECTION.findall(text):
            if summary := _SUMMARY.search(content):
                lines.append(f"- **{benchmark}**: {summary[1]}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def cell(measure: str, found: Mapping[str, float] | None, *, signed: bool = False) -> str:
    """A measure with its interval, as a cell of a table.

    Example:
        >>> cell("near auroc", {"value": 0.991, "low": 0.984, "high": 0.997})
        '99.1 (98.4–99.7)'
        >>> cell("denoiser macs", {"value": 15298560.0, "low": 15298560.0, "high": 15298560.0})
        '15.3 M'
    """
    if found is None:
        return "–"
    if split_measure(measure)[1] in ("parameters", "macs", "training_macs"):
        return _with_prefix(found["value"], "+" if signed else "")
    value, low, high = (scale_of(measure) * found[key] for key in ("value", "low", "high"))
    digits = ".3g" if split_measure(measure)[1] == "score" else ".1f"
    sign = "+" if signed else ""
    if low == high:
        return f"{value:{sign}{digits}}".removesuffix(".0")
    if signed:
        return f"{value:+{digits}} ({low:+{digits}} to {high:+{digits}})"
    return f"{value:{digits}} ({low:{digits}}–{high:{digits}})"


def _with_prefix(value: float, sign: str) -> str:
    """A count with three digits and a prefix of SI."""
    for power, prefix in ((12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:{sign}.3g}{prefix}"
    return f"{value:{sign}.3g}"


def shown(measure: str, found: Mapping[str, float] | None) -> str:
    """A measure with its unit and interval, in a sentence."""
    text = cell(measure, found)
    return text.replace(" (", f"{_unit(measure)} (", 1) if " (" in text else f"{text}{_unit(measure)}"


def shown_difference(measure: str, found: Mapping[str, float] | None) -> str:
    """A difference of a measure with its unit and interval, in a sentence."""
    text = cell(measure, found, signed=True)
    return text.replace(" (", " points (", 1) if split_measure(measure)[1] in SHARES else text


def _unit(measure: str) -> str:
    return " %" if split_measure(measure)[1] in SHARES else ""


def _sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


def _selected(selector: Any) -> str:
    if isinstance(selector, dict):
        return "points with " + ", ".join(f"{axis} {value}" for axis, value in selector.items())
    return f"`{selector}`"


def _axis_name(axis: str) -> str:
    return axis.rpartition(".")[2].replace("_", " ")


def _values(values: Any) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
