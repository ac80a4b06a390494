//! Every flag and variable that a file of `deploy/` uses exists, in the program that it is for.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Finished, command, workspace};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// What one program, or one command of it, understands.
pub struct Help {
    /// `--flag`.
    pub flags: BTreeSet<String>,
    /// `ARCFACE_..`.
    pub variables: BTreeSet<String>,
    /// Default by flag.
    pub defaults: BTreeMap<String, String>,
}

/// What `PROGRAM [COMMAND] --help` says.
pub fn help(program: &str, arguments: &[&str]) -> Result<Help> {
    let scratch = tempfile::tempdir()?;
    let mut ask = command(program, scratch.path())?;
    ask.args(arguments).arg("--help");
    let text = Finished::of(ask, Duration::from_secs(20))?.expect(0)?.stdout;
    let mut help = Help {
        flags: BTreeSet::new(),
        variables: BTreeSet::new(),
        defaults: BTreeMap::new(),
    };
    let mut last = String::new();
    for line in text.lines().map(str::trim) {
        let definition = line.strip_prefix("-").map(|_| words(line));
        if let Some(flag) = definition.and_then(|words| words.into_iter().find(|word| word.starts_with("--")))
        {
            last = flag.to_owned();
            help.flags.insert(last.clone());
        }
        if let Some(rest) = line.strip_prefix("[env: ") {
            help.variables.extend(variables(rest));
        }
        if let Some(default) = line
            .strip_prefix("[default: ")
            .and_then(|rest| rest.strip_suffix(']'))
        {
            help.defaults.insert(last.clone(), default.to_owned());
        }
    }
    ensure!(
        help.flags.contains("--help"),
        "{program} {arguments:?}: no flags in\n{text}"
    );
    Ok(help)
}

/// All commands that files of `deploy/` call.
fn everything() -> Result<Vec<Help>> {
    [
        ("arcface-coordinator", &["serve"][..]),
        ("arcface-coordinator", &["submit"]),
        ("arcface-coordinator", &["nodes"]),
        ("arcface-worker", &[]),
        ("arcface-worker", &["data", "synth"]),
    ]
    .iter()
    .map(|(program, arguments)| help(program, arguments))
    .collect()
}

/// Flags of other programs, by the file that calls these.
const FOREIGN: [(&str, &[&str]); 7] = [
    // etcd, etcdctl and wget.
    (
        "deploy/compose/compose.yaml",
        &[
            "--data-dir",
            "--listen-client-urls",
            "--advertise-client-urls",
            "--auto-compaction-mode",
            "--auto-compaction-retention",
            "--endpoints",
            "--spider",
        ],
    ),
    (
        "deploy/helm/arcface/templates/etcd.yaml",
        &[
            "--name",
            "--data-dir",
            "--listen-client-urls",
            "--advertise-client-urls",
            "--listen-peer-urls",
            "--initial-advertise-peer-urls",
            "--listen-metrics-urls",
            "--initial-cluster",
            "--initial-cluster-token",
            "--initial-cluster-state",
            "--auto-compaction-mode",
            "--auto-compaction-retention",
        ],
    ),
    ("deploy/helm/arcface/templates/NOTES.txt", &["--namespace"]),
    ("deploy/docker/coordinator.Dockerfile", BUILD_FLAGS),
    ("deploy/docker/worker.Dockerfile", BUILD_FLAGS),
    ("deploy/docker/worker-cuda.Dockerfile", BUILD_FLAGS),
    (
        "deploy/slurm/arcface.sbatch",
        &[
            "--job-name",
            "--nodes",
            "--ntasks",
            "--ntasks-per-node",
            "--cpus-per-task",
            "--time",
            "--open-mode",
            "--requeue",
            "--signal",
            "--kill-on-bad-exit",
        ],
    ),
];

/// Of docker build and run, apt, cargo, pip, useradd and HEALTHCHECK.
const BUILD_FLAGS: &[&str] = &[
    "--no-install-recommends",
    "--mount",
    "--release",
    "--locked",
    "--package",
    "--strip-debug",
    "--gid",
    "--uid",
    "--no-create-home",
    "--home-dir",
    "--shell",
    "--from",
    "--interval",
    "--timeout",
    "--start-period",
    "--retries",
    "--gpus",
    "--no-cache-dir",
    "--target",
];

/// Variables of the deployment itself: who reads them.
const OWN: [(&str, &str); 15] = [
    ("ARCFACE_VERSION", "compose.yaml"),
    ("ARCFACE_WORKERS", "compose.yaml"),
    ("ARCFACE_SHM_SIZE", "compose.yaml"),
    ("ARCFACE_PROMETHEUS_PORT", "compose.yaml"),
    ("ARCFACE_GRAFANA_PORT", "compose.yaml"),
    ("ARCFACE_GRAFANA_PASSWORD", "compose.yaml"),
    ("ARCFACE_LISTEN", "arcface-coordinator.service"),
    ("ARCFACE_METRICS", "arcface-coordinator.service"),
    ("ARCFACE_COORDINATOR_OPTIONS", "arcface-coordinator.service"),
    ("ARCFACE_WORKER_OPTIONS", "arcface-worker.service"),
    ("ARCFACE_BIN", "arcface.sbatch"),
    ("ARCFACE_DATA_ROOT", "arcface.sbatch"),
    ("ARCFACE_CACHE", "worker.Dockerfile"),
    // Of the worker, and passed on by the script.
    ("ARCFACE_OUTPUT_ROOT", "arcface.sbatch"),
    ("ARCFACE_SLOTS", "compose.yaml"),
];

/// Words of a line, without quotes, brackets and what follows an equals sign.
fn words(line: &str) -> Vec<&str> {
    line.split(|c: char| c.is_whitespace() || "\"'`[](){},;:=.".contains(c))
        .filter(|word| !word.is_empty())
        .collect()
}

/// Names that begin with `ARCFACE_`.
fn variables(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !(c.is_ascii_uppercase() || c == '_'))
        .filter(|word| word.len() > 8 && word.starts_with("ARCFACE_"))
        .map(str::to_owned)
}

/// Text files below a folder.
fn files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            files(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

/// Files of `deploy/` that call the programs, by path. Dashboards and rules have a test of their own.
fn callers() -> Result<BTreeMap<String, String>> {
    let root = workspace();
    let mut found = Vec::new();
    for folder in ["docker", "compose", "helm", "systemd", "slurm"] {
        files(&root.join("deploy").join(folder), &mut found)?;
    }
    found
        .iter()
        .map(|path| {
            let name = path.strip_prefix(&root)?.display().to_string();
            Ok((name, fs::read_to_string(path)?))
        })
        .collect()
}

/// A line that is a comment in all of these languages; commented settings (`#NAME=`) are read like others.
fn is_comment(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("# ") || line == "#"
}

#[test]
fn every_flag_exists() -> Result<()> {
    let ours: BTreeSet<String> = everything()?.into_iter().flat_map(|help| help.flags).collect();
    let mut unknown = Vec::new();
    for (path, text) in callers()? {
        let foreign = FOREIGN
            .iter()
            .find(|(file, _)| *file == path)
            .map_or(&[][..], |(_, flags)| flags);
        for line in text.lines().filter(|line| !is_comment(line)) {
            for word in words(line).into_iter().filter(|word| {
                word.starts_with("--") && word.len() > 2 && !word.starts_with("---") && *word != "--"
            }) {
                if !ours.contains(word) && !foreign.contains(&word) {
                    unknown.push(format!("{path}: {word} in {:?}", line.trim()));
                }
            }
        }
    }
    ensure!(unknown.is_empty(), "{}", unknown.join("\n"));
    Ok(())
}

/// Nothing is allowed that nobody needs.
#[test]
fn every_flag_of_another_program_is_used() -> Result<()> {
    let files = callers()?;
    for flag in FOREIGN.iter().flat_map(|(_, flags)| *flags) {
        let used = FOREIGN
            .iter()
            .filter(|(_, flags)| flags.contains(flag))
            .any(|(path, _)| {
                let text = files.get(*path).map_or("", String::as_str);
                text.lines().flat_map(words).any(|word| word == *flag)
            });
        ensure!(used, "{flag} is not used any more");
    }
    Ok(())
}

#[test]
fn every_variable_is_read_by_someone() -> Result<()> {
    let ours: BTreeSet<String> = everything()?
        .into_iter()
        .flat_map(|help| help.variables)
        .collect();
    let files = callers()?;
    let mut unknown = Vec::new();
    for (path, text) in &files {
        for name in variables(text) {
            if !ours.contains(&name) && !OWN.iter().any(|(own, _)| *own == name) {
                unknown.push(format!("{path}: {name}"));
            }
        }
    }
    for (name, reader) in OWN {
        let read = files
            .iter()
            .any(|(path, text)| path.ends_with(reader) && variables(text).any(|seen| seen == name));
        if !read {
            unknown.push(format!("{name} is not read in {reader}"));
        }
    }
    ensure!(unknown.is_empty(), "{}", unknown.join("\n"));
    Ok(())
}

/// Arguments of a container are flags of its own program, and its environment is what that program reads.
pub fn container_fits(image: &str, arguments: &[&str], environment: &[&str]) -> Result<()> {
    let (program, known) = if image.contains("arcface-coordinator") {
        (
            "arcface-coordinator",
            help("arcface-coordinator", &arguments[..1])?,
        )
    } else {
        ("arcface-worker", help("arcface-worker", &[])?)
    };
    for argument in arguments.iter().filter(|argument| argument.starts_with("--")) {
        let flag = argument.split('=').next().unwrap_or_default();
        ensure!(
            known.flags.contains(flag),
            "{program} has no {flag}: {arguments:?}"
        );
    }
    let mut variables = known.variables;
    // The commands of a person in a coordinator's container.
    variables.extend(help("arcface-coordinator", &["nodes"])?.variables);
    for name in environment.iter().filter(|name| name.starts_with("ARCFACE_")) {
        ensure!(variables.contains(*name), "{program} does not read {name}");
    }
    Ok(())
}

/// The port at the end of the default of a flag of `serve`.
pub fn default_port(flag: &str) -> Result<u16> {
    let help = help("arcface-coordinator", &["serve"])?;
    let default = help
        .defaults
        .get(flag)
        .with_context(|| format!("default of {flag}"))?;
    let (_, port) = default.rsplit_once(':').context("a port")?;
    Ok(port.parse()?)
}
