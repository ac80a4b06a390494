//! A cluster that was not told to use CUDA opens none of its libraries: neither the coordinator, nor workers with `--device cpu`
//! or the default, nor their ranks. Seen in what the loader says it looked for, so that a library that is not installed here
//! counts too.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options, Process, command};
use std::{fs, path::Path, time::Duration};

const TRAINED: Duration = Duration::from_secs(240);

/// libtorch's CPU half itself needs libcudart and libcupti of its CUDA builds: these two are everywhere.
const LIBRARIES: [&str; 6] = [
    "libcuda.so",
    "libnvcuda",
    "libtorch_cuda",
    "libnccl",
    "libnvidia-ml",
    "libnvrtc",
];

/// Fails if a text names one of them.
fn without_cuda(what: &str, text: &str) -> Result<()> {
    for name in LIBRARIES {
        if let Some(line) = text.lines().find(|line| line.contains(name)) {
            anyhow::bail!("{what} asked for {name}: {line}");
        }
    }
    Ok(())
}

#[test]
fn nothing_of_cuda_is_opened_unless_asked_for() -> Result<()> {
    let said = tempfile::tempdir()?;
    let prefix = said.path().join("loader");
    let environment = [
        ("LD_DEBUG".to_owned(), "libs".to_owned()),
        (
            "LD_DEBUG_OUTPUT".to_owned(),
            prefix.to_string_lossy().into_owned(),
        ),
    ];
    let options = Options { workers: 1, slots: 1 };
    Cluster::run_in_environment(options, environment.to_vec(), |cluster| {
        // Beside the worker of the harness, which is told to use the CPU, one with the default.
        let mut automatic = command("arcface-worker", cluster.scratch())?;
        automatic
            .args([
                "--join",
                cluster.address(),
                "--slots",
                "1",
                "--memory-root",
                "memory",
            ])
            .env_remove("ARCFACE_DEVICE")
            .envs(environment.iter().cloned());
        let mut automatic = Process::start("worker-auto", &cluster.scratch().join("logs"), automatic)?;
        let id = cluster.submit(&JobFile::tiny("no_cuda").epochs(1))?;
        cluster.wait_for_state(&id, "succeeded", TRAINED)?;
        for pid in cluster.living() {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("its memory")?;
            without_cuda(&format!("process {pid}"), &maps)?;
        }
        ensure!(
            cluster.living().len() >= 3,
            "the coordinator and two workers live"
        );
        ensure!(automatic.ended()?.is_none(), "{}", automatic.output());
        Ok(())
    })?;
    let mut ranks_and_workers = 0;
    for entry in fs::read_dir(said.path())? {
        let path = entry?.path();
        let text = fs::read_to_string(&path).context("what the loader said")?;
        ranks_and_workers += usize::from(text.contains("libtorch_cpu.so"));
        without_cuda(&name(&path), &text)?;
    }
    ensure!(
        ranks_and_workers >= 4,
        "{ranks_and_workers}: two workers and two ranks were seen"
    );
    Ok(())
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
