//! The Dockerfiles.

use crate::{VERSION, flags::default_port, read, tools::tool};
use anyhow::{Context, Result, ensure};
use arcface_tests::workspace;

const DOCKERFILES: [&str; 3] = [
    "deploy/docker/coordinator.Dockerfile",
    "deploy/docker/worker.Dockerfile",
    "deploy/docker/worker-cuda.Dockerfile",
];

/// Instructions, continued lines joined, comments left out.
fn instructions(text: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        match line.strip_suffix('\\') {
            Some(part) => current.push_str(part),
            None => {
                current.push_str(line);
                if !current.trim().is_empty() {
                    all.push(current.clone());
                }
                current.clear();
            }
        }
    }
    all
}

/// The text after an instruction's name, if it is this one.
fn of<'a>(name: &str, instruction: &'a str) -> Option<&'a str> {
    instruction.strip_prefix(name)?.strip_prefix(' ').map(str::trim)
}

#[test]
fn images_are_small_pinned_and_without_root() -> Result<()> {
    let toolchain: toml::Value = toml::from_str(&read("rust-toolchain.toml")?)?;
    let channel = toolchain["toolchain"]["channel"].as_str().context("channel")?;
    for path in DOCKERFILES {
        let all = instructions(&read(path)?);
        let bases: Vec<_> = all.iter().filter_map(|line| of("FROM", line)).collect();
        ensure!(
            bases.len() == if path.contains("cuda") { 3 } else { 2 },
            "{path}: a stage that builds, one that is kept, and on GPUs one with their libraries"
        );
        for base in &bases {
            let (_, tag) = base
                .split_whitespace()
                .next()
                .and_then(|image| image.split_once(':'))
                .context("a tag")?;
            ensure!(
                tag.starts_with(|c: char| c.is_ascii_digit()),
                "{path}: {base} is not pinned"
            );
        }
        ensure!(
            bases[0].starts_with(&format!("rust:{channel}-")),
            "{path}: rust-toolchain.toml says {channel}"
        );

        let last = all
            .iter()
            .rposition(|line| of("FROM", line).is_some())
            .unwrap_or_default();
        let last = &all[last..];
        let has = |name: &str| last.iter().filter_map(|line| of(name, line)).next_back();
        let user = has("USER").with_context(|| format!("{path}: no USER"))?;
        let user: u32 = user
            .split(':')
            .next()
            .unwrap_or_default()
            .parse()
            .context("a number")?;
        ensure!(user != 0, "{path} runs as root");
        ensure!(
            has("STOPSIGNAL") == Some("SIGTERM") && has("HEALTHCHECK").is_some(),
            "{path}"
        );
        let label = format!("image.version=\"{VERSION}\"");
        ensure!(
            has("LABEL").is_some_and(|labels| labels.contains(&label)),
            "{path}: {label}"
        );
        ensure!(
            !last
                .iter()
                .any(|line| line.contains("apt-get") || line.contains("cargo ")),
            "{path}: the stage that is kept has build tools"
        );
        for sources in last.iter().filter_map(|line| of("COPY", line)) {
            ensure!(sources.starts_with("--from="), "{path}: COPY {sources}");
        }
    }
    Ok(())
}

#[test]
fn images_listen_where_everything_else_looks() -> Result<()> {
    let (grpc, metrics) = (default_port("--listen")?, default_port("--metrics")?);
    let coordinator = read(DOCKERFILES[0])?;
    for text in [
        format!("EXPOSE {grpc} {metrics}\n"),
        format!("\"--listen\", \"0.0.0.0:{grpc}\""),
        format!("\"--metrics\", \"0.0.0.0:{metrics}\""),
        format!("/dev/tcp/127.0.0.1/{metrics} "),
    ] {
        ensure!(
            coordinator.contains(&text),
            "{text:?} was expected in {}",
            DOCKERFILES[0]
        );
    }
    for path in &DOCKERFILES[1..] {
        let worker = read(path)?;
        for text in [
            "EXPOSE 9465\n",
            "ARCFACE_WORKER_METRICS=0.0.0.0:9465 ",
            "/dev/tcp/127.0.0.1/9465 ",
        ] {
            ensure!(worker.contains(text), "{text:?} was expected in {path}");
        }
    }
    let scrape = read("deploy/prometheus/prometheus.yml")?;
    ensure!(
        scrape.contains(&format!(":{metrics}")) && scrape.contains(":9465"),
        "{scrape}"
    );
    Ok(())
}

/// The executable looks for libtorch where it was at build time.
#[test]
fn the_workers_libtorch_is_where_it_was_built_against() -> Result<()> {
    let settings = read("scripts/env.sh")?;
    let folder = settings
        .split("$ARCFACE_CACHE/")
        .find_map(|rest| {
            rest.strip_prefix("libtorch-")
                .and_then(|rest| rest.split('}').next())
        })
        .context("the version in scripts/env.sh")?;
    let path = format!("/opt/arcface/libtorch-{folder}/lib");
    for (file, from) in [
        (DOCKERFILES[1], format!("--from=build {path}")),
        (DOCKERFILES[2], "--from=cuda /libraries".to_owned()),
    ] {
        let worker = read(file)?;
        ensure!(worker.contains("ENV ARCFACE_CACHE=/opt/arcface\n"));
        ensure!(
            worker.contains(&format!("COPY {from} {path}\n")),
            "{file}: {path}"
        );
    }
    let cuda = read(DOCKERFILES[2])?;
    ensure!(
        cuda.contains(&format!("torch=={folder} ")) && cuda.contains(&format!("LD_LIBRARY_PATH={path} ")),
        "the libraries are of another libtorch"
    );
    Ok(())
}

/// Everything that the build context lets in exists, and is all that a build needs.
#[test]
fn the_build_context_holds_the_sources() -> Result<()> {
    let ignore = read(".dockerignore")?;
    let allowed: Vec<_> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    for path in &allowed {
        ensure!(workspace().join(path).exists(), "{path} does not exist");
    }
    let manifest: toml::Value = toml::from_str(&read("Cargo.toml")?)?;
    let members = manifest["workspace"]["members"].as_array().context("members")?;
    for member in members.iter().filter_map(toml::Value::as_str) {
        let there = allowed
            .iter()
            .any(|path| *path == member || *path == format!("{member}/Cargo.toml"));
        ensure!(
            there,
            "cargo wants every member's manifest, and {member}'s is left out"
        );
    }
    Ok(())
}

#[test]
fn hadolint_has_nothing_to_say() -> Result<()> {
    if let Some(finished) = tool(&[&["hadolint"], &DOCKERFILES[..]].concat(), None)? {
        finished.expect(0)?;
    }
    Ok(())
}
