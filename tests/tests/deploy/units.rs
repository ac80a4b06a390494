//! The systemd units.

use crate::{LEAVE_S, read, tools::skipped};
use anyhow::{Context, Result, ensure};
use arcface_tests::{Finished, binary};
use std::{fs, path::PathBuf, process::Command, time::Duration};

const UNITS: [&str; 2] = ["arcface-coordinator", "arcface-worker"];

/// Highest exposure that `systemd-analyze security` may find, in tenths.
const EXPOSURE: &str = "--threshold=20";

fn setting<'a>(unit: &'a str, name: &str) -> Option<&'a str> {
    unit.lines()
        .rev()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// The units with the programs of this build, which need not be installed then.
fn installed(folder: &tempfile::TempDir) -> Result<Vec<PathBuf>> {
    UNITS
        .iter()
        .map(|name| {
            let program = binary(name)?.display().to_string();
            let unit = read(&format!("deploy/systemd/{name}.service"))?;
            let path = folder.path().join(format!("{name}.service"));
            fs::write(&path, unit.replace(&format!("/usr/local/bin/{name}"), &program))?;
            Ok(path)
        })
        .collect()
}

#[test]
fn systemd_analyze_finds_them_right_and_safe() -> Result<()> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return skipped("systemd-analyze", "there is no systemd here");
    }
    let folder = tempfile::tempdir()?;
    let units = installed(&folder)?;
    let mut verify = Command::new("systemd-analyze");
    verify.arg("verify").args(&units);
    let finished = Finished::of(verify, Duration::from_secs(60))?.expect(0)?;
    // Words about other units of this machine are not about ours.
    let ours: Vec<_> = finished
        .stderr
        .lines()
        .filter(|line| line.contains("arcface"))
        .collect();
    ensure!(ours.is_empty(), "{ours:?}");
    for unit in &units {
        let mut security = Command::new("systemd-analyze");
        security.args(["security", "--offline=yes", EXPOSURE]).arg(unit);
        Finished::of(security, Duration::from_secs(60))?.expect(0)?;
    }
    Ok(())
}

#[test]
fn a_worker_has_time_to_leave_and_its_shared_memory() -> Result<()> {
    let worker = read("deploy/systemd/arcface-worker.service")?;
    let stop: u64 = setting(&worker, "TimeoutStopSec")
        .context("TimeoutStopSec")?
        .parse()?;
    ensure!(stop > LEAVE_S, "a worker is killed after {stop} s");
    // To the agent alone, so that ranks finish the checkpoint.
    ensure!(setting(&worker, "KillMode") == Some("mixed"));
    ensure!(
        setting(&worker, "RemoveIPC").is_none(),
        "what is in /dev/shm would be gone after a restart"
    );
    ensure!(
        setting(&worker, "InaccessiblePaths").is_none() && setting(&worker, "TemporaryFileSystem").is_none()
    );
    for name in UNITS {
        let unit = read(&format!("deploy/systemd/{name}.service"))?;
        for (key, value) in [
            ("Restart", "on-failure"),
            ("ProtectSystem", "strict"),
            ("NoNewPrivileges", "yes"),
            ("CapabilityBoundingSet", ""),
        ] {
            ensure!(
                setting(&unit, key) == Some(value),
                "{name}: {key} is {:?}",
                setting(&unit, key)
            );
        }
        let (_, short) = name.split_once('-').context("a name")?;
        let file = format!("-/etc/arcface/{short}.env");
        ensure!(setting(&unit, "EnvironmentFile") == Some(&file), "{name}: {file}");
        read(&format!("deploy/systemd/{short}.env"))?;
    }
    Ok(())
}
