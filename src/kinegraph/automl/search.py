"""The automl action: a study of many trainings, the best of them kept."""

from __future__ import annotations

from kinegraph.automl.definition import check_definition
from kinegraph.automl.finish import finish_study
from kinegraph.automl.progress import open_table, show_study
from kinegraph.automl.study import open_study, run_trials
from kinegraph.automl.workers import WorkerPool, choose_environments
from kinegraph.run import Result, Run
from kinegraph.spec import Spec


def search(spec: Spec, run: Run) -> Result:
    """Search for better options. Run again in the same folder, it goes on where it stopped.

    Raises UserError for a spec that cannot be searched, KinegraphError if no trial ends well.
    """
    if spec.automl.engine == "ray":
        from kinegraph.automl.ray_engine import search_with_ray

        return search_with_ray(spec, run)
    study = open_study(spec, run)
    check_definition(run)
    run.write_experiment()
    with WorkerPool(run.folder / "logs", choose_environments(spec, run.origins)) as pool:
        with open_table(study) as table:
            run_trials(study, pool, lambda: show_study(study, table))
            show_study(study, table)
        return finish_study(study, pool)
