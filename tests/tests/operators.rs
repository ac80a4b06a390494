//! What is shipped for operators fits together: the documents list the metrics that there are, every alert has a runbook whose commands
//! work, dashboards are whole. What it finds in a running cluster is `monitoring.rs`.

use anyhow::{Context, Result, ensure};
use arcface_coordinator::telemetry::{METRICS, MetricKind};
use arcface_tests::{
    Finished, binary,
    shipped::{code, dashboards, files, list, of_rules, read, table, text},
    workspace,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    process::Command,
    time::Duration,
};

const CHECKED: Duration = Duration::from_secs(60);

/// Names of our metrics that a text mentions, without the endings of histograms.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':')
        .filter(|word| word.starts_with("arcface_") && !word.contains(':'))
        .map(|word| {
            let bare = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|ending| word.strip_suffix(ending));
            bare.filter(|bare| known(bare)).unwrap_or(word).to_owned()
        })
        .collect()
}

/// The table of the coordinator's metrics as it should be.
fn coordinators_table() -> String {
    let mut table = String::from("\n| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n");
    for metric in METRICS {
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram(_) => "histogram",
        };
        let labels = match metric.labels {
            [] => "-".to_owned(),
            labels => labels.join(", "),
        };
        table += &format!("| `{}` | {kind} | {labels} | {} |\n", metric.name, metric.help);
    }
    table + "\n"
}

#[test]
fn the_document_lists_the_coordinators_metrics() -> Result<()> {
    const HEADING: &str = "\n### Coordinator\n";
    let path = workspace().join("docs/monitoring.md");
    let document = read(&path)?;
    let (before, rest) = document.split_once(HEADING).context("a heading")?;
    let end = rest.find("\n#").context("a heading after it")?;
    let expected = coordinators_table();
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, format!("{before}{HEADING}{expected}{}", &rest[end + 1..]))?;
        return Ok(());
    }
    ensure!(
        rest[..=end] == expected,
        "docs/monitoring.md does not list what the coordinator exports\n\
         hint: UPDATE_EXPECT=1 cargo test -p arcface-tests --test operators the_document"
    );
    Ok(())
}

#[test]
fn rules_dashboards_and_runbooks_name_metrics_that_there_are() -> Result<()> {
    let mut known: BTreeSet<String> = METRICS.iter().map(|metric| metric.name.to_owned()).collect();
    known.extend(table("### Worker")?.into_keys());
    let recorded = of_rules("record")?;
    let mut texts = Vec::new();
    for (folder, ending) in [
        ("deploy/prometheus/rules", "yml"),
        ("deploy/prometheus/tests", "yml"),
        ("deploy/grafana/dashboards", "json"),
        ("docs/runbooks", "md"),
    ] {
        for file in files(folder, ending)? {
            texts.push((file.display().to_string(), read(&file)?));
        }
    }
    for (file, text) in texts {
        for name in metrics_in(&text) {
            ensure!(known.contains(&name), "{file}: there is no metric {name}");
        }
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':') {
            ensure!(
                !word.contains(":arcface_") || recorded.iter().any(|name| name == word),
                "{file}: no rule records {word}"
            );
        }
    }
    Ok(())
}

#[test]
fn every_alert_has_a_runbook_with_commands_that_work() -> Result<()> {
    let (alerts, pages) = (of_rules("alert")?, of_rules("runbook_url")?);
    ensure!(alerts.len() == pages.len(), "an alert without a runbook");
    for key in ["severity", "summary"] {
        ensure!(of_rules(key)?.len() == alerts.len(), "an alert without {key}");
    }
    let guide = read(&workspace().join("docs/monitoring.md"))?;
    for ((alert, page), severity) in alerts.iter().zip(&pages).zip(of_rules("severity")?) {
        let page = page.trim_start_matches("docs/");
        ensure!(
            ["critical", "warning", "info"].contains(&severity.as_str())
                && guide.contains(&format!("\n| [{alert}]({page}) | {severity} | ")),
            "docs/monitoring.md does not list {alert} as {severity} with {page}"
        );
    }
    let mut helps: BTreeMap<String, String> = BTreeMap::new();
    let mut commands = 0;
    for (alert, page) in alerts.iter().zip(&pages) {
        let text = read(&workspace().join(page))?;
        ensure!(
            text.starts_with(&format!("# {alert}\n")),
            "{page} does not open with # {alert}"
        );
        for heading in ["Meaning", "Impact", "Look", "Do", "Escalate"] {
            ensure!(
                text.contains(&format!("\n## {heading}\n")),
                "{page} has no {heading}"
            );
        }
        for line in code(&text, "sh").iter().flat_map(|block| block.lines()) {
            let mut words = line.split_whitespace();
            let (Some("arcface-coordinator"), Some(command)) = (words.next(), words.next()) else {
                continue;
            };
            commands += 1;
            if !helps.contains_key(command) {
                let mut ask = Command::new(binary("arcface-coordinator")?);
                ask.args([command, "--help"]);
                let help = Finished::of(ask, CHECKED)?
                    .expect(0)
                    .with_context(|| page.clone())?;
                helps.insert(command.to_owned(), help.stdout);
            }
            for word in words.take_while(|word| !matches!(*word, "|" | "#")) {
                ensure!(
                    !word.starts_with('-') || helps[command].contains(word),
                    "{page}: {command} has no {word}"
                );
            }
        }
    }
    ensure!(
        commands >= alerts.len(),
        "{commands} commands found in {} pages",
        alerts.len()
    );
    let named: BTreeSet<_> = pages.iter().map(|page| workspace().join(page)).collect();
    for page in files("docs/runbooks", "md")? {
        ensure!(named.contains(&page), "{} belongs to no alert", page.display());
    }
    Ok(())
}

#[test]
fn dashboards_are_what_their_script_writes_and_are_whole() -> Result<()> {
    let mut script = Command::new("python3");
    script
        .arg(workspace().join("deploy/grafana/generate.py"))
        .arg("--check");
    Finished::of(script, CHECKED)?.expect(0)?;
    let dashboards = dashboards()?;
    let mut uids = BTreeSet::new();
    for dashboard in &dashboards {
        let title = text(dashboard, "title")?;
        let uid = text(dashboard, "uid")?;
        ensure!(uids.insert(uid.to_owned()) && uid.len() <= 40, "uid {uid}");
        let variables: Vec<_> = list(&dashboard["templating"]["list"])
            .iter()
            .filter_map(|variable| variable["name"].as_str())
            .collect();
        let mut taken = BTreeSet::new();
        let mut numbers = Vec::new();
        for panel in list(&dashboard["panels"]) {
            let name = format!("{title} / {}", text(panel, "title")?);
            numbers.extend(panel["id"].as_u64());
            let description = text(panel, "description")?;
            ensure!(!description.is_empty(), "{name} has no description");
            for page in description
                .split_whitespace()
                .filter(|word| word.starts_with("docs/"))
            {
                ensure!(workspace().join(page).is_file(), "{name}: there is no {page}");
            }
            let place = |key: &str| panel["gridPos"][key].as_u64().context("a place");
            let (x, y, width, height) = (place("x")?, place("y")?, place("w")?, place("h")?);
            ensure!(x + width <= 24, "{name} sticks out");
            for cell in (x..x + width).flat_map(|x| (y..y + height).map(move |y| (x, y))) {
                ensure!(taken.insert(cell), "{name} lies on another panel");
            }
            ensure!(
                panel["fieldConfig"]["defaults"]["unit"].is_string(),
                "{name} has no unit"
            );
            for target in list(&panel["targets"]) {
                let expression = text(target, "expr")?;
                ensure!(target["datasource"]["uid"] == "${datasource}", "{name}");
                let mut used = expression.split('$').skip(1).map(|rest| {
                    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                    &rest[..end.unwrap_or(rest.len())]
                });
                let unknown = used.find(|name| !name.starts_with("__") && !variables.contains(name));
                ensure!(unknown.is_none(), "{name}: there is no variable {unknown:?}");
            }
        }
        ensure!(
            numbers == (1..=numbers.len() as u64).collect::<Vec<_>>(),
            "{title}: numbers {numbers:?}"
        );
    }
    for uid in ["overview", "job", "node", "recovery", "data", "ranks"] {
        ensure!(uids.contains(&format!("arcface-{uid}")), "no dashboard {uid}");
    }
    Ok(())
}
