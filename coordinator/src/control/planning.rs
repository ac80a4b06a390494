//! When the planner is asked, and for whom: jobs that wait, and running jobs that may grow.

use super::{Control, Entry};
use crate::{
    job::{self, Event},
    membership::RankKey,
    plan::{self, PlanNode},
    store::Transaction,
};
use arcface_proto::types::{JobId, NodeId, Rank};
use std::collections::{BTreeMap, BTreeSet};

impl Control {
    /// Plans every job that may be launched: those that recover first, then by age. A job that does not fit does not
    /// hold up smaller ones behind it. Jobs that wish for the same are refused for the same reason, which is worked out
    /// once: thousands may wait.
    pub(super) async fn schedule(&mut self) {
        let now = self.clock.now();
        let unplanned = std::mem::take(&mut self.unplanned);
        let looked_at = match unplanned.everybody {
            true => &self.live,
            false => &unplanned.jobs,
        };
        let mut waiting: Vec<(bool, JobId)> = Vec::new();
        for (_, id) in looked_at {
            let Some(entry) = self.jobs.get(id) else { continue };
            if matches!(entry.job.phase, job::Phase::Queued | job::Phase::Recovering) {
                waiting.push((entry.job.phase == job::Phase::Queued, id.clone()));
            }
        }
        waiting.sort_by_key(|(queued, _)| *queued);
        let mut nodes = None;
        let mut refused: BTreeMap<(u32, u32), String> = BTreeMap::new();
        if waiting.is_empty() && unplanned.everybody {
            self.offer_room().await;
        }
        for (_, id) in waiting {
            let Some(entry) = self.jobs.get(&id) else { continue };
            let wishes = entry.job.wishes();
            let planned = match (
                entry.job.may_launch(now),
                refused.get(&(wishes.least, wishes.most)),
            ) {
                (Err(None), _) => continue,
                (Err(Some(reason)), _) => Err(reason),
                (Ok(()), Some(reason)) => Err(reason.clone()),
                (Ok(()), None) => {
                    let nodes = nodes.get_or_insert_with(|| self.plan_nodes());
                    plan::plan(nodes, wishes, &entry.job.placement()).map_err(|reason| {
                        let reason = reason.to_string();
                        refused.insert((wishes.least, wishes.most), reason.clone());
                        reason
                    })
                }
            };
            match &planned {
                Err(reason) if *reason == entry.job.reason => continue,
                Err(_) => {}
                // Slots are taken from here on.
                Ok(_) => (nodes, refused) = (None, BTreeMap::new()),
            }
            // Not tried again as an event: the next round plans anew.
            if let Err(error) = self
                .apply(&id, &Event::Planned(planned), Transaction::default())
                .await
            {
                tracing::warn!(job = %id, %error, "a plan was not stored");
                return;
            }
        }
    }

    /// Tells running jobs that may grow how many ranks there is room for. Jobs that wait come first: they are offered
    /// slots before any running job is.
    async fn offer_room(&mut self) {
        let may_grow = |id: &JobId| self.jobs.get(id).is_some_and(|entry| entry.job.may_grow());
        let growing: Vec<JobId> = self
            .live
            .iter()
            .map(|(_, id)| id)
            .filter(|id| may_grow(id))
            .cloned()
            .collect();
        if growing.is_empty() {
            return;
        }
        let mut nodes = self.plan_nodes();
        for id in growing {
            let Some(Entry { job, .. }) = self.jobs.get(&id) else {
                continue;
            };
            let own = |node: &NodeId| job.ranks.iter().filter(|rank| rank.node == *node).count() as u32;
            let free_without: Vec<PlanNode> = nodes
                .iter()
                .map(|node| PlanNode {
                    free: (node.free + own(&node.id)).min(node.slots),
                    ..node.clone()
                })
                .collect();
            let placement = plan::plan(&free_without, job.wishes(), &job.placement()).unwrap_or_default();
            let room = Some(placement.len() as u32).filter(|room| *room as usize > job.ranks.len());
            if let Some(room) = room {
                // What one job was offered, the next is not.
                for node in &mut nodes {
                    let taken = placement.iter().filter(|id| **id == node.id).count() as u32;
                    node.free = (node.free + own(&node.id)).saturating_sub(taken).min(node.free);
                }
                tracing::debug!(job = %id, room, "room to grow");
            }
            if job.room != room {
                // Not stored: it is offered anew after a restart.
                self.happened(&id, Event::Room(room)).await;
            }
        }
    }

    fn plan_nodes(&self) -> Vec<PlanNode> {
        let used = self.used_slots();
        self.members
            .members()
            .iter()
            .map(|(id, member)| PlanNode {
                id: id.clone(),
                slots: member.hello.slots,
                free: member
                    .hello
                    .slots
                    .saturating_sub(used.get(id).map_or(0, |ranks| ranks.len() as u32)),
                usable: member.usable(),
            })
            .collect()
    }

    /// Ranks that hold a slot, by node: what agents list, and what they were told to start.
    pub(super) fn used_slots(&self) -> BTreeMap<NodeId, BTreeSet<RankKey>> {
        let mut used: BTreeMap<NodeId, BTreeSet<RankKey>> = BTreeMap::new();
        for (node, member) in self.members.members() {
            used.entry(node.clone())
                .or_default()
                .extend(member.hello.ranks.keys().cloned());
        }
        let placed: BTreeSet<&JobId> = self.placed.values().flatten().map(|(_, id)| id).collect();
        for id in placed {
            let Some(Entry { job, .. }) = self.jobs.get(id) else {
                continue;
            };
            for (index, rank) in job
                .ranks
                .iter()
                .enumerate()
                .filter(|(_, rank)| rank.process.occupies())
            {
                let key = RankKey {
                    job: id.clone(),
                    generation: job.generation,
                    rank: Rank(index as u32),
                };
                used.entry(rank.node.clone()).or_default().insert(key);
            }
        }
        used
    }
}
