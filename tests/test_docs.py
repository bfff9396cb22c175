"""The pages of docs/: they name every file and key there is, and their links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import REPOSITORY
from hydra.errors import HydraException
from run_folders import write_run
from safetensors import safe_open
from test_run_files import names

import tcsae
from tcsae.base.errors import UserError
from tcsae.config.compose import config_of
from tcsae.measure.analysis import Analysis
from tcsae.report.comparison import Comparison
from tcsae.runs.state import RunState

FORMATS = (REPOSITORY / "docs" / "formats.md").read_text(encoding="utf-8")
GOLDEN = json.loads((REPOSITORY / "tests" / "golden" / "golden.json").read_text(encoding="utf-8"))


def of_any_window(name: str) -> str:
    """C_8_sparse is C_W_sparse on the page."""
    return re.sub(r"^([CDL])_\d+", r"\1_W", name)


def in_code(page: str) -> set[str]:
    """Every word of a page that stands between backticks, its dotted and comma-joined parts too."""
    spans = re.findall(r"`([^`\n]+)`", page)
    return {word for span in spans for word in (span, *re.split(r"[^\w.\-]+", span))}


def all_keys(tree: Any, path: str = "") -> set[str]:
    """Dotted paths of the nested keys of golden.json."""
    if isinstance(tree, list):
        return set().union(*(all_keys(inner, path) for inner in tree)) if tree else set()
    if not isinstance(tree, dict):
        return set()
    found = set()
    for key, inner in tree.items():
        found |= {f"{path}{key}"} | all_keys(inner, f"{path}{key}.")
    return found


def missing(wanted: set[str], page: str = FORMATS) -> list[str]:
    known = in_code(page)
    return sorted(name for name in wanted if of_any_window(name) not in known)


def test_the_page_of_files_names_every_file_of_a_run() -> None:
    run, export = GOLDEN["run"]["run_files"], GOLDEN["run"]["export_files"]
    assert len(run) > 20
    assert missing(names() | {Path(name).name for name in (*run, *export)}) == []


def test_a_file_that_the_page_lacks_is_found() -> None:
    """What the other tests rest on."""
    assert missing({"core.json", "C_8"}) == []
    assert missing({"core.jso", "training"}, "`core.json`, in words: training") == [
        "core.jso",
        "training",
    ]


def test_the_page_names_every_key_of_final_info() -> None:
    keys = all_keys(GOLDEN["run"]["final_info"])
    assert {"seconds.shared_by", "seconds.own.clusters"} <= keys
    assert missing({key.rsplit(".", 1)[-1] for key in keys if not key.startswith("seconds.")}) == []
    stages = {key for key in keys if key.startswith("seconds.")}
    assert missing({stage.split(".", 1)[-1].rsplit(".", 1)[-1] for stage in stages}) == []


@pytest.mark.parametrize("file", ["core", "consistency"])
def test_the_page_names_every_key_of_what_is_measured(file: str) -> None:
    keys = {key for key in all_keys(GOLDEN["run"][file]) if not key.startswith("sae_cfg_dict.")}
    # SAEBench's own, and the reasons by dotted path.
    keys = {key for key in keys if not re.match(r"eval_config\.|.*\.(intervals|missing)\.", key)}
    assert len(keys) > 40
    assert missing({key.rsplit(".", 1)[-1] for key in keys if not key[-1].isdigit()}) == []


def test_the_page_names_every_tensor_of_a_measured_run(tmp_path: Path) -> None:
    run, seen = write_run(tmp_path / "run"), 0
    for path in sorted((run / "eval").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = set(file.keys())
        assert missing(tensors) == [], path.name
        seen += len(tensors)
    assert seen > 60


def test_the_page_names_what_state_comparison_and_analysis_hold() -> None:
    for kind in (RunState, Comparison):
        assert missing({field.name for field in fields(kind)}) == [], kind.__name__
    parts = {field.name for field in fields(Analysis)} - {"top_tokens"}
    assert [part for part in sorted(parts) if f"`{part}." not in FORMATS] == []


# --------------------------------------------------------------------------------------- links

PAGES = (
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "docs" / "results").glob("*.md")),
)


def without_code(page: str) -> str:
    """A page without its blocks and spans of code, where brackets are no links."""
    page = re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.M | re.S)
    page = re.sub(r"^ {4}.*$", "", page, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", page)


def links(page: str) -> list[str]:
    """Targets of a page's inline links and images that are not on the web."""
    found = re.findall(r"\]\(([^()\s]+)\)", without_code(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them; a second of one name has -1 at its end."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^ {4}.*$", "", page, flags=re.M), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        name = next(n for n in (base, *(f"{base}-{i}" for i in range(1, 99))) if n not in found)
        found.add(name)
    return found


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in links(path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        is_there = there.exists() and (
            not anchor or anchor in anchors(there.read_text(encoding="utf-8"))
        )
        if not is_there:
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_every_link_of_a_page_leads_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A b, `c_d`\n\n# A b\n# A b\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md) [2](b.md#a-b-c_d) [3](b.md#a-b-1) `[4](no.md)` [5](https://no.org)\n"
    )
    assert dead_links(page) == []
    page.write_text("# Here\n[1](no.md) [2](b.md#no) [3](#no) [4](#here)\n")
    assert dead_links(page) == ["no.md", "b.md#no", "#no"]


def test_pages_have_links_between_them() -> None:
    assert sum(len(links(path.read_text(encoding="utf-8"))) for path in PAGES) > 60


# ------------------------------------------------------------------------------- what is said


def strings_of(folder: Path) -> list[str]:
    """Every string of the code, with ... for what an f-string fills in."""
    found = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def unsaid(page: str, strings: list[str]) -> list[str]:
    """The messages in a page's headings (`...` and single letters for what varies) that no string
    of the code has."""
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    messages = [said for title in titles for said in re.findall(r"`([^`]+)`", title)]
    lost = []
    for said in messages:
        parts = [p.strip() for p in re.split(r"\.\.\.|-\.\.\.|\b[MNWx]\b", said) if p.strip()]
        if not any(all(part in text for part in parts) for text in strings):
            lost.append(said)
    return lost


def test_the_messages_of_the_faq_are_those_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "faq.md").read_text(encoding="utf-8")
    page = page.split("## When something is said")[1]
    strings = strings_of(REPOSITORY / "tcsae")
    assert page.count("### `") > 9
    assert unsaid(page, strings) == []
    assert unsaid("### `nobody ever says ... this`", strings) == ["nobody ever says ... this"]


def test_the_options_of_the_pages_are_those_of_the_config() -> None:
    """Dotted keys as one types them: `training.target_l0=32`."""
    from tcsae.config.mistakes import _known_keys

    known, seen = set(_known_keys()), 0
    for name in ("faq.md", "extending.md", "glossary.md"):
        page = REPOSITORY / "docs" / name
        groups = "model|dataset|sae|consistency|training|evaluation|store|tracking"
        keys = re.findall(rf"`(?:[^`\n]* )?((?:{groups})\.[a-z_0-9]+)=?[^`\n]*`", page.read_text())
        wrong = sorted(
            {
                key
                for key in keys
                if key not in known and not key.endswith((".json", ".safetensors"))
            }
        )
        assert wrong == [], name
        seen += len(keys)
    assert seen > 10


def test_the_files_and_names_that_extending_sends_to_are_there() -> None:
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    code = {path: path.read_text(encoding="utf-8") for path in REPOSITORY.glob("t*/**/*.py")}
    spans = [span for span in re.findall(r"`([^`\n]+)`", page) if "NAME" not in span]
    files = {span for span in spans if re.fullmatch(r"[\w./]+\.(py|yaml)", span)}
    names = {span.removesuffix("(pre)").removesuffix("()") for span in spans} - files
    names = {name for name in names if re.fullmatch(r"_?[A-Za-z]+(_[A-Za-z]+)+|[A-Z]\w+", name)}
    assert len(files) > 25 and len(names) > 20
    lost = [f for f in files if not any(p.as_posix().endswith(f"/{f}") for p in code)]
    assert [f for f in sorted(lost) if not (REPOSITORY / f).is_file()] == []
    text = "".join(text for path, text in code.items() if path != Path(__file__))
    text += "".join(p.read_text(encoding="utf-8") for p in (REPOSITORY / "conf").rglob("*.yaml"))
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", text)) == []


# --------------------------------------------------------------------------------------- site


def test_links_of_pages_are_those_of_the_site_on_the_site() -> None:
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        from site_pages import linked
    finally:
        sys.path.remove(str(REPOSITORY / "scripts"))

    assert linked("[a](docs/faq.md#x) [b](CONTRIBUTING.md)", "README.md") == (
        "[a](faq.md#x) [b](contributing.md)"
    )
    assert linked("[a](README.md) [b](#here)", "docs/results/protocol.md") == (
        "[a](README.md) [b](#here)"
    )
    assert linked("![a](x.svg) [b](../faq.md)", "docs/results/README.md") == (
        "![a](x.svg) [b](../faq.md)"
    )
    assert linked("[r](docs/results) [w](https://a.b/c.md)", "README.md") == (
        "[r](results/README.md) [w](https://a.b/c.md)"
    )
    assert linked("[run.py](../tcsae/run.py) [here](../LICENSE)", "docs/faq.md") == (
        "`tcsae/run.py` here (`LICENSE`)"
    )


def test_every_page_is_on_the_site() -> None:
    site = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    shown = set(re.findall(r"- (?:[^:\n]+: )?([\w/]+\.md)$", site, re.M))
    pages = (REPOSITORY / "docs").rglob("*.md")
    names = {page.relative_to(REPOSITORY / "docs").as_posix() for page in pages}
    assert shown == names | {"index.md", "contributing.md", "changelog.md"}


def test_the_citation_is_of_this_package() -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert (cited["title"], cited["version"]) == ("tcsae", tcsae.__version__)
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith(f"{cited['license']} License")
    assert [author["name"].lower() in licence for author in cited["authors"]] == [True]


# ----------------------------------------------------------------------------------- commands


def training_commands(page: str) -> list[list[str]]:
    """The overrides of every `python -m tcsae.train ...` of a page, whole lines and in spans; of
    several values, or of an interval, the first. What stands in [brackets] or is a placeholder is
    left out."""
    lines = page.replace("\\\n", " ")
    found = re.findall(r"python -m tcsae\.train([^`\n#]*)", re.sub(r" \[[^]\n]*\]", "", lines))
    commands = []
    for text in found:
        text = re.split(r" {4,}|  \(", text.rstrip())[0]  # words beside the command
        words = [word.strip("\"'") for word in text.split() if not word.startswith("-")]
        if any(mark in text for mark in ("<", "...", "NAME", "FOLDER", "--help")):
            continue
        words = [re.sub(r"=(?:tag\(log,)?interval\(([^,]+),.*", r"=\1", word) for word in words]
        values = [re.sub(r"^([\w.+/]+=)([^\[{,]*),.*", r"\1\2", word) for word in words]
        commands.append([value for value in values if "=" in value])
    return commands


@pytest.mark.documents
def test_the_training_commands_of_the_pages_are_accepted() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    commands = {tuple(command) for text in texts for command in training_commands(text)}
    assert len(commands) > 20 and ("window=4", "lambda=0") in commands
    refused = {}
    for command in sorted(commands):
        # An experiment with points has its own choice of what would be missing here.
        given = [word for word in command if not word.startswith("hydra")]
        try:
            config_of(*given)
        except (UserError, HydraException) as error:
            refused[command] = str(error)
    assert refused == {}
    with pytest.raises((UserError, HydraException)):
        config_of(*training_commands("    python -m tcsae.train window=0 lambda=1")[0])


# ------------------------------------------------------------------------------------ figures


def unfounded(page: str, sources: str) -> list[str]:
    """Decimal figures of a page, of two digits or more, that no figure of the sources rounds to."""
    known = [abs(float(x)) for x in re.findall(r"-?\d*\.\d+", sources)]
    said = re.findall(r"(?<![\w.])\d*\.\d{2,}(?!\w)", without_code(page))
    return [
        x
        for x in said
        if not any(abs(float(x) - y) <= 0.501 * 0.1 ** len(x.split(".")[1]) for y in known)
    ]


@pytest.mark.documents
def test_the_figures_of_the_faq_are_in_the_pages_of_results() -> None:
    docs = REPOSITORY / "docs"
    page = (docs / "faq.md").read_text(encoding="utf-8").split("## When something is said")[0]
    results = [docs / "effect.md", docs / "results" / "README.md"]
    sources = "".join(path.read_text(encoding="utf-8") for path in results)
    assert unfounded(page, sources) == []
    assert unfounded("C_8 is .041, not 0.1234", "0.0412 and -0.12") == ["0.1234"]
