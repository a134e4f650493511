"""The files in deploy/kubernetes/: the resources are valid, and agree with what the code reads."""

from typing import Any

import pytest
from kubeflow_trainer_api import models
from ruamel.yaml import YAML

from stages.execution import torchrun
from tests.support.common import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
KINDS = {
    "Job": models.IoK8sApiBatchV1Job,
    "Service": models.IoK8sApiCoreV1Service,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}


def documents(name: str) -> dict[str, Any]:
    """The resources in a file, by kind."""
    text = (KUBERNETES / name).read_text(encoding="utf-8")
    return {document["kind"]: document for document in YAML(typ="safe", pure=True).load_all(text)}


@pytest.mark.parametrize("name", [path.name for path in KUBERNETES.glob("*.yaml")])
def test_the_resources_are_valid(name: str) -> None:
    """A field that the model of the resource does not know gets lost on the way through it."""
    for kind, document in documents(name).items():
        assert KINDS[kind].from_dict(document).to_dict() == document


def test_the_job_describes_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = documents("job.yaml")
    job, name = found["Job"]["spec"], found["Job"]["metadata"]["name"]
    (container,) = job["template"]["spec"]["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "1"))
    group = torchrun.nodes()
    assert group.count == job["completions"] == job["parallelism"]
    domain = job["template"]["spec"]["subdomain"]
    assert domain == found["Service"]["metadata"]["name"]
    assert found["Service"]["spec"]["selector"] == {"job-name": name}
    assert group.endpoint == f"{name}-0.{domain}:29500"
    assert torchrun.training_environment(8)["PET_NPROC_PER_NODE"] == "1"
