"""The LoggedModel of a run: a model that MLflow can load, serve, compare and register.

It is of the flavor `python_function`: the checkpoint, the code of the package `gpt` and the module `gpt.pyfunc`, which
loads one with the other. It holds no pickle beyond the checkpoint's tensors (`weights_only`).
"""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import requires, version
from pathlib import Path

import mlflow.pyfunc
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric, Run
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from packaging.requirements import Requirement

import gpt
from stages.runs.run_record import Record

NAME = "chargpt"
SAMPLING = {
    "max_new_tokens": DataType.long,
    "temperature": DataType.double,
    "top_k": DataType.long,
    "top_p": DataType.double,
    "min_p": DataType.double,
    "seed": DataType.long,
}
OPTIONAL = [ParamSpec(name, kind, None) for name, kind in SAMPLING.items()]  # None: the default of `gpt generate`
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string)]),
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema([*OPTIONAL, ParamSpec("stop", DataType.string, [], (-1,))]),
)
EXAMPLE = (["ROMEO:"], {"max_new_tokens": 20, "seed": 1})


def models_of(client: MlflowClient, run: Run) -> Sequence[LoggedModel]:
    """The LoggedModels of a run, the newest first."""
    return list(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"))


def log_model(client: MlflowClient, run: Run, train: Record, checkpoint: Path) -> bool:
    """Create the LoggedModel of a run, or complete it; returns whether it changed.

    Args:
        checkpoint: a file with the content of the record's checkpoint.
    """
    tag, info = "checkpoint.sha256", run.info
    model = next((model for model in models_of(client, run) if model.tags.get(tag) == train.checkpoint), None)
    if model and model.status == "READY":
        return False
    if not model:
        tags = {name: value for name, value in train.tags.items() if name.startswith("mlflow.source.")}
        tags[tag] = train.checkpoint
        model = client.create_logged_model(info.experiment_id, NAME, info.run_id, tags, train.params, "text generation")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / Path(train.checkpoint_file).name  # that in DVC's cache is named by its hash
        shutil.copyfile(checkpoint, file)
        _save_model(Path(temporary) / NAME, file)
        client.log_model_artifacts(model.model_id, str(Path(temporary) / NAME))
    client.log_outputs(info.run_id, [LoggedModelOutput(model.model_id, 0)])
    client.finalize_logged_model(model.model_id, "READY")
    return True


def link_metrics(client: MlflowClient, run: Run, records: Iterable[Record]) -> None:
    """Link the metrics of stages, and the dataset, to the run's newest LoggedModel."""
    if not (models := models_of(client, run)):
        return
    model, datasets = models[0], run.inputs.dataset_inputs if run.inputs else []
    about = {"dataset_name": datasets[0].dataset.name, "dataset_digest": datasets[0].dataset.digest} if datasets else {}
    known = {(metric.key, metric.value) for metric in model.metrics or []}
    new = [
        Metric(name, value, int(record.ended * 1000), 0, model_id=model.model_id, **about)
        for record in records
        for name, value in record.metrics.items()
        if (name, value) not in known
    ]
    if new:
        client.log_batch(run.info.run_id, metrics=new, synchronous=True)


def _save_model(folder: Path, checkpoint: Path) -> None:
    """Write the model as MLflow's folder."""
    package = Path(gpt.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / package.name
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            folder,
            loader_module="gpt.pyfunc",
            data_path=checkpoint,
            code_paths=[str(code)],
            signature=SIGNATURE,
            input_example=EXAMPLE,
            pip_requirements=_requirements(),
        )


def _requirements() -> list[str]:
    """The packages that `gpt` requires, and MLflow, in their public versions that are installed here."""
    declared = [Requirement(text) for text in requires("chargpt") or []]
    names = [requirement.name for requirement in declared if not requirement.marker]
    return [f"{name}=={version(name).partition('+')[0]}" for name in ["mlflow", *names]]
