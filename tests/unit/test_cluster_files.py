"""The files in cluster/: what reads them would take them. Clusters they are not tried on."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raydet.recipe import load

CLUSTER = Path(__file__).parents[2] / "cluster"
CLOUDS = ["aws", "gcp"]
MANIFESTS = ["rayjob", "raycluster"]
KUBERNETES = "1.31"
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def strict(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# The fields of KubeRay's resources, API v1, that raydet uses: a stranger among them is an error, where Kubernetes would
# drop it without a word. Templates of pods are checked by Kubernetes' own schema.
TEMPLATE = {"type": "object", "required": ["spec"]}
GROUP = {"rayStartParams": TEXTS, "template": TEMPLATE, "labels": TEXTS}
RAY_CLUSTER = strict(
    ["headGroupSpec", "rayVersion"],
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=strict(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, resources={"type": "object"}),
    authOptions=strict(["mode"], mode={"enum": ["token", "disabled"]}),
    headGroupSpec=strict(["template", "rayStartParams"], **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": strict(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            **GROUP,
        ),
    },
)
RAY_JOB = strict(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes={"const": True},  # ttlSecondsAfterFinished needs it
    ttlSecondsAfterFinished=COUNT,
    submitterPodTemplate=TEMPLATE,
    rayClusterSpec=RAY_CLUSTER,
)


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def cluster_of(name):
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name):
    spec = documents(name)[0]["spec"]
    cluster = cluster_of(name)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    return [*(group["template"] for group in groups), *submitter]


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_s_autoscaler_takes_it(name):
    content = documents(name)[0]
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(content, schema)
    validate_config(prepare_config(content))


@pytest.mark.parametrize("name", CLOUDS)
def test_data_tasks_have_nodes_without_gpus_and_the_head_stays(name):
    types = documents(name)[0]["available_node_types"]
    assert types["data"]["labels"] == {"raydet": "data"}
    assert "GPU" not in types["data"]["resources"]
    assert types["gpu"]["resources"]["GPU"] > 0
    assert types["head"]["resources"] == {"CPU": 0}
    spot = {name for name, node in types.items() if re.search("spot|preemptible", json.dumps(node["node_config"]))}
    assert spot == {"gpu", "data"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_it(name):
    content = documents(name)[0]
    assert content.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert content["apiVersion"] == "ray.io/v1"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", content["metadata"]["name"])
    jsonschema.validate(content["spec"], {"RayJob": RAY_JOB, "RayCluster": RAY_CLUSTER}[content["kind"]])


@pytest.mark.parametrize("path", [["workerGroupSpecs", 0, "maxReplica"], ["headGroupSpec", "raystartParams"], ["ray"]])
def test_a_field_that_kuberay_has_not_is_found(path):
    spec = cluster_of("raycluster")
    place = spec
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 3
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(spec, RAY_CLUSTER)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_pods_and_policies(name):
    for number, template in enumerate(pods(name)):
        metadata = {**template["metadata"], "name": f"pod-{number}"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for other in documents(name)[1:]:
        kubernetes_validate.validate(other, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_no_root_and_hold_no_keys(name):
    policy = documents(name)[1]
    for template in pods(name):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == {"allowPrivilegeEscalation": False}
            assert all("value" not in entry for entry in container.get("env", []))
    for group in cluster_of(name)["workerGroupSpecs"]:
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        assert (gpus is None) == (group.get("labels") == {"raydet": "data"})


def test_both_manifests_have_the_same_cluster():
    assert cluster_of("rayjob") == cluster_of("raycluster")


def test_the_job_s_recipe_is_one():
    spec = documents("rayjob")[0]["spec"]
    python, script, recipe, *overrides = shlex.split(spec["entrypoint"])
    assert python == "python"
    assert (CLUSTER.parent / script.removeprefix("/home/ray/raydet/")).is_file()
    settings = load(recipe, overrides)
    assert settings.scale.data_label == "raydet=data"
    shipped = documents("runtime_env")[0]["env_vars"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == shipped
    assert int(shipped["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_versions_are_those_that_were_tried():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.MULTILINE))
    assert {cluster_of(name)["rayVersion"] for name in MANIFESTS} == {pinned["ray"]}
    assert "-c constraints.txt" in (CLUSTER / "Dockerfile").read_text()


def test_the_dockerfile_is_clean_and_ends_as_no_root():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    users = re.findall(r"^USER (.*)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert users[-1] not in ("root", "0")


def test_no_file_holds_a_secret():
    keys = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:secret_access_key|password|api[_-]key)\s*[:=]\s*[\"']?\w{16,}")
    for path in CLUSTER.iterdir():
        assert not keys.search(path.read_text()), path


@pytest.mark.parametrize(
    ("script", "command"), [(path, path.stem) for path in sorted((CLUSTER.parent / "jobs").glob("*.py"))], ids=str
)
def test_a_job_runs_the_command_of_its_name(script, command, monkeypatch):
    ran = []
    monkeypatch.setattr("raydet.cli.main", lambda: ran.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", [str(script), "demo", "--help"])
    runpy.run_path(str(script), run_name="__main__")
    assert ran == [[{"predict": "batch-predict"}.get(command, command), "demo", "--help"]]
    assert f"python jobs/{script.name} " in script.read_text()
