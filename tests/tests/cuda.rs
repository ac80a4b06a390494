//! A cluster that was not told to use CUDA opens none of its libraries: neither the coordinator, nor workers with `--device cpu`
//! or the default, nor their ranks. Seen in what the loader says it looked for, so that a library that is not installed here
//! counts too.
//!
//! One that was told to gives each rank a GPU of its own. Without a GPU here, NVIDIA's libraries are stand-ins, and libtorch
//! refuses them: the job ends, and its reason says so.

use anyhow::{Context, Result, ensure};
use arcface_tests::{Cluster, JobFile, Options, Process, command, workspace};
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
    if Path::new("/dev/nvidia0").exists() {
        println!("SKIPPED: this machine has a GPU, which --device auto looks at");
        return Ok(());
    }
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

/// Compiles stand-ins for NVIDIA's libraries into a folder.
fn stand_ins(folder: &Path) -> Result<()> {
    let empty = folder.join("empty.c");
    fs::write(&empty, "int arcface_stand_in;\n")?;
    let stubs = workspace().join("worker/tests/cuda_stubs");
    for (source, library) in [
        (stubs.join("driver.c"), "libcuda.so.1"),
        (stubs.join("nvml.c"), "libnvidia-ml.so.1"),
        (stubs.join("nccl.c"), "libnccl.so.2"),
        (empty, "libtorch_cuda.so"),
    ] {
        let status = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-pthread", "-o"])
            .args([&folder.join(library), &source])
            .status()
            .context("a C compiler")?;
        ensure!(status.success(), "{library}");
    }
    Ok(())
}

#[test]
fn each_rank_of_a_node_gets_a_gpu_of_its_own_and_a_job_ends_in_words_where_libtorch_cannot_use_it()
-> Result<()> {
    if std::env::var_os("ARCFACE_NVRTC").is_none_or(|path| !Path::new(&path).exists()) {
        ensure!(
            std::env::var_os("CI").is_none(),
            "ARCFACE_NVRTC names no library: `scripts/setup.sh nvrtc` fetches it"
        );
        eprintln!("SKIPPED: no kernels can be compiled: ARCFACE_NVRTC names no library");
        return Ok(());
    }
    if Path::new("/dev/nvidia0").exists() {
        eprintln!("SKIPPED: this machine has a GPU, stand-ins would be in its way");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    stand_ins(folder.path())?;
    let options = Options {
        workers: 0,
        ..Options::default()
    };
    Cluster::run(options, |cluster| {
        let mut command = command("arcface-worker", cluster.scratch())?;
        command
            .args(["--join", cluster.address(), "--device", "cuda"])
            .args(["--memory-root", "memory"])
            .env_remove("CUDA_VISIBLE_DEVICES")
            .env("LD_LIBRARY_PATH", folder.path())
            .env("XDG_CACHE_HOME", folder.path())
            .env("STUB_CUDA_VERSION", "13000")
            .env("STUB_GPUS", "2")
            .env("STUB_CAPABILITY", "90");
        let mut worker = Process::start("worker-cuda", &cluster.scratch().join("logs"), command)?;
        cluster.wait_for_nodes(1)?;
        let id = cluster.submit(&JobFile::tiny("on_gpus").epochs(1))?;
        let job = cluster.wait_for_state(&id, "failed", TRAINED)?;
        let reason = job["reason"].as_str().unwrap_or_default();
        // Ranks are started in their order, and the first that fails ends them all.
        let of_rank = |rank: u32| {
            let end = format!("device cuda: libtorch cannot use GPU {rank} (NVIDIA H100, 80 GiB, sm_90)");
            reason.contains(&format!("rank {rank} on ")) && reason.contains(&end)
        };
        ensure!(of_rank(0) || of_rank(1), "{job:#}");
        ensure!(worker.ended()?.is_none(), "{}", worker.output());
        Ok(())
    })
}
