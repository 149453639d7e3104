"""EleutherAI's lm-eval, made right for models that read their context in both directions.

Its own ``HFLM`` runs context and continuation through the model at once. A model exported with ``"is_causal": false``
then looks at the very answer it is scored on: too good a score, and no warning. Here the scorer makes the mask.
Written text (``generate_until``) was right: the prompt is read whole, the rest is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError, UnreachableError
from . import statistics
from .baselines import missing
from .models import Opened
from .report import Score, TaskScore
from .scoring import Query, Scorer

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("potluck"):
        raise
    raise missing(f"lm-eval ({error.name})") from error


class PrefixHFLM(HFLM):
    """``HFLM`` for an opened model: log-likelihoods come from ``scorer``, with the context's length as the prefix's.

    Rolling log-likelihoods (perplexities) are causal: there is no context that was given.
    """

    def __init__(self, opened: Opened, scorer: Scorer) -> None:
        super().__init__(
            pretrained=opened.model,
            tokenizer=opened.tokenizer,
            max_length=scorer.max_length,
            batch_size=scorer.batch_size,
            device=str(opened.model.device),
        )
        self._scorer = scorer
        self._rolling = False

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of every (key, context ids, continuation ids)."""
        together: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            together.setdefault(tuple(context), []).append(i)
        queries = [Query(context, [requests[i][2] for i in places]) for context, places in together.items()]
        found = self._scorer.score(queries, prefix=False if self._rolling else None)
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places, scores in zip(together.values(), found, strict=True):
            for i, score in zip(places, scores, strict=True):
                out[i] = score.total, score.is_greedy
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], out[i])
        return out


def evaluate(
    opened: Opened, scorer: Scorer, names: Sequence[str], *, include: Path | None, shots: int | None, limit: int | None
) -> list[TaskScore]:
    """lm-eval's ``names``, and those defined in YAML files below ``include``.

    Raises ConfigError for a name nobody knows, UnreachableError when a task's data cannot be had.
    """
    manager = _manager(names, include)
    unknown = _unknown(manager, names)
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {', '.join(unknown)}",
            hint="lm-eval ls tasks lists those it has; --include DIR adds your own.",
        )
    try:
        results = lm_eval.simple_evaluate(
            model=PrefixHFLM(opened, scorer),
            tasks=list(names),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=statistics.RESAMPLES,
        )
    except Exception as error:  # datasets and lm-eval raise anything
        if not _is_about_data(error):
            raise
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UnreachableError(
            f"the data of {', '.join(names)} cannot be had: {reason}",
            hint="Connect to the network, or define the task on local files and name their folder with --include.",
        ) from error
    assert results is not None
    return [line for name in results["samples"] for line in _lines(name, results)]


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """Of the tasks below ``include`` alone if they are enough: lm-eval's own are over ten thousand files to read."""
    if include:
        if not include.is_dir():
            raise ConfigError(f"{include} is no folder", hint="Name one with --include that holds tasks as YAML.")
        own = TaskManager(include_path=str(include), include_defaults=False)
        if not _unknown(own, names):
            return own
    return TaskManager(include_path=str(include) if include else None)


def _unknown(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _is_about_data(error: BaseException) -> bool:
    """Whether ``error`` comes from reading or downloading a data set, not from the model."""
    seen: BaseException | None = error
    while seen:
        modules = {kind.__module__.split(".")[0] for kind in type(seen).__mro__}
        if isinstance(seen, OSError) or modules & {"datasets", "huggingface_hub", "httpx", "requests"}:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _lines(name: str, results: Any) -> list[TaskScore]:
    """One line per metric of the task: with an interval from its rows where those are numbers that are averaged,
    otherwise from lm-eval's standard error."""
    out = []
    samples = results["samples"][name]
    for label, value in results["results"][name].items():
        metric, _, kept = label.partition(",")
        if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        rows = [row for row in samples if row["filter"] == kept and isinstance(row.get(metric), int | float)]
        numbers = [float(row[metric]) for row in rows]
        n = len({row["doc_id"] for row in samples})
        note, ids = "", tuple(f"{row['doc_id']}-{row['doc_hash'][:12]}" for row in rows)
        average, low, high = statistics.mean_interval(numbers) if numbers else (float("nan"),) * 3
        if not abs(average - value) < 1e-6:
            error = results["results"][name].get(f"{metric}_stderr,{kept}")
            known = isinstance(error, int | float)
            spread = 1.96 * float(error) if known else 0.0
            low, high, numbers, ids = value - spread, value + spread, [], ()
            note = "interval from lm-eval's standard error" if known else "no interval: lm-eval gives no standard error"
        better = results.get("higher_is_better", {}).get(name, {}).get(metric)
        out.append(
            TaskScore(
                name=name,
                metric=metric if kept == "none" else f"{metric} ({kept})",
                score=Score(value=float(value), low=float(low), high=float(high), n=n),
                ids=ids,
                values=tuple(numbers),
                weights=(1.0,) * len(numbers),
                lower_is_better=better is False,
                note=note,
            )
        )
    return out
