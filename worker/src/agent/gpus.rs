//! Which GPU each rank of this node computes on: one each, the first that is free. Pure.

use super::table::RankKey;
use crate::device::gpus::Gpu;
use std::collections::BTreeMap;

/// The GPUs of a node; none on a node that computes on the CPU.
#[derive(Debug)]
pub struct Gpus {
    uuids: Vec<String>,
    /// Index into `uuids`.
    taken: BTreeMap<RankKey, usize>,
}

impl Gpus {
    /// All of them free.
    pub fn new(gpus: &[Gpu]) -> Self {
        Self {
            uuids: gpus.iter().map(|gpu| gpu.uuid.clone()).collect(),
            taken: BTreeMap::new(),
        }
    }

    /// The uuid of the GPU for a rank; none if there is none that is free. A node has no more slots than GPUs, and a rank
    /// that was not reaped yet keeps both.
    pub fn take(&mut self, key: &RankKey) -> Option<&str> {
        let is_free = |gpu: &usize| !self.taken.values().any(|taken| taken == gpu);
        let gpu = (0..self.uuids.len()).find(is_free)?;
        self.taken.insert(key.clone(), gpu);
        Some(&self.uuids[gpu])
    }

    /// The rank is gone.
    pub fn give_back(&mut self, key: &RankKey) {
        self.taken.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nvrtc::Arch;
    use arcface_proto::types::{Generation, Rank};

    fn key(rank: u32) -> RankKey {
        RankKey {
            job: "job-000000000001".parse().expect("a job's id"),
            generation: Generation(1),
            rank: Rank(rank),
        }
    }

    fn node(count: u32) -> Gpus {
        let gpu = |index| Gpu {
            index,
            uuid: format!("GPU-{index}"),
            name: "one".to_owned(),
            memory: 1,
            arch: Arch::new(9, 0),
            fault: None,
        };
        Gpus::new(&(0..count).map(gpu).collect::<Vec<_>>())
    }

    #[test]
    fn no_two_ranks_share_a_gpu() {
        let mut gpus = node(2);
        assert_eq!(gpus.take(&key(0)), Some("GPU-0"));
        assert_eq!(gpus.take(&key(1)), Some("GPU-1"));
        assert_eq!(gpus.take(&key(2)), None);
        gpus.give_back(&key(0));
        assert_eq!(gpus.take(&key(2)), Some("GPU-0"));
    }

    #[test]
    fn a_node_without_gpus_gives_none() {
        let mut gpus = node(0);
        assert_eq!(gpus.take(&key(0)), None);
        gpus.give_back(&key(0));
    }
}
