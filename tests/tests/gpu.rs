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
/// `scripts/python.sh` ends with this if the packages are not there (EX_UNAVAILABLE).
const NO_PACKAGES: i32 = 69;

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

/// With a stand-in for the reference, where there is PyTorch (`scripts/setup.sh python`).
#[test]
fn the_reference_runs_beside_ours() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut command = Command::new(workspace().join("scripts/python.sh"));
    command
        .current_dir(scratch.path())
        .arg(workspace().join("tests/gpu/accept.py"))
        .args([
            "--device",
            "cpu",
            "--quick",
            "--output",
            "result.json",
            "--only",
            "reference",
        ])
        .arg("--reference")
        .arg(workspace().join("tests/python/reference_stand_in"))
        .arg("--bin")
        .arg(executables()?)
        .env("OMP_NUM_THREADS", "1");
    let finished = Finished::of(command, ACCEPTED)?;
    if finished.code == NO_PACKAGES {
        ensure!(std::env::var_os("CI").is_none(), "{}", finished.stderr);
        println!("SKIPPED: there is no PyTorch: {}", finished.stderr.trim());
        return Ok(());
    }
    finished.expect(0)?;
    let result = result(scratch.path())?;
    let figures = result["checks"][0]["figures"].as_object().context("figures")?;
    for head in ["head, rate 1", "head, rate 0.1"] {
        let row = figures
            .iter()
            .find(|(name, _)| name.starts_with(head))
            .context(head)?
            .1;
        let [ratio, theirs, ours] = ["ratios", "reference_ms", "ours_ms"].map(|key| row[key][0].as_f64());
        let (ratio, theirs, ours) = (
            ratio.context("a ratio")?,
            theirs.context("ms")?,
            ours.context("ms")?,
        );
        ensure!((ratio - theirs / ours).abs() < 1e-9 && ours > 0.0, "{row:#}");
    }
    ensure!(
        figures
            .iter()
            .any(|(name, ms)| name.starts_with("products") && ms.as_f64().is_some_and(|ms| ms > 0.0)),
        "{figures:?}"
    );
    let commands = result["checks"][0]["commands"].to_string();
    let path = workspace().to_string_lossy().into_owned();
    ensure!(
        !commands.contains(&path) && commands.contains("--reference DIR"),
        "{commands}"
    );
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
