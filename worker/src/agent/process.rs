//! One rank process: started in its own process group with the assignment on standard input, its standard error
//! forwarded line by line, killed as a group, reaped once.

use super::route::{interfaces, nccl_network};
use super::table::{ExitFacts, RankKey};
use crate::progress::{Progress, Shared};
use crate::{device, paths};
use anyhow::Context;
use arcface_proto::v1::RankAssignment;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, watch};
use tracing::{Level, info, warn};

/// Longest line of standard error that is forwarded whole; longer ones are cut into several.
const LONGEST_LINE: u64 = 16 * 1024;
/// Longest last error that is reported.
const LONGEST_ERROR: usize = 4096;
/// How long the pipe of a dead process may stay open (a child of its own) before its exit is reported anyway.
const LATE_OUTPUT: Duration = Duration::from_secs(1);

/// The command that is one rank. Added are `--parent-pid PID`, so that the process can end with its agent, and
/// `--progress`: standard output is the memory where it shows its [`Progress`].
#[derive(Clone, Debug)]
pub struct RankCommand {
    /// Program.
    pub program: PathBuf,
    /// Arguments before ours.
    pub args: Vec<OsString>,
    /// Its compute threads; `None`: an equal share of the cores.
    pub threads: Option<u32>,
}

impl RankCommand {
    /// This executable's own `rank` subcommand.
    ///
    /// # Errors
    /// If the executable's path cannot be read.
    pub fn of_this_executable() -> anyhow::Result<Self> {
        Ok(Self {
            program: std::env::current_exe().context("find this executable")?,
            args: vec!["rank".into()],
            threads: None,
        })
    }
}

/// A process that was started and not yet reaped.
#[derive(Debug)]
pub struct RankProcess {
    /// Process id, also of its group.
    pub pid: u32,
    kill: watch::Sender<Option<Duration>>,
    board: Shared,
}

impl RankProcess {
    /// What it does, by its own account.
    pub fn progress(&self) -> Option<Progress> {
        self.board.read()
    }

    /// True if a signal has stopped it, or a debugger.
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // pid (name) state ...: the name may hold anything, also parentheses.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        matches!(state, Some('T' | 't'))
    }

    /// Ends the process group: SIGTERM, and SIGKILL when the grace has passed. A later call can only shorten it.
    pub fn kill(&self, grace: Duration) {
        self.kill.send_if_modified(|wanted| {
            let shorter = wanted.is_none_or(|old| grace < old);
            if shorter {
                *wanted = Some(grace);
            }
            shorter
        });
    }
}

/// Environment of a rank: its compute threads, the GPU that is its own, and, unless the agent's own sets the variable, how threads wait:
/// spinning OpenMP threads made a step up to 20 times slower beside busy neighbours. On GPUs also the network that NCCL uses.
fn environment(
    command: &RankCommand,
    assignment: &RankAssignment,
    gpu: Option<&str>,
) -> Vec<(&'static str, String)> {
    let threads = match command.threads {
        Some(told) => told as usize,
        None => device::threads_per_rank(device::cores(), assignment.local_world_size),
    };
    let network = match assignment.device.as_str() {
        "cuda" => nccl_network(&assignment.address, &interfaces()),
        _ => Vec::new(),
    };
    let usual = std::iter::once(("OMP_WAIT_POLICY", "passive".into()))
        .chain(network)
        .filter(|(name, _)| std::env::var_os(name).is_none());
    // Whatever the agent was started with: that is one number for all of a node's ranks together, if it is meant at all.
    std::iter::once((device::THREADS_VARIABLE, threads.to_string()))
        .chain(gpu.map(|uuid| (device::VISIBLE_VARIABLE, uuid.to_owned())))
        .chain(usual)
        .collect()
}

/// Starts a rank, which sees the GPU of this uuid and no other. Its end arrives on `exits`.
///
/// Call it on a thread that lives as long as the agent (the main one): the kernel sends the parent-death signal
/// when the *thread* that started the process ends.
///
/// # Errors
/// If the process cannot be started.
pub fn spawn(
    command: &RankCommand,
    key: &RankKey,
    assignment: &RankAssignment,
    gpu: Option<&str>,
    exits: mpsc::Sender<(RankKey, ExitFacts)>,
) -> anyhow::Result<RankProcess> {
    let input = serde_json::to_vec(assignment).context("encode the assignment")?;
    let board = Shared::new().context("make the memory of its progress")?;
    let output = board.for_rank().context("share the memory of its progress")?;
    let mut child = Command::new(&command.program)
        .args(&command.args)
        .arg("--parent-pid")
        .arg(std::process::id().to_string())
        .arg("--progress")
        .envs(environment(command, assignment, gpu))
        .stdin(Stdio::piped())
        .stdout(output)
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", command.program.display()))?;
    let pid = child.id().context("the process ended before it began")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A process that dies before it has read its assignment is reported by its exit, not here.
        tokio::spawn(async move {
            let _gone_already = stdin.write_all(&input).await;
        });
    }
    let (kill, kill_wanted) = watch::channel(None);
    let log_path = paths::output_directory(
        &assignment.output_root,
        assignment
            .spec
            .as_ref()
            .and_then(|spec| spec.output.as_deref())
            .unwrap_or(""),
    )
    .ok()
    .map(|output| output.join(format!("rank-{}.log", key.rank)));
    tokio::spawn(supervise(child, pid, key.clone(), kill_wanted, log_path, exits));
    Ok(RankProcess { pid, kill, board })
}

/// Owns the process until it is reaped; only this task signals it, so a recycled process id is never hit.
async fn supervise(
    mut child: Child,
    pid: u32,
    key: RankKey,
    kill_wanted: watch::Receiver<Option<Duration>>,
    log_path: Option<PathBuf>,
    exits: mpsc::Sender<(RankKey, ExitFacts)>,
) {
    let stderr = child.stderr.take();
    let mut output = tokio::spawn(forward(stderr, pid, key.clone(), log_path));
    let signalled = AtomicBool::new(false);
    let status = tokio::select! {
        biased;
        status = child.wait() => Some(status),
        () = kill_when_wanted(pid, kill_wanted, &signalled) => None,
    };
    let by_itself = !signalled.into_inner();
    let status = match status {
        Some(status) => status,
        None => child.wait().await,
    };
    let last_error = match tokio::time::timeout(LATE_OUTPUT, &mut output).await {
        Ok(line) => line.unwrap_or_default(),
        Err(_) => {
            output.abort();
            String::new()
        }
    };
    let facts = match status {
        Ok(status) => ExitFacts {
            pid,
            exit_code: status.code(),
            signal: status.signal(),
            last_error,
            by_itself,
        },
        Err(error) => ExitFacts {
            pid,
            exit_code: None,
            signal: None,
            last_error: format!("cannot wait for process {pid}: {error}"),
            by_itself,
        },
    };
    // The receiver is gone only when the agent itself ends.
    let _agent_ended = exits.send((key, facts)).await;
}

/// Sends the signals that [`RankProcess::kill`] asks for, which it notes first; returns after SIGKILL.
async fn kill_when_wanted(pid: u32, mut wanted: watch::Receiver<Option<Duration>>, signalled: &AtomicBool) {
    let group = Pid::from_raw(pid as i32);
    let Some(mut grace) = next_wish(&mut wanted).await else {
        return std::future::pending().await;
    };
    signalled.store(true, Ordering::Relaxed);
    if !grace.is_zero() {
        send(group, Signal::SIGTERM);
    }
    let asked = tokio::time::Instant::now();
    while !grace.is_zero() {
        tokio::select! {
            () = tokio::time::sleep_until(asked + grace) => break,
            shorter = next_wish(&mut wanted) => grace = shorter.unwrap_or(Duration::ZERO),
        }
    }
    send(group, Signal::SIGKILL);
}

/// The next grace that was asked for; `None` when nobody can ask any more.
async fn next_wish(wanted: &mut watch::Receiver<Option<Duration>>) -> Option<Duration> {
    loop {
        wanted.changed().await.ok()?;
        if let Some(grace) = *wanted.borrow_and_update() {
            return Some(grace);
        }
    }
}

fn send(group: Pid, signal: Signal) {
    if let Err(error) = killpg(group, signal) {
        warn!(pid = group.as_raw(), %signal, %error, "cannot signal the rank");
    }
}

/// Copies standard error to our log and to the job's `rank-<r>.log`; returns the line that says best why it ended.
async fn forward(stderr: Option<ChildStderr>, pid: u32, key: RankKey, log_path: Option<PathBuf>) -> String {
    let Some(stderr) = stderr else {
        return String::new();
    };
    let mut file = match &log_path {
        Some(path) => open_log(path).await,
        None => None,
    };
    if let Some(file) = &mut file {
        let opening = format!("--- {key}, process {pid} ---\n");
        write_log(file, &opening).await;
    }
    let mut lines = BufReader::new(stderr);
    let mut words = LastWords::default();
    let mut raw = Vec::new();
    loop {
        raw.clear();
        match (&mut lines).take(LONGEST_LINE).read_until(b'\n', &mut raw).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&raw);
        let line = text.trim_end();
        if line.is_empty() {
            continue;
        }
        match level_of(line) {
            Some(Level::WARN | Level::ERROR) => {
                warn!(job = %key.job, generation = key.generation.0, rank = key.rank.0, "{line}");
            }
            _ => info!(job = %key.job, generation = key.generation.0, rank = key.rank.0, "{line}"),
        }
        if let Some(file) = &mut file {
            write_log(file, &format!("{line}\n")).await;
        }
        words.hear(line);
    }
    words.best()
}

/// The line of a process that says best why it ended.
#[derive(Default)]
struct LastWords {
    last: String,
    error: Option<String>,
    /// A panic's message is the line behind the one that says where it was.
    panicked: bool,
}

impl LastWords {
    fn hear(&mut self, line: &str) {
        // What it reported on its way is no reason for its end.
        if level_of(line).is_some() {
            return;
        }
        self.last = shortened(line);
        if self.panicked || line.starts_with("error: ") {
            self.error = Some(self.last.clone());
        }
        self.panicked = line.starts_with("thread '") && line.contains(" panicked at ");
    }

    fn best(self) -> String {
        self.error.unwrap_or(self.last)
    }
}

/// The level of a line of the rank's own log, `2026-11-28T01:14:31.524757Z  INFO ..`; none for everything else that it says.
fn level_of(line: &str) -> Option<Level> {
    let mut words = line.split_ascii_whitespace();
    let is_time = words
        .next()?
        .strip_suffix('Z')
        .is_some_and(|time| time.len() > 18 && time.as_bytes()[10] == b'T');
    is_time.then(|| words.next()?.parse().ok()).flatten()
}

fn shortened(line: &str) -> String {
    let mut end = line.len().min(LONGEST_ERROR);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line[..end].to_owned()
}

async fn open_log(path: &std::path::Path) -> Option<File> {
    let opened = async {
        if let Some(directory) = path.parent() {
            tokio::fs::create_dir_all(directory).await?;
        }
        File::options().create(true).append(true).open(path).await
    };
    match opened.await {
        Ok(file) => Some(file),
        Err(error) => {
            warn!(path = %path.display(), %error, "cannot write the rank's log; it goes on without");
            None
        }
    }
}

async fn write_log(file: &mut File, text: &str) {
    let written = async {
        file.write_all(text.as_bytes()).await?;
        file.flush().await
    };
    // A full disk must not end the training; the line is in our own log.
    let _lost_line = written.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_an_end_is_not_what_was_logged_before() {
        let best = |lines: &[&str]| {
            let mut words = LastWords::default();
            lines.iter().for_each(|line| words.hear(line));
            words.best()
        };
        let log = "2026-11-28T01:14:31.524757Z  INFO faces/train.rec: 64 images";
        let warning = "2026-11-28T01:14:31.524757Z  WARN no checkpoint, training goes on";
        assert_eq!(best(&[log, warning]), "");
        assert_eq!(best(&["Killed", log]), "Killed");
        assert_eq!(
            best(&["error: no room", "hint: make some", log]),
            "error: no room"
        );
        let panic = [
            "thread 'main' (12) panicked at src/a.rs:1:2:",
            log,
            "index out of bounds",
            "note: run with",
        ];
        assert_eq!(best(&panic), "index out of bounds");
        assert_eq!(level_of(warning), Some(Level::WARN));
        for other in [
            "",
            "INFO a",
            "2026 WARN a",
            "2026-11-28T01:14:31.524757Z",
            "2026-11-28T01:14:31.524757Z a b",
        ] {
            assert_eq!(level_of(other), None, "{other}");
        }
    }
}
