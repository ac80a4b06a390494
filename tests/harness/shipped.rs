//! What is shipped for operators, as files of the source tree: rules, dashboards, runbooks and the tables of metrics in
//! docs/monitoring.md. Reads and takes apart; what must be so is the tests' business.

use crate::workspace;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Files of a folder of the source tree with this ending, by name.
///
/// # Errors
/// If there are none.
pub fn files(folder: &str, ending: &str) -> Result<Vec<PathBuf>> {
    let folder = workspace().join(folder);
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
    found.sort();
    ensure!(!found.is_empty(), "no *.{ending} in {}", folder.display());
    Ok(found)
}

/// The text of a file.
///
/// # Errors
/// If it cannot be read; the message names it.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Values of a key of the rule files, in their order. The files are ours: a key and its value stand on one line.
///
/// # Errors
/// If they cannot be read.
pub fn of_rules(key: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for file in files("deploy/prometheus/rules", "yml")? {
        for line in read(&file)?.lines() {
            let line = line.trim_start().trim_start_matches("- ");
            if let Some(value) = line.strip_prefix(key).and_then(|rest| rest.strip_prefix(": ")) {
                found.push(value.to_owned());
            }
        }
    }
    Ok(found)
}

/// The dashboards.
///
/// # Errors
/// If one is not JSON.
pub fn dashboards() -> Result<Vec<Value>> {
    files("deploy/grafana/dashboards", "json")?
        .iter()
        .map(|file| serde_json::from_str(&read(file)?).with_context(|| file.display().to_string()))
        .collect()
}

/// A list, empty if it is none.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The text at a key.
///
/// # Errors
/// If there is none.
pub fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("{key:?} of {value}"))
}

/// A query of a dashboard.
pub struct Query {
    /// "dashboard / panel: letter".
    pub name: String,
    /// PromQL, with Grafana's variables.
    pub expression: String,
}

/// Queries of all dashboards, those of their annotations among them.
///
/// # Errors
/// If a dashboard is not what it should be.
pub fn queries() -> Result<Vec<Query>> {
    let mut found = Vec::new();
    for dashboard in dashboards()? {
        let title = text(&dashboard, "title")?;
        for panel in list(&dashboard["panels"]) {
            for target in list(&panel["targets"]) {
                let (panel, letter) = (text(panel, "title")?, text(target, "refId")?);
                found.push(Query {
                    name: format!("{title} / {panel}: {letter}"),
                    expression: text(target, "expr")?.to_owned(),
                });
            }
        }
        for mark in list(&dashboard["annotations"]["list"]) {
            found.push(Query {
                name: format!("{title}: mark {:?}", text(mark, "name")?),
                expression: text(mark, "expr")?.to_owned(),
            });
        }
    }
    Ok(found)
}

/// A row of a table of metrics.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Labels.
    pub labels: BTreeSet<String>,
    /// What it means.
    pub help: String,
}

/// Rows of the table under a heading of docs/monitoring.md, by the metric's name.
///
/// # Errors
/// If there is no such table.
pub fn table(heading: &str) -> Result<BTreeMap<String, Row>> {
    let document = read(&workspace().join("docs/monitoring.md"))?;
    let (_, section) = document
        .split_once(&format!("\n{heading}\n"))
        .with_context(|| format!("docs/monitoring.md has no {heading:?}"))?;
    let mut rows = BTreeMap::new();
    for line in section.lines().take_while(|line| !line.starts_with('#')) {
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [name, kind, labels, help] = cells[..] else {
            continue;
        };
        let Some(name) = name.strip_prefix('`').and_then(|name| name.strip_suffix('`')) else {
            continue;
        };
        let row = Row {
            kind: kind.to_owned(),
            labels: labels
                .split(", ")
                .filter(|label| *label != "-")
                .map(str::to_owned)
                .collect(),
            help: help.to_owned(),
        };
        ensure!(
            rows.insert(name.to_owned(), row).is_none(),
            "{name} stands there twice"
        );
    }
    ensure!(!rows.is_empty(), "no table under {heading:?}");
    Ok(rows)
}

/// Code of a document by its language: what stands between fences.
pub fn code<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    document
        .split(&fence)
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect()
}
