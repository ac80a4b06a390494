//! Tables of whole lives, and the invariants under any order of events.

use super::*;
use crate::tables;
use arcface_proto::{convert, v1};
use proptest::prelude::*;
use std::collections::HashMap;

const LIMITS: Limits = Limits {
    backoff_ms: 1000,
    backoff_max_ms: 8000,
    spawn_ms: 60_000,
    grace_ms: 5000,
};

fn spec(world_size: u32, max_restarts: u32) -> JobSpec {
    let wire = v1::JobSpec {
        output: Some("out".into()),
        job: Some(v1::JobSection {
            world_size: Some(world_size),
            max_restarts: Some(max_restarts),
            ..Default::default()
        }),
        model: Some(v1::ModelSection {
            network: Some("tiny".into()),
            ..Default::default()
        }),
        data: Some(v1::DataSection {
            rec: Some("/data".into()),
            ..Default::default()
        }),
        ..Default::default()
    };
    convert::job_spec(&wire).expect("a valid job")
}

fn job(world_size: u32, max_restarts: u32) -> Job {
    Job::new(JobId::from_random(1), spec(world_size, max_restarts), 0)
}

/// `key=value` words of a line.
struct Words<'a>(HashMap<&'a str, &'a str>);

impl Words<'_> {
    fn number(&self, key: &str, default: u64) -> u64 {
        self.0
            .get(key)
            .map_or(default, |text| text.parse().expect("a number"))
    }
    fn rank(&self) -> Rank {
        Rank(self.number("rank", 0) as u32)
    }
    fn node(&self) -> NodeId {
        self.0["node"].parse().expect("node id")
    }
    fn text(&self, key: &str) -> String {
        self.0
            .get(key)
            .map_or(String::new(), |text| text.replace('_', " "))
    }
}

/// `AT EVENT [key=value]...`; the generation is the newest unless `gen=` says otherwise.
fn parse(line: &str, job: &Job) -> (Event, Now) {
    let mut words = line.split_whitespace();
    let at: u64 = words.next().expect("time").parse().expect("time");
    let kind = words.next().expect("event");
    let words = Words(
        words
            .map(|word| word.split_once('=').unwrap_or((word, "true")))
            .collect(),
    );
    let generation = Generation(words.number("gen", job.generation.0));
    let rank = words.rank();
    let event = match kind {
        "plan" => Event::Planned(Ok(words.0["on"]
            .split(',')
            .map(|id| id.parse().expect("node id"))
            .collect())),
        "wait" => Event::Planned(Err(words.text("for"))),
        "spawned" => Event::Spawned {
            generation,
            rank,
            pid: words.number("pid", 7) as u32,
        },
        "exited" => Event::Exited {
            generation,
            rank,
            exit: Exit {
                code: words.0.get("code").map(|code| code.parse().expect("code")),
                signal: words
                    .0
                    .get("signal")
                    .map(|signal| signal.parse().expect("signal")),
                last_error: words.text("last"),
                requested: words.0.contains_key("requested"),
                stalled_ms: words.0.get("stalled").map(|ms| ms.parse().expect("stalled")),
            },
            silent_ms: words.number("silent", 200),
        },
        "listed" => Event::Listed {
            node: words.node(),
            ranks: words
                .0
                .get("ranks")
                .map(|list| {
                    list.split(',')
                        .map(|rank| (Rank(rank.parse().expect("rank")), 7))
                        .collect()
                })
                .unwrap_or_default(),
            joined: words.0.contains_key("joined"),
        },
        "lost" => Event::NodeLost {
            node: words.node(),
            silent_ms: words.number("silent", 3000),
        },
        "restarted" => Event::NodeRestarted { node: words.node() },
        "orphaned" => Event::NodeOrphaned { node: words.node() },
        "started" => Event::Started {
            generation,
            rank,
            step: words.number("step", 0),
            total_steps: 100,
            from_memory: false,
        },
        "metrics" => Event::Metrics {
            generation,
            progress: Progress {
                step: words.number("step", 0),
                ..Progress::default()
            },
            step_seconds: words.number("step_ms", 0) as f64 / 1000.0,
        },
        "finished" => Event::Finished {
            generation,
            rank,
            step: words.number("step", 100),
            reason: words.text("early"),
        },
        "error" => Event::Error {
            generation,
            rank,
            message: words.text("says"),
            permanent: words.0.contains_key("permanent"),
            peer: words.0.get("peer").map(|peer| Rank(peer.parse().expect("rank"))),
            rollback_step: words.0.get("without").map(|step| step.parse().expect("step")),
        },
        "committed" => Event::Committed {
            generation,
            step: words.number("step", 0),
        },
        "damaged" => Event::Damaged {
            generation,
            rank,
            message: words.text("says"),
            left: words.0.get("left").map(|step| step.parse().expect("step")),
        },
        "cancel" => Event::Cancel {
            reason: words.text("why"),
        },
        "drain" => Event::Drain { node: words.node() },
        "stay" => Event::Stay { node: words.node() },
        "room" => Event::Room(words.0.get("ranks").map(|ranks| ranks.parse().expect("ranks"))),
        "tick" => Event::Tick,
        other => panic!("unknown event {other:?}"),
    };
    (
        event,
        Now {
            mono_ms: at,
            unix_ms: at,
        },
    )
}

fn case(lines: &[&str]) -> String {
    let mut job = job(2, 2);
    let mut output = Vec::new();
    for line in lines {
        let (event, now) = parse(line, &job);
        if matches!(event, Event::Planned(Ok(_)))
            && let Err(why) = job.may_launch(now)
        {
            output.push(format!(
                "{line}: may not launch, {}",
                why.unwrap_or_else(|| "waits for no plan".into())
            ));
            continue;
        }
        match step(&job, &event, now, &LIMITS) {
            Err(refused) => output.push(format!("{line}: refused, {refused}")),
            Ok((next, effects)) => {
                job = next;
                let reason = if job.reason.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", job.reason)
                };
                let effects: Vec<String> = effects.iter().map(|effect| format!("{effect:?}")).collect();
                output.push(format!(
                    "{line}: {} {}{reason} [{}]",
                    job.phase,
                    job.generation,
                    effects.join(", ")
                ));
            }
        }
    }
    if !job.left_out_steps.is_empty() {
        output.push(format!("left out {:?}", job.left_out_steps));
    }
    for recovery in &job.recoveries {
        output.push(format!(
            "recovery from {}: {} ({}), detected {} s, resumed {:?}, lost {:?}, total {:?}",
            recovery.from,
            recovery.reason,
            recovery.kind.as_str(),
            recovery.detected_s,
            recovery.resumed_step,
            recovery.lost_steps,
            recovery.total_s
        ));
    }
    output.join("\n")
}

#[test]
fn lives() {
    tables::run("job/lives.txt", case);
}

#[test]
fn failures() {
    tables::run("job/failures.txt", case);
}

#[test]
fn fences() {
    tables::run("job/fences.txt", case);
}

/// Edges of the picture in the module's head, over any number of steps at once (an event may pass through two).
fn allowed(from: Phase, to: Phase) -> bool {
    use Phase::*;
    from == to
        || match from {
            Queued => matches!(to, Starting | Cancelling | Cancelled),
            Starting => matches!(
                to,
                Running | Recovering | Succeeded | Failed | Cancelling | Cancelled
            ),
            Running => matches!(to, Recovering | Succeeded | Failed | Cancelling | Cancelled),
            Recovering => matches!(to, Starting | Failed | Cancelling | Cancelled),
            Cancelling => to == Cancelled,
            Succeeded | Failed | Cancelled => false,
        }
}

fn node() -> impl Strategy<Value = NodeId> {
    (0u8..3).prop_map(|n| format!("n{n}").parse().expect("node id"))
}

fn any_event() -> impl Strategy<Value = Event> {
    // Generations near the newest ones: stale, current and future.
    let generation = || (0u64..5).prop_map(Generation);
    let rank = || (0u32..3).prop_map(Rank);
    let exit = (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(ok, signal, requested)| Exit {
        code: (!signal).then_some(if ok { 0 } else { 1 }),
        signal: signal.then_some(9),
        last_error: String::new(),
        requested,
        stalled_ms: None,
    });
    prop_oneof![
        3 => prop::collection::vec(node(), 2..3).prop_map(|mut nodes| { nodes.sort(); Event::Planned(Ok(nodes)) }),
        4 => (generation(), rank()).prop_map(|(generation, rank)| Event::Spawned { generation, rank, pid: 1 }),
        3 => (generation(), rank(), exit).prop_map(|(generation, rank, exit)|
            Event::Exited { generation, rank, exit, silent_ms: 1 }),
        1 => (node(), prop::collection::vec(rank().prop_map(|rank| (rank, 1)), 0..3), any::<bool>())
            .prop_map(|(node, ranks, joined)| Event::Listed { node, ranks, joined }),
        1 => node().prop_map(|node| Event::NodeLost { node, silent_ms: 3000 }),
        1 => node().prop_map(|node| Event::NodeRestarted { node }),
        1 => node().prop_map(|node| Event::NodeOrphaned { node }),
        4 => (generation(), rank()).prop_map(|(generation, rank)|
            Event::Started { generation, rank, step: 0, total_steps: 9, from_memory: false }),
        2 => generation().prop_map(|generation|
            Event::Metrics { generation, progress: Progress { step: 5, ..Default::default() }, step_seconds: 0.1 }),
        2 => (generation(), rank()).prop_map(|(generation, rank)| Event::Finished { generation, rank, step: 9, reason: String::new() }),
        1 => (generation(), rank(), any::<bool>(), proptest::option::of(0u64..100)).prop_map(
            |(generation, rank, permanent, rollback_step)|
            Event::Error { generation, rank, message: String::new(), permanent, peer: None, rollback_step }),
        2 => (generation(), 0u64..9).prop_map(|(generation, step)| Event::Committed { generation, step }),
        1 => (generation(), rank(), any::<bool>()).prop_map(|(generation, rank, left)| Event::Damaged {
            generation, rank, message: String::new(), left: left.then_some(0) }),
        1 => Just(Event::Cancel { reason: String::new() }),
        1 => node().prop_map(|node| Event::Drain { node }),
        1 => node().prop_map(|node| Event::Stay { node }),
        1 => proptest::option::of(1u32..5).prop_map(Event::Room),
        2 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn invariants_hold_under_any_events(events in prop::collection::vec((any_event(), 0u64..5000), 1..80)) {
        let mut job = job(2, 3);
        let mut now = Now::default();
        let mut cancelled = false;
        for (event, wait) in events {
            now.mono_ms += wait;
            now.unix_ms += wait;
            let before = job.clone();
            let Ok((after, effects)) = step(&before, &event, now, &LIMITS) else { continue };

            prop_assert!(allowed(before.phase, after.phase), "{} -> {} by {event:?}", before.phase, after.phase);
            // Generations count up by one, and only by a launch.
            let opened = after.generation != before.generation;
            prop_assert!(!opened || after.generation == before.generation.next());
            prop_assert_eq!(opened, effects.contains(&Effect::Launch(None)));
            if opened {
                // One rank index, one process: nothing that we reach runs, and the old world cannot step.
                prop_assert!(before.ranks.iter().all(|rank| !rank.process.occupies()));
                let fenced = before.ranks.is_empty()
                    || before.ranks.iter().any(|rank| rank.process == Process::Reaped)
                    || before.ranks.iter().all(|rank| rank.process == Process::Presumed);
                prop_assert!(fenced, "launched beside {:?}", before.ranks);
                prop_assert!(now.mono_ms >= before.not_before_ms);
            }
            // A change of phase or generation is stored before anybody acts on it.
            if opened || after.phase != before.phase {
                prop_assert!(effects.contains(&Effect::Persist));
            }
            // A generation that ends early is killed.
            let ended_early = before.phase.wants_ranks() && !after.phase.wants_ranks()
                && after.phase != Phase::Succeeded && after.ranks.iter().any(|rank| rank.process.occupies());
            let killed = effects.iter().any(|effect| matches!(effect, Effect::Kill { .. }));
            prop_assert!(!ended_early || killed);
            // Messages of other generations change nothing but freed slots.
            if let Event::Metrics { generation, .. } | Event::Started { generation, .. }
                | Event::Committed { generation, .. } = &event {
                prop_assert_eq!(*generation, before.generation);
            }
            cancelled |= matches!(event, Event::Cancel { .. }) && !before.phase.is_terminal();
            if cancelled {
                prop_assert!(matches!(after.phase, Phase::Cancelling | Phase::Cancelled));
            }
            if before.phase.is_terminal() {
                prop_assert_eq!(&after.reason, &before.reason);
            }
            prop_assert!(after.failures <= after.spec.max_restarts + 1);
            // The committed step moves forward, but for a checkpoint that turned out damaged.
            let damaged = matches!(event, Event::Damaged { .. });
            prop_assert!(damaged || after.checkpoint_step >= before.checkpoint_step);
            // Never from scratch behind its user's back.
            prop_assert!(!damaged || after.checkpoint_step.is_some() || !after.phase.wants_ranks());
            job = after;
        }
    }
}
