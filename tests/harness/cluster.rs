//! Coordinators and their workers on this machine, for the time of one test.

mod run;

use crate::{
    Certificates, Etcd, Finished, JobFile, Network, Process, command, http, process,
    wait::{self, Seen},
};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// For commands that only ask the coordinator something.
const ANSWER: Duration = Duration::from_secs(20);
/// For a process to come up on a machine that compiles beside it.
const START: Duration = Duration::from_secs(30);

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Workers.
    pub workers: usize,
    /// Slots of each, that is, ranks it can run.
    pub slots: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { workers: 2, slots: 1 }
    }
}

/// One of the coordinators, and the address that it keeps when it is started again.
struct Seat {
    process: Option<Process>,
    address: String,
}

/// A coordinator and its workers, or several coordinators that share an etcd.
pub struct Cluster {
    scratch: tempfile::TempDir,
    coordinators: Vec<Seat>,
    workers: Vec<Process>,
    /// Ended on purpose; their logs are still of interest.
    past: Vec<Process>,
    slots: usize,
    etcd: Option<Etcd>,
    network: Option<Network>,
    /// What coordinators and workers are started with.
    environment: Vec<(String, String)>,
    certificates: Option<Certificates>,
}

impl Cluster {
    /// The network that the workers are in, by number in the order of their start.
    ///
    /// # Errors
    /// If the cluster was not started in one.
    pub fn network(&self) -> Result<&Network> {
        self.network.as_ref().context("a cluster in a network")
    }

    /// Where everything lies: the working directory of all processes.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// `HOST:PORT` of the (first) coordinator.
    pub fn address(&self) -> &str {
        &self.coordinators[0].address
    }

    /// `HOST:PORT` of all coordinators, with commas between.
    pub fn addresses(&self) -> String {
        let addresses: Vec<&str> = self
            .coordinators
            .iter()
            .map(|seat| seat.address.as_str())
            .collect();
        addresses.join(",")
    }

    /// The certificates of this cluster.
    ///
    /// # Errors
    /// If it has none.
    pub fn certificates(&self) -> Result<&Certificates> {
        self.certificates
            .as_ref()
            .context("this cluster has no certificates")
    }

    /// The etcd of this cluster.
    ///
    /// # Errors
    /// If it has none.
    pub fn etcd(&mut self) -> Result<&mut Etcd> {
        self.etcd.as_mut().context("this cluster has no etcd")
    }

    /// `HOST:PORT` of the (first) coordinator's metrics.
    ///
    /// # Errors
    /// If it serves none.
    pub fn metrics_address(&self) -> Result<String> {
        self.metrics_address_of(0)
    }

    /// `HOST:PORT` of the metrics of one of the coordinators.
    ///
    /// # Errors
    /// If it serves none.
    pub fn metrics_address_of(&self, index: usize) -> Result<String> {
        self.served(index, "metrics")?
            .context("the coordinator serves no metrics")
    }

    /// Whether a coordinator that runs says at `/metrics` that it leads.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn leads(&self, index: usize) -> Result<bool> {
        let address = self.metrics_address_of(index)?;
        let page = http::get(&address, "/metrics")?;
        Ok(page.lines().any(|line| line == "arcface_coordinator_is_leader 1"))
    }

    /// Waits until a coordinator that runs leads, or stands by.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_for_role(&self, index: usize, leads: bool) -> Result<()> {
        let wanted = if leads { "lead" } else { "stand by" };
        wait::until(&format!("coordinator {index} to {wanted}"), START, || {
            Ok(match self.leads(index)? == leads {
                true => Seen::Yes(()),
                false => Seen::NotYet("it does not".into()),
            })
        })
    }

    /// Number of the coordinator that leads, once one does.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_for_leader(&mut self) -> Result<usize> {
        wait::until("a coordinator to lead", START, || {
            self.check_alive()?;
            for index in 0..self.coordinators.len() {
                if self.coordinators[index].process.is_some() && self.leads(index)? {
                    return Ok(Seen::Yes(index));
                }
            }
            Ok(Seen::NotYet("all stand by".into()))
        })
    }

    /// Starts the (first) coordinator, on the address that it had before if it had one, with the same store.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_coordinator(&mut self) -> Result<()> {
        self.start_coordinator_at(0)
    }

    /// Starts one of the coordinators, on the address that it had before if it had one, with the same store.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_coordinator_at(&mut self, index: usize) -> Result<()> {
        let file = self.address_file(index);
        if file.exists() {
            fs::remove_file(&file)?; // written again when it serves
        }
        let store = match &self.etcd {
            Some(etcd) => format!("etcd:{}", etcd.url()),
            None => format!("embedded:{}", self.scratch().join("store").display()),
        };
        let mut command = command("arcface-coordinator", self.scratch())?;
        command
            .args(["serve", "--listen", &self.coordinators[index].address])
            .args(["--metrics", "127.0.0.1:0", "--store", &store])
            .arg("--address-file")
            .arg(&file)
            .envs(self.environment.iter().cloned());
        if let Some(certificates) = &self.certificates {
            for (flag, file) in [
                ("--tls-cert", certificates.cert("server")),
                ("--tls-key", certificates.key("server")),
                ("--tls-client-ca", certificates.cert("ca")),
                ("--etcd-ca", certificates.cert("ca")),
                ("--etcd-cert", certificates.cert("client")),
                ("--etcd-key", certificates.key("client")),
            ] {
                command.arg(flag).arg(file);
            }
        }
        let name = match index {
            0 => "coordinator".to_owned(),
            _ => format!("coordinator-{index}"),
        };
        let mut process = Process::start(&name, &self.logs(), command)?;
        let address = wait::until("the coordinator's address file", START, || {
            if let Some(status) = process.ended()? {
                anyhow::bail!("the coordinator ended ({status}): {}", process.output());
            }
            Ok(match self.served(index, "grpc")? {
                Some(address) => Seen::Yes(address),
                None => Seen::NotYet("no file".into()),
            })
        })?;
        self.coordinators[index] = Seat {
            process: Some(process),
            address,
        };
        Ok(())
    }

    /// Starts one more worker.
    ///
    /// # Errors
    /// If it cannot be started. It may join later: see [`Self::wait_for_nodes`].
    pub fn start_worker(&mut self) -> Result<()> {
        self.start_worker_with(&[])
    }

    /// Starts one more worker with further arguments.
    ///
    /// # Errors
    /// As [`Self::start_worker`].
    pub fn start_worker_with(&mut self, arguments: &[&str]) -> Result<()> {
        let name = format!("worker-{}", self.workers.len() + self.past.len());
        let mut command = command("arcface-worker", self.scratch())?;
        if let Some(network) = &mut self.network {
            let namespace = network.add()?;
            let worker = command.get_program().to_owned();
            command = process::with_program(command, network.inside(namespace));
            command.arg(worker);
        }
        command
            .args(["--join", &self.addresses(), "--device", "cpu"])
            .args(["--slots", &self.slots.to_string()])
            .args(["--memory-root", "memory"])
            .args(arguments)
            .envs(self.environment.iter().cloned());
        self.workers.push(Process::start(&name, &self.logs(), command)?);
        Ok(())
    }

    /// Kills the (first) coordinator at once.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn kill_coordinator(&mut self) -> Result<()> {
        self.end_coordinator(0, Signal::SIGKILL)
    }

    /// Ends one of the coordinators with a signal.
    ///
    /// # Errors
    /// If it has ended before, or does not end.
    pub fn end_coordinator(&mut self, index: usize, signal: Signal) -> Result<()> {
        let mut process = self.coordinators[index]
            .process
            .take()
            .context("it does not run")?;
        process.signal(signal)?;
        process.wait(ANSWER)?;
        self.past.push(process);
        Ok(())
    }

    /// Sends a signal to one of the coordinators that it lives through: SIGSTOP, SIGCONT.
    ///
    /// # Errors
    /// If it does not run.
    pub fn signal_coordinator(&mut self, index: usize, signal: Signal) -> Result<()> {
        let process = self.coordinators[index]
            .process
            .as_mut()
            .context("it does not run")?;
        process.signal(signal)
    }

    /// Kills the newest worker at once; its ranks must end by themselves.
    ///
    /// # Errors
    /// If there is none, or it has ended before.
    pub fn kill_worker(&mut self) -> Result<()> {
        let mut process = self.workers.pop().context("no worker runs")?;
        process.signal(Signal::SIGKILL)?;
        process.wait(ANSWER)?;
        self.past.push(process);
        Ok(())
    }

    /// Tells the newest worker to stop, and waits until it has.
    ///
    /// # Errors
    /// If there is none, or it does not end in time.
    pub fn stop_worker(&mut self) -> Result<()> {
        let mut process = self.workers.pop().context("no worker runs")?;
        process.signal(Signal::SIGTERM)?;
        process.wait(2 * START)?;
        self.past.push(process);
        Ok(())
    }

    /// Sends a signal to a process that `nodes` named.
    ///
    /// # Errors
    /// If there is no such process, or it does not belong to this cluster.
    pub fn signal(&self, pid: u32, signal: Signal) -> Result<()> {
        ensure!(
            process::living_in(self.scratch()).contains(&pid),
            "process {pid} is not one of this cluster"
        );
        process::signal_pid(pid, signal)
    }

    /// Process id of the newest worker.
    ///
    /// # Errors
    /// If there is none.
    pub fn newest_worker(&self) -> Result<u32> {
        Ok(self.workers.last().context("no worker runs")?.pid())
    }

    /// Sends a signal to a process of this cluster and to its children: a worker with its ranks.
    ///
    /// # Errors
    /// If there is no such process, or it does not belong to this cluster.
    pub fn signal_group(&self, pid: u32, signal: Signal) -> Result<()> {
        self.signal(pid, signal)?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        for child in children.split_whitespace() {
            process::signal_pid(child.parse()?, signal)?;
        }
        Ok(())
    }

    /// Processes of this cluster that live, whoever started them.
    pub fn living(&self) -> Vec<u32> {
        process::living_in(self.scratch())
    }

    /// A command line of `arcface-coordinator` that talks to this cluster, not yet run.
    ///
    /// # Errors
    /// If the binary has not been built.
    pub fn client(&self, arguments: &[&str]) -> Result<std::process::Command> {
        let mut command = command("arcface-coordinator", self.scratch())?;
        command
            .args(arguments)
            .env("ARCFACE_COORDINATOR", self.addresses());
        if let Some(certificates) = &self.certificates {
            command.envs(certificates.environment("client"));
        }
        Ok(command)
    }

    /// Runs such a command to its end.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn cli(&self, arguments: &[&str], deadline: Duration) -> Result<Finished> {
        Finished::of(self.client(arguments)?, deadline)
    }

    /// Runs it with `--output json` and reads what it prints.
    ///
    /// # Errors
    /// If it fails or prints no JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let arguments = [arguments, &["--output", "json"]].concat();
        let finished = self.cli(&arguments, ANSWER)?.expect(0)?;
        serde_json::from_str(&finished.stdout)
            .with_context(|| format!("{} printed no JSON: {}", finished.line, finished.stdout))
    }

    /// Submits a job and gives its id.
    ///
    /// # Errors
    /// If it is not accepted.
    pub fn submit(&self, job: &JobFile) -> Result<String> {
        let file = job.write(self.scratch())?;
        let job = self.json(&["submit", &file.to_string_lossy()])?;
        Ok(job["id"]
            .as_str()
            .context("submit prints the job with its id")?
            .to_owned())
    }

    /// `job ID --output json`.
    ///
    /// # Errors
    /// If it fails.
    pub fn job(&self, id: &str) -> Result<Value> {
        self.json(&["job", id])
    }

    /// Waits until `arrived` says yes to the job as it stands. `wanted` says in words what for.
    ///
    /// # Errors
    /// At the deadline, and at once when the job has ended otherwise.
    pub fn wait_for_job(
        &mut self,
        id: &str,
        wanted: &str,
        deadline: Duration,
        arrived: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        wait::until(&format!("job {id} {wanted}"), deadline, || {
            self.check_alive()?;
            let job = self.job(id)?;
            if arrived(&job) {
                return Ok(Seen::Yes(job));
            }
            ensure!(
                !matches!(state(&job), "succeeded" | "failed" | "cancelled"),
                "it has ended: {job}"
            );
            Ok(Seen::NotYet(job.to_string()))
        })
    }

    /// Waits until the job has a state by name.
    ///
    /// # Errors
    /// As [`Self::wait_for_job`].
    pub fn wait_for_state(&mut self, id: &str, wanted: &str, deadline: Duration) -> Result<Value> {
        self.wait_for_job(id, &format!("to be {wanted}"), deadline, |job| {
            state(job) == wanted
        })
    }

    /// Waits until as many nodes are healthy.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_for_nodes(&mut self, count: usize) -> Result<Value> {
        wait::until(&format!("{count} nodes"), START, || {
            self.check_alive()?;
            let nodes = self.json(&["nodes"])?;
            let healthy = nodes
                .as_array()
                .context("nodes prints a list")?
                .iter()
                .filter(|node| state(node) == "healthy")
                .count();
            Ok(if healthy == count {
                Seen::Yes(nodes)
            } else {
                Seen::NotYet(nodes.to_string())
            })
        })
    }

    /// Process ids of a job's ranks, by rank.
    ///
    /// # Errors
    /// If `nodes` does not say.
    pub fn rank_pids(&self, job: &str) -> Result<Vec<(u64, u32)>> {
        let nodes = self.json(&["nodes"])?;
        let mut ranks = Vec::new();
        for node in nodes.as_array().context("nodes prints a list")? {
            for rank in node["ranks"].as_array().context("a node has a list of ranks")? {
                if rank["job"].as_str() == Some(job) {
                    let pid = rank["pid"].as_u64().context("a rank has a process id")?;
                    ranks.push((
                        rank["rank"].as_u64().context("a rank has a number")?,
                        u32::try_from(pid)?,
                    ));
                }
            }
        }
        ranks.sort_unstable();
        Ok(ranks)
    }

    /// Fails if a process that should run has ended: waiting on is in vain then.
    fn check_alive(&mut self) -> Result<()> {
        let coordinators = self
            .coordinators
            .iter_mut()
            .filter_map(|seat| seat.process.as_mut());
        for process in coordinators.chain(&mut self.workers) {
            if let Some(status) = process.ended()? {
                anyhow::bail!("{} ended by itself ({status})", process.name);
            }
        }
        Ok(())
    }

    /// A panic that was caught somewhere is still one.
    fn check_no_panic(&self) -> Result<()> {
        for process in self.processes() {
            ensure!(
                !process.output().contains("panicked at"),
                "{} has panicked",
                process.name
            );
        }
        Ok(())
    }

    fn processes(&self) -> impl Iterator<Item = &Process> {
        let coordinators = self.coordinators.iter().filter_map(|seat| seat.process.as_ref());
        self.past.iter().chain(coordinators).chain(&self.workers)
    }

    fn served(&self, index: usize, key: &str) -> Result<Option<String>> {
        let Ok(text) = fs::read_to_string(self.address_file(index)) else {
            return Ok(None);
        };
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        Ok(line.map(str::to_owned))
    }

    fn address_file(&self, index: usize) -> PathBuf {
        self.scratch().join(format!("address-{index}"))
    }

    fn logs(&self) -> PathBuf {
        self.scratch().join("logs")
    }

    /// Prints what every process wrote, and the training logs.
    fn print_logs(&self) {
        for process in self.processes() {
            eprintln!("---- {}\n{}", process.name, process.output());
        }
        let outputs = fs::read_dir(self.scratch().join("out"));
        for job in outputs.into_iter().flatten().flatten() {
            let log = job.path().join("training.log");
            if let Ok(text) = fs::read_to_string(&log) {
                eprintln!("---- {}\n{text}", log.display());
            }
        }
    }
}

/// `state` of a node or a job.
fn state(value: &Value) -> &str {
    value["state"].as_str().unwrap_or_default()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.workers.clear();
        self.coordinators.clear();
        // Ranks have process groups of their own; a test that failed may leave them behind.
        for pid in process::living_in(self.scratch()) {
            let _gone = process::signal_pid(pid, Signal::SIGKILL);
        }
    }
}
