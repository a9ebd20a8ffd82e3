"""cluster.yaml is what Ray's and EC2's own code accept, and Ray's own scheduler starts what the file's comments say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent  # type: ignore[attr-defined]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    return content


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda cluster: cluster.update(setup_comands=[]),
        lambda cluster: cluster["available_node_types"]["gpu-spot"].update(max_worker=3),
        lambda cluster: cluster["available_node_types"]["gpu-spot"]["resources"].update(GPU="one"),
        lambda cluster: cluster.update(head_node_type="haed"),
        lambda cluster: cluster["available_node_types"]["gpu-on-demand"].update(min_workers=17),
    ],
    ids=["key", "key of a node type", "resource", "name of the head", "more at least than at most"],
)
def test_ray_refuses_a_slip(cluster: dict[str, Any], break_it: Callable[[dict[str, Any]], None]) -> None:
    break_it(cluster)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(cluster))


def complaints(node_config: dict[str, Any]) -> str:
    """What EC2's published model has against a launch with this node_config; the counts are what Ray adds."""
    ec2 = botocore.session.get_session().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    assert shape is not None
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    return report.generate_report() if report.has_errors() else ""


def test_ec2_knows_every_key_of_a_launch(cluster: dict[str, Any]) -> None:
    nodes = {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}
    assert {name: complaints(config) for name, config in nodes.items()} == dict.fromkeys(nodes, "")
    nodes["gpu-spot"]["InstanceMarketOption"] = nodes["gpu-spot"].pop("InstanceMarketOptions")
    assert "InstanceMarketOption" in complaints(nodes["gpu-spot"])


def test_only_spot_workers_are_spot(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert [name for name, kind in kinds.items() if "InstanceMarketOptions" in kind["node_config"]] == ["gpu-spot"]
    assert kinds["gpu-spot"]["resources"] == kinds["gpu-on-demand"]["resources"]
    assert kinds["head"]["resources"] == {"CPU": 0}


def test_profiles_are_those_that_the_template_makes(cluster: dict[str, Any]) -> None:
    class Template(yaml.SafeLoader):
        """CloudFormation's own tags as plain values."""

    Template.add_multi_constructor("!", lambda loader, _suffix, node: loader.construct_scalar(node))
    resources = yaml.load((REPOSITORY / "deploy/aws/iam.yaml").read_text(), Loader=Template)["Resources"]
    made = {item["Properties"].get("InstanceProfileName") for item in resources.values()} - {None}
    assert made == {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in cluster["available_node_types"].values()}


def test_what_is_mounted_is_there_and_enough_to_install(cluster: dict[str, Any]) -> None:
    local = set(cluster["file_mounts"].values()) - {"~/.ray/auth_token"}
    assert [path for path in local if not (REPOSITORY / path).exists()] == []
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert {"embedding", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= local
    assert 'packages = ["embedding"]' in project


def test_it_holds_no_secret(cluster: dict[str, Any]) -> None:
    text = json.dumps(cluster)
    assert not any(word in text for word in ("AKIA", "aws_secret", "AWS_SECRET", "HF_TOKEN", "RAY_AUTH_TOKEN="))


def launches(cluster: dict[str, Any], gpus: int, monitor: CloudResourceMonitor) -> dict[str, int]:
    """What Ray's scheduler starts on an empty cluster for so many workers of one GPU."""
    config = AutoscalingConfig(prepare_config(copy.deepcopy(cluster)), skip_content_hash=True)
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * gpus),
        cloud_resource_availabilities=monitor.get_resource_availabilities(),
        recoverable_resource_availabilities=monitor.get_recoverable_resource_availabilities(),
        disable_launch_config_check=True,
    )
    return {each.instance_type: each.count for each in ResourceDemandScheduler().schedule(request).to_launch}


def failed(status: Any) -> InstanceUpdateEvent:
    return InstanceUpdateEvent(instance_id="i-1", instance_type="gpu-spot", new_instance_status=status)


def test_spot_is_taken_first_and_on_demand_when_spot_is_full(cluster: dict[str, Any]) -> None:
    at_most = cluster["available_node_types"]["gpu-spot"]["max_workers"]
    started = launches(cluster, 3, CloudResourceMonitor())
    assert (started.get("gpu-on-demand"), started.get("gpu-spot")) == (1, 2)
    assert launches(cluster, at_most + 1, CloudResourceMonitor()).get("gpu-spot") == at_most


def test_which_failures_of_spot_ray_notices(cluster: dict[str, Any]) -> None:
    """docs/clusters.md says so; when a Ray of later days also heeds a refused request, mend the page."""
    stuck, refused = CloudResourceMonitor(), CloudResourceMonitor()
    stuck.notify([failed(Instance.ALLOCATION_TIMEOUT)])
    refused.notify([failed(Instance.ALLOCATION_FAILED)])
    assert launches(cluster, 3, stuck) == {"gpu-on-demand": 3}
    assert launches(cluster, 3, refused)["gpu-spot"] == 2
