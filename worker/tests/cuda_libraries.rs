//! `--device cuda` on machines that lack something: the real worker, with stand-ins for NVIDIA's libraries that are compiled
//! here. Each thing that is missing ends it with one line that names it, a hint, and exit code 2. Where all is there it compiles
//! the head's kernels and joins.
//!
//! A machine with a GPU has the real libraries: there these tests would see those, and say that they are skipped.

mod cuda_stubs;

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where the stand-ins lie, and what they say.
struct Machine {
    folder: tempfile::TempDir,
    environment: Vec<(&'static str, String)>,
}

/// How the worker ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    error: String,
    hint: String,
}

impl Machine {
    /// A machine without anything; `None` where NVIDIA's driver is installed.
    fn bare() -> Option<Self> {
        if cuda_stubs::machine_has_the_real_ones() {
            eprintln!(
                "SKIPPED: the worker was not started with stand-ins: this machine has NVIDIA's libraries"
            );
            return None;
        }
        Some(Self {
            folder: tempfile::tempdir().expect("a folder"),
            environment: Vec::new(),
        })
    }

    /// Compiles a stand-in.
    fn with(self, source: &str, library: &str) -> Self {
        cuda_stubs::compile(source, self.folder.path(), library);
        self
    }

    fn set(mut self, name: &'static str, value: impl ToString) -> Self {
        self.environment.push((name, value.to_string()));
        self
    }

    fn with_driver(self) -> Self {
        self.with("driver.c", "libcuda.so.1")
            .set("STUB_CUDA_VERSION", 13_000)
    }

    fn with_gpus(self, count: u32) -> Self {
        self.with("nvml.c", "libnvidia-ml.so.1")
            .set("STUB_GPUS", count)
            .set("STUB_CAPABILITY", 90)
    }

    fn with_torch(self) -> Self {
        self.with("", "libtorch_cuda.so")
    }

    fn with_nccl(self) -> Self {
        self.with("nccl.c", "libnccl.so.2")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache/arcface/kernels")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_arcface-worker"));
        command
            .args(["--join", "127.0.0.1:1", "--device", "cuda"])
            .env_remove("CUDA_VISIBLE_DEVICES")
            .env("LD_LIBRARY_PATH", self.folder.path())
            .env("XDG_CACHE_HOME", self.folder.path().join("cache"))
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts with these further arguments; it is to end by itself.
    fn start(&self, arguments: &[&str]) -> Ended {
        let output = self.command().args(arguments).output().expect("start the worker");
        let text = String::from_utf8(output.stderr).expect("UTF-8");
        let lines: Vec<&str> = text.lines().collect();
        let [error, hint] = lines[..] else {
            panic!("two lines were expected: {text}")
        };
        assert!(output.stdout.is_empty(), "data alone goes there");
        Ended {
            code: output.status.code(),
            error: error.strip_prefix("error: ").expect("an error").to_owned(),
            hint: hint.strip_prefix("hint: ").expect("a hint").to_owned(),
        }
    }

    /// Starts and stays; the lines of its log until one that says that it tries to join.
    fn stays(&self) -> Vec<String> {
        let mut worker = self
            .command()
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the worker");
        let output = worker.stderr.take().expect("its log");
        let mut lines = Vec::new();
        for line in BufReader::new(output).lines() {
            lines.push(line.expect("UTF-8"));
            if lines.last().is_some_and(|line| line.contains("not joined")) {
                break;
            }
        }
        worker.kill().expect("it still runs");
        worker.wait().expect("its end");
        lines
    }

    /// Ends with exit code 2, and these in its line and its hint.
    fn refuses(&self, error: &str, hint: &str) {
        let ended = self.start(&[]);
        assert!(
            ended.error.starts_with("--device cuda: ")
                && ended.error.contains(error)
                && ended.hint.contains(hint),
            "{ended:?}"
        );
        assert_eq!(ended.code, Some(2), "{ended:?}");
    }
}

#[test]
fn without_a_driver_or_with_one_that_does_not_do() {
    let Some(bare) = Machine::bare() else { return };
    bare.refuses("no NVIDIA driver was found (libcuda.so.1)", "--device cpu");
    let driver = bare.with_driver();
    driver.refuses(
        "NVML, which says what GPUs there are, does not answer: ",
        "libnvidia-ml.so.1",
    );
    let mismatch = driver.set("STUB_CUDA_INIT", 803);
    mismatch.refuses(
        "the NVIDIA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "nvidia-smi",
    );
    let old = mismatch.set("STUB_CUDA_VERSION", 12_040);
    old.refuses(
        "the NVIDIA driver knows CUDA 12.4, and libtorch needs 13.0",
        "580",
    );
}

#[test]
fn without_a_gpu_that_may_be_used() {
    let Some(bare) = Machine::bare() else { return };
    let none = bare.with_driver().with_gpus(0).set("STUB_CUDA_INIT", 100);
    none.refuses("the NVIDIA driver finds no GPU", "nvidia-smi");
    let hidden = none.set("STUB_GPUS", 2).set("CUDA_VISIBLE_DEVICES", "");
    hidden.refuses(
        "no GPU is visible: CUDA_VISIBLE_DEVICES=\"\" leaves none of 2",
        "without it",
    );
    let seen = hidden.set("STUB_CUDA_INIT", 0);
    let wrong = seen.set("CUDA_VISIBLE_DEVICES", "0,2");
    wrong.refuses("CUDA_VISIBLE_DEVICES names 2, and there are 2 GPUs", "without it");
    let faulty = wrong.set("CUDA_VISIBLE_DEVICES", "0,1").set("STUB_FAULTY_GPU", 1);
    faulty.refuses(
        "GPU 1 (NVIDIA H100, 80 GiB, sm_90): its memory had 3 uncorrectable errors",
        "leaves it out",
    );
    let lost = faulty.set("STUB_LOST_GPU", 0);
    lost.refuses("GPU 0 (unknown", "leaves it out");
    // A GPU that is left out is not looked at; what is missing next is libtorch's.
    let left_out = lost
        .set("STUB_LOST_GPU", -1)
        .set("CUDA_VISIBLE_DEVICES", "GPU-00000000");
    left_out.refuses("libtorch cannot use CUDA: libtorch_cuda.so", "libtorch 2.11");
}

#[test]
fn without_libtorchs_cuda_half_nccl_or_a_compiler() {
    let Some(bare) = Machine::bare() else { return };
    let fit = bare.with_driver().with_gpus(1);
    fit.refuses(
        "libtorch cannot use CUDA: libtorch_cuda.so: cannot open shared object file",
        "CUDA 13 build",
    );
    let torch = fit.with_torch();
    torch.refuses(
        "NCCL cannot be loaded: libnccl.so.2: cannot open shared object file",
        "NCCL 2.28",
    );
    let empty = torch.with("", "libnccl.so.2");
    empty.refuses("undefined symbol: ncclGetVersion", "NCCL 2.28");
    let nccl = empty.with_nccl().set("STUB_NCCL", 21_805);
    nccl.refuses("NCCL is 2.18, and 2.28 or a newer 2 is needed", "NCCL 2.28");
    let compiler = nccl
        .set("STUB_NCCL", 22_809)
        .set("ARCFACE_NVRTC", "/nowhere/libnvrtc.so.13");
    compiler.refuses(
        "NVRTC, which compiles the kernels, cannot be loaded: /nowhere",
        "ARCFACE_NVRTC",
    );
}

#[test]
fn a_machine_that_is_fit_compiles_the_kernels_and_joins_with_a_slot_a_gpu() {
    let Some(nvrtc) = std::env::var_os("ARCFACE_NVRTC").filter(|path| Path::new(path).exists()) else {
        assert!(
            std::env::var_os("CI").is_none(),
            "ARCFACE_NVRTC names no library: `scripts/setup.sh nvrtc` fetches it"
        );
        eprintln!("SKIPPED: no kernels were compiled: ARCFACE_NVRTC names no library");
        return;
    };
    let Some(bare) = Machine::bare() else { return };
    let fit = bare
        .with_driver()
        .with_gpus(2)
        .with_torch()
        .with_nccl()
        .set("ARCFACE_NVRTC", nvrtc.to_str().expect("UTF-8"));
    let serves = |lines: &[String], gpu: u32| {
        let line = format!("GPU {gpu} (NVIDIA H100, 80 GiB, sm_90) serves one rank");
        lines.iter().any(|said| said.contains(&line))
    };
    let lines = fit.stays();
    assert!(serves(&lines, 0) && serves(&lines, 1), "{lines:?}");
    let files = || fs::read_dir(fit.cache()).expect("the cache").count();
    let sources = files();
    assert!(sources > 0, "a file a source, for one architecture");
    let too_many = fit.start(&["--slots", "3"]);
    assert_eq!(too_many.code, Some(2), "{too_many:?}");
    assert!(
        too_many.error.contains("--slots 3: there are 2 GPUs"),
        "{too_many:?}"
    );
    assert_eq!(files(), sources, "they were there");
    let second = fit.set("CUDA_VISIBLE_DEVICES", 1);
    let lines = second.stays();
    assert!(!serves(&lines, 0) && serves(&lines, 1), "{lines:?}");
    let old = second.set("STUB_CAPABILITY", 37);
    old.refuses("not for sm_37", "leaves it out");
}
