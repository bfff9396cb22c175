"""A W&B workspace made from code: training, outcomes, a sweep's heat maps, features.

It shows what every run logs (tcsae/jobs/tracking.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tcsae.base.labels import label, local_names

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

DEFAULT_WINDOW = 8
_X = "tokens"
_MAX_RUNS = 100
_HEAT_MAPS = ("explained_variance", "frac_alive", "l2_ratio", "ce_loss_score")
_HEAT_MAPS_MEMORY = ("rho_1", "persistence", "omega_squared", "edge_energy", "density")
_PLANES = ("pareto", "trade")
_REPORT_FIGURES = ("autocorrelation", "shares", "energy", "profile")
_DISTRIBUTIONS = ("rho_1", "tau_int", "omega_squared", "run_length", "density")


def workspace(
    entity: str, project: str, group: str | None = None, window: int = DEFAULT_WINDOW
) -> Workspace:
    """The workspace's definition; nothing is sent.

    Args:
        group: only this sweep's runs, each by itself; None: all runs, grouped by sweep.
        window: the W of the C_W and L_W that are shown; one of the runs' evaluation.windows.
    """
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws

    memory, local = f"C_{window}", f"L_{window}"
    if group is None:
        runs = ws.RunsetSettings(groupby=[expr.Metric("Group")])
    else:
        runs = ws.RunsetSettings(filters=f"Metric('Group') == {group!r}")
    runs.pinned_columns = [
        "run:displayName",
        *(f"config:{key}.value" for key in ("window", "lambda")),
        *(f"summary:eval/{name}" for name in ("l0", "explained_variance", memory, local)),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"tcsae {group or 'sweeps'}",
        sections=[
            _training(),
            _outcomes(memory, window),
            _heat_maps(memory, window),
            _features(),
            _redundancy(),
        ],
        settings=ws.WorkspaceSettings(max_runs=_MAX_RUNS),
        runset_settings=runs,
    )


def _section(name: str, panels: list[Any], columns: int, is_open: bool = True) -> Section:
    from wandb_workspaces import workspaces as ws

    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
    return ws.Section(name=name, panels=panels, is_open=is_open, layout_settings=layout)


def _training() -> Section:
    import wandb_workspaces.reports.v2 as wr

    def line(title: str, *metrics: str, log: bool = False) -> Any:
        return wr.LinePlot(title=title, x=_X, y=list(metrics), title_x=_X, log_y=log or None)

    panels = [
        line("loss", "loss/total", log=True),
        line("loss: reconstruction", "loss/reconstruction", log=True),
        line("loss: consistency, weighted", "loss/consistency", log=True),
        wr.LinePlot(title="loss: every term", x=_X, title_x=_X, metric_regex="^loss/", log_y=True),
        line("L0", "l0"),
        line("explained variance, in the batch", "explained_variance"),
        line("consistency within windows, in the batch", "window_consistency"),
        line("window variance", "window_variance"),
        line("share of dead features", "dead_share"),
        line("tokens a second", "tokens_per_second"),
        line("learning rate", "lr"),
        line("lambda", "lambda"),
    ]
    return _section("Training", panels, 4)


def _outcomes(memory: str, window: int) -> Section:
    import wandb_workspaces.reports.v2 as wr

    def measured(name: str) -> Any:
        return wr.SummaryMetric(f"eval/{name}")

    def plane(x: str, y: str, z: str) -> Any:
        title = f"{_words(y)} over {_words(x)}; colour: {_words(z)}"
        return wr.ScatterPlot(title=title, x=measured(x), y=measured(y), z=measured(z))

    def axis(metric: Any, name: str) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name)

    knobs = {
        "window": "window",
        "lambda": "lambda",
        "sae.architecture": "SAE",
        "consistency.form": "form",
    }
    beside = local_names(window)
    core = ("explained_variance", "ce_loss_score", "l0", "frac_alive")
    found = (memory, *beside, *core, "omega_squared", "edge_energy")
    panels = [
        plane("l0", "explained_variance", memory),
        plane("explained_variance", memory, "l0"),
        *(plane("explained_variance", name, "l0") for name in beside),
        plane("ce_loss_score", memory, "l0"),
        plane("omega_squared", memory, "l0"),
        wr.ParallelCoordinatesPlot(
            title="what was set, what came of it",
            columns=[
                *(axis(wr.Config(key), name) for key, name in knobs.items()),
                *(axis(measured(name), _words(name)) for name in found),
            ],
        ),
        wr.ParameterImportancePlot(with_respect_to=f"eval/{memory}"),
    ]
    return _section("Outcomes, held out", panels, 2)


def _heat_maps(memory: str, window: int) -> Section:
    """Of the sweep's comparison run."""
    import wandb_workspaces.reports.v2 as wr

    def picture(title: str, name: str) -> Any:
        return wr.MediaBrowser(title=title, media_keys=[f"comparison/s0-{name}"], num_columns=1)

    metrics = (*_HEAT_MAPS, memory, *local_names(window), *_HEAT_MAPS_MEMORY)
    panels = [
        *(picture(f"window x lambda: {_words(name)}", f"grid-0-{name}") for name in metrics),
        *(picture(name, name) for name in _PLANES),
        wr.WeavePanelSummaryTable(table_name="comparison/table"),
    ]
    return _section("Comparison of the sweep", panels, 3)


def _features() -> Section:
    import wandb_workspaces.reports.v2 as wr

    names = [*_REPORT_FIGURES, *(f"distribution-{name}" for name in _DISTRIBUTIONS)]
    panels = [
        wr.WeavePanelSummaryTable(table_name="report/features"),
        *(wr.MediaBrowser(title=name, media_keys=[f"report/{name}"]) for name in names),
    ]
    return _section("Features", panels, 3, is_open=False)


def _redundancy() -> Section:
    import wandb_workspaces.reports.v2 as wr

    names = ("redundant_share", "twinned_share", "effective_rank", "modularity_excess")
    panels = [wr.BarPlot(title=_words(name), metrics=[f"analysis/{name}"]) for name in names]
    return _section("Redundancy and clusters", panels, 2, is_open=False)


def _words(name: str) -> str:
    return label(name).name


def definition(made: Workspace) -> dict[str, Any]:
    """The workspace as W&B stores it."""
    return made._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def outline(made: Workspace) -> str:
    """Sections and panels as text."""
    lines = [f"workspace {made.name!r} for {made.entity}/{made.project}"]
    for section in made.sections:
        lines.append(f"{section.name}{'' if section.is_open else ' (closed)'}")
        lines += [f"  {type(panel).__name__}: {_shown(panel)}" for panel in section.panels]
    return "\n".join(lines)


def _shown(panel: Any) -> str:
    names = ("title", "table_name", "with_respect_to")
    return next(text for name in names if (text := getattr(panel, name, None)))
