"""Stage score: every variant's and baseline's score of every image, where it is not there yet.

A run is split into shards of `shard_size` rows. One engine (`diffguard.engine`) takes images from shard
after shard; a shard is written when its last image is finished.
"""

from collections.abc import Callable, Sequence

from tqdm import tqdm

from tasks.common.devices import devices
from tasks.config.precision import fast_precision, record_precision
from tasks.config.run import Run, open_run
from tasks.models.loaded import load_models
from tasks.score.plan import Item, missing, open_store, plan
from tasks.score.work import ShardScoring


def score_shards(
    run: Run,
    items: list[Item],
    shards: Sequence[int],
    device: str,
    progress: Callable[[int], object] = lambda images: None,
) -> int:
    """Score what these shards lack, by one engine for each training seed.

    A shard that another run is at work on comes last.

    Args:
        progress: called each time that a shard is written, with its number of images.

    Returns:
        How many score tables were written; 0 when all were there.
    """
    written = 0
    for seed in sorted({item.seed for item in items}):
        of_seed = [item for item in items if item.seed == seed]
        models = load_models(run.unchanged, seed, device)
        with ShardScoring(run, of_seed, progress) as scoring:
            scoring.score(models, shards)
            written += scoring.written
    return written


def score(run: Run) -> list[Item]:
    """Score everything that is missing, and put away what params.yaml no longer asks for."""
    items = plan(run)
    if shards := missing(run, items):
        total = sum(run.rows_of(shard) for shard in shards) * len(run.params.seeds)
        with tqdm(total=total, desc=f"score {len(shards)} of {run.shards} shards", unit="image") as bar:
            score_shards(run, items, shards, devices()[0], bar.update)
    finish(run, items)
    return items


def finish(run: Run, items: list[Item]) -> None:
    """Leave in DVC's output exactly what params.yaml's own run made."""
    if run.own:
        open_store(run).tidy([item.folder for item in items])
        if run.precision is not None:
            record_precision(run.home / "scores", run.precision)


def main() -> None:
    run = open_run()
    if missing(run, plan(run)):
        # Scores that another machine recorded stay as they are; whoever scores anew does it in what is fast here.
        run = open_run(precision=fast_precision())
    items = score(run)
    print(f"{len(items)} score tables are complete")
