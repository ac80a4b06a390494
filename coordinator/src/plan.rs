//! Pure: which node runs which rank. Knows nodes, free slots and one job's wishes; knows no clock and no store.
//!
//! Ranks that share a node talk through memory, so a world takes as few nodes as it can, idle ones first, and its
//! ranks are contiguous on each. Placement is a function of its arguments: the same cluster gives the same plan,
//! and a plan that still holds is not changed.

use arcface_proto::types::NodeId;
use std::{cmp::Reverse, fmt};

/// A node as the planner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanNode {
    /// Its id.
    pub id: NodeId,
    /// Ranks it can run at once.
    pub slots: u32,
    /// Slots without a process, at most `slots`, less those that are kept.
    pub free: u32,
    /// Slots without a process that jobs which recover will need.
    pub kept: u32,
    /// Heartbeats arrive and it is not being drained.
    pub usable: bool,
}

/// What a job asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanJob {
    /// Fewest ranks to start with, at least 1.
    pub least: u32,
    /// Most ranks to start with, at least `least`.
    pub most: u32,
}

/// The node of every rank, by rank. Ranks of one node are contiguous.
pub type Placement = Vec<NodeId>;

/// Why a job cannot be placed now: facts for the job's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unplaceable {
    /// Fewest ranks that would do.
    pub wanted: u32,
    /// Free slots on usable nodes.
    pub free: u32,
    /// Slots there that are kept for jobs which recover.
    pub kept: u32,
    /// Usable nodes.
    pub nodes: usize,
    /// Nodes that are there but not usable.
    pub unusable: usize,
}

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        write!(
            f,
            "wants {} rank{}, {} slot{} free on {} node{}",
            self.wanted,
            plural(self.wanted.into()),
            self.free,
            plural(self.free.into()),
            self.nodes,
            plural(self.nodes as u64)
        )?;
        if self.kept > 0 {
            write!(f, ", {} kept for a job that recovers", self.kept)?;
        }
        match self.unusable {
            0 => Ok(()),
            count => write!(f, " ({count} more not usable)"),
        }
    }
}

/// Places as many ranks as are free, between `job.least` and `job.most`. `previous` is the job's last placement
/// (empty for none): it is kept if it still holds, and its nodes are preferred otherwise, because their page caches
/// hold the data.
///
/// # Errors
/// [`Unplaceable`] if fewer than `job.least` slots are free on usable nodes.
pub fn plan(nodes: &[PlanNode], job: PlanJob, previous: &[NodeId]) -> Result<Placement, Unplaceable> {
    let usable: Vec<&PlanNode> = nodes.iter().filter(|node| node.usable && node.free > 0).collect();
    let free = usable
        .iter()
        .fold(0u32, |sum, node| sum.saturating_add(node.free));
    let world = free.min(job.most);
    if world < job.least.max(1) {
        let healthy: Vec<&PlanNode> = nodes.iter().filter(|node| node.usable).collect();
        return Err(Unplaceable {
            wanted: job.least,
            free,
            kept: healthy.iter().fold(0, |sum, node| sum.saturating_add(node.kept)),
            nodes: healthy.len(),
            unusable: nodes.len() - healthy.len(),
        });
    }
    if previous.len() == world as usize && holds(previous, &usable) {
        return Ok(previous.to_vec());
    }
    let mut shares = choose(usable, world, previous);
    // Old nodes keep their order, so that a node's ranks, and with them its class shards, move as little as they can.
    let old_position = |id: &NodeId| previous.iter().position(|old| old == id).unwrap_or(usize::MAX);
    shares.sort_by(|(a, _), (b, _)| (old_position(a), a).cmp(&(old_position(b), b)));
    let placement: Placement = shares
        .into_iter()
        .flat_map(|(id, ranks)| std::iter::repeat_n(id.clone(), ranks as usize))
        .collect();
    debug_assert_eq!(placement.len(), world as usize);
    Ok(placement)
}

/// True if every node of a placement is usable, has the slots, and holds one contiguous run of ranks.
fn holds(placement: &[NodeId], usable: &[&PlanNode]) -> bool {
    let runs: Vec<&[NodeId]> = placement.chunk_by(|a, b| a == b).collect();
    let distinct = runs
        .iter()
        .enumerate()
        .all(|(i, run)| runs[..i].iter().all(|before| before[0] != run[0]));
    distinct
        && runs.iter().all(|run| {
            usable
                .iter()
                .any(|node| node.id == run[0] && node.free as usize >= run.len())
        })
}

/// The fewest nodes that hold `world` ranks: the largest are taken whole while no single one holds the rest, then
/// the smallest that does. Among equals: one the job knows, then an idle one, then by id.
fn choose<'a>(mut usable: Vec<&'a PlanNode>, world: u32, previous: &[NodeId]) -> Vec<(&'a NodeId, u32)> {
    let preference = |node: &PlanNode| (!previous.contains(&node.id), node.free < node.slots);
    usable.sort_by_key(|node| (Reverse(node.free), preference(node), &node.id));
    let mut shares = Vec::new();
    let mut rest = world;
    while rest > 0 {
        let last = usable
            .iter()
            .enumerate()
            .filter(|(_, node)| node.free >= rest)
            .min_by_key(|(_, node)| (node.free, preference(node), &node.id))
            .map(|(index, _)| index);
        let node = usable.remove(last.unwrap_or(0));
        let ranks = node.free.min(rest);
        shares.push((&node.id, ranks));
        rest -= ranks;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables;
    use proptest::prelude::*;

    fn parse_node(words: &[&str]) -> PlanNode {
        let (free, slots) = words[1].split_once('/').expect("FREE/SLOTS");
        PlanNode {
            id: words[0].parse().expect("node id"),
            slots: slots.parse().expect("slots"),
            free: free.parse().expect("free"),
            kept: words
                .iter()
                .find_map(|word| word.strip_prefix("kept="))
                .map_or(0, |kept| kept.parse().expect("kept")),
            usable: !words.contains(&"down"),
        }
    }

    /// `node ID FREE/SLOTS [kept=N] [down]`, `previous ID...`, `job LEAST MOST`.
    fn case(lines: &[&str]) -> String {
        let (mut nodes, mut previous, mut job) = (Vec::new(), Vec::new(), None);
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[0] {
                "node" => nodes.push(parse_node(&words[1..])),
                "previous" => previous = words[1..].iter().map(|id| id.parse().expect("node id")).collect(),
                "job" => {
                    job = Some(PlanJob {
                        least: words[1].parse().expect("least"),
                        most: words[2].parse().expect("most"),
                    })
                }
                other => panic!("unknown word {other:?}"),
            }
        }
        match plan(&nodes, job.expect("a job line"), &previous) {
            Ok(placement) => placement.iter().map(NodeId::as_str).collect::<Vec<_>>().join(" "),
            Err(reason) => reason.to_string(),
        }
    }

    #[test]
    fn table() {
        tables::run("plan/placement.txt", case);
    }

    fn cluster() -> impl Strategy<Value = Vec<PlanNode>> {
        prop::collection::vec((0u32..9, 0u32..9, any::<bool>()), 0..12).prop_map(|nodes| {
            nodes
                .into_iter()
                .enumerate()
                .map(|(i, (slots, free, usable))| PlanNode {
                    id: format!("n{i}").parse().expect("node id"),
                    slots,
                    free: free.min(slots),
                    kept: 0,
                    usable,
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn plans_are_sound_minimal_and_stable(
            nodes in cluster(), least in 1u32..20, more in 0u32..20,
            old in prop::collection::vec(0usize..14, 0..12),
        ) {
            let job = PlanJob { least, most: least + more };
            let previous: Placement = old.iter().map(|i| format!("n{i}").parse().expect("node id")).collect();
            let free: u32 = nodes.iter().filter(|n| n.usable).map(|n| n.free).sum();
            match plan(&nodes, job, &previous) {
                Err(reason) => {
                    prop_assert!(free < least);
                    prop_assert_eq!(reason.free, free);
                }
                Ok(placement) => {
                    prop_assert_eq!(placement.len() as u32, free.min(job.most));
                    let runs: Vec<&[NodeId]> = placement.chunk_by(|a, b| a == b).collect();
                    for run in &runs {
                        let node = nodes.iter().find(|n| n.id == run[0]).expect("a node of the cluster");
                        prop_assert!(node.usable, "{} is not usable", node.id);
                        prop_assert!(run.len() as u32 <= node.free, "{} has {} free", node.id, node.free);
                        prop_assert_eq!(runs.iter().filter(|other| other[0] == run[0]).count(), 1);
                    }
                    prop_assert_eq!(plan(&nodes, job, &placement), Ok(placement.clone()));
                    if placement != previous {
                        let mut sizes: Vec<u32> = nodes.iter().filter(|n| n.usable).map(|n| n.free).collect();
                        sizes.sort_unstable_by_key(|free| Reverse(*free));
                        let mut covered = 0;
                        let fewest = sizes.iter().take_while(|free| {
                            let short = covered < placement.len() as u32;
                            covered += **free;
                            short
                        }).count();
                        prop_assert_eq!(runs.len(), fewest);
                    }
                }
            }
        }
    }
}
