//! The acceptance run for GPUs (`tests/gpu/accept.py`), on the CPU held against itself: so the script is proven before a GPU is
//! rented for it. What it says of a GPU is proven there alone.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Finished, binary, workspace};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
    time::Duration,
};

const ACCEPTED: Duration = Duration::from_secs(600);

/// The script on executables in a folder, in a scratch directory.
fn accept(scratch: &Path, bin: &Path, arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new(workspace().join("tests/gpu/accept.sh"));
    command
        .current_dir(scratch)
        .args(["--device", "cpu", "--quick", "--output", "result.json", "--bin"])
        .arg(bin)
        .args(arguments)
        .env_remove("ARCFACE_COORDINATOR")
        .env("OMP_NUM_THREADS", "1");
    Finished::of(command, ACCEPTED)
}

fn result(scratch: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(
        scratch.join("result.json"),
    )?)?)
}

fn executables() -> Result<std::path::PathBuf> {
    let worker = binary("arcface-worker")?;
    Ok(worker.parent().context("a folder")?.to_owned())
}

#[test]
fn every_check_runs_and_has_figures() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    accept(scratch.path(), &executables()?, &[])?.expect(0)?;
    let result = result(scratch.path())?;
    ensure!(
        result["passed"] == true && result["device"] == "cpu",
        "{result:#}"
    );
    let checks = result["checks"].as_array().context("checks")?;
    let names: Vec<_> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    let expected = [
        "embeddings",
        "training",
        "checkpoints",
        "nccl",
        "sanitizer",
        "learning",
        "speed",
    ];
    ensure!(names == expected, "{names:?}");
    for check in checks {
        let figures = check["figures"].as_object().context("figures")?;
        ensure!(!figures.is_empty(), "{check:#}");
        let commands = check["commands"].as_array().context("commands")?;
        ensure!(!commands.is_empty() || check["name"] == "sanitizer", "{check:#}");
    }
    Ok(())
}

/// A build with a fault: it embeds mirrored images where it should not.
#[test]
fn a_build_with_a_fault_does_not_pass() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let bin = scratch.path().join("bin");
    fs::create_dir(&bin)?;
    symlink(binary("arcface-coordinator")?, bin.join("arcface-coordinator"))?;
    let wrapper = format!(
        "#!/bin/sh\ncase \"$*\" in\n*'--precision bf16'*) set -- \"$@\" --flip ;;\nesac\nexec {} \"$@\"\n",
        binary("arcface-worker")?.display()
    );
    let worker = bin.join("arcface-worker");
    fs::write(&worker, wrapper)?;
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755))?;
    accept(scratch.path(), &bin, &["--only", "embeddings"])?.expect(1)?;
    let result = result(scratch.path())?;
    let check = &result["checks"][0];
    let problem = check["problem"].as_str().unwrap_or_default();
    ensure!(
        result["passed"] == false && problem.starts_with("r18 bf16: "),
        "{result:#}"
    );
    Ok(())
}

#[test]
fn a_machine_where_nothing_can_be_checked_is_told_in_a_line() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let missing = accept(scratch.path(), Path::new("/nowhere"), &[])?.expect(2)?;
    ensure!(
        missing.stderr.contains("/nowhere/arcface-worker is not there")
            && missing.stderr.contains("hint: make build"),
        "{}",
        missing.stderr
    );
    Ok(())
}
