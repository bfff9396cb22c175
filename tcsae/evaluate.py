"""`python -m tcsae.evaluate FOLDER [key=value ...]`: measure an SAE from anywhere as a run's is.

FOLDER is SAELens', dictionary_learning's, an export or a run; `--release` and `--sae-id` name one
of SAELens' pretrained SAEs. What it is measured on is what the folder says of itself (model, hook,
size of contexts; an export or a run: everything), unless a key says otherwise. The result is a run
folder like that of a trained run, for `python -m tcsae.compare`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcsae.errors import INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE, Interrupted, UserError

if TYPE_CHECKING:
    from tcsae.config import LoadedConfig
    from tcsae.data.language_model import LanguageModel
    from tcsae.foreign import ForeignSAE
    from tcsae.signals import StopRequest

log = logging.getLogger(__name__)


def evaluate_sae(
    found: ForeignSAE, overrides: Sequence[str], output: Path | None, stop: StopRequest
) -> Path:
    """Measure a loaded SAE on held-out contexts; the run folder with the results.

    Args:
        found: of `tcsae.foreign.from_folder` or `from_release`.
        overrides: "key=value" as on the command line.
        output: the run folder. None: outputs/<name made from the config>.

    Raises:
        UserError: what the user can mend, in one line; no folder was made.
        Interrupted: a signal came; the same call goes on.
    """
    import yaml

    from tcsae.config import run_name
    from tcsae.data.language_model import LanguageModel
    from tcsae.data.stream import open_stream
    from tcsae.files import make_folder, write_json, write_text
    from tcsae.foreign import composed, with_cautions
    from tcsae.measuring import write_pages
    from tcsae.memory import keep_large_blocks
    from tcsae.run_folder import claim_folder, owned_folder

    started = time.monotonic()
    keep_large_blocks()
    config = composed(found, overrides)
    model = LanguageModel(config.model, config.layer)
    _check_width(found, config, model)
    config = with_cautions(config, found.facts, model.hook_name)
    folder = output or Path("outputs") / run_name(config)
    if _holds_it(config, folder):
        if not (folder / "notes.txt").is_file():  # the last of the pages
            write_pages(folder)
        log.info(f"already finished: {folder} (rerun=true repeats it)")
        return folder
    for text in config.source.cautions:
        log.warning(text)
    # Before the folder is made: what is wrong with text or weights shows here.
    stream = open_stream(config, stop, model)
    with owned_folder(folder):
        claim_folder(config, folder)
        (folder / "final_info.json").unlink(missing_ok=True)
        write_json(folder / "content.json", stream.content)
        make_folder(folder / ".hydra")  # where a run's report finds its command
        write_text(folder / ".hydra" / "overrides.yaml", yaml.safe_dump(list(overrides)))
        _measure(found, config, stream, folder, stop, started)
    return folder


def _measure(
    found: ForeignSAE,
    config: LoadedConfig,
    stream: Any,
    folder: Path,
    stop: StopRequest,
    started: float,
) -> None:
    from tcsae.evaluation import on_the_model
    from tcsae.files import write_json
    from tcsae.measuring import measure, measured_info, say_results, write_pages
    from tcsae.sae.saelens_format import load_saelens, save_saelens

    save_saelens(folder / "sae", found.sae, found.metadata(config))
    sae, sae_cfg = load_saelens(folder / "sae")
    (behaviour,) = on_the_model([sae], config, stream.model, stream.evaluation, stop)
    evaluation, _ = measure(sae, sae_cfg, behaviour, config, stream, folder, stop)
    info = {
        "training_steps": None,
        "source": config.source.model_dump(mode="json"),
        **measured_info(config, stream, evaluation, time.monotonic() - started),
    }
    write_json(folder / "final_info.json", info)
    write_pages(folder)
    say_results(folder, evaluation)


def _check_width(found: ForeignSAE, config: LoadedConfig, model: LanguageModel) -> None:
    if found.sae.d_in != model.d_in:
        raise UserError(
            f"{found.source.folder}: d_in is {found.sae.d_in}, against {model.d_in} of "
            f"{config.model.name} at {model.hook_name}: give the model it was made for "
            f"(model=..., layer=...)"
        )


def _holds_it(config: LoadedConfig, folder: Path) -> bool:
    """Whether `folder` has the finished result. UserError if it has anything else in it."""
    from tcsae.config import LoadedConfig, parse_any, run_id
    from tcsae.files import read_json

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    own = folder / "config.json"
    content = read_json(own) if own.is_file() else None
    if not isinstance(content, dict) or not {"source", "evaluation"} <= content.keys():
        raise UserError(f"{folder} is not empty: choose another folder with --output")
    before = parse_any(content)
    if not isinstance(before, LoadedConfig) or run_id(before) != run_id(config):
        raise UserError(f"{folder} holds another result: choose another folder with --output")
    return (folder / "final_info.json").is_file() and not config.rerun


# --------------------------------------------------------------------------------- the command


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcsae.evaluate",
        description="Measure an SAE from anywhere on held-out text, as a run's SAE is measured.",
        epilog="Keys as of python -m tcsae.train: model, layer, window, dataset, evaluation, "
        "store. Those that are not given are what the SAE says of itself, else the defaults.",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="[FOLDER] key=value",
        help="a folder of SAELens or dictionary_learning, an export or a run; then what to "
        "measure it on",
    )
    parser.add_argument("--release", help="of SAELens' pretrained SAEs, in place of FOLDER")
    parser.add_argument("--sae-id", metavar="ID", help="with --release")
    parser.add_argument(
        "--output", type=Path, metavar="RUN", help="the run folder (default: in outputs/)"
    )
    given = parser.parse_intermixed_args(arguments)
    if (given.release is None) != (given.sae_id is None):
        parser.error("--release and --sae-id go together")
    given.folder = None
    if given.release is None:
        if not given.arguments:
            parser.error("give FOLDER, or --release and --sae-id")
        given.folder, *given.arguments = given.arguments
    return given


@contextlib.contextmanager
def _console() -> Iterator[None]:
    """The log on stderr, as that of a training run."""
    from tcsae.progress import ConsoleHandler

    handler = ConsoleHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
    )
    own = logging.getLogger("tcsae")
    level = own.level
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        own.removeHandler(handler)
        own.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    from tcsae.foreign import from_folder, from_release
    from tcsae.signals import stop_on_signal
    from tcsae.train import for_the_user

    try:
        with _console(), stop_on_signal() as stop:
            if given.folder is None:
                found = from_release(given.release, given.sae_id)
            else:
                found = from_folder(Path(given.folder))
            folder = evaluate_sae(found, given.arguments, given.output, stop)
    except Interrupted as stopped:
        print(f"tcsae: {stopped}; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        line = for_the_user(error)
        if line is None:
            raise
        print(f"tcsae: {line}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)
    print(f"measured: {folder}")


if __name__ == "__main__":
    main()
