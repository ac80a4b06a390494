//! How the ranks of a generation come together: rendezvous, the communicator, and a check that all begin from the same state.

use super::copies::Memory;
use super::failure::RankFailure;
use super::report::Reporter;
use crate::collective::{Beside, Collective, Listener, NcclCollective, Session, TcpCollective, Timeouts};
use crate::device::Placement;
use arcface_proto::v1::{CheckpointManifest, RankAssignment};
use std::time::Duration;
use tch::Tensor;
use tracing::warn;

/// Time to connect all ranks, once all have met.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// Longest time that a rank may be slower than its peers: an evaluation set being read, a slow disk.
const OPERATION_LIMIT: Duration = Duration::from_secs(600);
/// Both.
const TIMEOUTS: Timeouts = Timeouts {
    connect: CONNECT_LIMIT,
    operation: OPERATION_LIMIT,
};
/// What a rank has once it has met the others.
pub struct Met {
    /// The ring.
    pub ring: TcpCollective,
    /// If every node has memory for copies and there is more than one.
    pub memory: Option<Memory>,
}

/// Rendezvous and communicator. `buddy_steps` as the job has it.
///
/// # Errors
/// If the ranks do not all come, or cannot reach each other.
pub fn meet(
    assignment: &RankAssignment,
    reporter: &Reporter,
    buddy_steps: Option<u64>,
) -> Result<Met, RankFailure> {
    let address = assignment.address.as_str();
    let bound = Listener::bind(address).or_else(|error| {
        // Behind address translation the advertised address is not one of this machine's.
        warn!("cannot listen at {address} ({error}): listening at every address");
        Listener::bind("0.0.0.0")
    });
    let (listener, port) =
        bound.map_err(|error| RankFailure::transient(format!("listen for peers at {address}: {error}")))?;
    let endpoint = |port: u16| match address.contains(':') {
        true => format!("[{address}]:{port}"),
        false => format!("{address}:{port}"),
    };
    let session = Session {
        job: assignment.job_id.clone(),
        generation: assignment.generation,
    };
    let memory = Memory::open(assignment, &session, buddy_steps)?;
    let parts_endpoint = memory.as_ref().map(|memory| endpoint(memory.port()));
    let met = reporter.rendezvous(endpoint(port), parts_endpoint.unwrap_or_default())?;
    let endpoints = met.endpoints;
    if endpoints.len() != assignment.world_size as usize {
        return Err(RankFailure::transient(format!(
            "rendezvous: {} endpoints for {} ranks",
            endpoints.len(),
            assignment.world_size
        )));
    }
    let ring = listener.connect(&session, assignment.rank, &endpoints, TIMEOUTS)?;
    // All or none, as all ranks see alike: a set of copies that lacks one rank's is of no use.
    let everyone = met.parts_endpoints.len() == endpoints.len()
        && met.parts_endpoints.iter().all(|endpoint| !endpoint.is_empty());
    if memory.is_some() && !everyone {
        warn!("no copies in memory: a node keeps none (--memory-root)");
    }
    let memory = memory.filter(|_| everyone).map(|mut memory| {
        memory.meet(&assignment.nodes, met.parts_endpoints);
        memory
    });
    Ok(Met { ring, memory })
}

/// The communicator of ranks that compute at `placement`, all in places of one kind: on CPUs the ring itself, between GPUs NCCL
/// with the ring beside it. Collective.
///
/// # Errors
/// If NCCL does not come up.
pub fn communicator(ring: TcpCollective, placement: &Placement) -> Result<Box<dyn Collective>, RankFailure> {
    let comm: Box<dyn Collective> = match placement.gpu() {
        None => Box::new(ring),
        // Each rank sees one GPU, as number 0.
        Some(_) => Box::new(NcclCollective::start(ring, 0, TIMEOUTS)?),
    };
    Ok(Beside::start(comm))
}

/// All ranks begin from the same state: one that was told otherwise, by a coordinator that knew less, ends the generation.
///
/// # Errors
/// If not, or if a rank is gone.
pub fn agree(comm: &mut dyn Collective, resume: Option<&CheckpointManifest>) -> Result<(), RankFailure> {
    let name = resume.map_or("", |manifest| manifest.directory.as_str());
    let digest = blake3::hash(name.as_bytes());
    let [number] = *digest.as_bytes().as_chunks().0.first_chunk().unwrap_or(&[[0; 8]]);
    let all = comm.all_gather(&Tensor::from_slice(&[i64::from_le_bytes(number)]))?;
    match all.eq_tensor(&all.narrow(0, 0, 1)).all().int64_value(&[]) {
        0 => Err(RankFailure::transient(
            "the ranks were told to resume from different states",
        )),
        _ => Ok(()),
    }
}
