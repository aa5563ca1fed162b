"""The Kubernetes manifest is valid, and gives the launcher what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.cli import EPILOG

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs pip install kubernetes-validate")
yaml = pytest.importorskip("yaml", reason="needs pip install pyyaml")
pytestmark = pytest.mark.quick

MANIFEST = Path(__file__).resolve().parents[2] / "tools" / "kubernetes.yaml"


def documents() -> list[dict]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_it_is_valid(version):
    for document in documents():
        kubernetes_validate.validate(document, version, strict=True)
    broken = documents()[1]
    broken["spec"]["completionmode"] = broken["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def test_the_pods_find_each_other():
    service, job = documents()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert set(variables) - {"POWERTRAIN_LAUNCH"} <= set(EPILOG.replace(",", " ").split()), "variables of the launcher"
    name = job["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert variables["NNODES"].split(":")[1] == str(job["spec"]["parallelism"]) == str(job["spec"]["completions"])
