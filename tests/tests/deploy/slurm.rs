//! The Slurm script with the real programs, on a stand-in for `srun` that starts all tasks on this machine.

use anyhow::{Context, Result, ensure};
use arcface_tests::{
    JobFile, Process, binary,
    wait::{self, Seen},
    workspace,
};
use nix::sys::signal::Signal;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// As much of srun as the script uses: so many copies, a signal goes to all, the code of the last one that failed.
const SRUN: &str = r#"#!/usr/bin/env bash
while [[ $1 == -* ]]; do
    case $1 in --ntasks=*) count=${1#*=} ;; esac
    shift
done
tasks=()
for ((i = 0; i < count; i++)); do
    SLURM_PROCID=$i "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || code=$?; done
done
exit "$code"
"#;

const SCONTROL: &str = "#!/bin/sh\necho \"$@\" >>scontrol.calls\n";

const LONG: Duration = Duration::from_secs(180);

/// The script as job 4711 on two nodes.
fn sbatch(name: &str, scratch: &Path, arguments: &[&str]) -> Result<Process> {
    let bin = scratch.join("bin");
    fs::create_dir_all(&bin)?;
    for (tool, text) in [("srun", SRUN), ("scontrol", SCONTROL)] {
        fs::write(bin.join(tool), text)?;
        fs::set_permissions(bin.join(tool), fs::Permissions::from_mode(0o755))?;
    }
    let built = binary("arcface-worker")?;
    binary("arcface-coordinator")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("bash");
    command
        .arg(workspace().join("deploy/slurm/arcface.sbatch"))
        .args(arguments)
        .current_dir(scratch)
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("ARCFACE_BIN", built.parent().context("target")?)
        .env("SLURM_JOB_ID", "4711")
        .env("SLURM_JOB_NUM_NODES", "2")
        .env("SLURM_SUBMIT_DIR", scratch)
        .env("OMP_NUM_THREADS", "1")
        .env_remove("ARCFACE_OUTPUT_ROOT")
        .env_remove("ARCFACE_DATA_ROOT")
        .stdin(Stdio::null());
    Process::start(name, &scratch.join("logs"), command)
}

/// How the script ended, with its whole log if it was another code.
fn ends_with(code: i32, process: &mut Process) -> Result<()> {
    let status = process.wait(LONG).with_context(|| process.output())?;
    ensure!(
        status.code() == Some(code),
        "{status} instead of {code}\n{}",
        process.output()
    );
    Ok(())
}

#[test]
fn a_preempted_job_goes_on_from_its_checkpoint_when_it_is_requeued() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let file = scratch.path().join("job.toml");
    fs::write(&file, JobFile::tiny("slurm").epochs(6).text())?;

    let mut first = sbatch("first", scratch.path(), &["job.toml"])?;
    wait::until("a checkpoint", LONG, || {
        ensure!(first.ended()?.is_none(), "it has ended\n{}", first.output());
        Ok(match first.output().contains("checkpoint committed, ") {
            true => Seen::Yes(()),
            false => Seen::NotYet(first.output()),
        })
    })?;
    first.signal(Signal::SIGTERM)?;
    ends_with(143, &mut first)?;
    let calls = fs::read_to_string(scratch.path().join("scontrol.calls"))?;
    ensure!(calls == "requeue 4711\n", "{calls}");

    let mut second = sbatch("second", scratch.path(), &["job.toml"])?;
    ends_with(0, &mut second)?;
    let log = second.output();
    ensure!(log.contains("resumed from step"), "{log}");
    ensure!(log.contains("succeeded: 24 steps"), "{log}");
    Ok(())
}

#[test]
fn the_code_of_submit_is_the_code_of_the_script() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    fs::write(
        scratch.path().join("job.toml"),
        "output = \"x\"\n[model]\nnetwork = \"nonesuch\"\n",
    )?;
    let mut script = sbatch("bad", scratch.path(), &["job.toml"])?;
    ends_with(2, &mut script)?;
    ensure!(script.output().contains("model.network"), "{}", script.output());
    Ok(())
}
