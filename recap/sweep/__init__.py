"""`recap sweep`: search settings of captioner fine-tuning. To resume, run the same command again.

    stitch, if need be → trial-000, trial-001, … (each a fine-tuning stage with values of its own) → a table, best first

The study is an Optuna study in `runs/NAME/sweep/study.db`. What a trial tries depends on the seed, its number and the
trials before it alone, so a sweep that was stopped ends as one that was not.
"""

import dataclasses
from pathlib import Path

from recap import progress
from recap.errors import UserError
from recap.pipeline import Experiment
from recap.rundir import StageDir, lock
from recap.storage import write_json
from recap.sweep.result import line, table
from recap.sweep.search import Search
from recap.sweep.study import Study
from recap.variants import stitch


def sweep(exp: Experiment, redo: bool = False) -> None:
    """Do the trials that are not yet done, write `runs/NAME/sweep/result.json`, and print the table.

    Args:
        exp: with a `[sweep]` table and held-out images.
        redo: begin anew where the sweep was made with other settings.

    Raises:
        UserError: the table, a key of its space or the experiment is wrong, or no trial worked.
    """
    search = Search(exp)
    search.check_values()
    stitch(exp, redo)
    with lock(Path(exp.runs) / exp.name):
        search.check_effect()
        folder = search.folder()
        _begin(folder, redo)
        study = Study(folder.path / "study.db", search.config, search.metric)
        while trial := study.next():
            ended = search.attempt(trial, study, redo)
            study.tell(ended)
            write_json(str(folder.path / "result.json"), search.result(study.trials()))
            folder.log(event="trial", **dataclasses.asdict(ended))
            progress.say(f"    {line(ended, search.metric)}")
        result = search.result(study.trials())
        write_json(str(folder.path / "result.json"), result)
    print(f"\n{table(result)}\n")
    if result["best"] is None:
        raise UserError(f"sweep: no trial worked; the first: {result['trials'][0]['reason']}")
    print(f"The best is {result['best']['name']}: {result['best']['folder']}\nIts values, to paste:\n"
          f"{result['best']['overrides']}")


def _begin(folder: StageDir, redo: bool) -> None:
    """Refuse a sweep of other settings, or with `redo` delete it."""
    if folder.state() == "changed":
        if not redo:
            changes = folder.changes()
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise UserError(f"{folder.path} was made with other settings or inputs ({changes[0]}{more}): give the run "
                            "another name=…, or --redo to delete all its trials and begin anew")
        progress.say(f"    {folder.path} was made with other settings: deleted, made again")
        folder.clear()
    folder.begin()
