"""What the answers of the hosts mean: each by itself, all beside the first, and their connections."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bpt_dist.commands.check.hostfile import Host
from bpt_dist.commands.check.job import Finding
from bpt_dist.config import DistributionConfig, MeshShape

Facts = Mapping[str, Any]
SAME = {
    "sources": "copy the same version of the project to all hosts",
    "python": "use the same Python on all hosts",
    "packages": "pip install --constraint constraints.txt --editable . on all hosts",
    "backbone": "copy the backbone to the same place on all hosts, or download it on each",
}


def of_one_host(host: Host, answer: Facts, port: int) -> Iterator[Finding]:
    """Yield what is wrong with one host; one line that all is well where nothing is."""
    problems = [*_name_problems(host.name, answer), *_interface_problems(host.name, answer), *_size_problems(host, answer)]
    if not answer["marker"]:
        problems.append(
            Finding(host.name, "does not see the folder of the runs", "choose an output= on a file system all hosts share")
        )
    if answer["port_in_use"]:
        problems.append(
            Finding(host.name, f"port {port} is in use", "choose another: --master-port here, --master_port for deepspeed")
        )
    yield from problems
    if not problems:
        devices = f"{answer['gpus']} GPU(s)" if answer["gpus"] else f"{answer['cores']} cores"
        yield Finding(host.name, f"{answer['name']}, {devices} for {host.slots} slot(s), listens on {answer['gloo']}")


def _name_problems(host: str, answer: Facts) -> Iterator[Finding]:
    if "GLOO_SOCKET_IFNAME" in answer["variables"]:
        return
    remedy = "add the line GLOO_SOCKET_IFNAME=<interface> to .deepspeed_env, or correct its /etc/hosts"
    addresses = answer["own_addresses"]
    if not addresses:
        yield Finding(host, f"its own name {answer['name']} does not resolve there", remedy)
    elif ipaddress.ip_address(addresses[0].partition("%")[0]).is_loopback:
        yield Finding(host, f"its own name {answer['name']} resolves to {addresses[0]}, where no other host can reach it", remedy)


def _interface_problems(host: str, answer: Facts) -> Iterator[Finding]:
    there = answer["interfaces"]
    for variable, value in answer["variables"].items():
        exact = variable.startswith("GLOO") or value.startswith("=")
        names = value.lstrip("^=").split(",")
        missing = [] if value.startswith("^") else [
            name for name in names if not any(each == name or (not exact and each.startswith(name)) for each in there)
        ]  # fmt: skip
        if missing:
            yield Finding(host, f"{variable} names {missing[0]!r}, there are {', '.join(there)}", "correct it in .deepspeed_env")
        elif variable.startswith("GLOO") and answer["gloo"] is None:
            yield Finding(host, f"{variable} names {value!r}, which has no address", "correct it in .deepspeed_env")


def _size_problems(host: Host, answer: Facts) -> Iterator[Finding]:
    have, what = (answer["gpus"], "GPU(s)") if answer["gpus"] else (answer["cores"], "core(s)")
    if host.slots > have:
        yield Finding(host.name, f"slots={host.slots}, but it has {have} {what}", f"write slots={have} in the hostfile")


def compared(answers: Mapping[str, Facts], keys: Sequence[str] = ("sources", "python", "packages")) -> Iterator[Finding]:
    """Yield where the hosts differ from the first one."""
    if not answers:
        return
    first, *others = answers
    for key in keys:
        wrong = [_difference(key, first, answers[first].get(key), host, answers[host].get(key)) for host in others]
        missing = [host for host in answers if answers[host].get(key) is None]
        differing = [finding for finding in wrong if finding is not None]
        if missing:
            yield from (Finding(host, f"has no {key}", SAME[key]) for host in missing)
        elif differing:
            yield from differing
        else:
            shown = answers[first][key]
            text = f"{len(shown)} versions" if isinstance(shown, Mapping) else shown[:12]
            yield Finding(key, f"{text} on {len(answers)} host(s)")
    machines = [facts.get("name") for facts in answers.values()]
    for host, name in zip(answers, machines, strict=True):
        if name is not None and machines.count(name) > 1:
            yield Finding(
                host, f"calls itself {name}, as another line of the hostfile does", "name each host once, and each differently"
            )


def _difference(key: str, first: str, expected: Any, host: str, got: Any) -> Finding | None:
    if got == expected or got is None or expected is None:
        return None
    if isinstance(got, Mapping):
        names = [name for name in {**expected, **got} if got.get(name) != expected.get(name)]
        text = ", ".join(f"{name} {got.get(name, 'missing')} (on {first} {expected.get(name, 'missing')})" for name in names)
    else:
        text = f"{key} {got[:12]} (on {first} {expected[:12]})"
    return Finding(host, text, SAME[key])


def connections(reached_by: Mapping[str, Facts | None], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Yield which host could not reach which."""
    failed = 0
    for host, reached in reached_by.items():
        for peer, error in (reached or {peer: "no answer" for peer in facts if peer != host}).items():
            if error is not None:
                failed += 1
                remedy = "open all ports between the hosts: gloo and nccl choose theirs freely; the master port alone is not enough"
                yield Finding(host, f"cannot reach {peer} at {facts[peer]['gloo']} on a free port ({error})", remedy)
    pairs = sum(len(reached or ()) for reached in reached_by.values())
    if not failed and pairs:
        yield Finding("connections", f"{pairs} of {pairs} on free ports, both ways")


def world_size(distribution: DistributionConfig, slots: int) -> Finding:
    """Compare the slots with what the configuration expects."""
    expected, mesh = distribution.expect_world_size, distribution.mesh
    if isinstance(mesh, MeshShape) and mesh.particle * mesh.data != slots:
        text = f"the mesh has {mesh.particle} x {mesh.data} ranks, the hostfile {slots} slots"
        return Finding("world size", text, "change distribution.mesh or the slots")
    if expected is not None and expected != slots:
        text = f"distribution.expect_world_size is {expected}, the hostfile has {slots} slots"
        return Finding("world size", text, "change one of them")
    return Finding("world size", f"{slots}" + ("" if expected else f"; distribution.expect_world_size={slots} will be added"))
