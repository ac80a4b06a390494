//! Whom the planner looks at: nobody who could be planned is overlooked, and nobody is looked at for nothing.

use super::*;
use crate::store::StoreError;
use crate::{
    control::{AgentSession, Clock},
    job::Now,
    membership::Hello,
    server::Timers,
    store::EmbeddedStore,
};
use arcface_proto::{
    convert,
    spec::JobSpec,
    v1::{self, join_request, join_response},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::time::advance;

const NODES: usize = 3;

/// The state of a coordinator without its task, and the agents of its nodes.
struct World {
    control: Control,
    sessions: [Option<AgentSession>; NODES],
    running: [BTreeSet<RankKey>; NODES],
    boots: u32,
}

fn node(index: usize) -> NodeId {
    format!("n{index}").parse().expect("node id")
}

fn spec(world_size: u32, elastic: &str) -> JobSpec {
    let wire = v1::JobSpec {
        output: Some("out".into()),
        job: Some(v1::JobSection {
            world_size: Some(world_size),
            max_world_size: (elastic == "both").then_some(world_size + 2),
            min_world_size: (elastic == "both").then_some(1),
            elastic: Some(elastic.into()),
            max_restarts: Some(5),
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

impl World {
    async fn new() -> Self {
        let memory = redb::backends::InMemoryBackend::new();
        let database = redb::Builder::new()
            .create_with_backend(memory)
            .expect("a store in memory");
        let store = EmbeddedStore::on(database, Path::new("memory"), || {
            Err(StoreError::Failed("memory is gone".into()))
        })
        .expect("open");
        let clock = Clock::new(|| std::time::SystemTime::UNIX_EPOCH);
        let control = Control::load(clock, Arc::new(store), Timers::default());
        let mut world = Self {
            control: control.await.expect("load"),
            sessions: Default::default(),
            running: Default::default(),
            boots: 0,
        };
        world.tick().await; // Nobody is there yet.
        world
    }

    /// What the task does after commands.
    async fn turn(&mut self) {
        if self.control.unplanned.any() {
            self.control.schedule().await;
        }
    }

    async fn tick(&mut self) {
        self.control.tick().await;
        self.turn().await;
    }

    async fn submit(&mut self, world_size: u32, elastic: &str) -> JobId {
        let number = self.control.jobs.len() as u64;
        let job = Job::new(JobId::from_random(number), spec(world_size, elastic), number);
        let id = job.id.clone();
        let key = crate::control::keys::job(&id);
        let record = crate::control::records::encode(&job, 1);
        let stored = self
            .control
            .store
            .commit(Transaction::default().put(key, record))
            .await;
        self.control.take_in(Entry::new(job, 1, stored.expect("stored")));
        self.turn().await;
        id
    }

    async fn join(&mut self, index: usize, slots: u32) {
        self.boots += 1;
        self.running[index].clear();
        let hello = Hello {
            node: node(index),
            boot_id: self.boots.to_string(),
            address: "127.0.0.1".into(),
            slots,
            device: "cpu".into(),
            version: "0".into(),
            ranks: Default::default(),
            copies_of: Vec::new(),
        };
        // One that is connected keeps its id.
        if let Ok(session) = self.control.join(hello).await {
            self.sessions[index] = Some(session);
        }
        self.turn().await;
    }

    async fn says(&mut self, index: usize, message: join_request::Message) {
        if let Some(session) = &self.sessions[index] {
            let stream = session.stream;
            // Refused if another stream speaks for the node.
            let _answer = self.control.agent_says(&node(index), stream, message).await;
            self.turn().await;
        }
    }

    /// The agent does what it was told, and says so with a heartbeat.
    async fn beat(&mut self, index: usize) {
        let mut exits = Vec::new();
        while let Some(Ok(told)) = self.sessions[index]
            .as_mut()
            .map(|session| session.commands.try_recv())
        {
            match told.message {
                Some(join_response::Message::Launch(launch)) => {
                    let keys = launch.assignments.iter().map(|assignment| RankKey {
                        job: assignment.job_id.parse().expect("job id"),
                        generation: arcface_proto::types::Generation(assignment.generation),
                        rank: Rank(assignment.rank),
                    });
                    self.running[index].extend(keys);
                }
                Some(join_response::Message::Kill(kill)) => {
                    let told = |key: &RankKey| {
                        key.job.as_str() == kill.job_id && key.generation.0 <= kill.generation
                    };
                    exits.extend(self.running[index].iter().filter(|key| told(key)).cloned());
                }
                _ => {}
            }
        }
        for key in exits {
            self.exit(index, &key, Some(9)).await;
        }
        let ranks = self.running[index].iter().map(|key| wire(key, 7)).collect();
        self.says(
            index,
            join_request::Message::Heartbeat(v1::Heartbeat { sequence: 1, ranks }),
        )
        .await;
    }

    async fn exit(&mut self, index: usize, key: &RankKey, signal: Option<i32>) {
        if self.running[index].remove(key) {
            let exited = v1::RankExited {
                rank: Some(wire(key, 7)),
                exit_code: signal.is_none().then_some(0),
                signal,
                ..Default::default()
            };
            self.says(index, join_request::Message::RankExited(exited)).await;
        }
    }

    fn job(&self, id: &JobId) -> &Job {
        &self.control.jobs[id].job
    }

    fn now(&self) -> Now {
        self.control.clock.now()
    }

    /// The planner, asked for every job that waits: nobody could be launched, and all know why.
    fn check(&self) -> Result<(), String> {
        let nodes = self.control.plan_nodes();
        for Entry { job, .. } in self.control.jobs.values() {
            let reason = match job.may_launch(self.now()) {
                Err(None) => continue,
                Err(Some(reason)) => reason,
                Ok(()) => match plan::plan(&nodes, job.wishes(), &job.placement()) {
                    Ok(placement) => return Err(format!("{} could run on {placement:?}", job.id)),
                    Err(refused) => refused.to_string(),
                },
            };
            if job.reason != reason {
                return Err(format!("{} says {:?}, not {reason:?}", job.id, job.reason));
            }
        }
        let mut recount = ledger::Ledger::default();
        let jobs = self.control.jobs.values();
        jobs.for_each(|entry| recount.change(None, &entry.job));
        match recount == self.control.ledger {
            true => Ok(()),
            false => Err(format!("{:?} is {recount:?}", self.control.ledger)),
        }
    }

    fn rooms(&self) -> Vec<Option<u32>> {
        self.control.jobs.values().map(|entry| entry.job.room).collect()
    }
}

fn wire(key: &RankKey, pid: u32) -> v1::NodeRank {
    v1::NodeRank {
        job_id: key.job.to_string(),
        generation: key.generation.0,
        rank: key.rank.0,
        pid,
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_was_refused_is_planned_as_soon_as_a_node_joins() {
    let mut world = World::new().await;
    let id = world.submit(2, "off").await;
    assert_eq!(world.job(&id).reason, "wants 2 ranks, 0 slots free on 0 nodes");
    world.join(0, 1).await;
    assert_eq!(world.job(&id).phase, Phase::Queued);
    world.join(1, 1).await;
    assert_eq!(world.job(&id).phase, Phase::Starting);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_was_refused_is_planned_as_soon_as_a_slot_is_free() {
    let mut world = World::new().await;
    world.join(0, 1).await;
    let first = world.submit(1, "off").await;
    let second = world.submit(1, "off").await;
    assert_eq!(world.job(&second).phase, Phase::Queued);
    world.beat(0).await;
    let key = world.running[0].first().cloned().expect("a rank");
    world.exit(0, &key, None).await;
    assert_eq!(
        (world.job(&first).phase, world.job(&second).phase),
        (Phase::Succeeded, Phase::Starting)
    );
}

#[tokio::test(start_paused = true)]
async fn a_job_that_was_refused_is_planned_as_soon_as_a_drain_is_taken_back() {
    let mut world = World::new().await;
    world.join(0, 1).await;
    world.control.drain(node(0), true).await.expect("drained");
    let id = world.submit(1, "off").await;
    assert_eq!(world.job(&id).phase, Phase::Queued);
    world.control.drain(node(0), false).await.expect("taken back");
    world.turn().await;
    assert_eq!(world.job(&id).phase, Phase::Starting);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_waits_for_a_time_is_planned_at_that_time_and_nobody_is_looked_at_before() {
    let mut world = World::new().await;
    world.join(0, 1).await;
    let id = world.submit(1, "off").await;
    world.beat(0).await;
    let key = world.running[0].first().cloned().expect("a rank");
    world.exit(0, &key, Some(9)).await;
    assert_eq!(world.job(&id).phase, Phase::Recovering);
    let wait_ms = world.job(&id).not_before_ms - world.now().mono_ms;
    world.tick().await;
    advance(Duration::from_millis(wait_ms - 1)).await;
    world.control.tick().await;
    assert!(!world.control.unplanned.any(), "nothing happened");
    advance(Duration::from_millis(1)).await;
    world.control.tick().await;
    world.turn().await;
    assert_eq!(world.job(&id).phase, Phase::Starting);
}

/// A job that waits for its back-off on the only slot, and one that waits for a slot.
async fn one_recovers_and_one_is_queued() -> (World, JobId, JobId) {
    let mut world = World::new().await;
    world.join(0, 1).await;
    let first = world.submit(1, "off").await;
    let second = world.submit(1, "off").await;
    world.beat(0).await;
    let key = world.running[0].first().cloned().expect("a rank");
    world.exit(0, &key, Some(9)).await;
    world.tick().await;
    world.tick().await;
    assert_eq!(
        (world.job(&first).phase, world.job(&second).phase),
        (Phase::Recovering, Phase::Queued),
        "its slot is kept for it"
    );
    assert_eq!(
        world.job(&second).reason,
        "wants 1 rank, 0 slots free on 1 node, 1 kept for a job that recovers"
    );
    (world, first, second)
}

#[tokio::test(start_paused = true)]
async fn a_job_that_recovers_gets_its_slots_back_before_others_get_them() {
    let (mut world, first, second) = one_recovers_and_one_is_queued().await;
    let wait_ms = world.job(&first).not_before_ms - world.now().mono_ms;
    advance(Duration::from_millis(wait_ms)).await;
    world.tick().await;
    assert_eq!(
        (world.job(&first).phase, world.job(&second).phase),
        (Phase::Starting, Phase::Queued)
    );
}

#[tokio::test(start_paused = true)]
async fn slots_kept_for_a_job_that_is_cancelled_go_to_the_next() {
    let (mut world, first, second) = one_recovers_and_one_is_queued().await;
    let cancel = Event::Cancel {
        reason: String::new(),
    };
    world.control.happened(&first, cancel).await;
    world.tick().await;
    assert_eq!(
        (world.job(&first).phase, world.job(&second).phase),
        (Phase::Cancelled, Phase::Starting)
    );
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_ended_keeps_its_slot_while_another_of_its_job_has_not() {
    let mut world = World::new().await;
    world.join(0, 2).await;
    let first = world.submit(2, "off").await;
    let second = world.submit(1, "off").await;
    world.beat(0).await;
    let key = world.running[0].first().cloned().expect("a rank");
    world.exit(0, &key, Some(9)).await;
    world.tick().await;
    assert_eq!(
        (world.job(&first).phase, world.job(&second).phase),
        (Phase::Recovering, Phase::Queued)
    );
    assert!(
        world.job(&first).ranks.iter().any(|rank| rank.process.occupies()),
        "the other one runs"
    );
}

#[tokio::test(start_paused = true)]
async fn nobody_is_looked_at_while_nothing_happens() {
    let mut world = World::new().await;
    world.join(0, 1).await;
    for _ in 0..3 {
        world.submit(2, "off").await;
    }
    world.tick().await;
    for _ in 0..10 {
        advance(Duration::from_millis(100)).await;
        world.beat(0).await;
        world.control.tick().await;
        assert!(!world.control.unplanned.any());
    }
}

#[tokio::test(start_paused = true)]
async fn reasons_of_many_are_renewed_little_by_little() {
    let mut world = World::new().await;
    for _ in 0..REASONS * 2 {
        world.submit(2, "off").await;
    }
    world.join(0, 1).await;
    let told = |world: &World| {
        let jobs = world.control.jobs.values();
        jobs.filter(|entry| entry.job.reason.contains("1 slot free"))
            .count()
    };
    assert_eq!(told(&world), REASONS);
    world.tick().await;
    assert_eq!(told(&world), REASONS * 2);
    world.check().expect("all know why");
}

/// One thing that happens: a letter's worth of choice each.
async fn act(world: &mut World, [what, who, how]: [u8; 3]) {
    let index = who as usize % NODES;
    let jobs: Vec<JobId> = world.control.jobs.keys().cloned().collect();
    match what % 12 {
        0 | 1 if jobs.len() < 8 => {
            let elastic = if how.is_multiple_of(2) { "off" } else { "both" };
            world.submit(1 + u32::from(who % 4), elastic).await;
        }
        2 => world.join(index, u32::from(how % 3)).await,
        3 => {
            if let Some(session) = &world.sessions[index] {
                let stream = session.stream;
                world.control.agent_left(&node(index), stream);
            }
        }
        4 => {
            let key = world.running[index].iter().nth(how as usize % 3).cloned();
            if let Some(key) = key {
                let signal = (!how.is_multiple_of(4)).then_some(9);
                world.exit(index, &key, signal).await;
            }
        }
        5 => drop(world.control.drain(node(index), !how.is_multiple_of(3)).await),
        6 => {
            world
                .says(index, join_request::Message::Leaving(v1::Leaving {}))
                .await
        }
        7 => {
            if let Some(id) = jobs.get(how as usize % jobs.len().max(1)) {
                world
                    .control
                    .happened(
                        id,
                        Event::Cancel {
                            reason: String::new(),
                        },
                    )
                    .await;
            }
        }
        8 => {
            // Its ranks begin to train.
            for key in world.running[index].clone() {
                let started = Event::Started {
                    generation: key.generation,
                    rank: key.rank,
                    step: 0,
                    total_steps: 100,
                    from_memory: false,
                };
                world.control.happened(&key.job, started).await;
            }
        }
        9 => advance(Duration::from_millis(u64::from(how) * 60)).await,
        _ => world.beat(index).await,
    }
    world.turn().await;
}

/// After anything that may happen, two ticks later the state is the one that a planner which looks at everybody leaves.
#[test]
fn nobody_is_overlooked() {
    let mut runner = TestRunner::new(Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    });
    let lives = prop::collection::vec(any::<[u8; 3]>(), 1..80);
    let lived = runner.run(&lives, |acts| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut world = World::new().await;
            for index in 0..NODES {
                world.join(index, 1 + index as u32).await;
            }
            for (at, deed) in acts.iter().enumerate() {
                act(&mut world, *deed).await;
                world.tick().await;
                world.tick().await;
                let overlooked = |what| TestCaseError::fail(format!("after {:?}: {what}", &acts[..=at]));
                world.check().map_err(overlooked)?;
                let waits = world.control.ledger.waiting().next().is_some();
                let rooms = world.rooms();
                if !waits {
                    world.control.offer_room().await;
                }
                prop_assert_eq!(&rooms, &world.rooms(), "after {:?}", &acts[..=at]);
            }
            Ok(())
        })
    });
    lived.unwrap_or_else(|broken| panic!("{broken}"));
}
