//! What operators see: metrics in a real Prometheus, rules checked and tested by promtool, every query of every dashboard on the record of
//! a run in which a rank was killed, and documents that say what is there.

use anyhow::{Context, Result, ensure};
use arcface_coordinator::telemetry::{METRICS, MetricKind};
use arcface_tests::{
    Cluster, Finished, JobFile, Options, Prometheus, binary, free_port, http,
    wait::{self, Seen},
    workspace, write_identities,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const TRAINED: Duration = Duration::from_secs(240);
/// For Prometheus to scrape what has happened and to evaluate its rules, each of them once a second.
const SEEN: Duration = Duration::from_secs(45);
const CHECKED: Duration = Duration::from_secs(180);

/// Queries that find nothing in a run of a few steps on CPUs, as "dashboard / panel: query's letter", each with its reason. One that
/// does find something fails the test: it no longer belongs here.
const WITHOUT_DATA: [(&str, &str); 1] = [(
    "ArcFace / Job / Loss scale (fp16): A",
    "the job trains in fp32: there is no loss scale",
)];

// --- files ------------------------------------------------------------------------------------------------------

/// Files of a folder of the source tree with this ending, by name.
fn files(folder: &str, ending: &str) -> Result<Vec<PathBuf>> {
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

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Values of a key of the rule files, in their order. The files are ours: a key and its value stand on one line.
fn of_rules(key: &str) -> Result<Vec<String>> {
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

fn dashboards() -> Result<Vec<Value>> {
    files("deploy/grafana/dashboards", "json")?
        .iter()
        .map(|file| serde_json::from_str(&read(file)?).with_context(|| file.display().to_string()))
        .collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("{key:?} of {value}"))
}

/// A query of a dashboard.
struct Query {
    /// "dashboard / panel: letter".
    name: String,
    expression: String,
}

/// Queries of all dashboards, those of their annotations among them.
fn queries() -> Result<Vec<Query>> {
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

// --- documents --------------------------------------------------------------------------------------------------

/// A row of a table of metrics.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    kind: String,
    labels: BTreeSet<String>,
    help: String,
}

/// Rows of the table under a heading of docs/monitoring.md, by the metric's name.
fn table(heading: &str) -> Result<BTreeMap<String, Row>> {
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
         hint: UPDATE_EXPECT=1 cargo test -p arcface-tests --test monitoring the_document"
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

/// Code of a document by its language: what stands between fences.
fn code<'a>(document: &'a str, language: &str) -> Vec<&'a str> {
    let fence = format!("```{language}\n");
    document
        .split(&fence)
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect()
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
    for uid in ["overview", "job", "node", "recovery", "data"] {
        ensure!(uids.contains(&format!("arcface-{uid}")), "no dashboard {uid}");
    }
    Ok(())
}

// --- promtool ---------------------------------------------------------------------------------------------------

#[test]
fn promtool_accepts_configuration_and_rules_and_every_alert_fires_when_it_should() -> Result<()> {
    if !Prometheus::is_installed()? {
        return Ok(());
    }
    let promtool = |arguments: &[&str], files: &[PathBuf]| -> Result<()> {
        let mut command = Command::new("promtool");
        command.args(arguments).args(files);
        Finished::of(command, CHECKED)?.expect(0)?;
        Ok(())
    };
    let tests = files("deploy/prometheus/tests", "yml")?;
    promtool(&["check", "config"], &files("deploy/prometheus", "yml")?)?;
    promtool(&["check", "rules"], &files("deploy/prometheus/rules", "yml")?)?;
    promtool(&["test", "rules"], &tests)?;
    let tested: String = tests.iter().map(|file| read(file)).collect::<Result<_>>()?;
    for alert in of_rules("alert")? {
        ensure!(
            tested.contains(&format!("alertname=\"{alert}\"")),
            "no case in deploy/prometheus/tests fires {alert}"
        );
    }
    Ok(())
}

// --- a run ------------------------------------------------------------------------------------------------------

/// The shipped configuration with the addresses of this run, everything once a second; the rules as they are.
fn configuration(coordinator: &str, workers: &[String]) -> Result<String> {
    let mut text = read(&workspace().join("deploy/prometheus/prometheus.yml"))?;
    let workers: Vec<_> = workers.iter().map(|address| format!("\"{address}\"")).collect();
    for (shipped, here) in [
        ("scrape_interval: 5s", "scrape_interval: 1s".to_owned()),
        ("scrape_timeout: 4s", "scrape_timeout: 1s".to_owned()),
        ("evaluation_interval: 15s", "evaluation_interval: 1s".to_owned()),
        (
            "- targets: [\"127.0.0.1:9464\"]",
            format!("- targets: [\"{coordinator}\"]"),
        ),
        (
            "- targets: [\"127.0.0.1:9465\"]",
            format!("- targets: [{}]", workers.join(", ")),
        ),
        (
            "- rules/*.yml",
            format!(
                "- {}/*.yml",
                workspace().join("deploy/prometheus/rules").display()
            ),
        ),
    ] {
        ensure!(
            text.matches(shipped).count() == 1,
            "prometheus.yml has no {shipped:?}"
        );
        text = text.replace(shipped, &here);
    }
    Ok(text)
}

/// A cluster that is watched, and the job that it trains.
struct Watched {
    prometheus: Prometheus,
    job: String,
    pages: Vec<String>,
}

impl Watched {
    /// Two workers that serve metrics, a Prometheus, and a job that outlives the test.
    fn start(cluster: &mut Cluster) -> Result<Self> {
        let mut workers = Vec::new();
        for node in ["node-a", "node-b"] {
            let address = free_port()?.to_string();
            cluster.start_worker_with(&["--metrics", &address, "--node-id", node])?;
            workers.push(address);
        }
        cluster.wait_for_nodes(2)?;
        let coordinator = cluster.metrics_address()?;
        let folder = cluster.scratch().join("prometheus");
        fs::create_dir(&folder)?;
        let config = folder.join("prometheus.yml");
        fs::write(&config, configuration(&coordinator, &workers)?)?;
        let prometheus = Prometheus::start(&config)?;
        write_identities(cluster.scratch(), "faces", 8, 8, 40)?;
        let job = cluster.submit(&JobFile {
            rec: "faces".into(),
            checkpoint_steps: 4,
            more: "[eval]\nverbose = 0\nval_targets = [\"synth\"]".into(),
            ..JobFile::tiny("watched").epochs(50_000)
        })?;
        workers.insert(0, coordinator);
        Ok(Self {
            prometheus,
            job,
            pages: workers,
        })
    }

    /// A query of a dashboard as Grafana would ask it.
    fn ask(&self, expression: &str) -> Result<Vec<Value>> {
        let expression = expression
            .replace("$__rate_interval", "20s")
            .replace("$__range", "10m")
            .replace("$job_id", &self.job)
            .replace("$node", "node-b");
        self.prometheus.recorded(&expression)
    }

    fn wait_for(&self, what: &str, mut look: impl FnMut() -> Result<Option<String>>) -> Result<()> {
        wait::until(what, SEEN, || {
            Ok(match look()? {
                None => Seen::Yes(()),
                Some(seen) => Seen::NotYet(seen),
            })
        })
        .with_context(|| self.prometheus.log())
    }

    /// The alert about a failed rank, if it fires.
    fn rank_failed(&self) -> Result<Option<Value>> {
        let alerts = self.prometheus.api("alerts")?;
        Ok(list(&alerts["alerts"])
            .iter()
            .find(|alert| alert["labels"]["alertname"] == "ArcfaceRankFailed" && alert["state"] == "firing")
            .cloned())
    }

    /// Panels that find nothing although they should, or something although they should not.
    fn unexpected(&self) -> Result<Vec<String>> {
        let mut unexpected = Vec::new();
        let queries = queries()?;
        for (name, _) in WITHOUT_DATA {
            ensure!(
                queries.iter().any(|query| query.name == name),
                "there is no query {name}"
            );
        }
        for Query { name, expression } in queries {
            let excused = WITHOUT_DATA.iter().any(|(excused, _)| *excused == name);
            match (self.ask(&expression)?.is_empty(), excused) {
                (true, false) => unexpected.push(format!("{name} finds nothing: {expression}")),
                (false, true) => unexpected.push(format!("{name} finds something: strike it off the list")),
                _ => {}
            }
        }
        Ok(unexpected)
    }

    /// Every rule is evaluated without an error, and those that record something do.
    fn rules_work(&self) -> Result<()> {
        let groups = self.prometheus.api("rules")?;
        let rules: Vec<_> = list(&groups["groups"])
            .iter()
            .flat_map(|group| list(&group["rules"]))
            .collect();
        let written = of_rules("alert")?.len() + of_rules("record")?.len();
        ensure!(
            rules.len() == written,
            "{} of {written} rules are loaded",
            rules.len()
        );
        for rule in rules {
            let name = text(rule, "name")?;
            ensure!(rule["health"] == "ok", "{name}: {rule}");
            if rule["type"] == "recording" {
                ensure!(
                    !self.prometheus.recorded(name)?.is_empty(),
                    "{name} records nothing"
                );
            }
        }
        Ok(())
    }

    /// What the endpoints serve is what docs/monitoring.md lists, with the same kinds, labels and words.
    fn as_documented(&self) -> Result<()> {
        let tables = [table("### Coordinator")?, table("### Worker")?];
        for (index, address) in self.pages.iter().enumerate() {
            let (served, table) = (served(&http::get(address, "/metrics")?)?, &tables[index.min(1)]);
            for (name, row) in &served {
                ensure!(
                    table.get(name) == Some(row),
                    "{name} is {row:?} at {address} and {:?} in docs/monitoring.md",
                    table.get(name)
                );
            }
            // A coordinator serves what has happened; an agent everything from the start.
            let missing: Vec<_> = table.keys().filter(|name| !served.contains_key(*name)).collect();
            ensure!(
                index == 0 || missing.is_empty(),
                "{address} does not serve {missing:?}"
            );
        }
        Ok(())
    }
}

/// Metrics of a page with their kinds, labels and words.
fn served(page: &str) -> Result<BTreeMap<String, Row>> {
    let mut metrics: BTreeMap<String, Row> = BTreeMap::new();
    let mut help = String::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map_or("", |(_, help)| help).to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            current = name.to_owned();
            let row = Row {
                kind: kind.to_owned(),
                labels: BTreeSet::new(),
                help: help.clone(),
            };
            metrics.insert(current.clone(), row);
        } else if let Some((_, labels)) = line.split_once('{') {
            let row = metrics.get_mut(&current).with_context(|| line.to_owned())?;
            let (labels, _) = labels.rsplit_once('}').with_context(|| line.to_owned())?;
            // No value of a label has a quote or an equals sign in this run.
            let names = labels.split("\",").filter_map(|label| label.split_once('='));
            row.labels
                .extend(names.map(|(name, _)| name.to_owned()).filter(|name| name != "le"));
        }
    }
    Ok(metrics)
}

/// Queries of the documents: they are to be understood by Prometheus, whatever they find.
fn documented_queries() -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut documents = files("docs/runbooks", "md")?;
    documents.push(workspace().join("docs/monitoring.md"));
    for document in documents {
        for block in code(&read(&document)?, "promql") {
            found.extend(block.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
    }
    Ok(found)
}

#[test]
fn a_killed_rank_fires_the_alert_and_every_panel_shows_something() -> Result<()> {
    if !Prometheus::is_installed()? {
        return Ok(());
    }
    let options = Options {
        workers: 0,
        ..Options::default()
    };
    Cluster::run(options, |cluster| {
        let watched = Watched::start(cluster)?;
        let id = watched.job.clone();
        cluster.wait_for_job(&id, "to be evaluated and to have a checkpoint", TRAINED, |job| {
            job["checkpoint_step"].as_u64() >= Some(4) && !list(&job["evaluations"]).is_empty()
        })?;
        watched.wait_for("Prometheus to reach everything", || {
            let up = watched.prometheus.api("query?query=up==1")?;
            Ok(Some(up.to_string()).filter(|_| list(&up["result"]).len() != 3))
        })?;
        watched.wait_for("Prometheus to know of the checkpoint", || {
            let series = watched.ask("arcface_checkpoint_last_committed_step{job_id=\"$job_id\"}")?;
            Ok(series.is_empty().then(|| "no checkpoint".into()))
        })?;
        let failures = queries()?
            .into_iter()
            .find(|query| query.name == "ArcFace / Recovery and checkpoints / Failures by reason: A")
            .context("the panel of failures")?;
        ensure!(
            watched.ask(&failures.expression)?.is_empty(),
            "nothing has failed yet"
        );
        ensure!(watched.rank_failed()?.is_none(), "nothing has failed yet");

        let ranks = cluster.rank_pids(&id)?;
        let (killed, victim) = (Instant::now(), ranks.last().context("a rank")?.1);
        cluster.signal(victim, Signal::SIGKILL)?;
        let mut alert = Value::Null;
        watched.wait_for("the alert about the failed rank", || {
            alert = watched.rank_failed()?.unwrap_or_default();
            Ok(alert.is_null().then(|| "it does not fire".into()))
        })?;
        println!(
            "rank killed -> ArcfaceRankFailed fires: {:.1} s",
            killed.elapsed().as_secs_f64()
        );
        ensure!(
            alert["labels"]["job_id"] == *id
                && alert["labels"]["reason"] == "crash"
                && alert["labels"]["severity"] == "info",
            "{alert}"
        );
        ensure!(
            alert["annotations"]["summary"] == *format!("Job {id} lost a rank: crash"),
            "{alert}"
        );
        cluster.wait_for_job(&id, "to train again", TRAINED, |job| {
            job["recoveries"][0]["total_s"].is_number()
        })?;
        watched.wait_for("the recovery panel to show it", || {
            let series = watched.ask(&failures.expression)?;
            let shown = series.iter().any(|one| one["metric"]["reason"] == "crash");
            Ok((!shown).then(|| format!("{series:?}")))
        })?;
        watched.wait_for("all panels", || {
            let unexpected = watched.unexpected()?;
            Ok((!unexpected.is_empty()).then(|| format!("\n{}", unexpected.join("\n"))))
        })?;
        watched.rules_work()?;
        watched.as_documented()?;
        for query in documented_queries()? {
            let query = query.replace("JOB", &id).replace("NODE", "node-a");
            watched.prometheus.recorded(&query)?;
        }
        println!(
            "{} queries of {} dashboards, {} of them without data as expected; {} rules",
            queries()?.len(),
            dashboards()?.len(),
            WITHOUT_DATA.len(),
            of_rules("alert")?.len() + of_rules("record")?.len(),
        );
        cluster.json(&["cancel", &id])?;
        Ok(())
    })
}
