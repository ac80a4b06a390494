//! The machines: agents that read commands, tell exits, list ranks, leave and come back.

use super::{Cluster, Command, JOBS, Key, node_id, node_of};
use arcface_coordinator::{
    job::{Event, Exit},
    membership::{Hello, Joined, RankKey, RankList},
};
use arcface_proto::types::{Generation, Rank};

impl Cluster {
    pub(super) fn deliver(&mut self, node: usize) -> Result<(), String> {
        match self.machines[node].commands.pop_front() {
            None => Ok(()),
            Some(Command::Kill(job, generation)) => {
                let killed = &mut self.machines[node].killed[job];
                *killed = (*killed).max(generation);
                self.stop(node, job, generation);
                Ok(())
            }
            Some(Command::Launch(job, generation, rank)) => {
                let key = (job, generation, rank);
                let machine = &mut self.machines[node];
                if generation < machine.newest[job] || generation <= machine.killed[job] {
                    return Ok(());
                }
                machine.newest[job] = generation;
                let known = |(told, _): &(Key, Exit)| *told == key;
                let machine = &self.machines[node];
                if self.running.contains_key(&key)
                    || machine.untold.iter().any(known)
                    || machine.waiting.contains(&key)
                {
                    return Ok(());
                }
                self.stop(node, job, generation - 1);
                self.machines[node].waiting.push(key);
                self.start_waiting(node)
            }
        }
    }

    /// What was launched starts when a slot is free.
    pub(super) fn start_waiting(&mut self, node: usize) -> Result<(), String> {
        while self.on(node).len() < self.machines[node].slots as usize
            && !self.machines[node].waiting.is_empty()
        {
            let key = self.machines[node].waiting.remove(0);
            self.running.insert(key, node);
            if self.machines[node].stream.is_none() {
                continue; // Its agent tells when it joins.
            }
            self.members
                .rank_changed(&node_id(node), self.rank_key(key), Some(1));
            let spawned = Event::Spawned {
                generation: Generation(key.1),
                rank: Rank(key.2),
                pid: 1,
            };
            self.happens(key.0, &spawned)?;
        }
        Ok(())
    }

    pub(super) fn rank_key(&self, key: Key) -> RankKey {
        RankKey {
            job: self.jobs[key.0].id.clone(),
            generation: Generation(key.1),
            rank: Rank(key.2),
        }
    }

    pub(super) fn stop(&mut self, node: usize, job: usize, generation: u64) {
        let doomed = |key: &Key| key.0 == job && key.1 <= generation;
        let machine = &mut self.machines[node];
        let requested = Exit {
            signal: Some(9),
            requested: true,
            ..Exit::default()
        };
        let dropped: Vec<Key> = machine.waiting.extract_if(.., |key| doomed(key)).collect();
        machine
            .untold
            .extend(dropped.into_iter().map(|key| (key, requested.clone())));
        for key in self.on(node).into_iter().filter(doomed) {
            self.exits(key, Some(9), None, true);
        }
    }

    /// A process ends; its agent knows, and tells when it can.
    pub(super) fn exits(&mut self, key: Key, signal: Option<i32>, code: Option<i32>, requested: bool) {
        self.met.remove(&key);
        if let Some(node) = self.running.remove(&key) {
            let exit = Exit {
                code,
                signal,
                last_error: String::new(),
                requested,
                stalled_ms: None,
            };
            self.machines[node].untold.push((key, exit));
        }
    }

    pub(super) fn tell_exits(&mut self, node: usize) -> Result<(), String> {
        if self.machines[node].stream.is_none() {
            return Ok(());
        }
        for (key, exit) in std::mem::take(&mut self.machines[node].untold) {
            self.members
                .rank_changed(&node_id(node), self.rank_key(key), None);
            let placed = self.jobs[key.0]
                .ranks
                .get(key.2 as usize)
                .map(|rank| node_of(&rank.node));
            if self.jobs[key.0].generation.0 != key.1 || placed != Some(node) {
                continue;
            }
            self.happens(
                key.0,
                &Event::Exited {
                    generation: Generation(key.1),
                    rank: Rank(key.2),
                    exit,
                    silent_ms: 0,
                },
            )?;
        }
        Ok(())
    }

    pub(super) fn list(&self, node: usize) -> RankList {
        self.on(node)
            .into_iter()
            .map(|key| (self.rank_key(key), 1))
            .collect()
    }

    pub(super) fn beat(&mut self, node: usize) -> Result<(), String> {
        let Some(stream) = self.machines[node].stream else {
            return Ok(());
        };
        // One stream: exits come before the list that lacks them.
        self.tell_exits(node)?;
        let list = self.list(node);
        if self
            .members
            .heard(&node_id(node), stream, Some(list), self.now_ms)
        {
            self.machines[node].answered_ms = self.now_ms;
            self.listed(node, false)?;
            self.stop_strays(node);
        }
        Ok(())
    }

    pub(super) fn listed(&mut self, node: usize, joined: bool) -> Result<(), String> {
        for job in 0..JOBS {
            let generation = self.jobs[job].generation.0;
            if !self.jobs[job]
                .ranks
                .iter()
                .any(|rank| node_of(&rank.node) == node)
            {
                continue;
            }
            let ranks = self
                .on(node)
                .into_iter()
                .filter(|key| key.0 == job && key.1 == generation);
            let event = Event::Listed {
                node: node_id(node),
                ranks: ranks.map(|key| (Rank(key.2), 1)).collect(),
                joined,
            };
            self.happens(job, &event)?;
        }
        Ok(())
    }

    pub(super) fn stop_strays(&mut self, node: usize) {
        for key in self.on(node) {
            let job = &self.jobs[key.0];
            if key.1 != job.generation.0 || !job.phase.wants_ranks() {
                self.tell(node, Command::Kill(key.0, key.1));
            }
        }
    }

    pub(super) fn disconnect(&mut self, node: usize) {
        if let Some(stream) = self.machines[node].stream.take() {
            self.machines[node].commands.clear();
            self.members.disconnected(&node_id(node), stream);
        }
    }

    pub(super) fn join(&mut self, node: usize) -> Result<(), String> {
        self.disconnect(node);
        self.streams += 1;
        let hello = Hello {
            node: node_id(node),
            boot_id: format!("boot-{}", self.machines[node].boot),
            copies_of: Vec::new(),
            address: "a".into(),
            slots: self.machines[node].slots,
            device: "cpu".into(),
            version: "0".into(),
            ranks: self.list(node),
        };
        let Ok(joined) = self.members.hello(hello, self.streams, self.now_ms, self.now_ms) else {
            return Ok(());
        };
        self.members.drain(&node_id(node), self.drains.contains(&node));
        self.machines[node].stream = Some(self.streams);
        self.machines[node].answered_ms = self.now_ms;
        match joined {
            Joined::Restarted => self.all_on(&Event::NodeRestarted { node: node_id(node) })?,
            Joined::New | Joined::Reconnected => self.listed(node, true)?,
        }
        self.stop_strays(node);
        Ok(())
    }

    pub(super) fn power_cycle(&mut self, node: usize) {
        self.disconnect(node);
        for key in self.on(node) {
            self.running.remove(&key);
            self.met.remove(&key);
        }
        let machine = &mut self.machines[node];
        machine.boot += 1;
        machine.untold.clear();
        machine.waiting.clear();
        machine.newest = [0; JOBS];
        machine.killed = [0; JOBS];
    }
}
