//! The ring over real processes: one that is killed, and one that is stopped, are named by every survivor in time.

use arcface_worker::collective::{Collective, CollectiveError, Listener, ReduceOp, Session, Timeouts};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    io::{BufRead, BufReader, Lines, Write},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};
use tch::{Device, Kind, Tensor};

/// Tells a child process which rank it is: "rank/world size".
const RANK_VARIABLE: &str = "ARCFACE_RING_TEST_RANK";
const WORLD_SIZE: u32 = 4;
/// The deadline of an operation.
const DEADLINE: Duration = Duration::from_secs(3);
/// A dead process is noticed by its closed connections, not by the deadline.
const NOTICED: Duration = Duration::from_secs(2);

#[test]
fn a_killed_process_is_named_by_all() {
    for victim in 0..WORLD_SIZE {
        let took = strike(victim, Signal::SIGKILL, "lost");
        println!("killed rank {victim}: all named it within {took:?}");
        assert!(took < NOTICED, "{took:?}");
    }
}

#[test]
fn a_stopped_process_is_named_by_all() {
    let took = strike(2, Signal::SIGSTOP, "silent");
    println!("stopped rank 2: all named it within {took:?}");
    assert!(took < DEADLINE + NOTICED, "{took:?}");
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
    let mut comm = listener
        .connect(&session, rank, &endpoints, timeouts)
        .expect("connect");
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
    fn start() -> Self {
        let this_test = std::env::current_exe().expect("own path");
        let start = |rank: u32| {
            Command::new(&this_test)
                .args(["as_a_rank", "--exact", "--nocapture"])
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
fn strike(victim: u32, signal: Signal, verdict: &str) -> Duration {
    let mut world = World::start();
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
