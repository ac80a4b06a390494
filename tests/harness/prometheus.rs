//! A Prometheus of its own for a test, on a free port, with its data in a scratch directory; killed when it is dropped.

use crate::{
    Process, etcd, http,
    wait::{self, Seen},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    env,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// For a server to come up on a machine that compiles beside it.
const START: Duration = Duration::from_secs(30);

/// A server that runs.
pub struct Prometheus {
    process: Process,
    address: String,
    started: f64,
}

impl Prometheus {
    /// Whether Prometheus and its promtool are installed. That they are not is said on standard error.
    ///
    /// # Errors
    /// If they are missing in CI.
    pub fn is_installed() -> Result<bool> {
        let answers = |program| {
            let mut command = Command::new(program);
            command
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.status().is_ok()
        };
        if answers("prometheus") && answers("promtool") {
            return Ok(true);
        }
        let missing = "no Prometheus is installed (apt: prometheus, or run scripts/setup.sh prometheus)";
        if env::var_os("CI").is_some() {
            bail!("{missing}");
        }
        eprintln!("SKIPPED: {missing}");
        Ok(false)
    }

    /// Starts it with a configuration, in whose folder it keeps its data, and waits until it answers.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(config: &Path) -> Result<Self> {
        let folder = config.parent().context("a folder of the configuration")?;
        let address = etcd::free_port()?.to_string();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null());
        let mut process = Process::start("prometheus", &folder.join("logs"), command)?;
        wait::until("Prometheus to answer", START, || {
            if let Some(status) = process.ended()? {
                bail!("Prometheus ended ({status}): {}", process.output());
            }
            Ok(match http::get(&address, "/-/ready") {
                Ok(_) => Seen::Yes(()),
                Err(error) => Seen::NotYet(format!("{error:#}")),
            })
        })?;
        Ok(Self {
            process,
            address,
            started: now()?,
        })
    }

    /// What it logged, for the message of a test that fails.
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// The `data` of an answer of its API.
    ///
    /// # Errors
    /// If it refuses the question.
    pub fn api(&self, path: &str) -> Result<Value> {
        let body = http::get(&self.address, &format!("/api/v1/{path}"))?;
        let mut answer: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        ensure!(answer["status"] == "success", "{path}: {body}");
        Ok(answer["data"].take())
    }

    /// A query at every second since the server started: series with their labels in `metric` and their `values`, those left out
    /// that never have a (finite) number.
    ///
    /// # Errors
    /// If it is not a query.
    pub fn recorded(&self, query: &str) -> Result<Vec<Value>> {
        let path = format!(
            "query_range?query={}&start={}&end={}&step=1",
            http::quoted(query),
            self.started,
            now()?
        );
        let data = self.api(&path).with_context(|| format!("query {query}"))?;
        let has_number = |series: &Value| {
            let values = series["values"].as_array().map_or(&[][..], Vec::as_slice);
            values.iter().any(|pair| {
                let number = pair[1].as_str().and_then(|text| text.parse::<f64>().ok());
                number.is_some_and(f64::is_finite)
            })
        };
        let series = data["result"].as_array().context("a list of series")?;
        Ok(series
            .iter()
            .filter(|series| has_number(series))
            .cloned()
            .collect())
    }
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64())
}
