//! One simulation: a cluster, a schedule of faults that its seed decides, then fair weather in which everything must
//! come to its end.

use crate::{
    agent::{self, Node},
    clients::{self, Drain, Plan},
    coordinator,
    determinism::{Rng, with_seed},
    double::Double,
    history::{Shared, World},
    store::{Disk, Faults},
};
#[cfg(feature = "planted-bugs")]
use arcface_coordinator::planted::Bug;
use arcface_coordinator::server::Timers;
use std::{
    collections::BTreeMap,
    fmt,
    str::FromStr,
    sync::{Arc, Mutex},
    time::Duration,
};
use turmoil::{Builder, Sim};

/// The product's timers, shorter in about the same proportions.
pub const TIMERS: Timers = Timers {
    heartbeat_ms: 200,
    suspect_ms: 600,
    lost_ms: 1_200,
    orphan_ms: 6_000,
    rejoin_ms: 3_000,
    rendezvous_ms: 5_000,
    backoff_ms: 100,
    backoff_max_ms: 800,
    grace_ms: 300,
    leader_ms: 2_000,
};

const COORDINATORS: [&str; 2] = ["c0", "c1"];
const NODES: [&str; 3] = ["n0", "n1", "n2"];
const CLIENT: &str = "people";
const TICK_MS: u64 = 10;
/// Faults are made for so long.
const STORM_MS: u64 = 12_000;
/// After it, everything has to be at its end within so long.
const LIMIT_MS: u64 = 120_000;

/// What a seed is run with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub double: Option<Double>,
    #[cfg(feature = "planted-bugs")]
    pub bug: Option<Bug>,
    pub verbose: bool,
}

impl Options {
    /// A fault by its name; the empty name is none.
    pub fn with_fault(name: &str) -> Self {
        let double = Double::ALL
            .into_iter()
            .find(|double| format!("{double:?}") == name);
        #[cfg(feature = "planted-bugs")]
        let bug = Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
        #[cfg(not(feature = "planted-bugs"))]
        let bug = None::<()>;
        assert!(
            name.is_empty() || double.is_some() || bug.is_some(),
            "there is no fault {name}"
        );
        Self {
            double,
            #[cfg(feature = "planted-bugs")]
            bug,
            verbose: false,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Of the whole history.
    pub hash: u64,
    pub events: u64,
    pub simulated_ms: u64,
    pub violations: Vec<String>,
}

/// One line: numbers, then violations behind bars.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.hash, self.events, self.simulated_ms)?;
        self.violations
            .iter()
            .try_for_each(|violation| write!(f, "|{}", violation.replace(['|', '\n'], " ")))
    }
}

impl FromStr for Outcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('|');
        let numbers: Vec<u64> = parts
            .next()
            .unwrap_or_default()
            .split(' ')
            .map(|number| number.parse().map_err(|error| format!("{number:?}: {error}")))
            .collect::<Result<_, String>>()?;
        let [hash, events, simulated_ms] = numbers[..] else {
            return Err(format!("{} numbers", numbers.len()));
        };
        Ok(Self {
            hash,
            events,
            simulated_ms,
            violations: parts.map(str::to_owned).collect(),
        })
    }
}

/// Runs one seed on a thread of its own.
pub fn run(seed: u64, options: Options) -> Outcome {
    with_seed(seed, move || {
        #[cfg(feature = "planted-bugs")]
        arcface_coordinator::planted::plant(options.bug);
        Run::new(seed, options).finish()
    })
}

/// Something that is undone later.
enum Undo {
    Bounce(&'static str),
    Repair(&'static str, &'static str),
    Release(&'static str, &'static str),
    Latency,
    Store,
    /// A replaced coordinator notices at last.
    Retire(&'static str),
}

struct Run {
    sim: Sim<'static>,
    rng: Rng,
    world: Shared,
    disk: Disk,
    undo: BTreeMap<(u64, u64), Undo>,
    undos: u64,
    down: BTreeMap<&'static str, u32>,
}

impl Run {
    fn new(seed: u64, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let world: Shared = Arc::new(Mutex::new(World::new(options.verbose)));
        let disk = Disk::new(Rng::new(rng.next()), options.double, world.clone());
        let mut sim = Builder::new()
            .rng_seed(rng.next())
            .tick_duration(Duration::from_millis(TICK_MS))
            .simulation_duration(Duration::from_secs(3600))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(15))
            .tcp_capacity(4096)
            .enable_random_order()
            .build();
        world.lock().expect("world").leader = COORDINATORS[0];
        for name in COORDINATORS {
            let (world, disk) = (world.clone(), disk.clone());
            sim.host(name, move || {
                coordinator::run(name, world.clone(), disk.clone(), TIMERS)
            });
        }
        let hosts: Vec<String> = COORDINATORS.map(str::to_owned).to_vec();
        let mut slots = 0;
        for name in NODES {
            let node = Arc::new(Node {
                name: name.into(),
                slots: rng.between(1, 2) as u32,
                coordinators: hosts.clone(),
                timers: TIMERS,
                world: world.clone(),
                double: options.double,
            });
            slots += u64::from(node.slots);
            world.lock().expect("world").slots.insert(name.into(), node.slots);
            let seed = rng.next();
            sim.host(name, move || agent::run(node.clone(), seed));
        }
        let plans: Vec<(Plan, Rng)> = (0..rng.between(1, 4) as usize)
            .map(|index| (clients::plan(&mut rng, index, slots), Rng::new(rng.next())))
            .collect();
        let drains: Vec<Drain> = (0..rng.below(2))
            .map(|_| Drain {
                node: (*rng.pick(&NODES)).to_owned(),
                at_ms: rng.between(0, 8_000),
                for_ms: rng.between(1_000, 6_000),
            })
            .collect();
        let people = world.clone();
        sim.client(CLIENT, async move {
            let mut tasks = tokio::task::JoinSet::new();
            for (plan, rng) in plans {
                tasks.spawn_local(clients::own(plan, hosts.clone(), people.clone(), rng));
            }
            for drain in drains {
                tasks.spawn_local(clients::drain(drain, hosts.clone()));
            }
            while tasks.join_next().await.is_some() {}
            Ok(())
        });
        Self {
            sim,
            rng,
            world,
            disk,
            undo: BTreeMap::new(),
            undos: 0,
            down: BTreeMap::new(),
        }
    }

    fn now_ms(&self) -> u64 {
        self.sim.elapsed().as_millis() as u64
    }

    /// Lets a tick pass; true once the clients have all their answers.
    fn step(&mut self) -> bool {
        self.world.lock().expect("world").now_ms = self.now_ms();
        match self.sim.step() {
            Ok(finished) => finished,
            Err(error) => {
                let how = format!("a host failed: {error}");
                self.world.lock().expect("world").broken("host", how);
                true
            }
        }
    }

    fn finish(mut self) -> Outcome {
        let mut next_fault = self.rng.between(300, 2_000);
        while self.now_ms() < STORM_MS && self.is_safe() {
            self.step();
            let now = self.now_ms();
            while let Some(entry) = self.undo.first_entry().filter(|entry| entry.key().0 <= now) {
                let undo = entry.remove();
                self.undo(undo);
            }
            if now >= next_fault {
                next_fault = now + self.rng.between(50, 1_600);
                self.fault();
            }
        }
        self.heal();
        let limit = self.now_ms() + LIMIT_MS;
        let mut clients_done = false;
        while self.is_safe() {
            clients_done |= self.step();
            let unfinished = self.world.lock().expect("world").unfinished();
            if unfinished.is_empty() && clients_done {
                break;
            }
            if self.now_ms() > limit {
                let mut world = self.world.lock().expect("world");
                let clients = if clients_done { "" } else { "; a client waits" };
                world.broken("L2", format!("{}{clients}", unfinished.join("; ")));
            }
        }
        let mut world = self.world.lock().expect("world");
        if world.violations.is_empty() {
            world.check_ends();
        }
        Outcome {
            hash: world.hash(),
            events: world.events,
            simulated_ms: world.now_ms,
            violations: world.violations.clone(),
        }
    }

    fn is_safe(&self) -> bool {
        self.world.lock().expect("world").violations.is_empty()
    }

    fn event(&self, what: String) {
        self.world.lock().expect("world").event(what);
    }

    fn later(&mut self, lo: u64, hi: u64, undo: Undo) {
        self.undos += 1;
        let at = self.now_ms() + self.rng.between(lo, hi);
        self.undo.insert((at, self.undos), undo);
    }

    fn fault(&mut self) {
        let coordinator = *self.rng.pick(&COORDINATORS);
        let node = *self.rng.pick(&NODES);
        match self.rng.below(100) {
            0..12 => {
                let leader = self.world.lock().expect("world").leader;
                self.crash(leader);
                self.later(50, 3_500, Undo::Bounce(leader));
            }
            12..22 => self.replace(),
            22..34 => {
                self.crash(node);
                self.later(50, 5_000, Undo::Bounce(node));
            }
            34..52 => self.kill_rank(),
            52..64 => self.partition(coordinator, node, 3),
            64..70 => {
                let other = *self.rng.pick(&NODES);
                if other != node {
                    self.partition(node, other, 1);
                }
            }
            70..76 => {
                self.event(format!("hold {coordinator} {node}"));
                self.sim.hold(coordinator, node);
                self.later(100, 3_000, Undo::Release(coordinator, node));
            }
            76..82 => {
                let longest = self.rng.between(20, 400);
                self.event(format!("latency {longest}"));
                self.sim.set_max_message_latency(Duration::from_millis(longest));
                self.later(500, 3_000, Undo::Latency);
            }
            82..86 => {
                self.partition(coordinator, CLIENT, 1);
            }
            _ => {
                let faults = Faults {
                    fail: *self.rng.pick(&[0, 20, 100]),
                    unknown: *self.rng.pick(&[0, 30]),
                    slow_ms: *self.rng.pick(&[0, 20, 300]),
                };
                self.event(format!("store {faults:?}"));
                self.disk.set_faults(faults);
                self.later(200, 3_000, Undo::Store);
            }
        }
    }

    fn crash(&mut self, host: &'static str) {
        self.event(format!("crash {host}"));
        *self.down.entry(host).or_default() += 1;
        self.sim.crash(host);
        self.world.lock().expect("world").node_down(host);
    }

    fn bounce(&mut self, host: &'static str) {
        self.event(format!("bounce {host}"));
        self.down.remove(host);
        self.sim.crash(host);
        self.sim.bounce(host);
    }

    /// Another coordinator takes over; the old one does not know yet.
    fn replace(&mut self) {
        let old = self.world.lock().expect("world").leader;
        let new = if old == COORDINATORS[0] {
            COORDINATORS[1]
        } else {
            COORDINATORS[0]
        };
        self.world.lock().expect("world").leader = new;
        self.event(format!("{new} replaces {old}"));
        self.bounce(new);
        self.later(500, 4_000, Undo::Retire(old));
    }

    fn kill_rank(&mut self) {
        let world = self.world.clone();
        let world = world.lock().expect("world");
        let processes: Vec<_> = world.processes.values().collect();
        if !processes.is_empty() {
            self.rng.pick(&processes).doom.notify_one();
        }
    }

    fn partition(&mut self, a: &'static str, b: &'static str, seconds: u64) {
        let kind = self.rng.below(3);
        self.event(format!("partition {kind} {a} {b}"));
        match kind {
            0 => self.sim.partition(a, b),
            1 => self.sim.partition_oneway(a, b),
            _ => self.sim.partition_oneway(b, a),
        }
        let mut world = self.world.lock().expect("world");
        world.apart.insert((a.into(), b.into()));
        world.apart.insert((b.into(), a.into()));
        drop(world);
        self.later(100, 1_500 * seconds, Undo::Repair(a, b));
    }

    fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Bounce(host) => {
                if self.down.contains_key(host) {
                    self.bounce(host);
                }
            }
            Undo::Repair(a, b) => {
                self.event(format!("repair {a} {b}"));
                self.sim.repair(a, b);
                let mut world = self.world.lock().expect("world");
                world.apart.remove(&(a.into(), b.into()));
                world.apart.remove(&(b.into(), a.into()));
            }
            Undo::Release(a, b) => {
                self.event(format!("release {a} {b}"));
                self.sim.release(a, b);
            }
            Undo::Latency => self.sim.set_max_message_latency(Duration::from_millis(15)),
            Undo::Store => self.disk.set_faults(Faults::default()),
            Undo::Retire(host) => {
                if self.world.lock().expect("world").leader != host {
                    self.crash(host);
                }
            }
        }
    }

    /// Ends every fault.
    fn heal(&mut self) {
        self.event("heal".into());
        for undo in std::mem::take(&mut self.undo).into_values() {
            self.undo(undo);
        }
        self.disk.set_faults(Faults::default());
        let leader = self.world.lock().expect("world").leader;
        for host in NODES.into_iter().chain([leader]) {
            if self.down.contains_key(host) {
                self.bounce(host);
            }
        }
    }
}
