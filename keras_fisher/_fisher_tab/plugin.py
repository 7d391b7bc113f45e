"""The plugin that TensorBoard finds, and its addresses.

What is said of runs is computed here. The page draws it, and thins out curves
to medians and quartiles.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import importlib.util
import json
import pathlib

from tensorboard import context as context_lib
from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
import werkzeug
from werkzeug import exceptions
from werkzeug import wrappers

from keras_fisher import plotting
from keras_fisher._fisher_tab import experiment

_STATIC = pathlib.Path(__file__).parent / "static"
_FILES = {
    "index.js": "text/javascript",
    "views.js": "text/javascript",
    "page.js": "text/javascript",
    "style.css": "text/css",
}


class FisherTab(base_plugin.TBPlugin):
    """Explosion of Tr(F), early traces and memorization, over runs."""

    plugin_name = "fisher"

    def __init__(self, context: base_plugin.TBContext):
        super().__init__(context)
        self._provider = context.data_provider
        self._peaks: experiment.Peaks = {}

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(
            es_module_path="/index.js", tab_name="Fisher"
        )

    def is_active(self) -> bool:
        everything = experiment.Experiment(
            self._provider, context_lib.RequestContext(), ""
        )
        return everything.has_fisher_data()

    def data_plugin_names(self):
        return ()  # Scalars are of many; `is_active` says whose these are.

    def get_plugin_apps(self) -> dict[str, Callable]:
        static = {
            f"/{name}": _answering(functools.partial(_static, name))
            for name in _FILES
        }
        return {
            **static,
            "/plotly.js": _answering(_plotly),
            "/runs": _answering(self._runs),
            "/curves": _answering(self._curves),
            "/layers": _answering(self._layers),
            "/correlation": _answering(_correlation),
        }

    def _experiment(self, request: wrappers.Request) -> experiment.Experiment:
        return experiment.Experiment(
            self._provider,
            plugin_util.context(request.environ),
            plugin_util.experiment_id(request.environ),
            self._peaks,
        )

    def _runs(self, request):
        wants_all = request.args.get("peaks") != "known"
        rows = self._experiment(request).runs(read_curves=wants_all)
        return {
            "runs": rows,
            "threshold": experiment.threshold(rows),
            "has_plotly": importlib.util.find_spec("plotly") is not None,
        }

    def _curves(self, request):
        tags = request.args.getlist("tag")
        if not tags:
            raise exceptions.BadRequest("Ask for a `tag`, or several.")
        found = self._experiment(request).curves(_run(request), tags)
        return {tag: curve._asdict() for tag, curve in found.items()}

    def _layers(self, request):
        return self._experiment(request).layers(_run(request))


def _run(request: wrappers.Request) -> str:
    run = request.args.get("run")
    if run is None:
        raise exceptions.BadRequest("Ask for a `run`.")
    return run


def _answering(answer: Callable) -> Callable:
    """A WSGI application that answers in JSON, or with what it is given."""

    @wrappers.Request.application
    def application(request: wrappers.Request):
        if request.method not in ("GET", "HEAD"):
            return werkzeug.Response("Only GET.", 405, {"Allow": "GET, HEAD"})
        try:
            found = answer(request)
        except experiment.UnknownRunError as error:
            text = f"There is no run {error.args[0]!r}."
            return http_util.Respond(request, text, "text/plain", code=404)
        except exceptions.HTTPException as error:
            return http_util.Respond(
                request, error.description, "text/plain", code=error.code
            )
        if isinstance(found, werkzeug.Response):
            return found
        return http_util.Respond(
            request, json.dumps(found, allow_nan=False), "application/json"
        )

    return application


def _static(name: str, request: wrappers.Request):
    text = (_STATIC / name).read_text("utf-8")
    return http_util.Respond(request, text, _FILES[name])


def _plotly(request: wrappers.Request):
    spec = importlib.util.find_spec("plotly")
    if spec is None:
        raise exceptions.NotFound(
            'Charts need: pip install "keras_fisher[plot]"'
        )
    path = pathlib.Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return http_util.Respond(
        request, path.read_text("utf-8"), "text/javascript", expires=86400
    )


def _correlation(request: wrappers.Request):
    """Spearman's, of `x` and `y`, numbers that are parted by commas."""
    try:
        x, y = (
            [float(number) for number in request.args[name].split(",")]
            for name in ("x", "y")
        )
        found = plotting.rank_correlation(x, y)
    except (ImportError, ValueError) as error:
        return {"missing": str(error)}
    except exceptions.BadRequestKeyError:
        raise exceptions.BadRequest("Ask for numbers `x` and `y`.") from None
    return {
        name: None if value != value else value
        for name, value in found._asdict().items()
    }
