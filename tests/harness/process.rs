//! One process of the product: found beside the test's own executable, started in its own process group with its
//! output in a file, killed with everything it started.

use crate::wait::{self, Seen};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

/// Marks every process that a test starts, and what these start in turn; its value is the scratch directory.
const MARK: &str = "ARCFACE_TEST_SCRATCH";

/// A binary of this build's profile: test executables lie in `target/PROFILE/deps`.
///
/// # Errors
/// If it has not been built: cargo builds a package's binaries for that package's own tests only.
pub fn binary(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe().context("find the test's own executable")?;
    let profile = test
        .parent()
        .and_then(Path::parent)
        .context("find target/PROFILE")?;
    let path = profile.join(name);
    ensure!(
        path.is_file(),
        "{} is not built\nhint: run `cargo test --workspace --no-run` first, or `make test`",
        path.display()
    );
    Ok(path)
}

/// A command that runs `name` in `scratch`, without the settings of whoever runs the tests, and with one thread for
/// tensor arithmetic: several ranks share few cores.
///
/// # Errors
/// If the binary has not been built.
pub fn command(name: &str, scratch: &Path) -> Result<Command> {
    let mut command = Command::new(binary(name)?);
    command
        .current_dir(scratch)
        .env(MARK, scratch)
        .env("OMP_NUM_THREADS", "1")
        .env_remove("ARCFACE_COORDINATOR")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .stdin(Stdio::null());
    Ok(command)
}

/// The settings of one command with the program and the arguments of another.
pub fn with_program(settings: Command, mut program: Command) -> Command {
    for (name, value) in settings.get_envs() {
        match value {
            Some(value) => program.env(name, value),
            None => program.env_remove(name),
        };
    }
    if let Some(directory) = settings.get_current_dir() {
        program.current_dir(directory);
    }
    program.stdin(Stdio::null());
    program
}

/// A process in the background.
pub struct Process {
    /// What the test calls it.
    pub name: String,
    log: PathBuf,
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts it with both outputs in `logs/NAME.log` of its scratch directory, after what an earlier one wrote.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(name: &str, logs: &Path, mut command: Command) -> Result<Self> {
        fs::create_dir_all(logs)?;
        let log = logs.join(format!("{name}.log"));
        let sink = File::options().create(true).append(true).open(&log)?;
        let child = command
            .stdout(sink.try_clone()?)
            .stderr(sink)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            log,
            child,
            ended: None,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Sends a signal to the process alone, not to what it started.
    ///
    /// # Errors
    /// If it has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.ended()?.is_none(), "{} has ended", self.name);
        signal_pid(self.pid(), signal)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait::until(&format!("the end of {name}"), deadline, || {
            Ok(match self.ended()? {
                Some(status) => Seen::Yes(status),
                None => Seen::NotYet("it runs".into()),
            })
        })
    }

    /// What it wrote so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_else(|error| format!("(no log: {error})\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // Errors mean that the group is gone, which is what is wanted.
            let _gone = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
            let _reaped = self.child.wait();
        }
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub line: String,
    /// Exit code; 128 + signal if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Runs a command to its end.
    ///
    /// # Errors
    /// If it cannot be started, or still runs at the deadline (it is killed then).
    pub fn of(mut command: Command, deadline: Duration) -> Result<Self> {
        let line = format!("{command:?}");
        let outputs = tempfile::tempdir()?;
        let (out, err) = (outputs.path().join("out"), outputs.path().join("err"));
        let child = command
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {line}"))?;
        // Dropping it on an error kills it.
        let mut process = Process {
            name: line.clone(),
            log: err.clone(),
            child,
            ended: None,
        };
        let status = process.wait(deadline).with_context(|| process.output())?;
        Ok(Self {
            line,
            code: status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(-1),
            stdout: fs::read_to_string(&out)?,
            stderr: fs::read_to_string(&err)?,
        })
    }

    /// Its standard output, if it ended with `code`.
    ///
    /// # Errors
    /// If it ended otherwise; the message has everything it wrote.
    pub fn expect(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!(
                "{}\nended with code {}, expected {code}\nstdout: {}\nstderr: {}",
                self.line,
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }
}

/// Sends a signal to one process.
///
/// # Errors
/// If there is no such process.
pub(crate) fn signal_pid(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).context("process id")?;
    kill(Pid::from_raw(raw), signal).with_context(|| format!("send {signal} to process {pid}"))
}

/// Living processes that were started in `scratch` with [`command`], and those that they started.
pub fn living_in(scratch: &Path) -> Vec<u32> {
    let mark = format!("{MARK}={}", scratch.display());
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            // A process that has ended meanwhile, or a zombie, has no environment to read.
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|byte| *byte == 0)
                .any(|variable| variable == mark.as_bytes())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn shell(script: &str, scratch: &Path) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .env(MARK, scratch)
            .stdin(Stdio::null());
        command
    }

    #[test]
    fn a_dropped_process_takes_what_it_started_with_it() -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let parent = shell("sleep 1000 & sleep 1000", scratch.path());
        let process = Process::start("parent", scratch.path(), parent)?;
        wait::until("parent and child", SOON, || {
            let living = living_in(scratch.path());
            Ok(if living.len() >= 2 && living.contains(&process.pid()) {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("{living:?}"))
            })
        })?;
        drop(process);
        wait::until("nothing to be left", SOON, || {
            let living = living_in(scratch.path());
            Ok(if living.is_empty() {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("{living:?}"))
            })
        })
    }

    #[test]
    fn codes_signals_and_outputs_are_told() -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let finished = Finished::of(shell("echo out; echo err >&2; exit 3", scratch.path()), SOON)?;
        assert_eq!(
            (finished.code, finished.stdout.as_str(), finished.stderr.as_str()),
            (3, "out\n", "err\n")
        );
        let message = finished.expect(0).expect_err("3 is not 0").to_string();
        assert!(message.contains("code 3") && message.contains("err"), "{message}");
        let killed = Finished::of(shell("kill -9 $$", scratch.path()), SOON)?;
        assert_eq!(killed.code, 137);
        Ok(())
    }

    #[test]
    fn a_deadline_says_what_was_seen_last() {
        let never = wait::until("rain", Duration::ZERO, || {
            Ok(Seen::<()>::NotYet("sunshine".into()))
        });
        let message = format!("{:#}", never.expect_err("it never comes"));
        assert!(
            message.contains("rain") && message.contains("sunshine"),
            "{message}"
        );
    }

    #[test]
    fn a_command_that_hangs_is_killed_at_its_deadline() -> Result<()> {
        let scratch = tempfile::tempdir()?;
        let hangs = shell("echo waiting >&2; sleep 1000", scratch.path());
        let error = Finished::of(hangs, Duration::from_millis(200)).expect_err("it hangs");
        assert!(format!("{error:#}").contains("waited"), "{error:#}");
        wait::until("it to be gone", SOON, || {
            let living = living_in(scratch.path());
            Ok(if living.is_empty() {
                Seen::Yes(())
            } else {
                Seen::NotYet(format!("{living:?}"))
            })
        })
    }
}
