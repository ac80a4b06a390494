//! Metrics in a real Prometheus: rules checked and tested by promtool, and every query of every dashboard on the record of a run in
//! which a rank was killed.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    Cluster, Finished, JobFile, Options, Prometheus, free_port, http,
    shipped::{Query, Row, code, dashboards, files, list, of_rules, queries, read, table, text},
    wait::{self, Seen},
    workspace, write_identities,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
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

    /// The newest value of each series of a query, by one label.
    fn newest(&self, expression: &str, label: &str) -> Result<BTreeMap<String, f64>> {
        let newest = |series: &Value| -> Result<(String, f64)> {
            let last = list(&series["values"]).last();
            let value = last.and_then(|pair| pair[1].as_str()).context("a value")?;
            Ok((text(&series["metric"], label)?.to_owned(), value.parse()?))
        };
        self.ask(expression)?.iter().map(newest).collect()
    }

    /// What the panel of recoveries shows of the one that took `total_s` seconds; none if it does not show it as it was.
    fn stages(&self, panel: &str, total_s: f64) -> Result<Result<BTreeMap<String, f64>, String>> {
        let stages = self.newest(panel, "stage")?;
        let of = |stage: &str| stages.get(stage).copied().unwrap_or(f64::NAN);
        let known = of("detect") + of("rendezvous") + of("load");
        let shown = (of("total") - total_s).abs() < 0.01 && of("load") > 0.0 && known <= total_s + 0.5;
        Ok(if shown {
            Ok(stages)
        } else {
            Err(format!("{stages:?}, {total_s} s"))
        })
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
        let submitted = Instant::now();
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
        let panel = |title: &str| {
            let name = format!("ArcFace / Recovery and checkpoints / {title}: A");
            let query = queries()?.into_iter().find(|query| query.name == name);
            query.with_context(|| format!("no panel {name}"))
        };
        let (failures, stages) = (panel("Failures by reason")?, panel("Recovery by stage")?);
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
        // The agent that reaps it and the rank that misses it both tell; the first one gives the reason.
        let reason = text(&alert["labels"], "reason")?;
        ensure!(
            alert["labels"]["job_id"] == *id
                && ["crash", "error"].contains(&reason)
                && alert["labels"]["severity"] == "info"
                && alert["annotations"]["summary"] == *format!("Job {id} lost a rank: {reason}"),
            "{alert}"
        );
        let job = cluster.wait_for_job(&id, "to train again", TRAINED, |job| {
            job["recoveries"][0]["total_s"].is_number()
        })?;
        let total_s = job["recoveries"][0]["total_s"].as_f64().context("a time")?;
        watched.wait_for("the recovery panel to show it", || {
            let series = watched.ask(&failures.expression)?;
            let shown = series.iter().any(|one| one["metric"]["reason"] == reason);
            Ok((!shown).then(|| format!("{series:?}")))
        })?;
        watched.wait_for("the recovery panel to show its stages", || {
            Ok(match watched.stages(&stages.expression, total_s)? {
                Ok(stages) => {
                    println!("the recovery: {stages:.2?} s");
                    None
                }
                Err(seen) => Some(seen),
            })
        })?;
        let spent = watched.newest(
            "sum by (kind) (arcface_job_time_seconds_total{job_id=\"$job_id\"})",
            "kind",
        )?;
        let (all_s, since_s) = (spent.values().sum::<f64>(), submitted.elapsed().as_secs_f64());
        println!("{since_s:.0} s of the job: {spent:?}");
        // Whole seconds of five kinds, a scrape and a step old.
        ensure!(
            spent.len() == 5 && (since_s - 12.0..since_s + 2.0).contains(&all_s) && spent["restart"] >= 1.0,
            "{spent:?} make {all_s} of {since_s} s"
        );
        let page = http::get(&watched.pages[0], "/metrics")?;
        let series = page
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let of_job = series
            .clone()
            .filter(|line| line.contains(&format!("job_id=\"{id}\"")));
        println!(
            "the coordinator's page: {} series, {} of them of the job, {} kB",
            series.count(),
            of_job.count(),
            page.len() / 1000
        );
        let events = fs::read_dir(cluster.scratch().join("out/watched/tensorboard"))?.count();
        ensure!(events == 2, "{events} event files of two generations");
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
