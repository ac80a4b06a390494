//! What every implementation of [`Collective`] must do, run here on the ring over TCP and on NCCL with a stand-in for its library;
//! and what is the ring's own: how its connections come up.

use super::{
    Collective, CollectiveError, Listener, NcclCollective, ReduceOp, Session, TcpCollective, Timeouts, local,
    nccl,
};
use proptest::prelude::*;
use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};
use tch::{Kind, Tensor};

/// Longer than any pause of a busy machine, so that a test never ends by it.
const PATIENT: Duration = Duration::from_secs(60);
const KINDS: [Kind; 5] = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64];

/// A communicator under test.
trait Rank: Collective + Sized {
    /// Ranks of a world, in order; `operation` is the deadline of their operations.
    fn world(world_size: u32, operation: Duration) -> Vec<Self>;

    /// Ends as when its process dies: the connections close, and no word is said.
    fn die(&mut self);
}

impl Rank for TcpCollective {
    fn world(world_size: u32, operation: Duration) -> Vec<Self> {
        local::world(world_size, operation).expect("loopback")
    }

    fn die(&mut self) {
        self.sever();
    }
}

impl Rank for NcclCollective {
    fn world(world_size: u32, operation: Duration) -> Vec<Self> {
        nccl::tests::world(world_size, operation)
    }

    fn die(&mut self) {
        self.sever();
    }
}

/// Every test on every communicator.
macro_rules! on_all {
    ($($test:ident),* $(,)?) => {
        mod tcp {
            $(#[test]
            fn $test() {
                super::$test::<super::TcpCollective>();
            })*
        }

        mod nccl_stand_in {
            $(#[test]
            fn $test() {
                super::$test::<super::NcclCollective>();
            })*
        }
    };
}

on_all!(
    every_operation_on_every_kind_size_and_world,
    bytes_are_gathered_and_broadcast,
    what_cannot_be_sent_is_refused,
    every_rank_gets_the_same_bits_in_every_run,
    not_a_number_survives_a_maximum,
    large_tensors_do_not_lock_up,
    sums_are_sums,
    a_lost_rank_is_named_by_all_in_every_operation,
    a_rank_that_left_is_named,
    an_orderly_end_fails_nobody,
    a_silent_rank_is_named_by_all,
    different_calls_are_a_mismatch_not_a_hang,
);

/// Runs `work` on every rank of a world, each in a thread; results in rank order.
fn on_ranks<R: Rank, T: Send>(ranks: Vec<R>, work: impl Fn(&mut R) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|mut rank| scope.spawn(move || work(&mut rank)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("a rank panicked"))
            .collect()
    })
}

fn in_world<R: Rank, T: Send>(world_size: u32, work: impl Fn(&mut R) -> T + Sync) -> Vec<T> {
    on_ranks(R::world(world_size, PATIENT), work)
}

/// Small integers that every kind holds exactly, also summed over a few ranks: the order cannot matter.
fn sample(rank: u32, length: i64, kind: Kind) -> Tensor {
    let values: Vec<i64> = (0..length)
        .map(|i| (i * 7 + i64::from(rank) * 3) % 11 - 5)
        .collect();
    Tensor::from_slice(&values).to_kind(kind)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).contiguous().view([-1])).expect("a CPU tensor")
}

fn every_operation_on_every_kind_size_and_world<R: Rank>() {
    for world in 1..=5u32 {
        in_world(world, |comm: &mut R| {
            let rank = comm.rank();
            assert_eq!(comm.world_size(), world);
            for kind in KINDS {
                for length in [0, 1, 2, 7, 1001, 300_007] {
                    let all: Vec<Vec<f64>> = (0..world).map(|r| numbers(&sample(r, length, kind))).collect();
                    let fold = |f: fn(f64, f64) -> f64| -> Vec<f64> {
                        let of = |i: usize| all.iter().map(|values| values[i]).reduce(f).expect("a rank");
                        (0..length as usize).map(of).collect()
                    };
                    for (op, expected) in [
                        (ReduceOp::Sum, fold(|a, b| a + b)),
                        (ReduceOp::Max, fold(f64::max)),
                    ] {
                        let mut tensor = sample(rank, length, kind);
                        comm.all_reduce(&mut tensor, op).expect("all_reduce");
                        assert_eq!(
                            numbers(&tensor),
                            expected,
                            "{op:?} {kind:?} {length} on {rank} of {world}"
                        );
                    }
                    let gathered = comm.all_gather(&sample(rank, length, kind)).expect("all_gather");
                    assert_eq!(gathered.size(), [length * i64::from(world)]);
                    assert_eq!(numbers(&gathered), all.concat());

                    let full = sample(rank, length * i64::from(world) * 2, kind)
                        .view([i64::from(world) * length, 2]);
                    let own = comm.reduce_scatter(&full).expect("reduce_scatter");
                    assert_eq!(own.size(), [length, 2]);
                    let sum = (0..world)
                        .map(|r| sample(r, length * i64::from(world) * 2, Kind::Double))
                        .reduce(|a, b| a + b)
                        .expect("a rank");
                    let expected = sum.narrow(0, i64::from(rank) * length * 2, length * 2);
                    assert_eq!(numbers(&own), numbers(&expected));

                    for root in 0..world {
                        let mut tensor = sample(rank, length, kind);
                        comm.broadcast(&mut tensor, root).expect("broadcast");
                        assert_eq!(numbers(&tensor), all[root as usize]);
                    }
                }
            }
            comm.barrier().expect("barrier");
        });
    }
}

fn bytes_are_gathered_and_broadcast<R: Rank>() {
    in_world(3, |comm: &mut R| {
        let own = Tensor::from_slice(&[comm.rank() as u8, 250]);
        assert_eq!(
            numbers(&comm.all_gather(&own).expect("all_gather")),
            [0., 250., 1., 250., 2., 250.]
        );
        let mut bytes = own.copy();
        comm.broadcast(&mut bytes, 2).expect("broadcast");
        assert_eq!(numbers(&bytes), [2.0, 250.0]);
    });
}

fn what_cannot_be_sent_is_refused<R: Rank>() {
    let refuse = |what: &dyn Fn(&mut R) -> Result<(), CollectiveError>| {
        let mut comm = R::world(1, PATIENT).remove(0);
        assert!(matches!(
            what(&mut comm),
            Err(CollectiveError::Unsupported { .. })
        ));
        assert!(matches!(comm.barrier(), Err(CollectiveError::Dead { .. })));
    };
    let matrix = Tensor::zeros([3, 2], (Kind::Float, tch::Device::Cpu));
    refuse(&|comm| comm.all_reduce(&mut matrix.tr(), ReduceOp::Sum));
    refuse(&|comm| comm.all_reduce(&mut matrix.to_kind(Kind::Uint8), ReduceOp::Sum));
    refuse(&|comm| comm.all_gather(&matrix.to_kind(Kind::Bool)).map(drop));
    refuse(&|comm| comm.all_gather(&matrix.sum(Kind::Float)).map(drop));
    refuse(&|comm| comm.broadcast(&mut matrix.copy(), 1));
    let results = in_world(2, |comm: &mut R| {
        comm.reduce_scatter(&sample(0, 3, Kind::Float)).map(drop)
    });
    assert!(results.iter().all(Result::is_err), "3 rows among 2 ranks");
}

fn every_rank_gets_the_same_bits_in_every_run<R: Rank>() {
    let run = || {
        in_world(4, |comm: &mut R| {
            let values: Vec<f32> = (0..5003)
                .map(|i| ((i * (comm.rank() + 2)) as f32).sin() * 1e3)
                .collect();
            let mut tensor = Tensor::from_slice(&values);
            comm.all_reduce(&mut tensor, ReduceOp::Sum).expect("all_reduce");
            numbers(&tensor)
        })
    };
    let first = run();
    assert!(first.iter().all(|values| *values == first[0]), "ranks differ");
    assert_eq!(run(), first, "runs differ");
}

fn not_a_number_survives_a_maximum<R: Rank>() {
    in_world(2, |comm: &mut R| {
        let mut tensor = match comm.rank() {
            0 => Tensor::from_slice(&[f32::NAN, 1.0]),
            _ => Tensor::from_slice(&[1.0, f32::NAN]),
        };
        comm.all_reduce(&mut tensor, ReduceOp::Max).expect("all_reduce");
        assert!(numbers(&tensor).iter().all(|value| value.is_nan()));
    });
}

/// Both ends of each link have more to send than the system buffers: sending before receiving would hang.
fn large_tensors_do_not_lock_up<R: Rank>() {
    in_world(3, |comm: &mut R| {
        let mut tensor = Tensor::ones([12_000_000], (Kind::Float, tch::Device::Cpu));
        comm.all_reduce(&mut tensor, ReduceOp::Sum).expect("all_reduce");
        assert_eq!(tensor.min().double_value(&[]), 3.0);
        assert_eq!(tensor.max().double_value(&[]), 3.0);
        comm.broadcast(&mut tensor, 1).expect("broadcast");
    });
}

fn sums_are_sums<R: Rank>() {
    let config = ProptestConfig {
        cases: 24,
        ..ProptestConfig::default()
    };
    proptest!(config, |(world in 1u32..6, values in prop::collection::vec(-1e3f64..1e3, 0..200), many in any::<bool>())| {
        let scale = |rank: u32| f64::from(rank) + 0.5;
        let results = in_world(world, |comm: &mut R| {
            let own: Vec<f64> = values.iter().map(|v| v * scale(comm.rank())).collect();
            let mut tensor = Tensor::from_slice(&own);
            if many {
                comm.barrier().expect("barrier");
            }
            comm.all_reduce(&mut tensor, ReduceOp::Sum).expect("all_reduce");
            numbers(&tensor)
        });
        let factor: f64 = (0..world).map(scale).sum();
        for result in &results {
            prop_assert_eq!(result.len(), values.len());
            for (sum, value) in result.iter().zip(&values) {
                prop_assert!((sum - value * factor).abs() <= 1e-12 * value.abs() * factor.max(1.0) * 8.0);
            }
        }
    });
}

/// The operations in which a peer can be lost.
type Call = fn(&mut dyn Collective) -> Result<(), CollectiveError>;
const CALLS: [(&str, Call); 6] = [
    ("all_reduce", |comm| {
        comm.all_reduce(&mut sample(0, 700_000, Kind::Float), ReduceOp::Sum)
    }),
    ("small all_reduce", |comm| {
        comm.all_reduce(&mut sample(0, 2, Kind::Float), ReduceOp::Sum)
    }),
    ("all_gather", |comm| {
        comm.all_gather(&sample(0, 300_000, Kind::Float)).map(drop)
    }),
    ("reduce_scatter", |comm| {
        comm.reduce_scatter(&sample(0, 600_000, Kind::Float)).map(drop)
    }),
    ("broadcast", |comm| {
        comm.broadcast(&mut sample(0, 900_000, Kind::Float), 0)
    }),
    ("barrier", |comm| comm.barrier()),
];

/// Every rank names the lost one, also those that are not beside it in the ring.
fn a_lost_rank_is_named_by_all_in_every_operation<R: Rank>() {
    for (name, call) in CALLS {
        for lost in 0..4u32 {
            let results = in_world(4, |comm: &mut R| {
                // The others may still be inside this barrier when the lost rank has come through: then it is lost there.
                let together = comm.barrier();
                if comm.rank() == lost {
                    comm.die();
                    return None;
                }
                let start = Instant::now();
                // A rank that needs nothing from the lost one may come through once.
                let result = together.and_then(|()| call(comm)).and_then(|()| call(comm));
                let result = result.and_then(|()| comm.barrier());
                Some((result, start.elapsed()))
            });
            for (rank, (result, took)) in results.into_iter().enumerate().filter_map(|(r, x)| Some((r, x?))) {
                let error = result.expect_err("a rank is missing");
                match &error {
                    CollectiveError::PeerLost { peer, .. } => {
                        assert_eq!(*peer, lost, "{name} on {rank}: {error}")
                    }
                    other => panic!("{name} on {rank}: {other}"),
                }
                assert!(took < Duration::from_secs(2), "{name} on {rank} took {took:?}");
            }
        }
    }
}

/// A rank that leaves in good order while others still want it is named too. One that is still in the barrier that the
/// others have left may hear of it there.
fn a_rank_that_left_is_named<R: Rank>() {
    let results = in_world(4, |comm: &mut R| {
        let first = comm.barrier();
        if comm.rank() == 2 {
            first.expect("nobody has left yet");
            return None;
        }
        Some(first.and_then(|()| comm.barrier()).and_then(|()| comm.barrier()))
    });
    for result in results.into_iter().flatten() {
        let lost = matches!(result, Err(CollectiveError::PeerLost { peer: 2, .. }));
        assert!(lost, "{result:?}");
    }
}

/// The last call of a world ends well everywhere, however early the first rank leaves.
fn an_orderly_end_fails_nobody<R: Rank>() {
    for _ in 0..20 {
        in_world(4, |comm: &mut R| {
            let mut tensor = sample(comm.rank(), 50_000, Kind::Float);
            comm.all_reduce(&mut tensor, ReduceOp::Sum)
                .expect("the last call");
        });
    }
}

/// A rank that is alive but does not come is a timeout, and all name it, not the one that waits beside them.
fn a_silent_rank_is_named_by_all<R: Rank>() {
    let deadline = Duration::from_millis(1200);
    for (name, call) in [CALLS[1], CALLS[5]] {
        let (done, wait) = std::sync::mpsc::sync_channel::<()>(4);
        let wait = std::sync::Mutex::new(wait);
        let results = on_ranks(R::world(5, deadline), |comm| {
            let done = done.clone();
            comm.barrier().expect("all there");
            if comm.rank() == 3 {
                let wait = wait.lock().expect("its only user");
                (0..4).for_each(|_| wait.recv().expect("the others report"));
                return None;
            }
            let start = Instant::now();
            let result = call(comm);
            done.send(()).expect("the silent rank listens");
            Some((result, start.elapsed()))
        });
        for (result, took) in results.into_iter().flatten() {
            assert!(
                matches!(result, Err(CollectiveError::Timeout { peer: 3, .. })),
                "{name}: {result:?}"
            );
            assert!(took < deadline * 3, "{name}: {took:?}");
        }
    }
}

fn different_calls_are_a_mismatch_not_a_hang<R: Rank>() {
    let calls: [Call; 3] = [
        |comm| comm.all_reduce(&mut sample(0, 10, Kind::Float), ReduceOp::Sum),
        |comm| comm.all_reduce(&mut sample(0, 10, Kind::Float), ReduceOp::Max),
        |comm| comm.all_reduce(&mut sample(0, 20, Kind::BFloat16), ReduceOp::Sum),
    ];
    let barrier: Call = |comm| comm.barrier();
    for other in calls.into_iter().skip(1).chain([barrier]) {
        let results = in_world(3, |comm: &mut R| {
            let call = if comm.rank() == 1 { other } else { calls[0] };
            let result = call(comm);
            assert!(matches!(comm.barrier(), Err(CollectiveError::Dead { .. })));
            result
        });
        for result in results {
            assert!(
                matches!(result, Err(CollectiveError::Mismatch { .. })),
                "{result:?}"
            );
        }
    }
}

/// Strangers, noise, silence and ranks of an older generation knock first; the world comes up all the same.
#[test]
fn strangers_do_not_disturb_a_world() {
    let timeouts = Timeouts {
        connect: Duration::from_secs(30),
        operation: PATIENT,
    };
    let session = |job: &str, generation| Session {
        job: job.to_owned(),
        generation,
    };
    let mut listeners = Vec::new();
    let mut endpoints = Vec::new();
    for _ in 0..3 {
        let (listener, port) = Listener::bind("127.0.0.1").expect("loopback");
        listeners.push(listener);
        endpoints.push(format!("127.0.0.1:{port}"));
    }
    let endpoints = &endpoints;
    let mut strangers: Vec<TcpStream> = endpoints
        .iter()
        .map(|endpoint| TcpStream::connect(endpoint).expect("loopback"))
        .collect();
    strangers[0].write_all(&[b'x'; 500]).expect("noise");
    strangers[1]
        .write_all(b"GET / HTTP/1.1\r\n\r\n")
        .expect("half a hello");
    thread::scope(|scope| {
        let mut stale = Vec::new();
        for old in [session("job", 6), session("another", 7)] {
            let (listener, port) = Listener::bind("127.0.0.1").expect("loopback");
            let mut peers = endpoints.clone();
            peers[2] = format!("127.0.0.1:{port}");
            stale.push(scope.spawn(move || listener.connect(&old, 2, &peers, timeouts).map(drop)));
        }
        let ranks: Vec<_> = (0..)
            .zip(listeners)
            .map(|(rank, listener)| {
                let session = session("job", 7);
                scope.spawn(move || {
                    let mut comm = listener
                        .connect(&session, rank, endpoints, timeouts)
                        .expect("its world");
                    comm.barrier().expect("barrier");
                })
            })
            .collect();
        ranks
            .into_iter()
            .for_each(|rank| rank.join().expect("a rank failed"));
        for refused in stale {
            let refused = refused.join().expect("no panic");
            assert!(
                matches!(
                    refused,
                    Err(CollectiveError::PeerLost {
                        operation: "connect",
                        ..
                    })
                ),
                "{refused:?}"
            );
        }
    });
    let mut rest = Vec::new();
    assert!(strangers[0].read_to_end(&mut rest).is_ok_and(|n| n == 0) || rest.is_empty());
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let timeouts = Timeouts {
        connect: Duration::from_millis(300),
        operation: PATIENT,
    };
    let (listener, port) = Listener::bind("127.0.0.1").expect("loopback");
    let (_kept, silent) = Listener::bind("127.0.0.1").expect("loopback");
    let endpoints = [format!("127.0.0.1:{port}"), format!("127.0.0.1:{silent}")];
    let session = Session {
        job: "job".to_owned(),
        generation: 1,
    };
    let late = listener.connect(&session, 0, &endpoints, timeouts).map(drop);
    let named = matches!(
        late,
        Err(CollectiveError::Timeout {
            operation: "connect",
            peer: 1,
            ..
        })
    );
    assert!(named, "{late:?}");
}
