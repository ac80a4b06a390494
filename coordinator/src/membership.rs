//! Pure: which nodes there are and whether they live. Time is an argument, always the coordinator's own monotonic
//! clock at the moment of receipt, so no other machine's clock matters. Knows no jobs: ranks are keys here.
//!
//! A node is Healthy while its heartbeats come, Suspect when one is late (no new ranks), Lost when it has been silent
//! for so long that its generations end. A closed stream alone proves nothing: the agent joins again.

use arcface_proto::types::{Generation, JobId, NodeId, Rank};
use std::{collections::BTreeMap, fmt};

/// Silences and what they mean, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Silence that makes a node Suspect.
    pub suspect_ms: u64,
    /// Silence that makes a node Lost.
    pub lost_ms: u64,
    /// The same for a node that has not joined since the coordinator started.
    pub rejoin_ms: u64,
    /// Silence after which an agent has killed its ranks by itself; we wait 5% longer.
    pub orphan_ms: u64,
    /// Silence after which a lost node is forgotten.
    pub forget_ms: u64,
}

/// Whether a node lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Liveness {
    /// Known from the store, not seen since the coordinator started.
    Awaited,
    /// Heartbeats come.
    Healthy,
    /// A heartbeat is late.
    Suspect,
    /// Silent for too long.
    Lost,
}

impl fmt::Display for Liveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Awaited => "awaited",
            Self::Healthy => "healthy",
            Self::Suspect => "suspect",
            Self::Lost => "lost",
        })
    }
}

/// One rank process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RankKey {
    /// Job.
    pub job: JobId,
    /// Generation.
    pub generation: Generation,
    /// Rank.
    pub rank: Rank,
}

/// Process ids of the ranks that an agent says it runs.
pub type RankList = BTreeMap<RankKey, u32>;

/// What an agent says of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Node's id.
    pub node: NodeId,
    /// Random per start of the agent.
    pub boot_id: String,
    /// Host at which its ranks listen.
    pub address: String,
    /// Ranks it can run at once.
    pub slots: u32,
    /// "cpu" or "cuda".
    pub device: String,
    /// Version of arcface-worker.
    pub version: String,
    /// Ranks that run.
    pub ranks: RankList,
    /// Jobs of which it has copies in memory.
    pub copies_of: Vec<JobId>,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Member {
    /// What it said when it joined; `ranks` is its newest list.
    pub hello: Hello,
    /// Whether it lives.
    pub liveness: Liveness,
    /// Gets no new ranks.
    pub draining: bool,
    /// The stream that speaks for it; `None` while it is disconnected.
    pub stream: Option<u64>,
    /// When it was last heard.
    pub heard_ms: u64,
    /// When it joined: milliseconds since the Unix epoch, to be shown.
    pub joined_unix_ms: u64,
    /// Its silence is so long that its ranks are certainly gone.
    pub orphaned: bool,
}

impl Member {
    /// True if it may get new ranks.
    pub fn usable(&self) -> bool {
        self.liveness == Liveness::Healthy && self.stream.is_some() && !self.draining
    }

    /// Why it stands where it stands, for people; empty if all is well.
    pub fn reason(&self, now_ms: u64) -> String {
        let silent_s = now_ms.saturating_sub(self.heard_ms) as f64 / 1000.0;
        match self.liveness {
            Liveness::Awaited => "has not joined since the coordinator started".into(),
            Liveness::Lost | Liveness::Suspect => format!("silent for {silent_s:.1} s"),
            Liveness::Healthy if self.stream.is_none() => "disconnected".into(),
            Liveness::Healthy if self.draining => "drained: takes no new ranks".into(),
            Liveness::Healthy => String::new(),
        }
    }
}

/// How a Hello was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joined {
    /// A node that was not known, or only awaited.
    New,
    /// The same agent again: the ranks that it lists are still the ones it had.
    Reconnected,
    /// Another agent with that id: the old one's ranks are gone with it.
    Restarted,
}

/// A Hello that was refused: another agent answers for that id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {node} has already joined from {address} and was heard {heard_ms} ms ago")]
pub struct DuplicateNode {
    /// The id that both claim.
    pub node: NodeId,
    /// Address of the one that has it.
    pub address: String,
    /// When that one was last heard.
    pub heard_ms: u64,
}

/// What passing time did to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A heartbeat is late.
    Suspect(NodeId),
    /// Silent for so many milliseconds: its generations end.
    Lost(NodeId, u64),
    /// Silent for so long that its agent has killed its ranks.
    Orphaned(NodeId),
    /// Forgotten.
    Forgotten(NodeId),
}

/// All nodes, by id.
#[derive(Debug)]
pub struct Membership {
    limits: Limits,
    members: BTreeMap<NodeId, Member>,
    version: u64,
}

impl Membership {
    /// No nodes yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            members: BTreeMap::new(),
            version: 0,
        }
    }

    /// Grows with every change that a planner may see: who is there and usable, with how many slots and which ranks.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// All nodes, by id.
    pub fn members(&self) -> &BTreeMap<NodeId, Member> {
        &self.members
    }

    /// Expects a node that the store's jobs run on: it gets a full window to join again.
    pub fn await_node(&mut self, node: NodeId, now_ms: u64) {
        let hello = Hello {
            node: node.clone(),
            boot_id: String::new(),
            copies_of: Vec::new(),
            address: String::new(),
            slots: 0,
            device: String::new(),
            version: String::new(),
            ranks: RankList::new(),
        };
        self.members.entry(node).or_insert(Member {
            hello,
            liveness: Liveness::Awaited,
            draining: false,
            stream: None,
            heard_ms: now_ms,
            joined_unix_ms: 0,
            orphaned: false,
        });
        self.version += 1;
    }

    /// Takes in an agent. Its newest stream speaks for it from now on.
    ///
    /// # Errors
    /// [`DuplicateNode`] while another agent with that id is connected and healthy.
    pub fn hello(
        &mut self,
        hello: Hello,
        stream: u64,
        now_ms: u64,
        unix_ms: u64,
    ) -> Result<Joined, DuplicateNode> {
        let old = self.members.get(&hello.node);
        let joined = match old {
            None => Joined::New,
            Some(old) if old.hello.boot_id.is_empty() => Joined::Reconnected,
            Some(old) if old.hello.boot_id == hello.boot_id => Joined::Reconnected,
            Some(old) if old.liveness == Liveness::Healthy && old.stream.is_some() => {
                return Err(DuplicateNode {
                    node: hello.node,
                    address: old.hello.address.clone(),
                    heard_ms: now_ms.saturating_sub(old.heard_ms),
                });
            }
            Some(_) => Joined::Restarted,
        };
        let same_agent = old.filter(|old| old.hello.boot_id == hello.boot_id);
        let member = Member {
            liveness: Liveness::Healthy,
            draining: old.is_some_and(|old| old.draining),
            stream: Some(stream),
            heard_ms: now_ms,
            joined_unix_ms: same_agent.map_or(unix_ms, |old| old.joined_unix_ms),
            orphaned: false,
            hello,
        };
        self.members.insert(member.hello.node.clone(), member);
        self.version += 1;
        Ok(joined)
    }

    /// A sign of life with the ranks that run; `None` keeps the known list. False if the stream no longer speaks for
    /// the node.
    pub fn heard(&mut self, node: &NodeId, stream: u64, ranks: Option<RankList>, now_ms: u64) -> bool {
        let Some(member) = self
            .members
            .get_mut(node)
            .filter(|member| member.stream == Some(stream))
        else {
            return false;
        };
        let mut changed = member.liveness != Liveness::Healthy;
        member.heard_ms = member.heard_ms.max(now_ms);
        member.liveness = Liveness::Healthy;
        member.orphaned = false;
        if let Some(ranks) = ranks {
            changed |= member.hello.ranks != ranks;
            member.hello.ranks = ranks;
        }
        self.version += u64::from(changed);
        true
    }

    /// One rank more or less on a node, ahead of its next list.
    pub fn rank_changed(&mut self, node: &NodeId, rank: RankKey, pid: Option<u32>) {
        if let Some(member) = self.members.get_mut(node) {
            match pid {
                Some(pid) => member.hello.ranks.insert(rank, pid),
                None => member.hello.ranks.remove(&rank),
            };
            self.version += 1;
        }
    }

    /// A stream ended. The node stays what it is until its silence is too long.
    pub fn disconnected(&mut self, node: &NodeId, stream: u64) {
        if let Some(member) = self
            .members
            .get_mut(node)
            .filter(|member| member.stream == Some(stream))
        {
            member.stream = None;
            self.version += 1;
        }
    }

    /// Sets or takes back the drain of a node. False if there is no such node.
    pub fn drain(&mut self, node: &NodeId, draining: bool) -> bool {
        let Some(member) = self.members.get_mut(node) else {
            return false;
        };
        self.version += u64::from(member.draining != draining);
        member.draining = draining;
        true
    }

    /// Lets time pass: what changed, in the order of the nodes' ids.
    pub fn tick(&mut self, now_ms: u64) -> Vec<Change> {
        let limits = self.limits;
        let mut changes = Vec::new();
        for (id, member) in &mut self.members {
            let silent_ms = now_ms.saturating_sub(member.heard_ms);
            let lost_ms = match member.liveness {
                Liveness::Awaited => limits.rejoin_ms,
                _ => limits.lost_ms,
            };
            if member.liveness != Liveness::Lost && silent_ms >= lost_ms {
                member.liveness = Liveness::Lost;
                changes.push(Change::Lost(id.clone(), silent_ms));
            } else if member.liveness == Liveness::Healthy && silent_ms >= limits.suspect_ms {
                member.liveness = Liveness::Suspect;
                changes.push(Change::Suspect(id.clone()));
            }
            if member.liveness == Liveness::Lost && !member.orphaned {
                // 5% for clocks that run at other rates.
                member.orphaned = silent_ms >= limits.orphan_ms + limits.orphan_ms / 20;
                if member.orphaned {
                    member.hello.ranks.clear();
                    changes.push(Change::Orphaned(id.clone()));
                }
            }
        }
        let forgotten = |member: &Member| {
            member.orphaned && !member.draining && now_ms.saturating_sub(member.heard_ms) >= limits.forget_ms
        };
        let gone: Vec<NodeId> = self
            .members
            .iter()
            .filter(|(_, m)| forgotten(m))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            self.members.remove(&id);
            changes.push(Change::Forgotten(id));
        }
        self.version += changes.len() as u64;
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        suspect_ms: 1500,
        lost_ms: 3000,
        rejoin_ms: 10_000,
        orphan_ms: 120_000,
        forget_ms: 600_000,
    };

    fn hello(node: &str, boot: &str) -> Hello {
        Hello {
            node: node.parse().expect("node id"),
            boot_id: boot.into(),
            copies_of: Vec::new(),
            address: format!("{node}.example"),
            slots: 1,
            device: "cpu".into(),
            version: "0".into(),
            ranks: RankList::new(),
        }
    }

    /// `AT await NODE`, `AT hello NODE BOOT STREAM`, `AT beat NODE STREAM`, `AT close NODE STREAM`,
    /// `AT drain NODE`, `AT tick`; a line of output for each.
    fn case(lines: &[&str]) -> String {
        let mut membership = Membership::new(LIMITS);
        let mut output = Vec::new();
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            let now: u64 = words[0].parse().expect("time");
            let node = || words[2].parse::<NodeId>().expect("node id");
            let stream = |at: usize| words[at].parse::<u64>().expect("stream");
            let outcome = match words[1] {
                "await" => {
                    membership.await_node(node(), now);
                    "awaited".to_owned()
                }
                "hello" => match membership.hello(hello(words[2], words[3]), stream(4), now, now) {
                    Ok(joined) => format!("{joined:?}"),
                    Err(refused) => format!("refused: {refused}"),
                },
                "beat" => match membership.heard(&node(), stream(3), None, now) {
                    true => "heard".into(),
                    false => "not its stream".into(),
                },
                "close" => {
                    membership.disconnected(&node(), stream(3));
                    "closed".into()
                }
                "drain" => format!("drained {}", membership.drain(&node(), true)),
                "tick" => {
                    let changes = membership.tick(now);
                    match changes.is_empty() {
                        true => "nothing".into(),
                        false => changes
                            .iter()
                            .map(|c| format!("{c:?}"))
                            .collect::<Vec<_>>()
                            .join(", "),
                    }
                }
                other => panic!("unknown word {other:?}"),
            };
            output.push(format!("{line}: {outcome}"));
        }
        for member in membership.members().values() {
            output.push(format!(
                "{} is {}, {}usable",
                member.hello.node,
                member.liveness,
                if member.usable() { "" } else { "not " }
            ));
        }
        output.join("\n")
    }

    #[test]
    fn table() {
        tables::run("membership/liveness.txt", case);
    }

    /// What a planner sees.
    fn seen(membership: &Membership) -> Vec<(NodeId, bool, u32, RankList)> {
        let members = membership.members().values();
        members
            .map(|member| {
                let hello = &member.hello;
                (
                    hello.node.clone(),
                    member.usable(),
                    hello.slots,
                    hello.ranks.clone(),
                )
            })
            .collect()
    }

    proptest! {
        /// Nothing that a planner sees changes without the version.
        #[test]
        fn the_version_tells_every_change(steps in prop::collection::vec((0u64..2000, 0u8..9, 0u8..2, 0u64..3), 1..80)) {
            let mut membership = Membership::new(LIMITS);
            let rank = || RankKey { job: JobId::from_random(1), generation: Generation(1), rank: Rank(0) };
            let (mut now, mut before, mut version) = (0, Vec::new(), membership.version());
            for (wait, what, node, stream) in steps {
                now += wait;
                let id: NodeId = ["a", "b"][node as usize].parse().expect("node id");
                match what {
                    0 => drop(membership.hello(hello(id.as_str(), "boot"), stream, now, 0)),
                    1 => drop(membership.hello(hello(id.as_str(), "other"), stream, now, 0)),
                    2 => drop(membership.heard(&id, stream, None, now)),
                    3 => drop(membership.heard(&id, stream, Some(RankList::from([(rank(), 7)])), now)),
                    4 => membership.rank_changed(&id, rank(), (stream > 0).then_some(9)),
                    5 => membership.disconnected(&id, stream),
                    6 => drop(membership.drain(&id, stream > 0)),
                    7 => membership.await_node(id, now),
                    _ => drop(membership.tick(now)),
                }
                let after = seen(&membership);
                prop_assert!(after == before || membership.version() > version, "{:?} {:?}", before, after);
                (before, version) = (after, membership.version());
            }
        }

        /// Whatever the order of things: a node heard within the window is never Lost, and a silent one always is.
        #[test]
        fn silence_alone_decides(steps in prop::collection::vec((0u64..2000, 0u8..4), 1..60)) {
            let mut membership = Membership::new(LIMITS);
            let node: NodeId = "a".parse().expect("node id");
            let (mut now, mut heard, mut stream) = (0, 0, 1);
            membership.hello(hello("a", "boot"), stream, now, 0).expect("first");
            for (wait, what) in steps {
                now += wait;
                match what {
                    0 => {
                        stream += 1;
                        prop_assert_eq!(membership.hello(hello("a", "boot"), stream, now, 0), Ok(Joined::Reconnected));
                        heard = now;
                    }
                    1 => heard = if membership.heard(&node, stream, None, now) { now } else { heard },
                    2 => membership.disconnected(&node, stream),
                    _ => {}
                }
                membership.tick(now);
                let lost = membership.members()[&node].liveness == Liveness::Lost;
                prop_assert_eq!(lost, now - heard >= LIMITS.lost_ms);
            }
        }
    }
}
