//! Pure: sets of copies of a job's state in the memory of its nodes, and whether a new generation can resume from the
//! newest. A set is whole once every rank has said where its parts are. It is no checkpoint: the store does not know of
//! it, and a coordinator that restarts starts without any.

use super::{ControlError, prepared::Prepared};
use arcface_proto::{
    types::NodeId,
    v1::{CheckpointManifest, CommitCheckpointRequest, PartCopies, RankId},
};
use std::collections::{BTreeMap, BTreeSet};

/// Nodes that may have copies of one rank's parts.
const MAX_NODES: usize = 8;

/// A node as it was when it took a copy: another start of its agent has begun with an empty memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The node.
    pub node: NodeId,
    /// Its agent's boot id.
    pub boot_id: String,
}

/// Who has each file.
type Holders = BTreeMap<String, Vec<Holder>>;

/// The copies of one job.
#[derive(Default)]
pub struct Copies {
    /// Parts of sets that are not whole yet, of the newest generation.
    pending: Prepared,
    holders: BTreeMap<u64, Holders>,
    newest: Option<(CheckpointManifest, Holders)>,
    /// Nodes that have been said to keep anything.
    nodes: BTreeSet<NodeId>,
    /// What the newest generation was told to resume from.
    chosen: Option<(CheckpointManifest, Vec<PartCopies>)>,
}

impl Copies {
    /// The generation is over: what it did not finish never will be. The newest whole set stays.
    pub fn end_generation(&mut self) {
        self.pending.clear();
        self.holders.clear();
    }

    /// A node says that it keeps copies of this job.
    pub fn kept_on(&mut self, node: NodeId) {
        self.nodes.insert(node);
    }

    /// Nodes that keep something, which has no use any more.
    pub fn forget(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(self).nodes
    }

    /// The newest set cannot be used.
    pub fn lose_newest(&mut self) {
        self.newest = None;
        self.chosen = None;
    }

    /// Takes what a rank says of its parts. The step of a set that is whole by that.
    ///
    /// # Errors
    /// [`ControlError::Invalid`] for parts that cannot be part of a checkpoint, do not fit together, or that no node has.
    pub fn add(
        &mut self,
        id: &RankId,
        parts: &CommitCheckpointRequest,
        holders: Vec<Holder>,
        world_size: u32,
    ) -> Result<Option<u64>, ControlError> {
        if holders.is_empty() || holders.len() > MAX_NODES {
            let problem = format!(
                "{} nodes are not 1 to {MAX_NODES} that have joined",
                holders.len()
            );
            return Err(ControlError::invalid("copied.nodes", problem));
        }
        let manifest = self.pending.add(id, parts, world_size)?;
        self.nodes
            .extend(holders.iter().map(|holder| holder.node.clone()));
        let files = self.holders.entry(parts.step).or_default();
        for part in &parts.parts {
            files.insert(part.file.clone(), holders.clone());
        }
        let Some(manifest) = manifest else { return Ok(None) };
        let step = manifest.step;
        self.pending.committed(step);
        let whole = self.holders.remove(&step).unwrap_or_default();
        self.holders = self.holders.split_off(&step);
        // A generation that resumed from further back is newer than what it did not resume from.
        let age = |manifest: &CheckpointManifest| (manifest.generation, manifest.step);
        let newest = self.newest.as_ref();
        if newest.is_none_or(|(newest, _)| age(newest) < age(&manifest)) {
            self.newest = Some((manifest, whole));
        }
        Ok(Some(step))
    }

    /// Decides from what a generation on these nodes (by rank) resumes: from the newest set, if that is newer than the
    /// checkpoint of step `committed` and each of its parts is on one of the nodes, whose agents' boot ids `boot_id` knows.
    pub fn choose<'a>(
        &mut self,
        committed: Option<u64>,
        placement: &[NodeId],
        boot_id: impl Fn(&NodeId) -> Option<&'a str>,
    ) {
        let reachable = |holder: &&Holder| {
            placement.contains(&holder.node) && boot_id(&holder.node) == Some(holder.boot_id.as_str())
        };
        self.chosen = self.newest.as_ref().and_then(|(manifest, holders)| {
            if committed.is_some_and(|committed| committed >= manifest.step) {
                return None;
            }
            let copies = manifest.parts.iter().map(|part| {
                let nodes: Vec<String> = holders
                    .get(&part.file)?
                    .iter()
                    .filter(reachable)
                    .map(|holder| holder.node.to_string())
                    .collect();
                (!nodes.is_empty()).then(|| PartCopies {
                    file: part.file.clone(),
                    nodes,
                })
            });
            Some((manifest.clone(), copies.collect::<Option<Vec<_>>>()?))
        });
        if self.chosen.is_some() {
            // What they do not have they get, before they copy anything themselves.
            self.nodes.extend(placement.iter().cloned());
        }
    }

    /// What the newest generation resumes from, if that is a set of copies.
    pub fn chosen(&self) -> Option<&(CheckpointManifest, Vec<PartCopies>)> {
        self.chosen.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::v1::CheckpointPart;

    fn node(name: &str) -> NodeId {
        name.parse().expect("a node id")
    }

    fn holder(name: &str) -> Holder {
        Holder {
            node: node(name),
            boot_id: format!("boot of {name}"),
        }
    }

    fn id(rank: u32) -> RankId {
        RankId {
            job_id: "job-000000000001".into(),
            generation: 1,
            rank,
        }
    }

    /// Parts of rank `rank` of two, of ten classes.
    fn parts(step: u64, rank: u32) -> CommitCheckpointRequest {
        let part = |file: &str, class_lo, class_hi| CheckpointPart {
            file: file.into(),
            bytes: 1,
            blake3: "0".repeat(64),
            class_lo,
            class_hi,
        };
        CommitCheckpointRequest {
            step,
            directory: format!("step-{step}"),
            num_classes: 10,
            parts: match rank {
                0 => vec![
                    part("backbone.safetensors", 0, 0),
                    part("head-0-5.safetensors", 0, 5),
                ],
                _ => vec![part("head-5-10.safetensors", 5, 10)],
            },
            ..CommitCheckpointRequest::default()
        }
    }

    /// Rank 0 on a, rank 1 on b; both have both.
    fn two_nodes(steps: &[u64]) -> Copies {
        let mut copies = Copies::default();
        for &step in steps {
            for rank in [1, 0] {
                let added = copies
                    .add(&id(rank), &parts(step, rank), vec![holder("a"), holder("b")], 2)
                    .expect("valid");
                assert_eq!(added, (rank == 0).then_some(step));
            }
        }
        copies
    }

    fn chosen_step(
        copies: &mut Copies,
        committed: Option<u64>,
        nodes: &[&str],
        booted: &[&str],
    ) -> Option<u64> {
        let boots: BTreeMap<NodeId, String> = booted
            .iter()
            .map(|name| (node(name), holder(name).boot_id))
            .collect();
        let placement: Vec<NodeId> = nodes.iter().map(|name| node(name)).collect();
        copies.choose(committed, &placement, |id| boots.get(id).map(String::as_str));
        copies.chosen().map(|(manifest, _)| manifest.step)
    }

    #[test]
    fn one_node_of_two_has_everything() {
        let mut copies = two_nodes(&[10, 20]);
        assert_eq!(chosen_step(&mut copies, Some(0), &["b"], &["a", "b"]), Some(20));
        let (_, files) = copies.chosen().expect("chosen");
        assert!(files.iter().all(|file| file.nodes == ["b"]), "{files:?}");
        assert_eq!(files.len(), 3);
        assert_eq!(
            chosen_step(&mut copies, None, &["a", "b", "c"], &["a", "b", "c"]),
            Some(20)
        );
    }

    #[test]
    fn a_checkpoint_that_is_as_new_and_nodes_that_have_nothing_are_reasons_against_it() {
        let mut copies = two_nodes(&[10]);
        assert_eq!(chosen_step(&mut copies, Some(9), &["a"], &["a"]), Some(10));
        assert_eq!(chosen_step(&mut copies, Some(10), &["a"], &["a"]), None);
        assert_eq!(chosen_step(&mut copies, None, &["c"], &["a", "b", "c"]), None);
        copies.choose(None, &[node("a")], |_| Some("another boot"));
        assert_eq!(copies.chosen(), None, "its agent was restarted");
        assert_eq!(chosen_step(&mut copies, None, &["a"], &["a"]), Some(10));
        copies.lose_newest();
        assert_eq!(chosen_step(&mut copies, None, &["a"], &["a"]), None);
    }

    #[test]
    fn a_set_without_the_last_ranks_parts_is_none() {
        let mut copies = two_nodes(&[10]);
        let half = copies.add(&id(1), &parts(20, 1), vec![holder("a")], 2);
        assert_eq!(half.expect("valid"), None);
        assert_eq!(chosen_step(&mut copies, None, &["a"], &["a"]), Some(10));
        copies.end_generation();
        let other_half = copies.add(&id(0), &parts(20, 0), vec![holder("a")], 2);
        assert_eq!(other_half.expect("valid"), None, "the first half is of the past");
        assert_eq!(
            chosen_step(&mut copies, None, &["a"], &["a"]),
            Some(10),
            "it outlives generations"
        );
    }

    #[test]
    fn parts_that_nobody_has_are_refused_and_nodes_are_remembered() {
        let mut copies = two_nodes(&[10]);
        assert!(copies.add(&id(0), &parts(20, 0), Vec::new(), 2).is_err());
        copies.kept_on(node("c"));
        assert_eq!(chosen_step(&mut copies, None, &["b", "d"], &["b", "d"]), Some(10));
        assert_eq!(copies.forget(), BTreeSet::from(["a", "b", "c", "d"].map(node)));
        assert_eq!(chosen_step(&mut copies, None, &["a"], &["a"]), None);
    }
}
