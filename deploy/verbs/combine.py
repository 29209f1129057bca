"""`utune-deploy combine`: several tasks of one backbone into one, in the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ...merge.combine import METHODS
from ..options import (
    PATH,
    BackboneChoice,
    backbone_options,
    dry_run_option,
    force_option,
    json_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ...merge.combine.tasks import Combined
    from ..console import Console

SHOWN = 5


@click.command("combine")
@click.argument("deltas", type=PATH, nargs=-1, required=True)
@backbone_options
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    required=True,
    help="linear: weighted sum. cat: the same, low ranks side by side. svd: the same at --rank. ties, dare, "
    "dare-ties, magnitude: of --density of each tensor.",
)
@click.option(
    "--weight",
    "shares",
    type=float,
    multiple=True,
    help="Of each delta, in their order; all the same if not given: 1 for ties and dare-ties, which "
    "average, else 1 / number of deltas.",
)
@click.option("--density", type=float, help="Share of each tensor that is kept; 0.2 if not given.")
@click.option("--seed", type=int, help="Of the random methods; 0 if not given.")
@click.option("--rank", type=int, help="Cut the result to this rank; 16 for svd if not given.")
@click.option(
    "--energy", type=float, help="Cut it to the ranks that keep this share of the squares."
)
@click.option("--head", metavar="TASK|average", help="Whose classes the result answers with.")
@click.option("--task", required=True, help="The result's name.")
@click.option(
    "--labels",
    type=PATH,
    help="Class names, one per line, or Hugging Face's config.json; those of the head if not given.",
)
@click.option("-o", "--output", type=PATH, required=True, help="The delta (.safetensors).")
@dry_run_option
@json_option
@force_option
@click.pass_obj
def command(
    console: Console,
    deltas: tuple[Path, ...],
    choice: BackboneChoice,
    method: str,
    shares: tuple[float, ...],
    density: float | None,
    seed: int | None,
    rank: int | None,
    energy: float | None,
    head: str | None,
    task: str,
    labels: Path | None,
    output: Path,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Combine the tasks in DELTAS, each a difference of weights, into one task of the same backbone.

    Sums run over what each task changes in the backbone's weights, in float64; a branch that does not
    fold is refused. The order of DELTAS does not matter.
    """
    from ...merge.class_names import read_class_names
    from ...merge.combine.recipe import Recipe
    from ...merge.combine.tasks import combine
    from ...merge.delta import load_delta, save_delta
    from ...merge.differences import Ranks
    from ...merge.files import refuse_existing

    if not dry_run:
        refuse_existing(output, force=force, inputs=(*deltas, *choice.files))
    ranks = None if rank is None and energy is None else Ranks(rank, energy)
    recipe = Recipe(method, density, seed, ranks)
    names = None if labels is None else read_class_names(labels)
    found = combine(
        [load_delta(path) for path in deltas], choice.load(), recipe,
        task=task, weights=shares or None, head=head, labels=names,
    )  # fmt: skip
    if not dry_run:
        save_delta(output, found.delta, force=force)
    if as_json:
        console.json(
            {"output": str(output), "written": not dry_run, **_values(found, recipe.settings())}
        )
    else:
        settings = ", ".join(f"{key} {value}" for key, value in recipe.settings().items())
        console.result(f"task {task} from {len(deltas)}: {settings}")
        _show(console, found)
        if not dry_run:
            console.result(f"wrote {output}")
    if found.whole:
        low = "" if found.truncations or method == "cat" else ": --rank R keeps it low rank"
        console.say(
            f"note: the result cannot share a batch with other tasks, because {len(found.whole)} of its "
            f"branches are whole weights ({found.whole[0]}{', ...' if found.whole[1:] else ''}){low}"
        )


def _values(found: Combined, settings: dict[str, str]) -> dict[str, Any]:
    """The result as JSON values."""
    delta = found.delta
    return {
        "task": delta.task,
        "labels": list(delta.labels),
        "settings": settings,
        "provenance": dict(delta.provenance),
        "tasks": [vars(share) for share in found.shares],
        "pairs": [vars(pair) for pair in found.pairs],
        "branches": len(delta.branches),
        "parameters": delta.parameters,
        "shares_batch": not found.whole,
        "whole_branches": list(found.whole),
        "truncation_error": found.error,
        "truncations": [vars(cut) for cut in found.truncations],
    }


def _show(console: Console, found: Combined) -> None:
    """The result for a person."""
    console.table(
        ("task", "weight", "tensors", "norm of its difference"),
        [(s.task, f"{s.weight:g}", s.tensors, f"{s.norm:.4g}") for s in found.shares],
    )
    if found.pairs:
        console.table(
            ("tasks", "cosine", "opposite signs"),
            [
                (
                    f"{pair.one}, {pair.other}",
                    "-" if pair.cosine is None else f"{pair.cosine:.3f}",
                    "-" if pair.conflict is None else f"{pair.conflict:.1%}",
                )
                for pair in found.pairs
            ],
        )
    if found.error is not None:
        console.table(
            ("worst tensors", "rank", "error"),
            [
                *(
                    (c.tensor, f"{c.rank} of {c.of}", f"{c.error:.2e}")
                    for c in found.truncations[:SHOWN]
                ),
                (f"all {len(found.truncations)} together", "", f"{found.error:.2e}"),
            ],
        )
