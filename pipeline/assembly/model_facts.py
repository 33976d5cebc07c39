"""What the planner of a driver is told of the model: which adapters there are, and what they are, by their bytes."""

from __future__ import annotations

from typing import Any

from pipeline.config.model import ModelConfig
from pipeline.config.recipe import RecipeConfig, misfit
from pipeline.errors import PipelineError, UsageError
from pipeline.records.wishes import ModelRules
from pipeline.storage.adapters import AdapterShelf
from pipeline.storage.filesystem import is_local, join, size_of
from pipeline.storage.models import NOT_STAGED, staged_hashes


def model_facts(model: ModelConfig, *, is_staged: bool) -> dict[str, Any]:
    """What the planner is told of the model. Of one that is not staged here no file can be looked at."""
    folder = model.folder.rstrip("/")
    staged = staged_hashes(model.folder, model.name) if is_staged else {}
    shelf = AdapterShelf(join(folder, model.checkpoint), staged)
    extras = {join(folder, file): name for name, file in model.extras().items()}

    def require_staged(uri: str) -> None:
        way_out = f"run: python -m jobs.stage_weights model={model.name} extras=[{extras[uri]}] model.folder={folder}"
        if uri not in staged:
            raise UsageError(f"{extras[uri]} is not staged; {way_out}")

    def sha256(uri: str) -> str:
        if not is_staged and (uri in extras or uri.startswith(f"{folder}/")):
            return f"{NOT_STAGED}: {uri}"
        try:
            # Asked for every row: the shelf looks at each file once, so what lies beyond it waits for a failure.
            return shelf.sha256(uri)
        except PipelineError:
            if uri in extras and size_of(uri) is None:
                require_staged(uri)
            raise

    def adapters_of(recipe: RecipeConfig) -> dict[str, str]:
        names = sorted({stage.adapter for stage in recipe.stages} - {""})
        uris = {name: join(folder, model.adapters[name]) for name in names}
        for uri in uris.values():
            # A row's adapter is fetched by its URI, a recipe's comes with the model: of a bucket, what was staged.
            if is_staged and not is_local(uri):
                require_staged(uri)
        return {name: sha256(uri) for name, uri in uris.items()}

    def misfit_of(recipe: RecipeConfig) -> str:
        reason = misfit(recipe, model)
        try:
            if not reason:
                adapters_of(recipe)
        except UsageError as error:
            reason = f"its adapter cannot be used: {error}"
        return reason

    cameras = {move: join(folder, file) for move, file in model.cameras.items()}
    rules = ModelRules(cameras, model.can_enhance, model.size.has_audio, sha256)
    return {"rules": rules, "misfit": misfit_of, "adapters_of": adapters_of}
