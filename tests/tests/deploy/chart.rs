//! The Helm chart, as `helm template` renders it with different values.

use crate::{
    LEAVE_S, VERSION,
    flags::container_fits,
    read,
    tools::{texts, tool},
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const CHART: &str = "deploy/helm/arcface";

/// The oldest version of Kubernetes that the chart takes, and the newest with schemas.
const KUBERNETES: [&str; 2] = ["1.27", "1.35"];

/// Values that turn on every part at least once.
const VARIANTS: [&str; 5] = [
    "coordinator.replicas=2",
    "worker.kind=DaemonSet,worker.data.existingClaim=faces,worker.output.existingClaim=runs",
    "etcd.enabled=false,etcd.externalUrls={http://e1:2379,http://e2:2479}",
    "serviceMonitor.enabled=true,prometheusRule.enabled=true,dashboards.enabled=true,etcd.replicas=1",
    "networkPolicy.enabled=false,image.repository=registry.example.com/team,image.tag=v7,worker.leaveSeconds=90",
];

/// The manifests with these values, compared with the schemas of Kubernetes' API.
fn manifests(values: &str) -> Result<Option<Vec<Value>>> {
    let render = [
        "helm",
        "template",
        "release",
        CHART,
        "--namespace",
        "faces",
        "--set",
        values,
    ];
    let Some(rendered) = tool(&render, None)? else {
        return Ok(None);
    };
    let rendered = rendered.expect(0)?.stdout;
    let mut manifests = Vec::new();
    for version in KUBERNETES {
        let check = [
            "python3",
            "-s",
            "tests/python/deploy_yaml.py",
            "kubernetes",
            version,
        ];
        let Some(checked) = tool(&check, Some(&rendered))? else {
            return Ok(None);
        };
        manifests = serde_json::from_str(&checked.expect(0)?.stdout)?;
    }
    Ok(Some(manifests))
}

fn find<'a>(manifests: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let wanted = |manifest: &&Value| manifest["kind"] == kind && manifest["metadata"]["name"] == name;
    manifests
        .iter()
        .find(wanted)
        .with_context(|| format!("no {kind} {name}"))
}

/// The value of a container's variable.
fn variable<'a>(container: &'a Value, name: &str) -> &'a Value {
    let variables = container["env"].as_array().into_iter().flatten();
    variables
        .into_iter()
        .find(|variable| variable["name"] == name)
        .map_or(&Value::Null, |variable| &variable["value"])
}

#[test]
fn helm_lint_has_nothing_to_say() -> Result<()> {
    if let Some(finished) = tool(&["helm", "lint", "--strict", CHART], None)? {
        finished.expect(0)?;
    }
    Ok(())
}

#[test]
fn every_pod_is_restricted_and_calls_its_program_rightly() -> Result<()> {
    for values in VARIANTS {
        let Some(manifests) = manifests(values)? else {
            return Ok(());
        };
        let mut pods = 0;
        for manifest in &manifests {
            let pod = &manifest["spec"]["template"]["spec"];
            if !pod.is_object() {
                continue;
            }
            pods += 1;
            let name = format!("{values}: {}", manifest["metadata"]["name"]);
            let security = &pod["securityContext"];
            ensure!(
                security["runAsNonRoot"] == true && security["runAsUser"] == 10001,
                "{name}"
            );
            ensure!(security["seccompProfile"]["type"] == "RuntimeDefault", "{name}");
            ensure!(pod["automountServiceAccountToken"] == false, "{name}");
            for container in pod["containers"].as_array().context("containers")? {
                let security = &container["securityContext"];
                ensure!(security["readOnlyRootFilesystem"] == true, "{name}");
                ensure!(security["allowPrivilegeEscalation"] == false, "{name}");
                ensure!(texts(&security["capabilities"]["drop"]) == ["ALL"], "{name}");
                ensure!(!container["readinessProbe"].is_null(), "{name}");
                ensure!(!container["resources"]["limits"]["memory"].is_null(), "{name}");
                let image = container["image"].as_str().context("image")?;
                if image.contains("arcface-") {
                    let environment = container["env"].as_array().into_iter().flatten();
                    let environment: Vec<_> = environment
                        .filter_map(|variable| variable["name"].as_str())
                        .collect();
                    container_fits(image, &texts(&container["args"]), &environment)
                        .with_context(|| name.clone())?;
                }
            }
            let component =
                &manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"];
            let policed = manifests.iter().any(|other| {
                other["kind"] == "NetworkPolicy"
                    && other["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
                        == *component
            });
            ensure!(
                policed != values.contains("networkPolicy.enabled=false"),
                "{name}: a network policy"
            );
        }
        ensure!(
            pods == if values.contains("etcd.enabled=false") {
                2
            } else {
                3
            },
            "{values}: {pods}"
        );
    }
    Ok(())
}

#[test]
fn workers_join_the_names_that_coordinators_have() -> Result<()> {
    let Some(manifests) = manifests("coordinator.replicas=3")? else {
        return Ok(());
    };
    let coordinator = find(&manifests, "StatefulSet", "release-arcface-coordinator")?;
    let service = coordinator["spec"]["serviceName"].as_str().context("service")?;
    let headless = find(&manifests, "Service", service)?;
    ensure!(headless["spec"]["clusterIP"] == "None" && headless["spec"]["publishNotReadyAddresses"] == true);
    let expected: Vec<_> = (0..3)
        .map(|i| format!("release-arcface-coordinator-{i}.{service}:1234"))
        .collect();
    let worker = find(&manifests, "StatefulSet", "release-arcface-worker")?;
    let join = variable(
        &worker["spec"]["template"]["spec"]["containers"][0],
        "ARCFACE_COORDINATOR",
    );
    ensure!(*join == expected.join(","), "{join}");
    let container = &coordinator["spec"]["template"]["spec"]["containers"][0];
    let advertise = format!("--advertise=$(POD_NAME).{service}:1234");
    ensure!(
        texts(&container["args"]).contains(&advertise.as_str()),
        "{container}"
    );
    // etcd's members, likewise; a prefix of their own for every release.
    let store = variable(container, "ARCFACE_STORE").as_str().context("store")?;
    let members = (0..3).map(|i| format!("http://release-arcface-etcd-{i}.release-arcface-etcd:2379"));
    let members: Vec<_> = members.collect();
    ensure!(
        store == format!("etcd:{}/faces/release", members.join(",")),
        "{store}"
    );
    Ok(())
}

#[test]
fn workers_have_memory_for_copies_and_time_to_leave() -> Result<()> {
    for (values, leave) in [("worker.replicas=4", 20), (VARIANTS[4], 90)] {
        let Some(manifests) = manifests(values)? else {
            return Ok(());
        };
        let worker = find(&manifests, "StatefulSet", "release-arcface-worker")?;
        let pod = &worker["spec"]["template"]["spec"];
        let grace = pod["terminationGracePeriodSeconds"].as_u64().context("grace")?;
        ensure!(grace > leave + LEAVE_S - 20, "{values}: killed after {grace} s");
        let container = &pod["containers"][0];
        ensure!(
            *variable(container, "ARCFACE_LEAVE") == format!("{leave}s"),
            "{values}"
        );
        let mounts = container["volumeMounts"].as_array().context("mounts")?;
        let memory = mounts
            .iter()
            .find(|mount| mount["mountPath"] == "/dev/shm")
            .context("/dev/shm")?;
        let volumes = pod["volumes"].as_array().context("volumes")?;
        let volume = volumes
            .iter()
            .find(|volume| volume["name"] == memory["name"])
            .context("a volume")?;
        ensure!(volume["emptyDir"]["medium"] == "Memory", "{volume}");
    }
    Ok(())
}

#[test]
fn policies_let_in_who_has_business_there() -> Result<()> {
    let Some(manifests) = manifests(VARIANTS[0])? else {
        return Ok(());
    };
    // Who may reach which ports of whom; nobody else may.
    for (whom, port, who) in [
        ("coordinator", 1234, "worker"),
        ("worker", 1024, "worker"),
        ("etcd", 2379, "coordinator"),
        ("etcd", 2380, "etcd"),
    ] {
        let policy = find(&manifests, "NetworkPolicy", &format!("release-arcface-{whom}"))?;
        let other = find(&manifests, "NetworkPolicy", &format!("release-arcface-{who}"))?;
        let allows = |rules: &Value, peers: &str, component: &str| {
            rules.as_array().into_iter().flatten().any(|rule| {
                let ports = rule["ports"].as_array().into_iter().flatten();
                let from = rule[peers].as_array().into_iter().flatten();
                let mut from =
                    from.map(|peer| &peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]);
                ports.into_iter().any(|allowed| allowed["port"] == port) && from.any(|seen| seen == component)
            })
        };
        ensure!(
            allows(&policy["spec"]["ingress"], "from", who),
            "{whom}:{port} refuses {who}"
        );
        ensure!(
            allows(&other["spec"]["egress"], "to", whom),
            "{who} cannot call {whom}:{port}"
        );
    }
    let etcd = find(&manifests, "NetworkPolicy", "release-arcface-etcd")?;
    ensure!(
        !etcd["spec"]["ingress"].to_string().contains("\"worker\""),
        "workers reach etcd"
    );
    Ok(())
}

#[test]
fn wrong_values_are_refused() -> Result<()> {
    for (values, about) in [
        ("worker.replica=3", "'replica' not allowed"),
        ("coordinator.replicas=two", "want integer"),
        ("worker.kind=Deployment", "StatefulSet"),
        ("worker.sharedMemory=lots", "does not match"),
        ("etcd.replicas=2", "1, 3, 5"),
        ("etcd.enabled=false", "minItems"),
        ("etcd.externalUrls={http://e1:2379}", "maxItems"),
        (
            "etcd.enabled=false,etcd.externalUrls={https://e1:2379}",
            "does not match",
        ),
    ] {
        let render = ["helm", "template", "release", CHART, "--set", values];
        let Some(finished) = tool(&render, None)? else {
            return Ok(());
        };
        ensure!(
            finished.code != 0 && finished.stderr.contains(about),
            "{values}: {finished:?}"
        );
    }
    Ok(())
}

#[test]
fn the_chart_is_for_this_version() -> Result<()> {
    let chart = read(&format!("{CHART}/Chart.yaml"))?;
    ensure!(chart.contains(&format!("\nappVersion: {VERSION}\n")), "{chart}");
    ensure!(chart.contains(KUBERNETES[0]), "{chart}");
    // Rules and dashboards are those of deploy/, not copies.
    for (link, folder) in [
        ("rules", "deploy/prometheus/rules"),
        ("dashboards", "deploy/grafana/dashboards"),
    ] {
        let found = arcface_tests::workspace()
            .join(CHART)
            .join("files")
            .join(link)
            .canonicalize()?;
        ensure!(
            found == arcface_tests::workspace().join(folder).canonicalize()?,
            "{}",
            found.display()
        );
    }
    Ok(())
}
