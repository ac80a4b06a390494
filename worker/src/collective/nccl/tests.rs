//! What is NCCL's own: how its library is found, how its failures are told, and that no wait is without an end. On a stand-in
//! for NCCL that works on the memory of the host (`tests/cuda_stubs/nccl.c`), so tensors of the CPU are the GPU's here. What every
//! communicator must do is tested in `collective/suite.rs`, on the same stand-in.

use super::{library::NcclError, *};
use crate::{
    collective::local,
    device::streams::{RawStream, StreamError},
};
use std::{
    path::Path,
    process::Command,
    sync::{
        Barrier, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

/// Longer than any pause of a busy machine, so that a test never ends by it.
const PATIENT: Duration = Duration::from_secs(60);
/// How much later than its deadline a call may end: the watchdog's looks, and an abort that waits for a call.
const SLACK: Duration = Duration::from_millis(2500);

/// What becomes of the next operation of a rank, as `stream.h` numbers it.
#[derive(Clone, Copy)]
enum Fault {
    Hang = 1,
    Cuda = 2,
    Remote = 3,
    Refuse = 4,
    Stuck = 5,
}

/// `struct stream` of `stream.h`.
#[repr(C)]
#[derive(Default)]
struct HostStream {
    enqueued: AtomicU64,
    completed: AtomicU64,
    waits: AtomicU64,
    fault: AtomicU32,
}

/// A timeline of the host: what is computed is done when the call returns.
struct HostTimeline {
    stream: Arc<HostStream>,
    marked: u64,
}

impl Timeline for HostTimeline {
    fn stream(&self) -> RawStream {
        RawStream(Arc::as_ptr(&self.stream).cast_mut().cast())
    }

    fn follow_compute(&mut self) -> Result<(), StreamError> {
        self.stream.waits.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn mark(&mut self) -> Result<(), StreamError> {
        self.marked = self.stream.enqueued.load(Ordering::SeqCst);
        Ok(())
    }

    fn reached(&self) -> Result<bool, StreamError> {
        Ok(self.stream.completed.load(Ordering::SeqCst) >= self.marked)
    }
}

/// Compiles and loads the stand-in.
fn stand_in(flags: &[&str]) -> Result<Arc<Library>, NcclError> {
    let folder = tempfile::tempdir().expect("a folder");
    let library = folder.path().join("libnccl.so.2");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_stubs/nccl.c");
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2", "-pthread", "-Wall", "-Werror", "-o"])
        .args([&library, &source])
        .args(flags)
        .status();
    assert!(made.expect("a C compiler").success(), "{flags:?}");
    Library::open(Some(&library)).map(Arc::new)
}

/// The one without a fault.
fn usual() -> Arc<Library> {
    static USUAL: OnceLock<Arc<Library>> = OnceLock::new();
    Arc::clone(USUAL.get_or_init(|| stand_in(&[]).expect("it loads")))
}

/// A rank and the stream that its faults are planted in.
struct Rank {
    comm: NcclCollective,
    stream: Arc<HostStream>,
}

impl Rank {
    fn plant(&self, fault: Fault) {
        self.stream.fault.store(fault as u32, Ordering::SeqCst);
    }

    fn sum(&mut self) -> Result<(), CollectiveError> {
        let mut tensor = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        self.comm.all_reduce(&mut tensor, ReduceOp::Sum)?;
        assert_eq!(
            tensor.double_value(&[999]),
            f64::from(self.comm.world_size()),
            "an Ok holds"
        );
        Ok(())
    }
}

/// Runs `work` on every rank, each in a thread; results in rank order.
fn on_each<R: Send, T: Send>(ranks: Vec<R>, work: impl Fn(R) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(move || work(rank)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a rank panicked"))
            .collect()
    })
}

/// What comes of starting on each rank of a world; `open` by rank.
fn start(
    world_size: u32,
    timeouts: Timeouts,
    device: Device,
    open: impl Fn(u32) -> Result<Arc<Library>, NcclError> + Sync,
) -> Vec<Result<Rank, CollectiveError>> {
    let rings = local::world(world_size, timeouts.operation).expect("loopback");
    on_each(rings, |ring| {
        let stream = Arc::new(HostStream::default());
        let timeline = HostTimeline {
            stream: Arc::clone(&stream),
            marked: 0,
        };
        let library = open(ring.rank());
        let open = || -> Opened { Ok((library?, Box::new(timeline))) };
        let comm = NcclCollective::over(ring, open, device, timeouts)?;
        Ok(Rank { comm, stream })
    })
}

fn within(operation: Duration) -> Timeouts {
    Timeouts {
        connect: PATIENT,
        operation,
    }
}

fn ranks(world_size: u32, operation: Duration) -> Vec<Rank> {
    let started = start(world_size, within(operation), Device::Cpu, |_| Ok(usual()));
    started.into_iter().map(|rank| rank.expect("it starts")).collect()
}

/// A world on the stand-in, in rank order; `operation` is the deadline of its operations.
pub fn world(world_size: u32, operation: Duration) -> Vec<NcclCollective> {
    ranks(world_size, operation)
        .into_iter()
        .map(|rank| rank.comm)
        .collect()
}

/// Plants a fault in one rank of three and sums: how each call ended, and how long it took.
fn sums_with(fault: Fault, at: u32, deadline: Duration) -> Vec<(CollectiveError, Duration)> {
    on_each(ranks(3, deadline), |mut rank| {
        rank.sum().expect("nothing is wrong yet");
        if rank.comm.rank() == at {
            rank.plant(fault);
        }
        let since = Instant::now();
        let error = rank.sum().expect_err("one rank fails");
        let took = since.elapsed();
        let later = rank.sum().expect_err("it is dead");
        assert!(matches!(later, CollectiveError::Dead { .. }), "{later}");
        (error, took)
    })
}

/// The one that failed says what NCCL says; the others name it.
fn one_fails(results: &[(CollectiveError, Duration)], at: u32, text: &str) {
    for (rank, (error, took)) in (0..).zip(results) {
        match error {
            CollectiveError::Failed { rank: own, .. } if rank == at => assert_eq!(*own, at),
            CollectiveError::PeerLost { peer, .. } if rank != at => assert_eq!(*peer, at),
            other => panic!("rank {rank}: {other}"),
        }
        assert!(error.to_string().contains(text), "rank {rank}: {error}");
        assert!(*took < SLACK, "rank {rank}: {took:?}");
    }
}

#[test]
fn an_error_of_a_gpu_is_told_at_once_and_named_by_all() {
    let results = sums_with(Fault::Cuda, 1, PATIENT);
    one_fails(&results, 1, "unhandled cuda error");
}

#[test]
fn a_refused_call_is_told_in_nccls_words() {
    let results = sums_with(Fault::Refuse, 2, PATIENT);
    one_fails(
        &results,
        2,
        "ncclAllReduce: invalid argument (refused, as the test wants)",
    );
}

#[test]
fn an_error_of_a_peer_that_nobody_knows_is_told_as_it_is() {
    let results = sums_with(Fault::Remote, 0, PATIENT);
    one_fails(&results, 0, "remote process exited or there was a network error");
}

#[test]
fn an_error_of_a_peer_whose_connections_closed_names_the_peer() {
    // The ranks' own barrier lets one go on while others are still in it, and would tell them of its end.
    let all_there = Barrier::new(3);
    let results = on_each(ranks(3, PATIENT), |mut rank| {
        rank.sum().expect("nothing is wrong yet");
        all_there.wait();
        match rank.comm.rank() {
            2 => {
                rank.comm.sever();
                None
            }
            own => {
                if own == 1 {
                    rank.plant(Fault::Remote);
                }
                Some(rank.sum().expect_err("one is gone"))
            }
        }
    });
    for error in results.into_iter().flatten() {
        assert!(
            matches!(error, CollectiveError::PeerLost { peer: 2, .. }),
            "{error}"
        );
    }
}

/// Nobody is silent and nobody is gone: the first whose time is over says so, and the others may have heard it.
#[test]
fn an_operation_that_never_ends_is_ended_in_time_by_all() {
    let deadline = Duration::from_millis(1500);
    for fault in [Fault::Hang, Fault::Stuck] {
        let results = sums_with(fault, 1, deadline);
        for (rank, (error, took)) in results.into_iter().enumerate() {
            match &error {
                CollectiveError::Failed { detail: text, .. }
                | CollectiveError::PeerLost { cause: text, .. } => {
                    // The one that is stuck in a call, and the ones that wait for it.
                    let known = ["still busy with it after", "is not done after"];
                    assert!(known.iter().any(|known| text.contains(known)), "{rank}: {error}");
                }
                // A rank that is stuck answers nobody, but its watchdog does: it is not taken for a silent one.
                other => panic!("{rank}: {other}"),
            }
            assert!(took < deadline + SLACK, "{rank}: {took:?}");
        }
    }
}

#[test]
fn a_world_that_does_not_come_up_says_why() {
    let brief = Timeouts {
        connect: Duration::from_secs(1),
        operation: PATIENT,
    };
    for (flag, text) in [
        ("-DINIT_FAULT=1", "NCCL is still busy with it after"),
        ("-DINIT_FAULT=2", "unhandled system error"),
        (
            "-DINIT_FAULT=3",
            "ncclCommInitRankConfig: invalid usage (Duplicate GPU detected)",
        ),
    ] {
        let broken = stand_in(&[flag]).expect("it loads");
        let since = Instant::now();
        for (rank, started) in start(2, brief, Device::Cpu, |_| Ok(Arc::clone(&broken)))
            .into_iter()
            .enumerate()
        {
            let error = started.err().expect("it does not come up").to_string();
            // Rank 0 may fail, and say why, before the other has the world's id.
            let where_it_was = ["connect", "broadcast: rank 0 of 2 is gone"];
            assert!(
                where_it_was.iter().any(|place| error.starts_with(place)) && error.contains(text),
                "{rank}: {error}"
            );
        }
        assert!(since.elapsed() < brief.connect + SLACK, "{flag}");
    }
}

#[test]
fn a_rank_without_nccl_is_named_by_all() {
    for lacking in 0..3 {
        let open = |rank: u32| match rank == lacking {
            true => Library::open(Some(Path::new("/nowhere/libnccl.so.2"))).map(Arc::new),
            false => Ok(usual()),
        };
        for (rank, started) in (0..).zip(start(3, within(PATIENT), Device::Cpu, open)) {
            let error = started.err().expect("one cannot");
            match &error {
                CollectiveError::Failed { .. } if rank == lacking => {}
                CollectiveError::PeerLost { peer, .. } if rank != lacking => assert_eq!(*peer, lacking),
                other => panic!("{rank}: {other}"),
            }
            assert!(error.to_string().contains("NCCL cannot be loaded"), "{error}");
        }
    }
}

#[test]
fn libraries_that_do_not_do_are_refused() {
    let refusal = |flags: &[&str]| stand_in(flags).err().expect("refused").to_string();
    assert!(refusal(&["-DncclBroadcast=another"]).contains("ncclBroadcast"));
    assert!(refusal(&["-DncclGetVersion=another"]).contains("ncclGetVersion"));
    assert_eq!(
        refusal(&["-DVERSION=21805"]),
        "NCCL is 2.18, and 2.28 or a newer 2 is needed"
    );
    assert!(refusal(&["-DVERSION=30102"]).starts_with("NCCL is 3.1,"));
    assert_eq!(stand_in(&["-DVERSION=23001"]).expect("newer").version(), (2, 30));
    let missing = Library::open(Some(Path::new("/nowhere/libnccl.so.2"))).err();
    let missing = missing.expect("nowhere").to_string();
    assert!(
        missing.starts_with("NCCL cannot be loaded: /nowhere") && !missing.contains('\n'),
        "{missing}"
    );
}

#[test]
fn where_a_tensor_lives_decides_its_way() {
    let gpu = Device::Cuda(0);
    let started = start(2, within(PATIENT), gpu, |_| Ok(usual()));
    on_each(started, |rank| {
        let mut rank = rank.expect("it starts");
        rank.sum().expect("over the ring");
        rank.comm.barrier().expect("over the ring");
        assert_eq!(rank.stream.enqueued.load(Ordering::SeqCst), 0);
    });
    on_each(ranks(2, PATIENT), |mut rank| {
        rank.sum().expect("over NCCL");
        rank.comm.barrier().expect("over the ring");
        assert_eq!(rank.stream.enqueued.load(Ordering::SeqCst), 1);
        let mut nothing = Tensor::zeros([0], (Kind::Float, Device::Cpu));
        rank.comm
            .all_reduce(&mut nothing, ReduceOp::Sum)
            .expect("nothing to move");
        assert_eq!(rank.stream.enqueued.load(Ordering::SeqCst), 1);
    });
}

/// A tensor on one rank's GPU and on another's CPU: the ranks disagree on the way.
#[test]
fn a_tensor_that_lives_elsewhere_on_another_rank_is_a_mismatch() {
    let rings = local::world(2, PATIENT).expect("loopback");
    let results = on_each(rings, |ring| {
        let stream = Arc::new(HostStream::default());
        let device = match ring.rank() {
            0 => Device::Cpu,
            _ => Device::Cuda(0),
        };
        let timeline = HostTimeline { stream, marked: 0 };
        let open = || -> Opened { Ok((usual(), Box::new(timeline))) };
        let mut comm = NcclCollective::over(ring, open, device, within(PATIENT)).expect("it starts");
        let mut tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
        comm.all_reduce(&mut tensor, ReduceOp::Sum)
    });
    for result in results {
        assert!(
            matches!(result, Err(CollectiveError::Mismatch { .. })),
            "{result:?}"
        );
    }
}

/// NVIDIA's own library, where `ARCFACE_NCCL` names one: it is not fetched for tests (400 MB). It needs no GPU up to here.
#[test]
fn the_real_library_has_what_is_used_of_it() {
    let Some(path) = std::env::var_os("ARCFACE_NCCL") else {
        eprintln!("SKIPPED: NVIDIA's NCCL was not opened: ARCFACE_NCCL names no library");
        return;
    };
    let library = Arc::new(Library::open(Some(Path::new(&path))).expect("it does"));
    println!("NCCL {:?}", library.version());
    let id = library.unique_id().expect("an id");
    assert_ne!(id, library.unique_id().expect("another id"));
    if Path::new("/dev/nvidia0").exists() {
        return;
    }
    let refused = Comm::begin(library, &id, 0, 1).err().expect("there is no GPU");
    println!("without a GPU: {refused}");
    assert!(
        matches!(&refused, NcclError::Call { call: "ncclCommInitRankConfig", reason } if reason.contains("cuda")),
        "{refused}"
    );
}
