//! What the lock file brings in: allowed licences, one source, one version of the crates whose types cross crate
//! borders, and a coordinator that builds without libtorch.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

/// Licences that ask for no more than their notice.
const LICENCES: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Two versions of one of these give "expected Status, found Status", or two runtimes in one process.
const ONE_VERSION: [&str; 10] = [
    "tonic",
    "axum",
    "prost",
    "tokio",
    "hyper",
    "h2",
    "http",
    "tower",
    "metrics",
    "tracing-core",
];

struct Metadata {
    packages: Vec<Value>,
    nodes: Vec<Value>,
}

fn metadata() -> Result<Metadata> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(arcface_tests::workspace())
        .output()
        .context("run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let all: Value = serde_json::from_slice(&output.stdout)?;
    let list = |value: &Value| value.as_array().cloned().context("a list from cargo metadata");
    Ok(Metadata {
        packages: list(&all["packages"])?,
        nodes: list(&all["resolve"]["nodes"])?,
    })
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// True if a licence expression can be met with [`LICENCES`]: an `OR` needs one side, an `AND` both.
fn allowed(expression: &str) -> bool {
    let expression = expression.trim();
    if let Some((left, right)) = split(expression, &[" OR ", "/"]) {
        return allowed(left) || allowed(right);
    }
    if let Some((left, right)) = split(expression, &[" AND "]) {
        return allowed(left) && allowed(right);
    }
    match expression
        .strip_prefix('(')
        .and_then(|inner| inner.strip_suffix(')'))
    {
        Some(inner) => allowed(inner),
        None => LICENCES.contains(&expression),
    }
}

/// Splits at the first operator that is not inside parentheses.
fn split<'a>(expression: &'a str, operators: &[&str]) -> Option<(&'a str, &'a str)> {
    let mut depth = 0;
    for (at, c) in expression.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        let rest = &expression[at..];
        let operator = operators.iter().find(|operator| rest.starts_with(**operator));
        if let (0, Some(operator)) = (depth, operator) {
            return Some((&expression[..at], &rest[operator.len()..]));
        }
    }
    None
}

#[test]
fn licences_and_sources_are_allowed() -> Result<()> {
    let mut wrong = Vec::new();
    let packages = metadata()?.packages;
    for package in &packages {
        let name = format!("{} {}", text(package, "name"), text(package, "version"));
        if !allowed(text(package, "license")) {
            wrong.push(format!("{name}: licence {:?} is not allowed", package["license"]));
        }
        // Ours have no source. A git dependency can change or vanish under a lock file's feet.
        let source = text(package, "source");
        if !source.is_empty() && !source.starts_with("registry+") {
            wrong.push(format!("{name}: comes from {source}, not from the registry"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    ensure!(packages.len() > 50, "only {} packages", packages.len());
    Ok(())
}

#[test]
fn crates_that_cross_borders_have_one_version() -> Result<()> {
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata()?.packages {
        let name = text(&package, "name").to_owned();
        versions
            .entry(name)
            .or_default()
            .insert(text(&package, "version").to_owned());
    }
    for name in ONE_VERSION {
        let found = versions
            .get(name)
            .with_context(|| format!("{name} is not used any more"))?;
        ensure!(found.len() == 1, "{name} has several versions: {found:?}");
    }
    Ok(())
}

/// Names of everything that a crate of ours is built with.
fn closure(metadata: &Metadata, name: &str) -> Result<BTreeSet<String>> {
    let names: BTreeMap<&str, &str> = metadata
        .packages
        .iter()
        .map(|package| (text(package, "id"), text(package, "name")))
        .collect();
    let edges: BTreeMap<&str, &Value> = metadata
        .nodes
        .iter()
        .map(|node| (text(node, "id"), &node["dependencies"]))
        .collect();
    let root = names
        .iter()
        .find(|(_, n)| **n == name)
        .context("find the crate")?;
    let mut seen = BTreeSet::new();
    let mut next = vec![*root.0];
    while let Some(id) = next.pop() {
        if seen.insert(id) {
            let dependencies = edges.get(id).and_then(|list| list.as_array());
            next.extend(dependencies.into_iter().flatten().filter_map(Value::as_str));
        }
    }
    Ok(seen
        .iter()
        .filter_map(|id| Some((*names.get(id)?).to_owned()))
        .collect())
}

#[test]
fn only_the_worker_links_libtorch_and_knows_cuda() -> Result<()> {
    let metadata = metadata()?;
    for name in ["arcface-proto", "arcface-coordinator", "arcface-tests"] {
        let tensors: Vec<_> = closure(&metadata, name)?
            .into_iter()
            .filter(|dependency| {
                matches!(
                    dependency.as_str(),
                    "tch" | "torch-sys" | "arcface-worker" | "cudarc" | "nvml-wrapper"
                )
            })
            .collect();
        ensure!(
            tensors.is_empty(),
            "{name} depends on {tensors:?}: it must install where there is no libtorch"
        );
    }
    ensure!(
        closure(&metadata, "arcface-worker")?.contains("tch"),
        "the check does not see the worker's tch"
    );
    Ok(())
}

#[test]
fn licence_expressions_are_read_right() {
    for good in [
        "MIT",
        "GPL-3.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR GPL-2.0) AND Unicode-3.0",
    ] {
        assert!(allowed(good), "{good}");
    }
    for bad in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "(MIT OR Apache-2.0) AND GPL-3.0",
    ] {
        assert!(!allowed(bad), "{bad}");
    }
}
