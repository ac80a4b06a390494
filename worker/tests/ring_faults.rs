//! The ring over real processes, and NCCL beside it: one that is killed, and one that is stopped, are named by every survivor in
//! time. NCCL and the driver are stand-ins (`cuda_stubs`), which the ranks find as they would find the real ones; tensors of
//! the CPU are the GPU's there.

mod cuda_stubs;

use arcface_worker::{
    collective::{
        Collective, CollectiveError, Listener, NcclCollective, ReduceOp, Session, TcpCollective, Timeouts,
        nccl::{Opened, library::Library},
    },
    device::streams::CudaTimeline,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    io::{BufRead, BufReader, Lines, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

/// Tells a child process which rank it is.
const RANK_VARIABLE: &str = "ARCFACE_RING_TEST_RANK";
/// Tells it to go through NCCL.
const NCCL_VARIABLE: &str = "ARCFACE_RING_TEST_NCCL";
const WORLD_SIZE: u32 = 4;
/// The deadline of an operation: long enough that eight busy threads on two cores do not miss it.
const DEADLINE: Duration = Duration::from_secs(5);
/// A dead process is noticed by its closed connections, not by the deadline.
const NOTICED: Duration = Duration::from_secs(2);

#[test]
fn a_killed_process_is_named_by_all() {
    for victim in 0..WORLD_SIZE {
        let took = strike(victim, Signal::SIGKILL, "lost", None);
        println!("killed rank {victim}: all named it within {took:?}");
        assert!(took < NOTICED, "{took:?}");
    }
}

#[test]
fn a_stopped_process_is_named_by_all() {
    let took = strike(2, Signal::SIGSTOP, "silent", None);
    println!("stopped rank 2: all named it within {took:?}");
    assert!(took < DEADLINE + NOTICED, "{took:?}");
}

#[test]
fn a_killed_process_is_named_by_all_over_nccl() {
    let Some(stand_ins) = stand_ins() else { return };
    for victim in 0..WORLD_SIZE {
        let took = strike(victim, Signal::SIGKILL, "lost", Some(stand_ins.path()));
        println!("killed rank {victim} over NCCL: all named it within {took:?}");
        assert!(took < NOTICED, "{took:?}");
    }
}

#[test]
fn a_stopped_process_is_named_by_all_over_nccl() {
    let Some(stand_ins) = stand_ins() else { return };
    for victim in 0..WORLD_SIZE {
        let took = strike(victim, Signal::SIGSTOP, "silent", Some(stand_ins.path()));
        println!("stopped rank {victim} over NCCL: all named it within {took:?}");
        assert!(took < DEADLINE + NOTICED, "{took:?}");
    }
}

/// A folder with NCCL and a driver; `None` where processes would find the real driver.
fn stand_ins() -> Option<tempfile::TempDir> {
    if cuda_stubs::machine_has_the_real_ones() {
        eprintln!("SKIPPED: ranks were not started with stand-ins: this machine has NVIDIA's libraries");
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    cuda_stubs::compile("nccl.c", folder.path(), "libnccl.so.2");
    cuda_stubs::compile("driver.c", folder.path(), "libcuda.so.1");
    Some(folder)
}

/// NCCL as a rank opens it, with tensors of the CPU in the GPU's place.
fn over_nccl(ring: TcpCollective, timeouts: Timeouts) -> Result<NcclCollective, CollectiveError> {
    let open = || -> Opened {
        let library = Arc::new(Library::open(None)?);
        Ok((library, Box::new(CudaTimeline::open(0)?)))
    };
    NcclCollective::over(ring, open, Device::Cpu, timeouts)
}

/// One rank: sums large and small tensors until something happens, and says what. Does nothing when the tests are
/// run as such.
#[test]
fn as_a_rank() {
    let Ok(rank) = std::env::var(RANK_VARIABLE) else {
        return;
    };
    let rank: u32 = rank.parse().expect("a rank");
    let (listener, port) = Listener::bind("127.0.0.1").expect("loopback");
    println!("\nendpoint 127.0.0.1:{port}");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the endpoints");
    let endpoints: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let session = Session {
        job: "faults".to_owned(),
        generation: 1,
    };
    let timeouts = Timeouts {
        connect: Duration::from_secs(60),
        operation: DEADLINE,
    };
    let ring = listener
        .connect(&session, rank, &endpoints, timeouts)
        .expect("connect");
    let mut comm: Box<dyn Collective> = match std::env::var_os(NCCL_VARIABLE) {
        Some(_) => Box::new(over_nccl(ring, timeouts).expect("NCCL comes up")),
        None => Box::new(ring),
    };
    for round in 0u64.. {
        let length = if round % 2 == 0 { 1_000_000 } else { 1 };
        let mut tensor = Tensor::ones([length], (Kind::Float, Device::Cpu));
        let verdict = match comm.all_reduce(&mut tensor, ReduceOp::Sum) {
            Ok(()) => {
                if round == 3 {
                    println!("\nturning");
                }
                continue;
            }
            Err(CollectiveError::PeerLost { peer, .. }) => format!("lost {peer}"),
            Err(CollectiveError::Timeout { peer, .. }) => format!("silent {peer}"),
            Err(other) => format!("other {other}"),
        };
        println!("\nverdict {verdict}");
        return;
    }
}

/// The processes of a world; whatever happens to the test, they end.
struct World {
    ranks: Vec<Child>,
    outputs: Vec<Lines<BufReader<ChildStdout>>>,
}

impl World {
    /// Ranks that find the libraries in `stand_ins` go through NCCL.
    fn start(stand_ins: Option<&Path>) -> Self {
        let this_test = std::env::current_exe().expect("own path");
        let nccl = stand_ins.map(|folder| [("LD_LIBRARY_PATH", folder), (NCCL_VARIABLE, Path::new("1"))]);
        let start = |rank: u32| {
            Command::new(&this_test)
                .args(["as_a_rank", "--exact", "--nocapture"])
                .envs(nccl.into_iter().flatten())
                .env(RANK_VARIABLE, rank.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("start a rank")
        };
        let mut ranks: Vec<Child> = (0..WORLD_SIZE).map(start).collect();
        let output = |rank: &mut Child| BufReader::new(rank.stdout.take().expect("piped")).lines();
        let outputs = ranks.iter_mut().map(output).collect();
        let mut world = Self { ranks, outputs };
        let endpoints: Vec<String> = (0..WORLD_SIZE)
            .map(|rank| world.hear(rank, "endpoint "))
            .collect();
        for rank in &mut world.ranks {
            let mut stdin = rank.stdin.take().expect("piped");
            writeln!(stdin, "{}", endpoints.join(" ")).expect("tell a rank the endpoints");
        }
        (0..WORLD_SIZE).for_each(|rank| drop(world.hear(rank, "turning")));
        world
    }

    /// The rest of the next line of a rank that starts so.
    fn hear(&mut self, rank: u32, start: &str) -> String {
        let lines = self.outputs[rank as usize]
            .by_ref()
            .map(|line| line.expect("read a rank's output"));
        let mut said = lines.filter_map(|line| line.strip_prefix(start).map(str::to_owned));
        said.next()
            .unwrap_or_else(|| panic!("rank {rank} ended without {start:?}"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for rank in &mut self.ranks {
            // It may have ended by itself.
            let _ = rank.kill();
            let _ = rank.wait();
        }
    }
}

/// Sends a signal to one rank of a turning world; all others must name it so. How long the last one took.
fn strike(victim: u32, signal: Signal, verdict: &str, stand_ins: Option<&Path>) -> Duration {
    let mut world = World::start(stand_ins);
    let pid = Pid::from_raw(i32::try_from(world.ranks[victim as usize].id()).expect("a pid"));
    let start = Instant::now();
    kill(pid, signal).expect("its own child");
    for rank in (0..WORLD_SIZE).filter(|&rank| rank != victim) {
        assert_eq!(
            world.hear(rank, "verdict "),
            format!("{verdict} {victim}"),
            "rank {rank}"
        );
    }
    start.elapsed()
}
