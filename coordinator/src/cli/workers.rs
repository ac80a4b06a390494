//! The workers of `run`: found, started beside this process, watched and stopped. Knows nothing of jobs.

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use arcface_traces::Otlp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use std::{env, future};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Time for workers to stop their ranks and end, before they are killed.
const GRACE: Duration = Duration::from_secs(10);
/// Part of a log's end that is searched for a last line, in bytes.
const LOG_END: i64 = 4096;

/// What every worker gets.
#[derive(Debug)]
pub(super) struct Plan {
    /// The executable.
    pub program: PathBuf,
    /// The coordinator.
    pub join: SocketAddr,
    /// Workers.
    pub nodes: u32,
    /// Ranks each.
    pub slots: u32,
    /// `--device`, if it was given.
    pub device: Option<String>,
    /// Address of `/metrics` of the first; each further one takes the next port.
    pub metrics: Option<SocketAddr>,
    /// Where their traces go.
    pub otlp: Otlp,
    /// Where the job file's relative paths start.
    pub directory: PathBuf,
    /// Folder for `node-K.log`.
    pub logs: PathBuf,
}

/// A worker that has ended.
pub(super) struct Ended {
    /// Its name.
    pub node: String,
    /// How.
    pub status: ExitStatus,
    /// What it wrote.
    pub log: PathBuf,
}

impl Ended {
    /// What happened, with the last thing it said.
    pub fn describe(&self) -> String {
        let last = last_line(&self.log).map_or_else(String::new, |line| format!(": {line}"));
        format!("worker {} ended ({}){last}", self.node, self.status)
    }
}

struct Worker {
    node: String,
    log: PathBuf,
    child: Child,
}

/// Workers that run. Dropped, they are killed.
pub(super) struct Workers(Vec<Worker>);

/// `arcface-worker`: what `ARCFACE_WORKER` names, else the one beside this executable.
///
/// # Errors
/// If there is none.
pub(super) fn find() -> anyhow::Result<PathBuf> {
    let path = match env::var_os("ARCFACE_WORKER") {
        Some(path) => PathBuf::from(path),
        None => env::current_exe()
            .context("find this executable")?
            .with_file_name("arcface-worker"),
    };
    if !path.is_file() {
        return Err(Failure::new(
            ExitCode::NotFound,
            format!("worker {}: no such file", path.display()),
        )
        .hint("`make build` makes both executables; ARCFACE_WORKER names a worker elsewhere")
        .into());
    }
    Ok(fs::canonicalize(&path)?)
}

impl Workers {
    /// Starts all of them.
    ///
    /// # Errors
    /// If one cannot be started; those before it are killed.
    pub fn start(plan: &Plan) -> anyhow::Result<Self> {
        // Ranks of one machine share its cores; each agent alone would take them all.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / (plan.nodes as usize * plan.slots as usize).max(1)).max(1);
        let mut workers = Self(Vec::new());
        for k in 1..=plan.nodes {
            let node = format!("node-{k}");
            let log = plan.logs.join(format!("{node}.log"));
            let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
            let mut command = Command::new(&plan.program);
            command
                .args([
                    "--join",
                    &plan.join.to_string(),
                    "--slots",
                    &plan.slots.to_string(),
                    "--node-id",
                    &node,
                    "--parent-pid",
                    &std::process::id().to_string(),
                ])
                .args(plan.otlp.arguments())
                .current_dir(&plan.directory)
                .stdin(Stdio::null())
                .stdout(file.try_clone()?)
                .stderr(file)
                .kill_on_drop(true);
            // The coordinator of `run` is on loopback, without TLS, whatever the user's own cluster has.
            for variable in ["ARCFACE_TLS_CA", "ARCFACE_TLS_CERT", "ARCFACE_TLS_KEY"] {
                command.env_remove(variable);
            }
            if let Some(device) = &plan.device {
                command.args(["--device", device]);
            }
            if let Some(mut address) = plan.metrics {
                address.set_port(address.port() + u16::try_from(k - 1).context("a worker's number")?);
                command.args(["--metrics", &address.to_string()]);
            }
            if env::var_os("OMP_NUM_THREADS").is_none() {
                command.env("OMP_NUM_THREADS", threads.to_string());
            }
            let child = command
                .spawn()
                .with_context(|| format!("start {}", plan.program.display()))?;
            workers.0.push(Worker { node, log, child });
        }
        Ok(workers)
    }

    /// Workers that have not ended.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Waits for the next one to end. Never returns when none is left.
    ///
    /// # Errors
    /// If the system cannot say.
    pub async fn next_ended(&mut self) -> std::io::Result<Ended> {
        if self.0.is_empty() {
            return future::pending().await;
        }
        let (index, status) = future::poll_fn(|context| {
            for (index, worker) in self.0.iter_mut().enumerate() {
                // `wait` may be polled anew each time: it keeps its state in the child.
                let wait = std::pin::pin!(worker.child.wait());
                if let std::task::Poll::Ready(status) = wait.poll(context) {
                    return std::task::Poll::Ready((index, status));
                }
            }
            std::task::Poll::Pending
        })
        .await;
        let Worker { node, log, .. } = self.0.remove(index);
        Ok(Ended {
            node,
            status: status?,
            log,
        })
    }

    /// Asks all to end, and kills those that do not within the grace period.
    pub async fn stop(mut self) {
        for worker in &self.0 {
            if let Some(pid) = worker.child.id().and_then(|pid| i32::try_from(pid).ok()) {
                // It may have ended by itself just now.
                let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
        }
        let all_ended = async {
            while !self.0.is_empty() {
                if self.next_ended().await.is_err() {
                    break;
                }
            }
        };
        // Those that are left are killed when they are dropped.
        let _ = timeout(GRACE, all_ended).await;
    }
}

fn last_line(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    if file.seek(SeekFrom::End(-LOG_END)).is_err() {
        file.rewind().ok()?;
    }
    let mut end = Vec::new();
    file.take(LOG_END as u64).read_to_end(&mut end).ok()?;
    let text = String::from_utf8_lossy(&end).into_owned();
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
    Some(super::output::clean(line.trim()))
}
