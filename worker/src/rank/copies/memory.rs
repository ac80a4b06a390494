//! The memory of this node that a job's copies lie in, and who can be asked for those of other nodes.

use super::{Copier, Destination, buddy, gather};
use crate::checkpoint::Checkpoint;
use crate::collective::Session;
use crate::collective::parts::PartsServer;
use crate::rank::failure::RankFailure;
use crate::rank::report::Reporter;
use arcface_proto::spec::JobSpec;
use arcface_proto::types::ClassRange;
use arcface_proto::v1::report_request::Report;
use arcface_proto::v1::{CheckpointManifest, RankAssignment};
use std::path::{Path, PathBuf};

/// This rank's place among those that keep copies of each other's state.
pub struct Memory {
    server: PartsServer,
    session: Session,
    home: PathBuf,
    /// Node and endpoint for parts of every rank.
    ranks: Vec<(String, String)>,
}

impl Memory {
    /// Takes and gives parts from now on, if the job wants copies, there is more than one node, and this one has memory for
    /// them.
    ///
    /// # Errors
    /// If it cannot listen.
    pub fn open(
        assignment: &RankAssignment,
        session: &Session,
        buddy_steps: Option<u64>,
    ) -> Result<Option<Self>, RankFailure> {
        let wanted = buddy_steps.is_some() && buddy(assignment.rank as usize, &assignment.nodes).is_some();
        if !wanted || assignment.memory_root.is_empty() {
            return Ok(None);
        }
        let home = Path::new(&assignment.memory_root).join(&assignment.job_id);
        let address = assignment.address.as_str();
        // Behind address translation the advertised address is not one of this machine's.
        let server = PartsServer::start(address, session, home.clone())
            .or_else(|_| PartsServer::start("0.0.0.0", session, home.clone()))
            .map_err(|error| RankFailure::transient(format!("listen for parts at {address}: {error}")))?;
        Ok(Some(Self {
            server,
            session: session.clone(),
            home,
            ranks: Vec::new(),
        }))
    }

    /// Where this rank takes and gives parts.
    pub fn port(&self) -> u16 {
        self.server.port()
    }

    /// Learns of the others: node and endpoint for parts by rank.
    pub fn meet(&mut self, nodes: &[String], endpoints: Vec<String>) {
        self.ranks = nodes.iter().cloned().zip(endpoints).collect();
    }

    /// The copies to resume from, see [`gather()`].
    ///
    /// # Errors
    /// If they cannot be had.
    pub fn gather(
        &self,
        manifest: &CheckpointManifest,
        assignment: &RankAssignment,
    ) -> Result<Checkpoint, RankFailure> {
        let classes = ClassRange::of_rank(manifest.num_classes, assignment.rank, assignment.world_size);
        let copies = &assignment.resume_copies;
        gather(&self.home, &self.session, manifest, copies, classes, &self.ranks)
    }

    /// Makes copies from now on.
    pub fn copier(self, spec: &JobSpec, assignment: &RankAssignment, reporter: &Reporter) -> Option<Copier> {
        let buddy_steps = spec.checkpoint.buddy_steps?;
        let buddy = buddy(assignment.rank as usize, &assignment.nodes)?;
        let resume = assignment.resume.as_ref();
        let resumed = resume.filter(|_| !assignment.resume_copies.is_empty());
        let destination = Destination {
            home: self.home,
            node: assignment.node_id.clone(),
            buddy: self.ranks.get(buddy)?.clone(),
            session: self.session,
            server: self.server,
        };
        let say = reporter.teller();
        Some(Copier::start(
            buddy_steps,
            assignment.generation,
            destination,
            resumed.map(|manifest| manifest.directory.clone()),
            move |copied| say(Report::Copied(copied)),
        ))
    }
}
