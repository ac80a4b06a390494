//! When the planner is asked, and for whom: jobs that wait, and running jobs that may grow.

use super::{
    Control, Entry,
    ledger::{self, Age},
};
use crate::{
    job::{Event, Job, Phase, RankState},
    membership::RankKey,
    plan::{self, PlanNode},
    store::Transaction,
};
use arcface_proto::types::{JobId, NodeId, Rank};
use std::collections::{BTreeMap, BTreeSet};

/// Reasons of jobs that wait which are renewed in one round. The others follow at the next tick: to tell thousands that
/// a slot was taken must not hold up heartbeats.
const REASONS: usize = 200;

/// Whom the planner should look at. Jobs that were refused stay so until slots become free: among thousands that wait, it
/// looks at those alone to which something happened.
#[derive(Default)]
pub(super) struct Unplanned {
    /// At everybody, now: slots may have become free.
    everybody: bool,
    /// At everybody at the next tick: something changed that reasons tell of, or that running jobs may grow by.
    at_tick: bool,
    /// At these: they are new, or changed.
    jobs: BTreeSet<Age>,
    /// At these when it is time, in ms: they wait before they are launched again.
    later: BTreeSet<(u64, Age)>,
    /// The members as they were when it looked at everybody.
    members: Option<u64>,
}

impl Unplanned {
    pub(super) fn any(&self) -> bool {
        self.everybody || !self.jobs.is_empty()
    }

    pub(super) fn slots_freed(&mut self) {
        self.everybody = true;
    }

    /// A job that is new here.
    pub(super) fn job(&mut self, job: &Job) {
        if matches!(job.phase, Phase::Queued | Phase::Recovering) {
            self.jobs.insert(ledger::age(job));
            if job.not_before_ms > 0 {
                self.later.insert((job.not_before_ms, ledger::age(job)));
            }
        }
    }

    /// A job whose phase or ranks changed.
    pub(super) fn moved(&mut self, before: &Job, after: &Job) {
        self.everybody |= ledger::occupied(before) > ledger::occupied(after);
        self.at_tick = true;
        self.job(after);
    }

    /// Time has passed, and the members are what they are.
    pub(super) fn ticked(&mut self, now_ms: u64, members: u64) {
        self.everybody |= std::mem::take(&mut self.at_tick) || self.members != Some(members);
        while let Some((at_ms, _)) = self.later.first()
            && *at_ms <= now_ms
        {
            let due = self.later.pop_first();
            self.jobs.extend(due.map(|(_, age)| age));
            // What was kept for it is free for others if it does not take it.
            self.everybody = true;
        }
    }
}

impl Control {
    /// Plans every job that may be launched: those that recover first, then by age. A job that does not fit does not
    /// hold up smaller ones behind it. Jobs that wish for the same are refused for the same reason, which is worked out
    /// once: thousands may wait.
    pub(super) async fn schedule(&mut self) {
        let now = self.clock.now();
        let everybody = std::mem::take(&mut self.unplanned.everybody);
        let changed = std::mem::take(&mut self.unplanned.jobs);
        let waiting: Vec<JobId> = match everybody {
            true => self.ledger.waiting().cloned().collect(),
            false => {
                let waiting = self.ledger.waiting_among(changed);
                waiting.into_iter().map(|(_, (_, id))| id).collect()
            }
        };
        if everybody {
            self.unplanned.members = Some(self.members.version());
            if waiting.is_empty() {
                self.offer_room().await;
            }
        }
        let (mut nodes, mut told) = (None, 0);
        let mut refused: BTreeMap<(u32, u32), String> = BTreeMap::new();
        for id in waiting {
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
                Err(_) if told == REASONS => {
                    self.unplanned.at_tick = true;
                    continue;
                }
                Err(_) => told += 1,
                // Slots are taken from here on.
                Ok(_) => (nodes, refused) = (None, BTreeMap::new()),
            }
            // Not tried again as an event: the next tick plans anew.
            if let Err(error) = self
                .apply(&id, &Event::Planned(planned), Transaction::default())
                .await
            {
                tracing::warn!(job = %id, %error, "a plan was not stored");
                self.unplanned.at_tick = true;
                return;
            }
        }
    }

    /// Tells running jobs that may grow how many ranks there is room for. Jobs that wait come first: they are offered
    /// slots before any running job is.
    async fn offer_room(&mut self) {
        let may_grow = |id: &JobId| self.jobs.get(id).is_some_and(|entry| entry.job.may_grow());
        let growing: Vec<JobId> = self.ledger.live().filter(|id| may_grow(id)).cloned().collect();
        if growing.is_empty() {
            return;
        }
        let mut nodes = self.plan_nodes();
        for id in growing {
            let Some(Entry { job, .. }) = self.jobs.get(&id) else {
                continue;
            };
            let placement = placed_anew(&nodes, job);
            let room = Some(placement.len() as u32).filter(|room| *room as usize > job.ranks.len());
            if let Some(room) = room {
                // What one job was offered, the next is not.
                set_aside(&mut nodes, job, &placement);
                tracing::debug!(job = %id, room, "room to grow");
            }
            if job.room != room {
                // Not stored: it is offered anew after a restart.
                self.happened(&id, Event::Room(room)).await;
            }
        }
    }

    /// What is free for a job that may be launched now. What a job that recovers will need is kept for it while it waits
    /// for its old ranks to end or for its back-off: no other job trains for days in the place that it left for seconds.
    fn plan_nodes(&self) -> Vec<PlanNode> {
        let now = self.clock.now();
        let used = self.used_slots();
        let members = self.members.members().iter();
        let mut nodes: Vec<PlanNode> = members
            .map(|(id, member)| PlanNode {
                id: id.clone(),
                slots: member.hello.slots,
                free: member
                    .hello
                    .slots
                    .saturating_sub(used.get(id).copied().unwrap_or(0)),
                kept: 0,
                usable: member.usable(),
            })
            .collect();
        let waiting = self.ledger.waiting().filter_map(|id| self.jobs.get(id));
        let recovering = waiting.take_while(|entry| entry.job.phase == Phase::Recovering);
        for Entry { job, .. } in recovering.filter(|entry| entry.job.may_launch(now).is_err()) {
            let placement = placed_anew(&nodes, job);
            set_aside(&mut nodes, job, &placement);
        }
        nodes
    }

    /// How many ranks hold a slot, by node: what agents list, and what they were told to start.
    pub(super) fn used_slots(&self) -> BTreeMap<&NodeId, u32> {
        let members = self.members.members();
        let mut used: BTreeMap<&NodeId, u32> = members
            .iter()
            .map(|(id, member)| (id, member.hello.ranks.len() as u32))
            .collect();
        for id in self.ledger.placed() {
            let Some(Entry { job, .. }) = self.jobs.get(id) else {
                continue;
            };
            let mut key = RankKey {
                job: id.clone(),
                generation: job.generation,
                rank: Rank(0),
            };
            let ranks = job.ranks.iter().enumerate();
            for (index, rank) in ranks.filter(|(_, rank)| rank.process.occupies()) {
                key.rank = Rank(index as u32);
                let member = members.get(&rank.node);
                if !member.is_some_and(|member| member.hello.ranks.contains_key(&key)) {
                    *used.entry(&rank.node).or_default() += 1;
                }
            }
        }
        used
    }
}

/// Slots of a node that the job's own ranks hold.
fn own(job: &Job, node: &NodeId) -> u32 {
    let here = |rank: &&RankState| rank.node == *node && rank.process.occupies();
    job.ranks.iter().filter(here).count() as u32
}

/// Where the job would be launched if its own ranks were gone; empty if it does not fit.
fn placed_anew(nodes: &[PlanNode], job: &Job) -> Vec<NodeId> {
    let without: Vec<PlanNode> = nodes
        .iter()
        .map(|node| PlanNode {
            free: (node.free + own(job, &node.id)).min(node.slots),
            ..node.clone()
        })
        .collect();
    plan::plan(&without, job.wishes(), &job.placement()).unwrap_or_default()
}

/// Takes the slots of a placement out of what is free, other than those that the job holds already.
fn set_aside(nodes: &mut [PlanNode], job: &Job, placement: &[NodeId]) {
    for node in nodes {
        let taken = placement.iter().filter(|id| **id == node.id).count() as u32;
        let kept = taken.saturating_sub(own(job, &node.id)).min(node.free);
        node.free -= kept;
        node.kept += kept;
    }
}

#[cfg(test)]
mod tests;
