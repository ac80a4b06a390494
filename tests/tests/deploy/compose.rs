//! The compose file, as `docker compose config` understands it.

use crate::{
    LEAVE_S, VERSION,
    flags::container_fits,
    read,
    tools::{texts, tool, yaml},
};
use anyhow::{Context, Result, ensure};
use arcface_coordinator::spec;
use arcface_tests::workspace;
use serde_json::Value;
use std::collections::BTreeSet;

const FILE: &str = "deploy/compose/compose.yaml";

/// What Docker would do, with all profiles and the settings of `.env.example`.
fn config() -> Result<Option<Value>> {
    let arguments = [
        "docker-compose",
        "--file",
        FILE,
        "--env-file",
        "deploy/compose/.env.example",
        "--profile",
        "*",
        "config",
        "--format",
        "json",
    ];
    let Some(finished) = tool(&arguments, None)? else {
        return Ok(None);
    };
    Ok(Some(serde_json::from_str(&finished.expect(0)?.stdout)?))
}

#[test]
fn docker_compose_takes_the_file_as_it_is() -> Result<()> {
    let arguments = ["docker-compose", "--file", FILE, "config", "--quiet"];
    if let Some(finished) = tool(&arguments, None)? {
        let finished = finished.expect(0)?;
        ensure!(finished.stderr.is_empty(), "{finished:?}");
    }
    Ok(())
}

#[test]
fn services_are_hardened_and_their_files_exist() -> Result<()> {
    let Some(config) = config()? else { return Ok(()) };
    let services = config["services"].as_object().context("services")?;
    for name in [
        "etcd",
        "coordinator-1",
        "coordinator-2",
        "worker",
        "prometheus",
        "grafana",
    ] {
        let service = services.get(name).with_context(|| format!("no service {name}"))?;
        ensure!(
            !service["healthcheck"].is_null() || service["build"].is_object(),
            "{name} has no health check"
        );
    }
    for (name, service) in services {
        ensure!(service["read_only"] == true, "{name}: its root is writable");
        ensure!(texts(&service["cap_drop"]) == ["ALL"], "{name} has capabilities");
        ensure!(
            texts(&service["security_opt"]) == ["no-new-privileges:true"],
            "{name}"
        );
        let image = service["image"].as_str().context("image")?;
        ensure!(
            image.contains(':') && !image.ends_with(":latest"),
            "{name}: {image} is not pinned"
        );
        for port in service["ports"].as_array().into_iter().flatten() {
            ensure!(
                port["host_ip"] == "127.0.0.1",
                "{name}: {port} is open to everyone"
            );
        }
        for volume in service["volumes"].as_array().into_iter().flatten() {
            if volume["type"] == "bind" {
                let source = volume["source"].as_str().context("source")?;
                ensure!(
                    std::path::Path::new(source).exists(),
                    "{name}: {source} does not exist"
                );
            }
        }
        if service["build"].is_object() {
            let file = service["build"]["dockerfile"].as_str().context("dockerfile")?;
            ensure!(workspace().join(file).is_file(), "{name}: {file} does not exist");
            ensure!(image.ends_with(&format!(":{VERSION}")), "{name}: {image}");
            let environment: Vec<_> = service["environment"]
                .as_object()
                .into_iter()
                .flatten()
                .map(|(key, _)| key.as_str())
                .collect();
            container_fits(image, &texts(&service["command"]), &environment).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

#[test]
fn a_worker_has_memory_for_copies_time_to_leave_and_coordinators_to_join() -> Result<()> {
    let Some(config) = config()? else { return Ok(()) };
    let services = &config["services"];
    let worker = &services["worker"];
    let shm: u64 = worker["shm_size"].as_str().context("shm_size")?.parse()?;
    ensure!(shm >= 1 << 30, "shm_size is {shm}, Docker's own is 64 MB");
    let grace = worker["stop_grace_period"]
        .as_str()
        .context("stop_grace_period")?;
    ensure!(seconds(grace)? > LEAVE_S, "a worker is killed after {grace}");
    let join = worker["environment"]["ARCFACE_COORDINATOR"]
        .as_str()
        .context("coordinators")?;
    for address in join.split(',') {
        let (host, _) = address.split_once(':').context("HOST:PORT")?;
        let coordinator = &services[host];
        ensure!(coordinator.is_object(), "{address} is no service");
        ensure!(
            worker["depends_on"][host]["condition"] == "service_healthy",
            "worker does not wait for {host}"
        );
        ensure!(
            texts(&coordinator["command"]).contains(&address),
            "{host} does not advertise {address}"
        );
        ensure!(
            coordinator["depends_on"]["etcd"]["condition"] == "service_healthy",
            "{host}"
        );
    }
    // etcd asks nobody who they are.
    let networks: Vec<_> = services["etcd"]["networks"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, _)| name.as_str())
        .collect();
    ensure!(
        networks == ["store"] && config["networks"]["store"]["internal"] == true,
        "{networks:?}"
    );
    let networks: Vec<_> = worker["networks"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, _)| name.as_str())
        .collect();
    ensure!(networks == ["cluster"], "workers are in {networks:?}");
    Ok(())
}

/// `1m0s`, as compose writes times.
fn seconds(text: &str) -> Result<u64> {
    let (mut sum, mut number) = (0, 0);
    for c in text.chars() {
        match c {
            'h' => (sum, number) = (sum + number * 3600, 0),
            'm' => (sum, number) = (sum + number * 60, 0),
            's' => (sum, number) = (sum + number, 0),
            digit => number = number * 10 + u64::from(digit.to_digit(10).context("a time")?),
        }
    }
    Ok(sum)
}

/// The example has every setting of the file, with its default.
#[test]
fn the_example_names_every_setting() -> Result<()> {
    let file = read(FILE)?;
    let used: BTreeSet<_> = file
        .split("${")
        .skip(1)
        .filter_map(|rest| rest.split('}').next()?.split_once(":-"))
        .collect();
    let example = read("deploy/compose/.env.example")?;
    let named: BTreeSet<_> = example
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    ensure!(
        used == named,
        "compose.yaml has {used:?}\n.env.example has {named:?}"
    );
    Ok(())
}

/// The coordinators and workers under the names that dashboards and rules know.
#[test]
fn prometheus_looks_where_they_listen() -> Result<()> {
    let (Some(here), Some(plain)) = (
        yaml("deploy/compose/prometheus.yml")?,
        yaml("deploy/prometheus/prometheus.yml")?,
    ) else {
        return Ok(());
    };
    let jobs = |file: &Value| -> Vec<Value> {
        let jobs = file["scrape_configs"].as_array().into_iter().flatten();
        jobs.map(|job| job["job_name"].clone()).collect()
    };
    for name in ["arcface-coordinator", "arcface-worker"] {
        ensure!(
            jobs(&here[0]).contains(&name.into()) && jobs(&plain[0]).contains(&name.into()),
            "{name}"
        );
    }
    let configs = &here[0]["scrape_configs"];
    ensure!(
        texts(&configs[0]["static_configs"][0]["targets"]) == ["coordinator-1:9464", "coordinator-2:9464"]
    );
    ensure!(configs[1]["dns_sd_configs"][0]["port"] == 9465, "{configs}");
    Ok(())
}

#[test]
fn the_first_job_is_a_job() -> Result<()> {
    let job = spec::parse(&read("deploy/compose/jobs/first.toml")?, &[])
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    ensure!(
        job.spec.world_size == 2,
        "the example starts two workers with one slot each"
    );
    Ok(())
}
